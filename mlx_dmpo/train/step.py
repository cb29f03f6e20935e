"""The loss and its gradient, compiled where that pays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..core import losses
from ..core.finite import all_finite
from ..core.scorer import FrozenOutputs, Kept, frozen_layers
from ..core.selfcheck import GroupScorer
from ..core.tree import EncodedGroup, GroupBatch, pad_groups, planned
from ..machine import memory
from ..model import device
from .batches import MicroBatch

COMPILED_SHAPES = 64  # a compiled step keeps one program per shape for ever; beyond these, new shapes are not compiled

# (weight * sum of losses, losses (G,), margins (G, K), logps (G, R)), gradients
Outputs = tuple[tuple[mx.array, mx.array, mx.array, mx.array], Any]


def compiles(scorer: GroupScorer, compiled: bool | None = None) -> bool:
    """Whether a step is compiled; None means on a GPU."""
    return scorer.shared and (not device.on_cpu() if compiled is None else compiled)


def padding(scorer: GroupScorer, compiled: bool | None = None) -> Callable[[Sequence[EncodedGroup]], GroupBatch]:
    """How groups are padded for a step: to planned shapes where it is compiled."""
    return partial(pad_groups, sized=planned) if compiles(scorer, compiled) else pad_groups


class StepFunction:
    """The loss of a micro-batch and its gradient with respect to the adapter.

    checkpoint    recompute each layer in the backward pass
    leaner        whether `recompute` may turn that on
    keep          bytes in which outputs of layers below the adapter are kept between epochs
    disk          where they are kept as well, for other runs
    epoch         groups per epoch
    compiled      by mx.compile, one program per shape (see `padding`); None means on a GPU. Not with dropout, whose
                  seed a compiled step would fix.
    memory_limit  gigabytes; a micro-batch that takes more fails like one that does not fit. 0 sets no limit.
    """

    def __init__(
        self,
        model: nn.Module,
        scorer: GroupScorer,
        loss: losses.Loss,
        checkpoint: bool,
        *,
        keep: float = 0,
        disk: Kept | None = None,
        epoch: int = 0,
        compiled: bool | None = None,
        memory_limit: float = 0.0,
        leaner: bool = False,
    ):
        self.model, self.memory_limit = model, memory_limit
        self.checkpoint, self._leaner = checkpoint, leaner
        self.peak = 0  # bytes, over all micro-batches
        self._compiled = compiles(scorer, compiled)
        self._frozen = FrozenOutputs(model, keep, epoch, disk) if scorer.shared and frozen_layers(model) else None
        self._shapes: set[Any] = set()

        def forward(
            parameters: Any, arrays: dict[str, Any], groups: Any, reference: Any, weight: Any, seed: Any, options: Any
        ) -> tuple[mx.array, ...]:
            model.update(parameters)
            batch = GroupBatch(**arrays, groups=groups)
            logps = scorer.logps(model, batch, checkpoint=self.checkpoint, dropout_seed=seed, **options)
            value, margin = loss(logps, reference, batch)
            return weight * value.sum(), value, margin, logps

        self._run: Any = mx.value_and_grad(forward)
        self._program = mx.compile(self._run)

    def recompute(self) -> bool:
        """Recomputes each layer in the backward pass from here on -> whether it did not before, and may."""
        if self.checkpoint or not self._leaner:
            return False
        self.checkpoint = True
        self._shapes.clear()
        self._program = mx.compile(self._run)
        return True

    def prepare(self, micro_batch: MicroBatch, weight: float) -> Callable[[], Outputs]:
        """The call that computes `Outputs`. It leaves traced arrays in the model: put the parameters back after it.

        weight  of each group's loss in the sum
        """
        batch, seed = micro_batch.batch, micro_batch.seed
        reference = None if micro_batch.reference is None else mx.array(micro_batch.reference)
        options = {"frozen": self._frozen(batch)} if self._frozen else {}
        if self.memory_limit:
            mx.reset_peak_memory()
        parameters = self.model.trainable_parameters()
        arrays = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "groups"}
        if self._compiled and seed is None:
            shape = tuple(a.shape for a in arrays.values())
            if shape in self._shapes or len(self._shapes) < COMPILED_SHAPES:
                self._shapes.add(shape)
                given = {name: mx.array(a) for name, a in arrays.items()}
                return partial(self._program, parameters, given, (), reference, mx.array(weight), None, options)
        return partial(self._run, parameters, arrays, batch.groups, reference, weight, seed, options)

    def measure(
        self, micro_batch: MicroBatch, outputs: Any, gradients: Any
    ) -> tuple[dict[str, float], Sequence[EncodedGroup]]:
        """Evaluates everything -> sums over the micro-batch, and its groups with NaN or Inf. Raises MemoryError."""
        _, value, margin, logps = outputs
        batch = micro_batch.batch
        difference, finite = losses.pair_difference(logps, mx.array(batch.pairs)), all_finite(gradients)
        mx.eval(value, margin, difference, finite, gradients)
        self.peak = max(self.peak, mx.get_peak_memory())
        memory.check(self.memory_limit)
        sums = {
            "loss": float(value.sum()),
            "margin": float((np.array(margin) * batch.pair_mask).sum()),
            "right": right_pairs(np.array(difference), batch.pair_mask),
            "pairs": float(batch.pair_mask.sum()),
            "tokens": float(sum(g.shared_tokens for g in batch.groups)),
        }
        bad = [g for g, v in zip(batch.groups, np.array(value), strict=True) if not math.isfinite(v)]
        return sums, bad or ([] if finite.item() else batch.groups)

    def __call__(self, batch: GroupBatch, reference: np.ndarray | None, weight: float, seed: int | None) -> Outputs:
        """One batch, outside the loop."""
        parameters = self.model.trainable_parameters()
        try:
            return self.prepare(MicroBatch(np.arange(len(batch.groups)), batch, reference, seed), weight)()
        finally:
            self.model.update(parameters)


def right_pairs(difference: np.ndarray, mask: np.ndarray) -> float:
    """How many pairs the policy ranks correctly; a tie counts ½.  (G, K), (G, K)."""
    return float((((difference > 0) + 0.5 * (difference == 0)) * mask).sum())
