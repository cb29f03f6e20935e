"""The rate that a training step reaches on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..core.tree import pad_groups
from .cost import Training, Work, assumed_groups, step_flops
from .shape import ModelShape

# Share of the rate of plain matrix products that a step reaches: only to estimate how long calibration takes
STEP_SHARE = 0.25


def calibrate(shape: ModelShape, training: Training, seconds: float = 10.0) -> float:
    """FLOP/s that a training step of the model's width reaches on this machine, in about `seconds`.

    Measured on two layers, on one group of k = 5, with a vocabulary that has the same share of the work as in the whole
    model; on a CPU in float32, as runs there. Where that would take too long, on a shorter group, then a smaller model.
    """
    import time

    import mlx.core as mx
    import mlx.nn as nn

    from ..core.scorer import shared_logps
    from .device import on_cpu
    from .random import random_qwen3

    width = 4 if on_cpu() else training.activation_bytes
    setting = replace(training, adapted_layers=2, keys=(), activation_bytes=width)
    small = replace(shape, layers=2, vocabulary=max(64, 2 * shape.vocabulary // shape.layers))
    begun = time.perf_counter()

    def timed(work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        mx.eval(work())
        return time.perf_counter() - started

    while True:
        model = random_qwen3(small, mx.float32 if width == 4 else mx.bfloat16, rank=training.rank)
        x, up = (
            mx.random.normal((32, small.hidden)).astype(model.model.norm.weight.dtype),
            model.model.layers[0].mlp.up_proj,
        )
        products = 2 * 32 * small.hidden * small.intermediate / min(timed(lambda: up(x)) for _ in range(2))  # noqa: B023
        lengths = [
            assumed_groups(1, k, history=history, vocabulary=small.vocabulary)
            for k, history in ((5, 22), (1, 22), (1, 2))
        ]
        batches = [pad_groups(groups) for groups in lengths]
        quick = [b for b in batches if 3 * step_flops(small, Work.of(b), setting) < STEP_SHARE * products * seconds]
        if quick or small.hidden <= 256:
            break
        small = replace(small, hidden=small.hidden // 2, intermediate=small.intermediate // 2)
    batch = (quick or batches[-1:])[0]
    step = nn.value_and_grad(model, lambda: shared_logps(model, batch, checkpoint=training.checkpoint).sum())
    timed(step)
    taken = [timed(step)]
    while len(taken) < 5 and time.perf_counter() - begun + taken[-1] < seconds:
        taken.append(timed(step))
    return step_flops(small, Work.of(batch), setting) / min(taken)
