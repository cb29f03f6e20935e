"""The training loop: one for every loss. It is handed everything, and knows no settings.

A step's loss is the mean over its groups, whatever their shapes and however they are split into micro-batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_map

from ..core.finite import all_finite
from ..core.tree import EncodedGroup
from ..machine import memory
from ..machine.ranks import world
from .batches import Step
from .checkpoint import State
from .step import StepFunction


@dataclass(frozen=True)
class Schedule:
    steps: int
    learning_rate: Callable[[int], float]  # of a step, counted from 0
    max_grad_norm: float = 0.0  # 0 does not clip
    save_every: int = 1  # steps
    validate_every: int = 0  # steps; 0 never validates
    patience: int = 0  # validations without a new best; 0 never stops early

    def ended(self, state: State) -> bool:
        return state.step == self.steps or bool(self.patience and state.waited >= self.patience)

    def validates(self, step: int) -> bool:
        return bool(self.validate_every) and (step % self.validate_every == 0 or step == self.steps)


@dataclass(frozen=True)
class Callbacks:
    """What happens around the steps. On several ranks all call the same ones, in the same order."""

    stopping: Callable[[], bool]  # whether the run is to stop after this step
    interrupted: Callable[[], Exception]  # what is raised then
    validate: Callable[[], None]  # clears state.validate, unless the run is to stop
    save: Callable[[], None]  # a checkpoint
    skipped: Callable[[Step, Sequence[EncodedGroup], Any], None]  # a step with NaN or Inf; its groups, its gradients
    leaner: Callable[[int, int, bool], None]  # memory did not suffice: the step, tokens run at once, recomputation
    done: Callable[[dict[str, float] | None, float], None]  # a step's sums (None: skipped) and its seconds


def fit(
    model: nn.Module,
    optimizer: optimizers.Optimizer,
    steps: Iterator[Step],
    loss: StepFunction,
    state: State,
    schedule: Schedule,
    callbacks: Callbacks,
) -> None:
    """Trains from `state` to the end of the schedule.

    One evaluation per micro-batch, one for the update. A micro-batch that does not fit in memory is split in two, once,
    and so are later ones of its size; where it cannot be split, layers are recomputed from there on.
    A step whose loss, gradient or update is NaN or Inf leaves weights and optimizer as they were.
    Raises `callbacks.interrupted()`, everything saved, where the run is to stop.
    """
    too_many: float = math.inf  # tokens of a micro-batch
    while True:
        stopping = callbacks.stopping()
        if state.validate and not stopping:
            callbacks.validate()
            stopping = callbacks.stopping()
        ended = schedule.ended(state)
        new_best = state.best is not None and state.best[1] == state.step
        if stopping or ended or new_best or state.step % schedule.save_every == 0:
            callbacks.save()
        if ended and not state.validate:
            return
        if stopping:
            raise callbacks.interrupted()

        begun = time.perf_counter()
        step = next(steps)
        parameters = model.trainable_parameters()
        gradients: Any = None if step.micro_batches else tree_map(mx.zeros_like, parameters)
        sums: dict[str, float] = dict.fromkeys(("loss", "margin", "right", "pairs", "tokens"), 0.0)
        bad: list[EncodedGroup] = []
        waiting = list(step.micro_batches)
        while waiting:
            micro_batch, outputs, more = waiting.pop(0), None, None
            if micro_batch.tokens >= too_many and (halves := micro_batch.halves()):
                waiting[:0] = halves
                continue
            try:
                run = loss.prepare(micro_batch, 1 / len(step.groups))
                try:
                    outputs, more = run()
                finally:
                    model.update(parameters)  # tracing leaves its own arrays in the model
                numbers, found = loss.measure(micro_batch, outputs, more)
            except (MemoryError, RuntimeError) as error:
                if not memory.is_allocation_failure(error):
                    raise
                if halves := micro_batch.halves():
                    too_many = micro_batch.tokens
                elif not loss.recompute():
                    raise
                waiting[:0] = halves or [micro_batch]
                callbacks.leaner(step.number, max(m.tokens for m in halves or [micro_batch]), loss.checkpoint)
            else:
                gradients = more if gradients is None else tree_map(mx.add, gradients, more)
                mx.async_eval(gradients)  # so that only one micro-batch's gradients exist beside their sum
                sums = {name: value + numbers[name] for name, value in sums.items()}
                bad += found
                continue
            outputs = more = None  # the failed attempt's arrays
            mx.clear_cache()
            mx.reset_peak_memory()

        gradients, sums = world().sum(gradients), world().sum_numbers(sums)
        state.step = step.number
        rate, finite = schedule.learning_rate(step.number - 1), math.isfinite(sums["loss"])
        if update(model, optimizer, gradients, rate, schedule.max_grad_norm, keep=finite):
            state.bad_in_a_row = 0
            callbacks.done(sums | {"groups": float(len(step.groups))}, time.perf_counter() - begun)
        else:
            callbacks.skipped(step, bad, gradients)
            callbacks.done(None, time.perf_counter() - begun)
        state.validate = schedule.validates(step.number)


def update(
    model: nn.Module, optimizer: optimizers.Optimizer, gradients: Any, rate: float, max_norm: float, keep: bool
) -> bool:
    """One optimizer step -> whether it was taken.

    Where `keep` is false, or a number is NaN or Inf, weights and optimizer stay as they were.
    """
    before = model.trainable_parameters(), tree_map(lambda a: a, optimizer.state)
    clipped = optimizers.clip_grad_norm(gradients, max_norm)[0] if max_norm else gradients
    optimizer.learning_rate = rate
    optimizer.update(model, clipped)
    after = model.trainable_parameters(), optimizer.state
    finite = all_finite(gradients, *after)
    mx.eval(finite, *after)
    if keep and finite.item():
        return True
    model.update(before[0])
    optimizer.state = before[1]
    return False
