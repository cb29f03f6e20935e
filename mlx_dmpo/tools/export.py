"""An adapter for other tools: a fused model directory for mlx-lm, or an adapter that PEFT loads.

What was written is read back, and its log-probs are compared with those of base and adapter: what rounding or
quantizing again costs is printed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import assets
from ..config import CommonSettings, ExportSettings, build
from ..data import formats
from ..errors import UserError
from ..machine import commands, console, files, memory, run_directory
from ..model import adapters, device, loading, saving
from ..model.open import LanguageModelScorer, choose_template, open_scorer
from ..prompts import pairwise
from ..prompts.groups import build_group
from ..prompts.orders import first_negatives
from ..prompts.template import Template
from ..records import Example, RankingExample
from .model_card import Difference, _evaluations, _mapping, difference, model_card
from .peft import PEFT_CONFIG, PEFT_WEIGHTS, peft_config, peft_tensors, read_peft

NO_THINKING = json.dumps({"enable_thinking": False})


@dataclass(frozen=True)
class Exported:
    path: Path
    difference: Difference | None
    commands: tuple[str, ...]  # how to run it


def _base_of(settings: ExportSettings, stored: Mapping[str, Any]) -> ExportSettings:
    """The settings with the base that the adapter names, and quantized as it was in training, where the flags leave
    them open."""
    adapter = Path(settings.adapter_path)
    named = stored.get("model")
    if not settings.model and named != "embedded":
        if (
            not isinstance(named, str) or not Path(named).is_dir()
        ):  # a repository is fetched only when the user names it
            known = (
                f"{named}, which is not a directory here" if isinstance(named, str) else "a model that it does not name"
            )
            raise UserError(
                f"{adapter}: was trained on {known}: add --model {named if isinstance(named, str) else 'MODEL'}"
            )
        settings = replace(settings, model=named)
    if settings.quantize is None and run_directory.is_complete(adapter) and (settings.model or "embedded") == named:
        manifest = adapter / run_directory.MANIFEST
        trained = _mapping(_mapping(files.read_json(manifest)).get("config"))
        names = ("quantize", "quantize_group_size", "quantize_mode")
        kept = build(CommonSettings, {k: trained[k] for k in names if k in trained}, lambda key: f"{manifest}: {key}")
        settings = replace(settings, **{k: getattr(kept, k) for k in names})
    return settings


def _check(settings: ExportSettings) -> None:
    if not settings.adapter_path:
        raise UserError("--adapter-path: no adapter is named: name the directory that sft or dmpo wrote")
    for flag, given in (("--keep-quantized", settings.keep_quantized), ("--requantize", settings.requantize)):
        if given and settings.to == "peft":
            raise UserError(f"{flag}: a PEFT adapter holds no base: leave it out, or export --to mlx")
    if settings.keep_quantized and settings.requantize:
        raise UserError("--requantize: contradicts --keep-quantized: keep one of them")


def _place(settings: ExportSettings) -> Path:
    """The directory to make. Raises UserError where something else is there."""
    out = Path(settings.out or Path(settings.adapter_path) / settings.to).resolve()
    if not out.exists():
        return out
    if not out.is_dir() or (any(out.iterdir()) and not run_directory.is_complete(out)):
        raise UserError(f"{out}: exists and is not an export: name another --out")
    if run_directory.is_complete(out):
        if "export" not in _mapping(files.read_json(out / run_directory.MANIFEST)):
            raise UserError(f"{out}: holds a run or an evaluation: name another --out")
        if not settings.overwrite:
            raise UserError(f"{out}: holds an export: name another --out, or add --overwrite")
    return out


def _examples(settings: ExportSettings, domains: dict[str, pairwise.Domain]) -> list[Example]:
    """The examples to compare on, drawn by seed, in the file's order."""
    if not settings.examples:
        return []
    data = settings.data or str(assets.data_dir())
    loaded = formats.load(data, settings.split, domains, settings.skip_bad_rows, console.notice, settings.domain)
    if not loaded.has_pairs:
        raise UserError(
            f"{loaded.name}: holds {loaded.format}, one answer per prompt: give data with chosen and rejected answers"
        )
    drawn = np.random.default_rng(settings.seed).permutation(len(loaded.examples))[: settings.examples]
    return [first_negatives(loaded.examples[i], settings.num_negatives) for i in sorted(drawn)]


def _logps(
    base: loading.Loaded, settings: ExportSettings, template: Template, examples: Sequence[Example]
) -> np.ndarray:
    """(N, O, 2): pair, printed order (two, or one), answer (chosen, rejected); nats. See `Scores.logps`."""
    base.model.eval()
    scorer = LanguageModelScorer(base, settings, template=template)
    return np.concatenate([s.logps for s in scorer.score(examples) if s.logps is not None])


def _base_name(settings: ExportSettings, base: loading.Loaded) -> str:
    """What PEFT loads the base by. Raises UserError where that would be a format that transformers does not read."""
    if settings.base_name:
        return settings.base_name
    if "quantization" in base.config and settings.quantize is None:
        raise UserError(
            f"--base-name: {base.name} is quantized in MLX's format, which transformers does not read: name its "
            "unquantized original, such as Qwen/Qwen3-0.6B"
        )
    return settings.model or str(base.path)


def _placeholder_prompt(examples: Sequence[Example], template: Template) -> str:
    """A prompt in the data's wording; titles to be filled in, since a user's own history should not be
    passed on."""
    if examples and not isinstance(examples[0], RankingExample):
        return "Your prompt, worded as in the data"
    example = RankingExample(
        "",
        examples[0].domain if examples else "movie",
        ("First liked title", "Second liked title"),
        "One candidate",
        ("Another candidate",),
        disliked=("A disliked title",),
    )
    orders: list[tuple[Any, ...]] = {"pairwise": [(True,)], "listwise": [(0, 1)]}.get(template.form, [])  # type: ignore[assignment]
    return build_group(example, orders, template).branches[0].messages[0]["content"]


