"""An adapter for other tools: a fused model directory for mlx-lm, or an adapter that PEFT loads.

What was written is read back, and its log-probs are compared with those of base and adapter: what rounding or quantising again
costs is printed rather than hidden.
"""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import yaml

from . import assets, report, rundir
from . import model as models
from .batches import first_negatives
from .config import CommonSettings, ExportSettings, build
from .data import formats, prompts
from .encode import Encoder
from .errors import UserError
from .evaluate import score_examples
from .records import Example, RankingExample
from .scoring import choose_road

PEFT_FAMILIES = ("llama", "qwen2", "qwen3")  # whose layers bear the same names in transformers
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_LINEAR = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_EMBEDDING = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}
NO_THINKING = json.dumps({"enable_thinking": False})


@dataclass(frozen=True)
class Difference:
    """Log-probs before and after the export, in nats: of answers, and of margins (chosen minus rejected)."""

    answers: int
    pairs: int
    largest: float
    mean: float
    largest_margin: float
    ranked_otherwise: int  # pairs whose margin, summed over both printed orders, changed its sign

    def __str__(self) -> str:
        return (
            f"log-probs of {self.answers} answers before and after: largest difference {self.largest:.2g} nats, mean {self.mean:.2g}; "
            f"margins: largest {self.largest_margin:.2g}; {self.ranked_otherwise} of {self.pairs} pairs ranked otherwise"
        )


@dataclass(frozen=True)
class Exported:
    path: Path
    difference: Difference | None
    commands: tuple[str, ...]  # how to run it


def difference(before: np.ndarray, after: np.ndarray) -> Difference:
    """(N, O, 2), (N, O, 2): pair, printed order, answer (chosen, rejected)."""
    moved = np.abs(after - before)
    margins = [logps[..., 0] - logps[..., 1] for logps in (before, after)]
    signs = [np.sign(m.sum(axis=1)) for m in margins]
    return Difference(
        before.size,
        len(before),
        float(moved.max()),
        float(moved.mean()),
        float(np.abs(margins[1] - margins[0]).max()),
        int((signs[0] != signs[1]).sum()),
    )


# --- what is exported


def _base_of(settings: ExportSettings, stored: Mapping[str, Any]) -> ExportSettings:
    """The settings with the base that the adapter names, and quantised as it was in training, where the flags leave them open."""
    adapter = Path(settings.adapter_path)
    named = stored.get("model")
    if not settings.model and named != "embedded":
        if not isinstance(named, str) or not Path(named).is_dir():  # a repository is fetched only when the user names it
            known = f"{named}, which is no directory here" if isinstance(named, str) else "a model that it does not name"
            raise UserError(f"{adapter}: was trained on {known}: add --model {named if isinstance(named, str) else 'MODEL'}")
        settings = replace(settings, model=named)
    if settings.quantize is None and rundir.is_complete(adapter) and (settings.model or "embedded") == named:
        manifest = adapter / rundir.MANIFEST
        trained = _mapping(_mapping(rundir.read_json(manifest)).get("config"))
        names = ("quantize", "quantize_group_size", "quantize_mode")
        kept = build(CommonSettings, {k: trained[k] for k in names if k in trained}, lambda key: f"{manifest}: {key}")
        settings = replace(settings, **{k: getattr(kept, k) for k in names})
    return settings


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _check(settings: ExportSettings) -> None:
    if not settings.adapter_path:
        raise UserError("--adapter-path: no adapter is named: name the directory that sft or dmpo wrote")
    for flag, given in (("--keep-quantized", settings.keep_quantized), ("--requantize", settings.requantize)):
        if given and settings.to == "peft":
            raise UserError(f"{flag}: a PEFT adapter holds no base: leave it out, or export --to mlx")
    if settings.keep_quantized and settings.requantize:
        raise UserError("--requantize: contradicts --keep-quantized: keep one of them")


