"""Every setting, once: its name, default, range and help. Defaults < embedded model's settings < YAML < flags.

The command line's options and the reference in docs/ are made from these fields. Names that mean what
`mlx_lm.lora` means by them are its names.
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import UserError

T = TypeVar("T")


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
) -> Any:
    """A field with its help and its range: `low` and `high` are allowed values, `above` is not."""
    meta = {"help": help, "choices": choices, "low": low, "above": above, "high": high}
    return field(default_factory=default, metadata=meta) if callable(default) else field(default=default, metadata=meta)


@dataclass(frozen=True)
class Lora:
    rank: int = setting(8, "Rank of the LoRA matrices.", low=1)
    scale: float = setting(2.0, "Factor on the LoRA term: alpha / rank (2.0 is alpha 16 at rank 8).", above=0)
    dropout: float = setting(0.0, "Dropout on the LoRA branch's input while training.", low=0, high=0.9)
    keys: tuple[str, ...] = setting((), "Linear layers to adapt, such as self_attn.q_proj (all of them when left out).")


@dataclass(frozen=True)
class CommonSettings:
    model: str = setting("", "Model directory or hub repository, whatever mlx-lm loads (the embedded tiny model when left out).")
    quantize: int | None = setting(None, "Quantise an unquantised model to this many bits at load.", choices=("2", "3", "4", "5", "6", "8"))
    quantize_group_size: int = setting(64, "Weights that share a scale when quantising.", low=16)
    quantize_mode: str = setting("affine", "Quantisation mode.", choices=("affine", "mxfp4", "mxfp8", "nvfp4"))
    dtype: str = setting(
        "auto",
        "Floating-point type of the weights; auto keeps the model's on a GPU and takes float32 on a CPU.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    data: str = setting(
        "",
        "Prepared directory (train, valid, test.jsonl), a file in any format of docs/data.md, or a data set of the hub, owner/name (embedded data when left out).",
    )
    domain: str = setting(
        "", "Domain of rows that name none, such as S-DPO's: a built-in one (movie, game, ...), or one worded under `domains:`."
    )
    skip_bad_rows: bool = setting(False, "Go on without rows that cannot be read, naming each, rather than stop at the first.")
    num_negatives: int = setting(0, "Negatives used of each example; 0 takes all.", low=0)
    max_seq_length: int = setting(
        2048, "Longest prompt with answer, in tokens; the oldest history items are left out, whole, to fit.", low=16
    )
    batch_size: int = setting(4, "Groups run at once (a micro-batch).", low=1)
    scoring: str = setting(
        "auto",
        "auto runs a shared history once wherever that is exact for the model; plain runs every sequence alone.",
        choices=("auto", "plain"),
    )
    seed: int = setting(0, "Seed of everything random: LoRA's start, data order, candidate order, dropout.", low=0)
    memory_limit: float = setting(0.0, "Gigabytes (10^9 bytes) that MLX may use; 0 leaves its own limit.", low=0)
    domains: dict[str, dict[str, str]] = setting(dict, "Wording of further domains: name -> topic, items, consumed, consuming (YAML only).")


@dataclass(frozen=True)
class TrainSettings(CommonSettings):
    adapter_path: str = setting("", "Directory to write: adapter, metrics, pictures, manifest.")
    valid_data: str = setting("", "Validation examples, where --data is a file (a directory brings its own valid.jsonl).")
    fine_tune_type: str = setting("lora", "Kind of adapter.", choices=("lora", "dora"))
    num_layers: int = setting(-1, "Adapt this many of the last layers; -1 adapts all.", low=-1)
    lora_parameters: Lora = setting(Lora, "LoRA's rank, scale, dropout and keys.")
    epochs: float = setting(3.0, "Passes over the training groups.", above=0)
    iters: int | None = setting(None, "Optimiser steps, instead of epochs.", low=1)
    batch_tokens: int = setting(
        8192, "Tokens run at once, shared ones counted once: groups of a micro-batch beyond them run after it, with the same result.", low=1
    )
    grad_accumulation_steps: int = setting(2, "Micro-batches a step: a step sees batch_size x this many groups.", low=1)
    candidate_order: str = setting(
        "fixed",
        "fixed: each pair's printed order is the file's, or else drawn once by seed; epoch: drawn afresh each epoch.",
        choices=("fixed", "epoch"),
    )
    both_orders: bool = setting(
        False, "Train on both printed orders of every pair, the cure for order bias; the shared history keeps it cheap."
    )
    optimizer: str = setting("adamw", "Optimiser.", choices=("adamw", "adam", "sgd", "adafactor", "muon", "lion"))
    optimizer_config: dict[str, Any] = setting(dict, "Further arguments of the optimiser, such as betas (YAML only).")
    learning_rate: float = setting(1e-4, "Peak learning rate.", above=0)
    lr_schedule: str | dict[str, Any] = setting(
        "cosine",
        "Course of the learning rate to 0 (YAML may give mlx-lm's form: name, arguments, warmup).",
        choices=("cosine", "linear", "constant"),
    )
    warmup: float = setting(0.0, "Steps over which the learning rate rises; below 1, a share of all steps.", low=0)
    weight_decay: float = setting(0.0, "Decoupled weight decay (adamw, lion, muon, adafactor).", low=0)
    max_grad_norm: float = setting(1.0, "Largest global gradient norm, in the loss's units; 0 does not clip.", low=0)
    grad_checkpoint: bool = setting(False, "Recompute each layer in the backward pass: less memory, about a third more time.")
    frozen_cache_gb: float = setting(
        1.0, "With --num-layers: GB in which outputs of the layers below the adapter, which never change, are kept between epochs.", low=0
    )
    memory_check: bool = setting(True, "Refuse to start what by `mlx-dmpo plan` cannot fit in this machine's memory.")
    steps_per_report: int = setting(5, "Steps between lines of metrics.jsonl.", low=1)
    steps_per_eval: int = setting(0, "Steps between validations; 0 validates at the end of every epoch.", low=0)
    val_batches: int = setting(25, "Validation micro-batches; -1 takes the whole split.", low=-1)
    best_metric: str = setting("valid_loss", "What decides which adapter is best.", choices=("valid_loss", "valid_pair_accuracy"))
    patience: int = setting(0, "Stop after this many validations without a new best; 0 never stops early.", low=0)
    save_every: int = setting(100, "Steps between checkpoints (a new best is also one); each is an adapter directory too.", low=1)
    keep_checkpoints: int = setting(2, "Checkpoints kept, beside the best.", low=1)
    resume: bool = setting(False, "Go on from the newest checkpoint in --adapter-path, as if the run had not been interrupted.")
    max_bad_steps: int = setting(3, "Stop after this many steps in a row that were left out because a number was not finite.", low=1)
    debug_nan: bool = setting(False, "Name the first layer whose numbers are not finite, whenever a step is left out (slow, then only).")
    report_to: str = setting("", "Experiment tracker that mlx-lm knows: wandb or swanlab, comma-separated.")
    project_name: str = setting("", "Project name for the experiment tracker.")
    overwrite: bool = setting(False, "Replace a finished run in --adapter-path.")


@dataclass(frozen=True)
class SftSettings(TrainSettings):
    adapter_path: str = setting("runs/sft", "Directory to write: adapter, metrics, pictures, manifest.")
    start_adapter: str = setting("", "Adapter directory to go on from.")
    epochs: float = setting(5.0, "Passes over the training groups.", above=0)
    num_negatives: int = setting(1, "Negatives used of each example (a prompt each); 0 takes all.", low=0)


@dataclass(frozen=True)
class DmpoSettings(TrainSettings):
    adapter_path: str = setting("runs/dmpo", "Directory to write: adapter, metrics, pictures, manifest.")
    start_adapter: str = setting(
        "", "Adapter directory to go on from, as sft wrote it; it is also the reference. Without it the base model is both."
    )
    loss: str = setting("dmpo", "How a group's margins become one loss.", choices=("dmpo", "dpo", "s-dpo", "simpo"))
    beta: float = setting(0.1, "Strength of the preference (0.1-0.5; simpo 2-10).", above=0)
    gamma: float = setting(0.5, "simpo's target margin, after beta.", low=0)
    label_smoothing: float = setting(0.0, "Chance that a preference is taken to be the wrong way round.", low=0, high=0.499)
    sft_weight: float = setting(0.0, "Weight of the chosen answers' mean token loss, added to the preference loss.", low=0)
    reference_free: bool = setting(False, "Leave the reference out of the margin.")
    preset: str = setting(
        "",
        "released-code: what the DMPO release's trainer computes (pairwise, reference-free, + 1.0 x SFT); not the paper's loss.",
        choices=("", "released-code"),
    )


@dataclass(frozen=True)
class EvaluateSettings(CommonSettings):
    adapter_path: str = setting("", "Adapter directory; without it the base model is evaluated.")
    split: str = setting("test", "Split of a prepared directory.", choices=("train", "valid", "test"))
    out: str = setting("", "Directory to write: metrics.json, scores.jsonl, pictures, manifest (default: ADAPTER/eval, or runs/base/eval).")
    batch_size: int = setting(8, "Groups run at once.", low=1)
    limit: int = setting(0, "Evaluate only the first so many examples; 0 takes all.", low=0)
    resamples: int = setting(2000, "Bootstrap resamples of the users for the 95 % intervals.", low=100)
    overwrite: bool = setting(False, "Replace a finished evaluation in --out.")


@dataclass(frozen=True)
class ExportSettings(CommonSettings):
    model: str = setting("", "Base model (the one that the adapter names, where that is on this disk, when left out).")
    adapter_path: str = setting("", "Adapter directory to export, as sft, dmpo or mlx-lm wrote it.")
    to: str = setting(
        "mlx", "mlx: a fused model directory for mlx-lm; peft: an adapter for transformers and PEFT.", choices=("mlx", "peft")
    )
    out: str = setting("", "Directory to make (default: ADAPTER/mlx or ADAPTER/peft).")
    keep_quantized: bool = setting(
        False, "Of a quantised base: leave it as it is, with the adapter beside it (else it is dequantised and fused, which is larger)."
    )
    requantize: bool = setting(False, "Of a quantised base: fuse, then quantise again as it was, which loses part of what was trained.")
    base_name: str = setting("", "Name of the base for PEFT and the model card, such as Qwen/Qwen3-0.6B (default: --model).")
    split: str = setting("test", "Split of a prepared directory.", choices=("train", "valid", "test"))
    examples: int = setting(
        16, "Examples of --data, drawn by --seed, whose log-probs are compared before and after; 0 compares none.", low=0
    )
    num_negatives: int = setting(1, "Negatives used of each example; 0 takes all.", low=0)
    eval: tuple[str, ...] = setting((), "Evaluation directory whose results go into the model card.")
    batch_size: int = setting(8, "Groups run at once.", low=1)
    overwrite: bool = setting(False, "Replace an earlier export in --out.")


@dataclass(frozen=True)
class PrepareSettings:
    out: str = setting("", "Directory to write: train, valid, test and items.jsonl, summary.png, manifest.")
    domains: str = setting("", "Name of each PATH's domain, comma-separated (the source's own name when left out).")
    train_domains: str = setting("", "Domains that training and validation users come from, comma-separated (all when left out).")
    test_domains: str = setting("", "Domains that test users come from, comma-separated (all when left out).")
    liked_above: float | None = setting(
        None, "Ratings above this are liked, the others disliked (3 on a scale up to 5; else the midpoint of the ratings' own scale)."
    )
    liked_quantile: float | None = setting(
        None,
        "Instead: ratings above this quantile of the user's own are liked (lastfm: 0.5, the user's median play count).",
        above=0,
        high=0.99,
    )
    max_interactions: int = setting(40, "A user's last so many interactions are looked at; 0 takes all.", low=0)
    min_liked: int = setting(5, "Users need so many liked items among them.", low=2)
    min_disliked: int = setting(5, "Users need so many disliked items among them.", low=0)
    order: str = setting(
        "",
        "Order of a user's interactions (time where the file has timestamps, else file; lastfm, whose file is sorted by plays: random).",
        choices=("", "time", "file", "random"),
    )
    train_users: int = setting(100, "Training users of each domain.", low=0)
    valid_users: int = setting(100, "Validation users of each domain.", low=0)
    test_users: int = setting(1000, "Test users of each domain; all that are left where there are fewer.", low=0)
    few_shot: int = setting(
        0, "Only the first so many training users; 16, 64 and 256 are nested, and valid and test stay as they are. 0 takes all.", low=0
    )
    num_negatives: int = setting(5, "Negatives of an example; 0 takes all disliked items.", low=0)
    negatives: str = setting(
        "disliked",
        "Where negatives come from: disliked; uniform or popularity (drawn from items that the user never met); "
        "scores:FILE (disliked items of least margin first, by JSON lines of user, positive, negative, margin).",
    )
    title_articles: bool = setting(True, 'Put a title\'s article first: "Sixth Sense, The" becomes "The Sixth Sense".')
    title_years: bool = setting(True, 'Keep the year that ends a title: "(1999)".')
    skip_bad_rows: bool = setting(False, "Go on without rows that cannot be read, counting them, rather than stop at the first.")
    seed: int = setting(0, "Seed of everything random: which users, which negatives, random order.", low=0)
    overwrite: bool = setting(False, "Replace a finished directory in --out.")


@dataclass(frozen=True)
class MovielensSettings(PrepareSettings):
    recipe: str = setting(
        "",
        "dmpo-release: write the seven MovieLens-1M files of the DMPO release instead, byte for byte; it fixes every other rule.",
        choices=("", "dmpo-release"),
    )


@dataclass(frozen=True)
class TableSettings(PrepareSettings):
    items: str = setting("", "File of titles, a row an item (the item column itself is the title when left out).")
    user_column: str = setting("", "Column of the user (guessed from the names when left out, as are the others).")
    item_column: str = setting("", "Column of the item, in PATH and in --items.")
    rating_column: str = setting("", "Column of the rating.")
    time_column: str = setting("", "Column of the time: a number or an ISO date.")
    title_column: str = setting("", "Column of the title, in --items.")


@dataclass(frozen=True)
class SampleSettings(CommonSettings):
    adapter_path: str = setting("", "Adapter directory; without it the base model answers.")
    split: str = setting("test", "Split of a prepared directory.", choices=("train", "valid", "test"))
    out: str = setting("samples.jsonl", "File to write, one JSON object a line.")
    n: int = setting(10, "Answers drawn to each prompt.", low=1)
    temperature: float = setting(0.8, "Sampling temperature; 0 takes the likeliest token.", low=0)
    top_p: float = setting(0.95, "Draw from the fewest likeliest tokens of this total probability; 1 draws from all.", above=0, high=1)
    top_k: int = setting(50, "Draw from this many likeliest tokens; 0 draws from all.", low=0)
    max_tokens: int = setting(128, "Longest answer, in tokens.", low=1)
    score: bool = setting(False, "Write the margin of every candidate negative instead of answers, for `prepare --negatives scores:FILE`.")
    limit: int = setting(0, "Take only the first so many examples; 0 takes all.", low=0)
    overwrite: bool = setting(False, "Replace --out.")


@dataclass(frozen=True)
class CheckSettings:
    model: str = setting("", "Model whose tokenizer counts tokens: a directory or hub repository (no token counts when left out).")
    max_seq_length: int = setting(2048, "Longest prompt with answer, in tokens.", low=16)
    num_negatives: int = setting(0, "Negatives used of each example; 0 takes all.", low=0)
    domain: str = setting("", "Domain of rows that name none, such as S-DPO's.")
    domains: dict[str, dict[str, str]] = setting(dict, "Wording of further domains: name -> topic, items, consumed, consuming (YAML only).")


@dataclass(frozen=True)
class ConvertSettings:
    out: str = setting("", "Directory to write: train, valid and test.jsonl, manifest.")
    valid: float = setting(0.1, "Share of the users that goes to valid.jsonl.", low=0, high=0.9)
    test: float = setting(0.1, "Share of the users that goes to test.jsonl.", low=0, high=0.9)
    valid_data: str = setting("", "File that becomes valid.jsonl whole, instead of a share of FILE.")
    test_data: str = setting("", "File that becomes test.jsonl whole, instead of a share of FILE.")
    domain: str = setting(
        "", "Domain of rows that name none, such as S-DPO's: a built-in one (movie, game, ...), or one worded under `domains:`."
    )
    skip_bad_rows: bool = setting(False, "Go on without rows that cannot be read, naming each, rather than stop at the first.")
    seed: int = setting(0, "Seed of which users go to which split.", low=0)
    overwrite: bool = setting(False, "Replace a finished directory in --out.")
    domains: dict[str, dict[str, str]] = setting(dict, "Wording of further domains: name -> topic, items, consumed, consuming (YAML only).")


# What may change when a run is resumed: paths (what they lead to is compared), reports, and how a step's work is cut up.
_FREE = frozenset(
    """model data valid_data skip_bad_rows domains adapter_path start_adapter batch_size batch_tokens grad_accumulation_steps val_batches grad_checkpoint
    steps_per_report report_to project_name save_every keep_checkpoints overwrite resume preset max_bad_steps debug_nan memory_limit memory_check""".split()
)


def course(settings: TrainSettings) -> dict[str, Any]:
    """The settings that decide where a run goes."""
    return {
        **{name: value for name, value in asdict(settings).items() if name not in _FREE},
        "batch_size x grad_accumulation_steps": settings.batch_size * settings.grad_accumulation_steps,
        "batch_size x val_batches": max(-1, settings.batch_size * settings.val_batches),
    }


# `preset` gives what it names; flags and YAML still win
PRESETS: dict[str, dict[str, Any]] = {"released-code": {"loss": "dpo", "reference_free": True, "sft_weight": 1.0}}


class _Loader(yaml.SafeLoader):
    """SafeLoader which reads 1e-5 as a number, as YAML 1.2 and mlx-lm do, and no aliases: a few lines of them can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*name): write the value out", self.peek_event().start_mark)
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _coerce(value: Any, annotation: Any, where: str) -> Any:
    """`value` as the field's type, or UserError. Ints pass for floats; nothing else is converted."""
    for kind in _kinds(annotation):
        origin = typing.get_origin(kind) or kind
        if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, Mapping):
            return build(kind, value, lambda key: f"{where}.{key}")
        if origin is tuple and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return tuple(value)
        if origin is dict and isinstance(value, Mapping):
            return dict(value)
        if kind is type(None) and value is None:
            return None
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value) if abs(value) < 1e308 else math.inf  # a longer whole number than a float holds
        if isinstance(origin, type) and isinstance(value, origin) and not (kind is int and isinstance(value, bool)):
            return value
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    wanted = " or ".join(
        names.get(k, "a mapping" if (typing.get_origin(k) or k) is not tuple else "a list of names") for k in _kinds(annotation)
    )
    raise UserError(f"{where}: {value!r} does not fit: give {wanted}")