def _commands(settings: ExportSettings, base: loading.Loaded, place: str, prompt: str) -> tuple[str, ...]:
    """Shell commands, or Python for PEFT, which run the export in `place` with the template that it was trained
    with."""
    switch = "enable_thinking" in str(base.tokenizer.chat_template)
    if settings.to == "peft":
        thinking = ", enable_thinking=False" if switch else ""
        return (
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            f"model = AutoPeftModelForCausalLM.from_pretrained({place!r})",
            "tokenizer = AutoTokenizer.from_pretrained(model.peft_config['default'].base_model_name_or_path)",
            f"messages = [{{'role': 'user', 'content': {prompt!r}}}]",
            "inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, "
            f"return_tensors='pt'{thinking})",
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, "
            "inputs['input_ids'].shape[1]:]))",
        )
    what = ["--model", place]
    if settings.keep_quantized:
        what = ["--model", f"{place}/model", "--adapter-path", f"{place}/adapter"]
    # the two programs call the same setting by two names
    template = {"generate": ["--chat-template-config", NO_THINKING], "server": ["--chat-template-args", NO_THINKING]}
    return tuple(
        commands.join([f"mlx_lm.{program}", *what, *(template[program] if switch else []), *more])
        for program, more in (("generate", ["--max-tokens", "64", "--prompt", prompt]), ("server", ["--port", "8080"]))
    )


def _write_mlx(settings: ExportSettings, base: loading.Loaded, stored: Mapping[str, Any], path: Path) -> None:
    keep_dtypes = settings.dtype == "auto"
    if not settings.keep_quantized:
        saving.fuse(base, requantize=settings.requantize)
        saving.save_model(base, path, keep_dtypes=keep_dtypes)
        return
    saving.save_model(loading.load(settings), path / "model", keep_dtypes=keep_dtypes)
    (path / "adapter").mkdir()
    shutil.copyfile(Path(settings.adapter_path) / adapters.ADAPTER_WEIGHTS, path / "adapter" / adapters.ADAPTER_WEIGHTS)
    names = ("fine_tune_type", "num_layers", "lora_parameters", "prompt", "template_date")
    kept = {k: stored[k] for k in names if k in stored}
    files.write_json(path / "adapter" / adapters.ADAPTER_CONFIG, {"model": settings.base_name or base.name, **kept})


def _read_back(settings: ExportSettings, base: loading.Loaded, path: Path) -> loading.Loaded:
    """The model that the written files make."""
    if settings.to == "peft":
        read_peft(base.model, path)
        return base
    again = loading.load(
        replace(settings, model=str(path / "model" if settings.keep_quantized else path), quantize=None)
    )
    if settings.keep_quantized:
        adapters.load_adapter(again, path / "adapter")
    again.date = base.date
    return again


def export(settings: ExportSettings, command: str = "export") -> Exported:
    """Writes the export, whole or not at all. Raises UserError for what the user can fix."""
    with memory.memory_limits(settings):
        return _export(settings, command)


def _export(settings: ExportSettings, command: str) -> Exported:
    _check(settings)
    stored = adapters.read_adapter_config(settings.adapter_path)
    settings = _base_of(settings, stored)
    out = _place(settings)
    domains = dict(choose_template(settings, settings.adapter_path).domains)
    results = _evaluations(settings)
    examples = _examples(settings, domains)
    scorer = open_scorer(settings, settings.adapter_path)
    base, template, examples = scorer.base, scorer.template, scorer.usable(examples)
    if base.date:
        console.notice(
            f"note: the chat template prints the day; the adapter's prompts show {base.date}, other tools' today's"
        )
    if "quantization" not in base.config and (settings.keep_quantized or settings.requantize):
        raise UserError(
            f"--{'keep-quantized' if settings.keep_quantized else 'requantize'}: {base.name} is not quantized: "
            "leave it out"
        )
    peft = peft_config(base, stored, _base_name(settings, base)) if settings.to == "peft" else {}
    prompt = _placeholder_prompt(examples, template)
    try:
        with (
            files.atomic_directory(out) as temporary,
            run_directory.RunDirectory(temporary, command, settings, flag="--out") as run,
        ):
            before = _logps(base, settings, template, examples) if examples else None
            if settings.to == "peft":
                with saving.mlx_writes():
                    mx.save_safetensors(
                        str(temporary / PEFT_WEIGHTS), peft_tensors(base.model), metadata={"format": "pt"}
                    )
                files.write_json(temporary / PEFT_CONFIG, peft)
            else:
                _write_mlx(settings, base, stored, temporary)
            found = None
            if before is not None:
                found = difference(before, _logps(_read_back(settings, base, temporary), settings, template, examples))
            card = model_card(settings, base, stored, found, _commands(settings, base, out.name, prompt), results)
            files.write_text(temporary / "README.md", card)
            for name in (adapters.ADAPTER_WEIGHTS, adapters.ADAPTER_CONFIG):
                run.input(Path(settings.adapter_path) / name)
            facts = {"to": settings.to, "model": base.name, "difference": asdict(found) if found else None}
            run.finish(device.device_name(), export=facts)
            (temporary / run_directory.LOCK).unlink()  # nobody writes here again
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}): free some space, or name another --out"
        ) from None
    shown = settings.out or str(Path(settings.adapter_path) / settings.to)
    return Exported(Path(shown), found, _commands(settings, base, shown, prompt))