def _place(settings: ExportSettings) -> Path:
    """The directory to make. Raises UserError where something else stands there."""
    out = Path(settings.out or Path(settings.adapter_path) / settings.to).resolve()
    if not out.exists():
        return out
    if not out.is_dir() or (any(out.iterdir()) and not rundir.is_complete(out)):
        raise UserError(f"{out}: exists and is no export: name another --out")
    if rundir.is_complete(out):
        if "export" not in _mapping(rundir.read_json(out / rundir.MANIFEST)):
            raise UserError(f"{out}: holds a run or an evaluation: name another --out")
        if not settings.overwrite:
            raise UserError(f"{out}: holds an export: name another --out, or add --overwrite")
    return out


def _examples(settings: ExportSettings, domains: dict[str, prompts.Domain]) -> list[Example]:
    """The examples to compare on, drawn by seed, in the file's order."""
    if not settings.examples:
        return []
    data = settings.data or str(assets.data_dir())
    loaded = formats.load(data, settings.split, domains, settings.skip_bad_rows, rundir.notice, settings.domain)
    if not loaded.has_pairs:
        raise UserError(f"{loaded.name}: holds {loaded.format}, one answer a prompt: give data with chosen and rejected answers")
    drawn = np.random.default_rng(settings.seed).permutation(len(loaded.examples))[: settings.examples]
    return [first_negatives(loaded.examples[i], settings.num_negatives) for i in sorted(drawn)]


def _logps(base: models.Loaded, settings: ExportSettings, examples: Sequence[Example], domains: dict[str, prompts.Domain]) -> np.ndarray:
    """(N, O, 2): pair, printed order (two, or the one prompt of free text), answer (chosen, rejected); nats."""
    base.model.eval()
    road = choose_road(base.model, base.vocabulary, settings.scoring)
    encoder = Encoder(base.tokenizer, settings.max_seq_length, domains)
    rows = score_examples(base, road, encoder, examples, settings.batch_size)
    orders = ("positive_first", "positive_second") if isinstance(examples[0], RankingExample) else ("given",)
    return np.array([[[row[order]["chosen_logp"], row[order]["rejected_logp"]] for order in orders] for row in rows])


# --- PEFT


def peft_tensors(model: Any) -> dict[str, mx.array]:
    """An adapter under PEFT's names: lora_a (in, r) -> lora_A (r, in), lora_b (r, out) -> lora_B (out, r), m (out,) as it is."""
    return {
        f"base_model.model.{name}.{theirs}": mx.contiguous(layer[ours].T)
        for name, layer in models.adapted_layers(model).items()
        for ours, theirs in (_EMBEDDING if "embedding" in layer else _LINEAR).items()
        if ours in layer
    }


def peft_config(base: models.Loaded, stored: Mapping[str, Any], base_name: str) -> dict[str, Any]:
    """PEFT's adapter_config.json. Raises UserError for an adapter that PEFT cannot express."""
    family = base.config.get("model_type")
    if family not in PEFT_FAMILIES:
        raise UserError(
            f"--to peft: layers of {family} are named otherwise in transformers (known: {', '.join(PEFT_FAMILIES)}): export --to mlx"
        )
    dora = stored.get("fine_tune_type", "lora") == "dora"
    layers = models.adapted_layers(base.model)
    embeddings = [name for name, layer in layers.items() if "embedding" in layer]
    if embeddings and (dora or "lm_head" not in base.model):
        why = "DoRA on embeddings has other norms in PEFT" if dora else "tied embeddings: PEFT adapts the input side only"
        raise UserError(f"--to peft: the adapter sits on {embeddings[0]} ({why}): export --to mlx")
    places = {name: re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name) for name in layers}
    numbers = sorted({int(m[1]) for m in places.values() if m})
    within = {m[2] for m in places.values() if m}
    regular = len(numbers) * len(within) == sum(m is not None for m in places.values())
    lora = stored["lora_parameters"]
    alpha = lora["scale"] * lora["rank"]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora["rank"],
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # mlx-lm's scale is alpha / r
        "lora_dropout": lora["dropout"],
        "use_dora": dora,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        # names within a layer, or whole names of what stands outside the layers (or in single ones)
        "target_modules": sorted(within | {n for n, m in places.items() if not m}) if regular else sorted(places),
        "layers_to_transform": numbers if regular and 0 < len(numbers) < len(base.model.layers) else None,
        "layers_pattern": "layers" if regular and 0 < len(numbers) < len(base.model.layers) else None,
        "inference_mode": True,
    }


