"""README.md of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..config import ExportSettings
from ..machine import console, files, hub, run_directory
from ..model import loading
from ..report import read, tables


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
            f"log-probs of {self.answers} answers before and after: "
            f"largest difference {self.largest:.2g} nats, mean {self.mean:.2g}; "
            f"margins: largest {self.largest_margin:.2g}; "
            f"{self.ranked_otherwise} of {self.pairs} pairs ranked otherwise"
        )


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


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _evaluations(settings: ExportSettings) -> dict[str, Mapping[str, Any]]:
    """Name -> metrics of the --eval directories; the exported adapter's own is called so."""
    results: dict[str, Mapping[str, Any]] = {}
    for directory in map(Path, settings.eval):
        metrics, manifest = read.read_evaluation(directory)
        adapter = manifest.get("adapter")
        own = isinstance(adapter, str) and Path(adapter).resolve() == Path(settings.adapter_path).resolve()
        name = (
            "this model"
            if own
            else f"base ({Path(str(manifest.get('model'))).name})"
            if adapter is None
            else Path(str(adapter)).name
        )
        results[name if name not in results else str(directory)] = metrics
    return results


TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_PATHS = ("model", "data", "valid_data", "adapter_path", "start_adapter")  # of which a card shows the last part only


def _short(path: Any, among: Mapping[Any, Any]) -> str:
    """A file's name, with its directory's where another file has the same name; never the whole path."""
    parts = Path(str(path)).parts
    alike = sum(Path(str(other)).name == Path(str(path)).name for other in among) > 1
    return "/".join(parts[-2 if alike else -1 :])


def model_card(
    settings: ExportSettings,
    base: loading.Loaded,
    stored: Mapping[str, Any],
    found: Difference | None,
    commands: Sequence[str],
    results: Mapping[str, Mapping[str, Any]],
) -> str:
    """README.md: what it is, how to run it, results with intervals, data, settings, and what the export changed."""
    adapter = Path(settings.adapter_path)
    manifest = _mapping(files.read_json(adapter / run_directory.MANIFEST)) if run_directory.is_complete(adapter) else {}
    named = settings.base_name or base.name
    head: dict[str, Any] = {
        "library_name": settings.to if settings.to == "peft" else "mlx",
        "pipeline_tag": "text-generation",
    }
    if hub.REPOSITORY.fullmatch(named) and not Path(named).exists():
        head["base_model"] = named
    head["tags"] = [settings.to, "lora", "mlx-dmpo", "recommendation", "ranking"]
    kind = "DoRA" if stored.get("fine_tune_type") == "dora" else "LoRA"
    fused = {
        (True, False): "The quantized base is in model/, the adapter in adapter/.",
        (False, True): "The adapter was fused into the base, which was then quantized again.",
    }.get((settings.keep_quantized, settings.requantize), "The adapter was fused into the base's weights.")
    inputs = _mapping(manifest.get("inputs"))
    trained = _mapping(manifest.get("config")) or dict(stored)
    shown = {k: Path(str(v)).name if k in _PATHS else v for k, v in trained.items() if v not in ("", None, {}, [])}
    facts = {k: manifest[k] for k in ("steps", "best_step", "device", "seconds", "finished") if k in manifest}
    return _template().render(
        head=yaml.safe_dump(head, sort_keys=False, allow_unicode=True),
        title=adapter.resolve().name,
        named=Path(named).name if Path(named).exists() else named,
        what=f"A {kind} adapter in PEFT's format." if settings.to == "peft" else fused,
        language="python" if settings.to == "peft" else "sh",
        commands=commands,
        results=[list(row) for row in zip(*tables.result_rows(results), strict=True)] if results else [],
        inputs=[[_short(k, inputs), str(v)] for k, v in inputs.items()],
        settings=[[str(k), str(v)] for k, v in (shown | facts).items()],
        difference=str(found) if found else "not compared",
        quantized=settings.to == "peft" and "quantization" in base.config,
    )


def _template() -> Any:
    """model_card.md.jinja. Untrusted text goes through the filters md (escaped for Markdown), table, or printable."""
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"md": tables.markdown_text, "table": tables.markdown_table, "printable": console.printable}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
