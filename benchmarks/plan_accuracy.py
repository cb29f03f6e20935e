"""What `mlx-dmpo plan` predicts beside measured peaks, and the table of docs/plan.md: python
benchmarks/plan_accuracy.py [--json FILE]

Each configuration is one real training step, optimizer included, in a process that holds nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import contenders
import mlx.core as mx
import numpy as np
import shapes

from mlx_dmpo.config import DmpoSettings
from mlx_dmpo.core.tree import pad_groups
from mlx_dmpo.model import cost, fit
from mlx_dmpo.model import shape as model_shape
from mlx_dmpo.train import objective
from mlx_dmpo.train import step as train_step

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
    Configuration("bfloat16, recomputed, 8 layers", replace(NARROW, layers=8), checkpoint=True, half=True),
    Configuration("Qwen3-0.6B's width, 2 layers", WIDE),
    Configuration("Qwen3-0.6B's width, 3 layers, recomputed", replace(WIDE, layers=3), checkpoint=True),
    Configuration("Qwen3-0.6B's width and vocabulary, k = 3", replace(WIDE, vocabulary=151_936), k=3),
    Configuration("SwiGLU 4 x as wide, 8 heads", replace(NARROW, intermediate=3072, heads=8)),
)


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
    groups = cost.assumed_groups(c.batch, c.k, history=c.history, vocabulary=c.shape.vocabulary)
    batch = pad_groups(groups)
    reference = np.zeros(batch.answer_mask.shape[:2], np.float32)
    run = train_step.StepFunction(model, contenders.SHARED, objective.objective(DmpoSettings()), c.checkpoint)
    step = contenders.optimized(model, lambda groups: run(contenders.PAD(groups), reference, 1 / c.batch, None))
    resident = mx.get_active_memory() - nothing
    step(groups)
    mx.reset_peak_memory()
    step(groups)
    measured = mx.get_peak_memory() - nothing
    adapted = c.shape.layers if c.adapted < 0 else c.adapted
    training = cost.Training(adapted, checkpoint=c.checkpoint, activation_bytes=2 if c.half else 4)
    found = cost.memory(c.shape, cost.Work.of(batch), training)
    above = measured - resident
    predicted_above = found["peak"] - found["weights"] - found["adapter"]
    return {
        "name": c.name,
        "measured_mb": measured / 1e6,
        "predicted_mb": found["peak"] / 1e6,
        "error": found["peak"] / measured - 1,
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
    todo: list[tuple[Configuration, float | None]] = [(c, None) for c in CONFIGURATIONS]
    for configuration, limit in [*todo, *auto_choices()]:
        r = measure(configuration)
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