def read_peft(model: Any, path: Path) -> None:
    """Puts the tensors and the scale of a PEFT directory on a model's adapted layers, in place: the way back of `peft_tensors`."""
    stored: Any = mx.load(str(path / PEFT_WEIGHTS))
    config = rundir.read_json(path / PEFT_CONFIG)
    for name, layer in models.adapted_layers(model).items():
        for ours, theirs in (_EMBEDDING if "embedding" in layer else _LINEAR).items():
            if ours in layer:
                layer[ours] = stored[f"base_model.model.{name}.{theirs}"].T
        layer.scale = config["lora_alpha"] / config["r"]


def _base_name(settings: ExportSettings, base: models.Loaded) -> str:
    """What PEFT loads the base by. Raises UserError where that would be a format that transformers does not read."""
    if settings.base_name:
        return settings.base_name
    if "quantization" in base.config and settings.quantize is None:
        raise UserError(
            f"--base-name: {base.name} is quantised in MLX's format, which transformers does not read: name its unquantised original, such as Qwen/Qwen3-0.6B"
        )
    return settings.model or str(base.path)


# --- how to run it


def _placeholder_prompt(examples: Sequence[Example], domains: Mapping[str, prompts.Domain]) -> str:
    """A prompt in the data's wording; titles to be filled in, since a user's own history is no example to hand round."""
    if examples and not isinstance(examples[0], RankingExample):
        return "Your prompt, worded as in the data"
    domain = domains[examples[0].domain if examples else "movie"]
    example = RankingExample("", "", ("First liked title", "Second liked title"), "One candidate", ("Another candidate",))
    return prompts.pair_prompt(example, example.negatives[0], True, domain)


def _commands(settings: ExportSettings, base: models.Loaded, place: str, prompt: str) -> tuple[str, ...]:
    """Shell commands, or Python for PEFT, which run the export in `place` with the template that it was trained with."""
    switch = "enable_thinking" in str(base.tokenizer.chat_template)
    if settings.to == "peft":
        thinking = ", enable_thinking=False" if switch else ""
        return (
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            f"model = AutoPeftModelForCausalLM.from_pretrained({place!r})",
            "tokenizer = AutoTokenizer.from_pretrained(model.peft_config['default'].base_model_name_or_path)",
            f"messages = [{{'role': 'user', 'content': {prompt!r}}}]",
            f"inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors='pt'{thinking})",
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs['input_ids'].shape[1]:]))",
        )
    what = ["--model", place]
    if settings.keep_quantized:
        what = ["--model", f"{place}/model", "--adapter-path", f"{place}/adapter"]
    # the two programs call the same setting by two names
    template = {"generate": ["--chat-template-config", NO_THINKING], "server": ["--chat-template-args", NO_THINKING]}
    return tuple(
        shlex.join([f"mlx_lm.{program}", *what, *(template[program] if switch else []), *more])
        for program, more in (("generate", ["--max-tokens", "64", "--prompt", prompt]), ("server", ["--port", "8080"]))
    )


# --- the model card


