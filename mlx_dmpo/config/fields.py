"""How a setting is declared, and the settings that every command with a model has."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    path: bool = False,
    short: str = "",
    off: bool = False,
) -> Any:
    """A field with its help and its range: `low` and `high` are allowed values, `above` is not.

    path   the value may name a file or directory: `~` is the home directory
    short  a second, one-letter flag
    off    a second flag, --no-NAME, sets 0
    """
    meta = {
        "help": help,
        "choices": choices,
        "low": low,
        "above": above,
        "high": high,
        "path": path,
        "short": short,
        "off": off,
    }
    return field(default_factory=default, metadata=meta) if callable(default) else field(default=default, metadata=meta)


@dataclass(frozen=True)
class Lora:
    rank: int = setting(8, "Rank of the LoRA matrices.", low=1)
    scale: float = setting(2.0, "Factor on the LoRA term: alpha / rank (2.0 is alpha 16 at rank 8).", above=0)
    dropout: float = setting(0.0, "Dropout on the LoRA branch's input while training.", low=0, high=0.9)
    keys: tuple[str, ...] = setting((), "Linear layers to adapt, such as self_attn.q_proj (all of them when left out).")


FROZEN_CACHE = (
    "With an adapter on the last layers only: directory in which the outputs of the layers below it are kept, for "
    "every later training and evaluation of the model on the same data."
)


@dataclass(frozen=True)
class CommonSettings:
    model: str = setting(
        "",
        "Model directory or hub repository, whatever mlx-lm loads (the embedded tiny model when left out).",
        path=True,
    )
    quantize: int | None = setting(
        None, "Quantize an unquantized model to this many bits at load.", choices=("2", "3", "4", "5", "6", "8")
    )
    quantize_group_size: int = setting(64, "Weights that share a scale when quantizing.", low=16)
    quantize_mode: str = setting("affine", "Quantization mode.", choices=("affine", "mxfp4", "mxfp8", "nvfp4"))
    dtype: str = setting(
        "auto",
        "Floating-point type of the weights; auto keeps the model's on a GPU and takes float32 on a CPU.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    data: str = setting(
        "",
        "Prepared directory (train, valid, test.jsonl), a file in any format of docs/data.md, or a data set of "
        "the hub, owner/name (embedded data when left out).",
        path=True,
    )
    domain: str = setting(
        "",
        "Domain of rows that name none, such as S-DPO's: a built-in one (movie, game, ...), or one worded under "
        "`domains:`.",
    )
    prompt: str = setting(
        "",
        "Prompt form: pairwise, listwise, direct or pointwise, or a YAML file of your own (docs/prompts.md). "
        "When left out, the adapter's; pairwise without one.",
        path=True,
    )
    allow_other_prompt: bool = setting(
        False, "Use --prompt, or `domains:`, although the adapter was trained with another prompt."
    )
    skip_bad_rows: bool = setting(
        False, "Leave out rows that cannot be read, naming each, instead of stopping at the first."
    )
    num_negatives: int = setting(0, "Negatives used of each example; 0 takes all.", low=0)
    max_seq_length: int = setting(
        2048,
        "Maximum length of prompt plus answer, in tokens; whole history items are left out to fit, oldest first.",
        low=16,
    )
    batch_size: int = setting(4, "Groups run at once (a micro-batch).", low=1)
    scoring: str = setting(
        "auto",
        "auto runs a shared history once wherever that is exact for the model; plain runs every sequence alone.",
        choices=("auto", "plain"),
    )
    seed: int = setting(0, "Seed of everything random: LoRA's start, data order, candidate order, dropout.", low=0)
    memory_limit: float = setting(0.0, "Gigabytes (10^9 bytes) that MLX may use; 0 leaves its own limit.", low=0)
    memory: str = setting(
        "auto",
        "auto: tokens run at once, and in training recomputation, are chosen so that the plan fits in memory with room "
        "to spare; the result is the same. fixed: the defaults are kept.",
        choices=("auto", "fixed"),
    )
    domains: dict[str, dict[str, str]] = setting(
        dict, "Wording of further domains: name -> topic, items, consumed, consuming (YAML only)."
    )


def default_of(spec: Field[Any]) -> Any:
    if spec.default_factory is not MISSING:
        return spec.default_factory()
    return spec.default
