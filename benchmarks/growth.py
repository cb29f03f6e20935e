"""How a step's time and peak memory grow, beside what theory says: python benchmarks/growth.py [--out docs/images]
[--json FILE]

Each axis is varied alone around one base: 3 layers of 512 with 8,192 columns, one group, k = 5, 22 titles. Theory has
one free factor for time (a rate, fitted over all points) and none for memory (plan's prediction).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import contenders
import mlx.core as mx
import numpy as np
import shapes

from mlx_dmpo.config import DmpoSettings
from mlx_dmpo.core.tree import pad_groups
from mlx_dmpo.model import cost
from mlx_dmpo.model import shape as model_shape
from mlx_dmpo.train import objective
from mlx_dmpo.train import step as train_step

BASE = model_shape.ModelShape(3, 512, 1536, 8, 4, 64, 8192, True)


@dataclass(frozen=True)
class Point:
    shape: model_shape.ModelShape = BASE
    k: int = 5
    history: int = 22
    batch: int = 1
    checkpoint: bool = False


AXES: dict[str, tuple[list[int], Callable[[int], Point]]] = {
    "negatives k": ([1, 2, 3, 4, 5, 6, 8, 10], lambda v: Point(k=v)),
    "titles in the history": ([5, 10, 20, 30, 40, 60, 80], lambda v: Point(history=v)),
    "vocabulary": ([4096, 16_384, 40_000, 80_000, 120_000, 151_936], lambda v: Point(replace(BASE, vocabulary=v))),
    "groups in a batch": ([1, 2, 4, 8, 16], lambda v: Point(batch=v)),
    "layers": ([2, 4, 6, 8, 12], lambda v: Point(replace(BASE, layers=v))),
    "layers, recomputed": ([2, 4, 6, 8, 12], lambda v: Point(replace(BASE, layers=v), checkpoint=True)),
}


def measure(point: Point, repeat: int) -> dict[str, float]:
    mx.clear_cache()
    nothing = mx.get_active_memory()
    model = shapes.build(point.shape, dtype=mx.float32)
    groups = cost.assumed_groups(point.batch, point.k, history=point.history, vocabulary=point.shape.vocabulary)
    batch = pad_groups(groups)
    reference = np.zeros(batch.answer_mask.shape[:2], np.float32)
    run = train_step.StepFunction(model, contenders.SHARED, objective.objective(DmpoSettings()), point.checkpoint)
    step = contenders.optimized(model, lambda groups: run(contenders.PAD(groups), reference, 1 / point.batch, None))
    step(groups)
    mx.reset_peak_memory()
    seconds = []
    for _ in range(repeat):
        started = time.process_time()  # of all threads: other work on the machine counts little
        step(groups)
        mx.synchronize()
        seconds.append(time.process_time() - started)
    training = cost.Training(point.shape.layers, checkpoint=point.checkpoint, activation_bytes=4)
    work = cost.Work.of(batch)
    return {
        "cpu_seconds": statistics.median(seconds),
        "memory_mb": (mx.get_peak_memory() - nothing) / 1e6,
        "flop": cost.step_flops(point.shape, work, training),
        "plan_mb": cost.memory(point.shape, work, training)["peak"] / 1e6,
    }


def draw(results: dict[str, dict[str, Any]], rate: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure, axes = pyplot.subplots(2, len(results), figsize=(3.1 * len(results), 5.6), squeeze=False)
    for column, (name, r) in enumerate(results.items()):
        top, bottom = axes[0][column], axes[1][column]
        top.plot(r["values"], [p["cpu_seconds"] for p in r["points"]], "o", color="tab:blue", label="measured")
        top.plot(r["values"], [p["flop"] / rate for p in r["points"]], "-", color="tab:gray", label="FLOPs at one rate")
        bottom.plot(r["values"], [p["memory_mb"] for p in r["points"]], "o", color="tab:orange", label="measured")
        bottom.plot(r["values"], [p["plan_mb"] for p in r["points"]], "-", color="tab:gray", label="mlx-dmpo plan")
        top.set_title(name, fontsize=10)
        for axis in (top, bottom):
            axis.set_ylim(bottom=0)
            axis.set_xlim(left=0)
            axis.tick_params(labelsize=7)
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[0][0].set_ylabel("CPU seconds a step")
    axes[1][0].set_ylabel("peak memory (MB)")
    axes[0][0].legend(fontsize=7)
    axes[1][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/images", metavar="DIR")
    parser.add_argument("--json", default="", metavar="FILE")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for name, (values, point) in AXES.items():
        results[name] = {"values": values, "points": [measure(point(v), options.repeat) for v in values]}
    every = [p for r in results.values() for p in r["points"]]
    rate = statistics.median(p["flop"] / p["cpu_seconds"] for p in every)
    print(f"rate {rate / 1e9:.1f} GFLOP/s of CPU time")
    for name, r in results.items():
        print(f"\n| {name} | CPU s a step | FLOPs at one rate | peak MB | plan |\n|---|---|---|---|---|")
        for value, p in zip(r["values"], r["points"], strict=True):
            print(
                f"| {value:,} | {p['cpu_seconds']:.3f} | {p['flop'] / rate:.3f} | {p['memory_mb']:.0f} | "
                f"{p['plan_mb']:.0f} |"
            )
    Path(options.out).mkdir(parents=True, exist_ok=True)
    draw(results, rate, Path(options.out) / "growth.png")
    if options.json:
        Path(options.json).write_text(json.dumps({"rate": rate, "axes": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