def _check(value: Any, spec: Field[Any], where: str) -> None:
    meta = spec.metadata
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) < 1e308:
            raise UserError(f"{where}: is not finite: give a finite number")
        for key, bad, words in (
            ("low", lambda bound: value < bound, "at least"),
            ("above", lambda bound: value <= bound, "more than"),
            ("high", lambda bound: value > bound, "at most"),
        ):
            if meta.get(key) is not None and bad(meta[key]):
                raise UserError(f"{where}: {value:g} is out of range: give {words} {meta[key]:g}")
    if meta.get("choices") and value is not None and not isinstance(value, Mapping) and str(value) not in meta["choices"]:
        raise UserError(f"{where}: {value!r} is not a choice: give one of {', '.join(c for c in meta['choices'] if c)}")


def build(cls: type[T], values: Mapping[str, Any], where: Any = lambda key: key) -> T:
    """A settings object of `values`; `where(key)` begins the message of a UserError about that key."""
    specs = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    clean = {}
    for key, value in values.items():
        if key not in specs:
            near = difflib.get_close_matches(str(key), specs, n=1, cutoff=0.5)
            hint = f'did you mean "{near[0]}"?' if near else f"known settings: {', '.join(sorted(specs))}"
            raise UserError(f"{where(key)}: unknown setting: {hint}")
        clean[key] = _coerce(value, hints[key], where(key))
        _check(clean[key], specs[key], where(key))
    return cls(**clean)


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A config file's settings and the line of each. Raises UserError for a file that cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: name an existing YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): name a readable YAML file") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)  # noqa: S506  (_Loader is a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2024-13-45
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', None) or error}): mend the syntax") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:1: not a mapping of settings: write `name: value` lines")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if key.value in lines:
            raise UserError(f'{path}:{key.start_mark.line + 1}: setting "{key.value}" is given twice: keep one of them')
        lines[key.value] = key.start_mark.line + 1
    return {str(k): v for k, v in values.items()}, lines


