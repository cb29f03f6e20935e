"""The loss and its gradient, compiled where that pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..core.scorer import FrozenOutputs, frozen_layers
from ..core.selfcheck import GroupScorer
from ..core.tree import EncodedGroup, GroupBatch, pad_groups, planned
from ..model import device
from .objective import Objective

COMPILED_SHAPES = (
    64  # a compiled step keeps one program a shape for ever; past so many, a step of a new shape is not compiled
)


def compiles(scorer: GroupScorer, compiled: bool | None = None) -> bool:
    """Whether a step is compiled; None means on a GPU."""
    return scorer.shared and (not device.on_cpu() if compiled is None else compiled)


def padding(scorer: GroupScorer, compiled: bool | None = None) -> Callable[[Sequence[EncodedGroup]], GroupBatch]:
    """How a step wants its groups: in planned shapes where it is compiled."""
    return partial(pad_groups, sized=planned) if compiles(scorer, compiled) else pad_groups


def value_and_grad(
    model: nn.Module,
    scorer: GroupScorer,
    loss: Objective,
    checkpoint: bool,
    *,
    keep: float = 0,
    compiled: bool | None = None,
) -> Callable[[GroupBatch, np.ndarray | None, float, int | None], tuple[Any, Any]]:
    """(batch, reference, weight, dropout_seed) -> ((weight * sum of losses, losses (G,), margins (G, K), logps (G, R)), gradients).

    Only the adapter's leaves are differentiated. Tracing leaves its own arrays in the model: they are put back.

    keep      bytes in which outputs of layers below the adapter are kept between epochs
    compiled  by mx.compile, a program a shape (see `padding`); None means on a GPU. Not with dropout, whose seed a compiled step would fix.
    """
    compile_steps = compiles(scorer, compiled)
    frozen = FrozenOutputs(model, keep) if scorer.shared and frozen_layers(model) else None

    def run(
        parameters: Any,
        batch: GroupBatch,
        reference: mx.array | None,
        weight: Any,
        dropout_seed: int | None,
        **options: Any,
    ) -> tuple[mx.array, ...]:
        model.update(parameters)
        logps = scorer.logps(model, batch, checkpoint=checkpoint, dropout_seed=dropout_seed, **options)
        value, margin = loss(logps, reference, batch)
        return weight * value.sum(), value, margin, logps

    differentiate = mx.value_and_grad(run)

    def of_arrays(parameters: Any, arrays: dict[str, Any], reference: Any, weight: mx.array, options: Any) -> Any:
        return differentiate(parameters, GroupBatch(**arrays, groups=()), reference, weight, None, **options)

    program = mx.compile(of_arrays)
    shapes: set[Any] = set()

    def step(
        batch: GroupBatch, reference: np.ndarray | None, weight: float, dropout_seed: int | None
    ) -> tuple[Any, Any]:
        parameters = model.trainable_parameters()
        compile_it = compile_steps and dropout_seed is None
        if compile_it:
            arrays = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "groups"}
            shape = tuple(a.shape for a in arrays.values())
            compile_it = shape in shapes or len(shapes) < COMPILED_SHAPES
        given = None if reference is None else mx.array(reference)
        options = {"frozen": frozen(batch)} if frozen else {}
        try:
            if compile_it:
                shapes.add(shape)
                return program(
                    parameters, {k: mx.array(a) for k, a in arrays.items()}, given, mx.array(weight), options
                )
            return differentiate(parameters, batch, given, weight, dropout_seed, **options)
        finally:
            model.update(parameters)

    return step


def right_pairs(difference: np.ndarray, mask: np.ndarray) -> float:
    """How many pairs the policy ranks right, a tie ½.  (G, K), (G, K)."""
    return float((((difference > 0) + 0.5 * (difference == 0)) * mask).sum())
