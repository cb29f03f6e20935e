"""Our DMPO step on this device with 1, 2, 4, ... groups at once: time, share of the matmul peak, memory beside the
plan: python benchmarks/device.py [--shapes qwen3-0.6b,qwen3-8b-4bit] [--groups 1,4,16] [--json FILE]

The step is the one that `mlx-dmpo dmpo` runs, not compiled and compiled (then padded to planned shapes); on a GPU in
bfloat16. Groups are made up, as long as the released ML-1M ones. Floating-point operations count real tokens only, so
padding lowers the share. Before it is timed, the shared scorer is compared with the plain one on the same device
(values and gradients).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import contenders
import mlx.core as mx
import numpy as np
import shapes
from run import matmul_peak

from mlx_dmpo.config import DmpoSettings
from mlx_dmpo.core.selfcheck import choose_scorer
from mlx_dmpo.core.tree import pad_groups
from mlx_dmpo.machine.memory import is_allocation_failure
from mlx_dmpo.model import cost, device, prefix_attention
from mlx_dmpo.train import objective
from mlx_dmpo.train import step as train_step


def measure(
    shape: Any, model: Any, scorer: Any, count: int, k: int, compiled: bool, repeats: int, peak: float
) -> dict[str, Any]:
    """One micro-batch of so many groups: medians after two steps that compile and fill caches."""
    groups = cost.assumed_groups(count, k, vocabulary=shape.vocabulary)
    width = model.model.norm.weight.dtype.size
    training = cost.Training(shape.layers, activation_bytes=width)
    padded = train_step.padding(scorer, compiled)(groups)
    reference = np.zeros(padded.answer_mask.shape[:2], np.float32)
    run = train_step.StepFunction(model, scorer, objective.objective(DmpoSettings()), False, compiled=compiled)
    step: Any = contenders.optimized(model, lambda batch: run(batch, reference, 1 / count, None))
    started = time.perf_counter()
    for _ in range(2):
        step(padded)
    mx.synchronize()
    first = time.perf_counter() - started
    mx.reset_peak_memory()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        step(padded)
        mx.synchronize()
        seconds.append(time.perf_counter() - started)
    measured = mx.get_peak_memory()
    model.eval()
    scoring = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        mx.eval(scorer.logps(model, padded))
        scoring.append(time.perf_counter() - started)
    model.train()
    work = cost.Work.of(pad_groups(groups))
    taken = statistics.median(seconds)
    return {
        "groups": count,
        "compiled": compiled,
        "first_two_seconds": first,
        "tokens": work.tokens,
        "seconds": taken,
        "groups_per_second": count / taken,
        "share_of_peak": cost.step_flops(shape, work, training) / taken / peak,
        "scoring_seconds": statistics.median(scoring[1:]),
        "scoring_share_of_peak": cost.forward_flops(shape, work) / statistics.median(scoring[1:]) / peak,
        "peak_gb": measured / 1e9,
        "planned_gb": cost.memory(shape, cost.Work.of(padded), training)["peak"] / 1e9,
        "padding": padded.padding_share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen3-0.6b,qwen3-8b-4bit", help=f"of {', '.join(shapes.SHAPES)}")
    parser.add_argument("--groups", default="1,2,4,8,16", help="at once, each measured by itself")
    parser.add_argument("--compile", default="no,yes", help="no, yes or both, in this order (default no,yes)")
    parser.add_argument("-k", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    on_cpu = device.on_cpu()
    peak = matmul_peak(mx.float32 if on_cpu else mx.bfloat16)
    print(f"{device.device_name()}, mlx {metadata.version('mlx')}: matmul peak {peak / 1e12:.3g} TFLOP/s", flush=True)
    out: dict[str, Any] = {
        "device": device.device_name(),
        "mlx": metadata.version("mlx"),
        "matmul_flops": peak,
        "shapes": {},
    }
    for name in options.shapes.split(","):
        shape = shapes.SHAPES[name]
        model = shapes.build(shape)
        chunk = prefix_attention.chunk_for(model)
        started = time.perf_counter()
        scorer = choose_scorer(model, shape.vocabulary, chunk=chunk)
        found: dict[str, Any] = {"shared_equals_plain": scorer.shared, "reason": scorer.reason, "prefix_chunk": chunk}
        print(
            f"\n{name}: shared scorer {'equals the plain one' if scorer.shared else scorer.reason} "
            f"({time.perf_counter() - started:.1f} s); prefix queries at once: {'all' if chunk > 10_000 else chunk}\n"
            "| compiled | groups | tokens | first two steps, s | s | groups/s | % of peak | scoring s | % of peak | peak GB | planned | padding |\n"
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
            flush=True,
        )
        found["steps"] = []
        out["shapes"][name] = found
        for how in options.compile.split(","):
            for count in map(int, options.groups.split(",")):
                try:
                    r = measure(shape, model, scorer, count, options.k, how == "yes", options.repeat, peak)
                except (MemoryError, RuntimeError) as error:
                    if not is_allocation_failure(error):
                        raise
                    print(f"| {how} | {count} | does not fit: {str(error).splitlines()[0]} |", flush=True)
                    break
                found["steps"].append(r)
                print(
                    f"| {how} | {count} | {r['tokens']:,} | {r['first_two_seconds']:.1f} | {r['seconds']:.4f} | "
                    f"{r['groups_per_second']:.2f} | {100 * r['share_of_peak']:.1f} | {r['scoring_seconds']:.4f} | "
                    f"{100 * r['scoring_share_of_peak']:.1f} | {r['peak_gb']:.2f} | {r['planned_gb']:.2f} | "
                    f"{100 * r['padding']:.1f} % |",
                    flush=True,
                )
                if options.json:
                    Path(options.json).write_text(json.dumps(out, indent=2) + "\n")
        del model, scorer
        gc.collect()
        mx.clear_cache()


if __name__ == "__main__":
    main()
