"""What `mlx-dmpo plan` predicts beside measured peaks, and the table of docs/plan.md: python
benchmarks/plan_accuracy.py [--json FILE]

Each configuration is one real training step, optimizer included, in a process that holds nothing else. Of the other
families the count is scaled by the self-check's measurement, as a run does it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import contenders
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import shapes
from mlx.utils import tree_flatten

from mlx_dmpo.config import DmpoSettings
from mlx_dmpo.core.selfcheck import choose_scorer
from mlx_dmpo.core.tree import EncodedGroup, pad_groups
from mlx_dmpo.machine import memory
from mlx_dmpo.model import cost, fit, probe
from mlx_dmpo.model import shape as model_shape
from mlx_dmpo.train import objective
from mlx_dmpo.train import step as train_step

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
families: Any = importlib.import_module("families")  # the same small models as the tests'

NARROW = model_shape.ModelShape(4, 256, 768, 4, 2, 64, 8192, True)
WIDE = replace(shapes.PROPORTIONAL, vocabulary=4096)


@dataclass(frozen=True)
class Configuration:
    name: str
    shape: model_shape.ModelShape = NARROW
    k: int = 5
    history: int = 22
    batch: int = 1
    checkpoint: bool = False
    adapted: int = -1
    half: bool = False


CONFIGURATIONS = (
    Configuration("4 narrow layers"),
    Configuration("k = 1", k=1),
    Configuration("k = 10", k=10),
    Configuration("history 5", history=5),
    Configuration("history 80", history=80),
    Configuration("vocabulary 151,936", replace(NARROW, vocabulary=151_936)),
    Configuration("vocabulary 40,000, k = 10", replace(NARROW, vocabulary=40_000), k=10),
    Configuration("12 layers", replace(NARROW, layers=12)),
    Configuration("12 layers, recomputed", replace(NARROW, layers=12), checkpoint=True),
    Configuration("12 layers, 4 adapted", replace(NARROW, layers=12), adapted=4),
    Configuration("batch 4", batch=4),
    Configuration("batch 8, recomputed", batch=8, checkpoint=True),
    Configuration("4-bit weights", replace(NARROW, bits=4)),
    Configuration(
        "4-bit weights, recomputed, history 60", replace(NARROW, bits=4, layers=8), history=60, checkpoint=True
    ),
    Configuration("bfloat16", half=True),
    Configuration("bfloat16, 12 layers", replace(NARROW, layers=12), half=True),
    Configuration("bfloat16, recomputed, 8 layers", replace(NARROW, layers=8), checkpoint=True, half=True),
    Configuration("Qwen3-0.6B's width, 2 layers", WIDE),
    Configuration("Qwen3-0.6B's width, 3 layers, recomputed", replace(WIDE, layers=3), checkpoint=True),
    Configuration("Qwen3-0.6B's width and vocabulary, k = 3", replace(WIDE, vocabulary=151_936), k=3),
    Configuration("vocabulary 151,936, batch 4", replace(NARROW, vocabulary=151_936), batch=4),
    Configuration(
        "vocabulary 151,936, batch 8, recomputed", replace(NARROW, vocabulary=151_936), batch=8, checkpoint=True
    ),
    Configuration("SwiGLU 4 x as wide, 8 heads", replace(NARROW, intermediate=3072, heads=8)),
)


FAMILIES = ("qwen3", "qwen3_moe", "qwen2", "llama", "mistral", "ministral3", "smollm3", "gemma3_text")
SHARES = (1.2, 1.0, 0.8, 0.6, 0.4)  # of the default's peak: the limits that --memory auto is given


def auto_choices() -> list[tuple[Configuration, float]]:
    """The largest micro-batch of what --memory auto chooses for 4 groups of 12 narrow layers, and the limit in
    bytes."""
    shape, k, groups = replace(NARROW, layers=12), 5, 4
    examples = cost.assumed_groups(groups, k, vocabulary=shape.vocabulary)
    case = fit.Case(shape, cost.Training(shape.layers, activation_bytes=4), examples, groups)
    found = []
    for share in SHARES:
        limit = share * case.peak()
        chosen = fit.choose(case, limit)
        batch = chosen.largest.branches // (2 * k)
        name = f"auto within {limit / 1e6:.0f} MB: {batch} of 4 groups"
        name += ", recomputed" if chosen.training.checkpoint else ""
        found.append((Configuration(name, shape, k, batch=batch, checkpoint=chosen.training.checkpoint), limit))
    return found


def measure(c: Configuration) -> dict[str, Any]:
    gc.collect()  # an earlier model of this process must not be freed in the middle
    mx.clear_cache()
    nothing = mx.get_active_memory()
    model = shapes.build(c.shape, lora_layers=c.adapted, dtype=mx.bfloat16 if c.half else mx.float32)
    adapted = c.shape.layers if c.adapted < 0 else c.adapted
    training = cost.Training(adapted, checkpoint=c.checkpoint, activation_bytes=2 if c.half else 4)
    groups = cost.assumed_groups(c.batch, c.k, history=c.history, vocabulary=c.shape.vocabulary)
    return compare(c.name, nothing, model, c.shape, training, groups, cost.AS_COUNTED)


def measure_family(name: str, checkpoint: bool) -> dict[str, Any]:
    """A family's small model, and the count scaled by what its self-check measured, as `sft` and `dmpo` do."""
    gc.collect()
    mx.clear_cache()
    nothing = mx.get_active_memory()
    module, given = families.FAMILIES[name]
    sizes = shapes.family_sizes(given)
    model = families.build(module, given, lora_layers=4, **sizes)
    shape = model_shape.ModelShape.of_config(families.SIZES | given | sizes)
    training = cost.Training(shape.layers, rank=4, checkpoint=checkpoint, activation_bytes=4)
    scale = probe.scale_of(shape, training, choose_scorer(model, shape.vocabulary))
    groups = cost.assumed_groups(1, 5, vocabulary=shape.vocabulary)
    return compare(name + (", recomputed" if checkpoint else ""), nothing, model, shape, training, groups, scale)