def _markdown(text: str) -> str:
    """Untrusted text for a Markdown table: one line, no markup, no HTML."""
    return html.escape(re.sub(r"([\\`*_\[\]|~])", r"\\\1", rundir.printable(text)), quote=False)


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(_markdown, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _evaluations(settings: ExportSettings) -> dict[str, Mapping[str, Any]]:
    """Name -> metrics of the --eval directories; the exported adapter's own is called so."""
    results: dict[str, Mapping[str, Any]] = {}
    for directory in map(Path, settings.eval):
        metrics, manifest = report.read_evaluation(directory)
        adapter = manifest.get("adapter")
        own = isinstance(adapter, str) and Path(adapter).resolve() == Path(settings.adapter_path).resolve()
        name = "this model" if own else f"base ({Path(str(manifest.get('model'))).name})" if adapter is None else Path(str(adapter)).name
        results[name if name not in results else str(directory)] = metrics
    return results


_PATHS = ("model", "data", "valid_data", "adapter_path", "start_adapter")  # of which a card shows the last part only


def model_card(
    settings: ExportSettings,
    base: models.Loaded,
    stored: Mapping[str, Any],
    found: Difference | None,
    commands: Sequence[str],
    results: Mapping[str, Mapping[str, Any]],
) -> str:
    """README.md: what it is, how to run it, results with intervals, data, settings, and what the export changed."""
    adapter = Path(settings.adapter_path)
    manifest = _mapping(rundir.read_json(adapter / rundir.MANIFEST)) if rundir.is_complete(adapter) else {}
    named = settings.base_name or base.name
    head: dict[str, Any] = {"library_name": settings.to if settings.to == "peft" else "mlx", "pipeline_tag": "text-generation"}
    if models.REPOSITORY.fullmatch(named) and not Path(named).exists():
        head["base_model"] = named
    head["tags"] = [settings.to, "lora", "mlx-dmpo", "recommendation", "ranking"]
    kind = "DoRA" if stored.get("fine_tune_type") == "dora" else "LoRA"
    how = {
        (True, False): "The quantised base stands in model/, the adapter in adapter/.",
        (False, True): "The adapter was fused into the base, which was then quantised again.",
    }.get((settings.keep_quantized, settings.requantize), "The adapter was fused into the base's weights.")
    what = f"A {kind} adapter in PEFT's format." if settings.to == "peft" else how
    language = "python" if settings.to == "peft" else "sh"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n",
        f"# {_markdown(adapter.resolve().name)}\n",
        f"A personal ranker: {_markdown(Path(named).name if Path(named).exists() else named)}, fine-tuned with mlx-dmpo to say which of two "
        f"items a user will like better, given what the user liked before. {what}\n",
        f"## Use\n\nFrom the directory above this one:\n\n```{language}\n" + "\n".join(map(rundir.printable, commands)) + "\n```\n",
        "It was trained on prompts worded exactly so, thinking off; other wording, or a template with thinking on, is outside what was measured.\n",
    ]
    if results:
        rows = [list(row) for row in zip(*report.result_rows(results), strict=True)]
        parts.append(
            f"## Results\n\n{_table(rows)}\n\n95 % bootstrap intervals over users in brackets. Pair accuracy is order-debiased: a pair "
            "counts as right when the liked item's margin, summed over both printed orders, is positive.\n"
        )
    inputs = _mapping(manifest.get("inputs"))
    if inputs:
        parts.append("## Data\n\n" + _table([["file", "sha256"], *([str(k), str(v)] for k, v in inputs.items())]) + "\n")
    trained = _mapping(manifest.get("config")) or dict(stored)
    shown = {k: Path(str(v)).name if k in _PATHS else v for k, v in trained.items() if v not in ("", None, {}, [])}
    facts = {k: manifest[k] for k in ("steps", "best_step", "device", "seconds", "finished") if k in manifest}
    parts.append("## Settings\n\n" + _table([["setting", "value"], *([str(k), str(v)] for k, v in (shown | facts).items())]) + "\n")
    told = str(found) if found else "Not compared."
    parts.append(
        f"## What the export changed\n\nAgainst base and adapter, read back from this directory: {_markdown(told)}.\n".replace("..", ".")
    )
    if settings.to == "peft" and "quantization" in base.config:
        parts.append("Trained on a quantised base; on the unquantised one the log-probs differ by the base's quantising error.\n")
    return "\n".join(parts)