def resolve(cls: type[T], config: str | Path | None, flags: Mapping[str, Any], embedded: Mapping[str, Any] | None = None) -> T:
    """Defaults < the embedded model's own settings (when no model is named) < YAML < flags; `flags` holds only what was given."""
    values, lines = read_yaml(config) if config else ({}, {})
    from_file = set(values)

    def where(key: str) -> str:
        if key in flags:
            return f"--{key.replace('_', '-')}"
        return in_file(key) if key in from_file else key

    def in_file(key: str) -> str:
        return f'{config}:{lines.get(key, 1)}: "{key}"'

    if config:
        build(cls, values, in_file)  # so that the file's own mistakes are told with their lines
    if "epochs" in values and values.get("iters") is not None:
        raise UserError(f"{where('iters')}: both epochs and iters are given: keep one of them")
    if "epochs" in flags and flags.get("iters") is not None:
        raise UserError("--iters: both --epochs and --iters are given: keep one of them")
    if "epochs" in flags:
        values["iters"] = None
    lora = {k[5:]: v for k, v in flags.items() if k.startswith("lora_")}
    flags = {k: v for k, v in flags.items() if not k.startswith("lora_")}
    merged = {**values, **flags}
    if embedded and not merged.get("model"):
        merged = {**embedded, **merged}
    merged = {**PRESETS.get(str(merged.get("preset")), {}), **merged}
    if lora:
        merged["lora_parameters"] = {**(merged.get("lora_parameters") or {}), **lora}
    return build(cls, merged, where)


def default_of(spec: Field[Any]) -> Any:
    if spec.default_factory is not MISSING:
        return spec.default_factory()
    return spec.default