def compare(
    name: str,
    nothing: int,
    model: nn.Module,
    shape: model_shape.ModelShape,
    training: cost.Training,
    groups: list[EncodedGroup],
    scale: cost.Scale,
) -> dict[str, Any]:
    """The peak of a step beside its count.  nothing: bytes in use before the model."""
    batch = pad_groups(groups)
    reference = np.zeros(batch.answer_mask.shape[:2], np.float32)
    run = train_step.StepFunction(model, contenders.SHARED, objective.objective(DmpoSettings()), training.checkpoint)
    step = contenders.optimized(model, lambda groups: run(contenders.PAD(groups), reference, 1 / len(groups), None))
    mx.synchronize()
    resident = mx.get_active_memory() - nothing
    case = fit.Case(shape, training, groups, len(groups), scale=scale, other=nothing)
    with memory.waiting_at(case.wait_at(fit.ROOM * case.peak())):
        step(groups)
        mx.reset_peak_memory()
        step(groups)
    measured = mx.get_peak_memory() - nothing
    found = cost.memory(shape, cost.Work.of(batch), training, scale)
    counted = found["weights"] + found["adapter"]
    peak = found["peak"] + max(0, sum(v.nbytes for _, v in tree_flatten(model.parameters())) - counted)
    above, predicted_above = measured - resident, found["peak"] - counted
    return {
        "name": name,
        "measured_mb": measured / 1e6,
        "predicted_mb": peak / 1e6,
        "error": peak / measured - 1,
        "measured_above_mb": above / 1e6,
        "predicted_above_mb": predicted_above / 1e6,
        "error_above": predicted_above / above - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    rows = []
    print(
        "| configuration | peak measured (MB) | predicted | off by | above the model measured (MB) | predicted | off "
        "by |"
    )
    print("|---|---|---|---|---|---|---|")
    todo: list[tuple[Callable[[], dict[str, Any]], float | None]] = [
        (partial(measure, c), None) for c in CONFIGURATIONS
    ]
    todo += [(partial(measure, c), limit) for c, limit in auto_choices()]
    todo += [(partial(measure_family, name, c), None) for name in FAMILIES for c in (False, True)]
    for run, limit in todo:
        r = run()
        if limit is not None:
            r["limit_mb"] = limit / 1e6
        gc.collect()
        rows.append(r)
        print(
            f"| {r['name']} | {r['measured_mb']:.0f} | {r['predicted_mb']:.0f} | {100 * r['error']:+.1f} % | "
            f"{r['measured_above_mb']:.0f} | {r['predicted_above_mb']:.0f} | {100 * r['error_above']:+.1f} % |",
            flush=True,
        )
    print(
        f"\nlargest error of the peak {100 * max(abs(r['error']) for r in rows):.1f} %, above the model "
        f"{100 * max(abs(r['error_above']) for r in rows):.1f} %"
    )
    over = [r["name"] for r in rows if r["measured_mb"] > r.get("limit_mb", float("inf"))]
    print(f"choices of --memory auto over their limit: {', '.join(over) or 'none'}")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
