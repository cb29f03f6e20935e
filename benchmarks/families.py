"""Each family of models on the shared-prefix scorer: how far from the plain scorer, and how much faster.

python benchmarks/families.py [--repeats 3] [--json docs/results/families.json]

Small random models of mlx-lm's own classes (4 layers of 256), groups of assumed lengths with k = 5, LoRA on every
linear layer. Compared are log-probs in nats and the adapter's gradient, in float32 and on 4-bit weights (k = 1, since
quantized products are slow on a CPU). Times are of
value and gradient of one group, the two scorers in turn, medians. A random model's log-probs are far from 0, which is
the harder case for a limit in nats.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import shapes
from mlx.utils import tree_flatten

from mlx_dmpo.core.scorer import plain_logps, shared_logps
from mlx_dmpo.core.selfcheck import choose_scorer
from mlx_dmpo.core.tree import GroupBatch, pad_groups
from mlx_dmpo.machine.run_directory import versions
from mlx_dmpo.model.cost import assumed_groups

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
models: Any = importlib.import_module("families")  # the same small models as the tests'


def gradient(model: nn.Module, score: Callable[..., mx.array], batch: GroupBatch) -> tuple[mx.array, Any]:
    """(G, R) log-probs, and the gradient of their weighted sum."""
    weights = mx.array(np.random.default_rng(0).normal(size=batch.answer_mask.shape[:2]).astype(np.float32))

    def total() -> tuple[mx.array, mx.array]:
        logps = score(model, batch)
        return (weights * logps).sum(), logps

    (_, logps), found = nn.value_and_grad(model, total)()
    mx.eval(logps, found)
    return logps, found


def difference(model: nn.Module, batch: GroupBatch) -> dict[str, float]:
    """Largest difference of a log-prob in nats; relative difference of the gradients."""
    shared, plain = (gradient(model, score, batch) for score in (shared_logps, plain_logps))
    both = [np.concatenate([np.array(a).ravel() for _, a in tree_flatten(g)]) for g in (shared[1], plain[1])]
    return {
        "nats": float(mx.abs(shared[0] - plain[0]).max()),
        "gradient": float(np.linalg.norm(both[0] - both[1]) / np.linalg.norm(both[1])),
    }


def seconds(model: nn.Module, batch: GroupBatch, repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {"shared": [], "plain": []}
    for _ in range(repeats):
        for name, score in (("shared", shared_logps), ("plain", plain_logps)):
            started = time.perf_counter()
            gradient(model, score, batch)
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(of) for name, of in times.items()}


def measure(name: str, repeats: int) -> dict[str, Any]:
    module, given = models.FAMILIES[name]
    sizes = shapes.family_sizes(given)
    batch = pad_groups(assumed_groups(1, 5, vocabulary=sizes["vocab_size"]))
    short = pad_groups(assumed_groups(1, 1, history=12, vocabulary=sizes["vocab_size"]))
    found: dict[str, Any] = {"module": module, "window": "sliding_window" in given}
    for column, bits in (("float32", 0), ("4-bit", 4)):
        model = models.build(module, given, bits=bits, lora_layers=4, **sizes)
        found[column] = difference(model, short if bits else batch)
        if not bits:
            found["accepted"] = choose_scorer(model, sizes["vocab_size"]).shared
            found["seconds"] = seconds(model, batch, repeats)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="one family")
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    for name in [args.only] if args.only else models.FAMILIES:
        rows[name] = measure(name, args.repeats)
        row = rows[name]
        print(
            f"{name:<16} {row['float32']['nats']:.1e} nats, gradient {row['float32']['gradient']:.1e}; 4-bit "
            f"{row['4-bit']['nats']:.1e}, {row['4-bit']['gradient']:.1e}; "
            f"{row['seconds']['plain'] / row['seconds']['shared']:.1f} times faster",
            flush=True,
        )
    if args.json:
        found = {"device": str(mx.default_device()), "mlx": versions()["mlx"], "families": rows}
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