# --- the command


def _write_mlx(settings: ExportSettings, base: models.Loaded, stored: Mapping[str, Any], path: Path) -> None:
    keep_dtypes = settings.dtype == "auto"
    if not settings.keep_quantized:
        models.fuse(base, requantize=settings.requantize)
        models.save_model(base, path, keep_dtypes=keep_dtypes)
        return
    models.save_model(models.load(settings), path / "model", keep_dtypes=keep_dtypes)
    (path / "adapter").mkdir()
    shutil.copyfile(Path(settings.adapter_path) / models.ADAPTER_WEIGHTS, path / "adapter" / models.ADAPTER_WEIGHTS)
    kept = {k: stored[k] for k in ("fine_tune_type", "num_layers", "lora_parameters") if k in stored}
    rundir.write_json(path / "adapter" / models.ADAPTER_CONFIG, {"model": settings.base_name or base.name, **kept})


def _read_back(settings: ExportSettings, base: models.Loaded, path: Path) -> models.Loaded:
    """The model that the written files make."""
    if settings.to == "peft":
        read_peft(base.model, path)
        return base
    again = models.load(replace(settings, model=str(path / "model" if settings.keep_quantized else path), quantize=None))
    if settings.keep_quantized:
        models.load_adapter(again, path / "adapter")
    return again


def export(settings: ExportSettings, command: str = "export") -> Exported:
    """Writes the export, whole or not at all. Raises UserError for what the user can mend."""
    _check(settings)
    stored = models.read_adapter_config(settings.adapter_path)
    settings = _base_of(settings, stored)
    out = _place(settings)
    domains = prompts.with_domains(settings.domains)
    results = _evaluations(settings)
    examples = _examples(settings, domains)
    base = models.load(settings)
    if "quantization" not in base.config and (settings.keep_quantized or settings.requantize):
        raise UserError(f"--{'keep-quantized' if settings.keep_quantized else 'requantize'}: {base.name} is not quantised: leave it out")
    models.load_adapter(base, settings.adapter_path)
    peft = peft_config(base, stored, _base_name(settings, base)) if settings.to == "peft" else {}
    prompt = _placeholder_prompt(examples, domains)
    try:
        with (
            rundir.atomic_directory(out) as temporary,
            rundir.RunDirectory(temporary, command, settings, flag="--out") as run,
        ):
            before = _logps(base, settings, examples, domains) if examples else None
            if settings.to == "peft":
                with models.mlx_writes():
                    mx.save_safetensors(str(temporary / PEFT_WEIGHTS), peft_tensors(base.model), metadata={"format": "pt"})
                rundir.write_json(temporary / PEFT_CONFIG, peft)
            else:
                _write_mlx(settings, base, stored, temporary)
            found = None
            if before is not None:
                found = difference(before, _logps(_read_back(settings, base, temporary), settings, examples, domains))
            card = model_card(settings, base, stored, found, _commands(settings, base, out.name, prompt), results)
            rundir.write_text(temporary / "README.md", card)
            for name in (models.ADAPTER_WEIGHTS, models.ADAPTER_CONFIG):
                run.input(Path(settings.adapter_path) / name)
            facts = {"to": settings.to, "model": base.name, "difference": asdict(found) if found else None}
            run.finish(models.device_name(), export=facts)
            (temporary / rundir.LOCK).unlink()  # nobody writes here again
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}): free some space, or name another --out") from None
    shown = settings.out or str(Path(settings.adapter_path) / settings.to)
    return Exported(Path(shown), found, _commands(settings, base, shown, prompt))
