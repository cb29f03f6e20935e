"""Loss, margin and order-debiased pair accuracy on the validation groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..core.losses import Loss
from ..core.scorer import FrozenOutputs
from ..core.selfcheck import GroupScorer
from ..core.tree import BATCH_TOKENS, pad_groups
from ..machine import console
from ..model.score import score_groups
from .batches import GroupSource
from .checkpoint import State
from .reference import Reference
from .reporting import Report
from .step import right_pairs


@dataclass(frozen=True)
class Validation:
    """Measures the validation groups, reports, and updates the state's best."""

    model: nn.Module
    scorer: GroupScorer
    source: GroupSource
    loss: Loss
    reference: Reference | None
    batch_size: int
    best_metric: str  # auto, valid_loss or valid_pair_accuracy
    interrupted: Callable[[], bool]  # whether to give up: the validation is then done on resume, from its start
    tokens: int = BATCH_TOKENS  # run at once
    frozen: FrozenOutputs | None = None  # keeps what the layers below the adapter give

    def measure(self) -> dict[str, float] | None:
        """The numbers of a line of metrics.jsonl; None where it was interrupted."""
        groups, orders = self.source.epoch(0), 2 if self.source.both else 1
        loss = margin = right = pairs = 0.0
        scored = score_groups(
            self.model, self.scorer, groups, self.batch_size, "validate", self.tokens, frozen=self.frozen
        )
        for group, logps in scored:
            if self.interrupted():
                return None
            reference = None if self.reference is None else mx.array(self.reference.logps([group]))
            per_group, margins = self.loss(mx.array(logps[None]), reference, pad_groups([group]))
            loss += float(per_group[0])
            margin += float(margins.mean())
            # the printed orders of a pair are next to each other; free text has one
            difference = (logps[group.pairs[:, 0]] - logps[group.pairs[:, 1]]).reshape(-1, orders).sum(axis=1)
            right += right_pairs(difference, np.ones_like(difference))
            pairs += len(difference)
        numbers = {"valid_loss": loss / len(groups)}
        if pairs:
            numbers |= {"valid_margin": margin / len(groups), "valid_pair_accuracy": right / pairs}
        return numbers

    def run(self, state: State, report: Report) -> None:
        numbers = self.measure()
        if numbers is None:
            return
        state.validate = False
        if not all(map(math.isfinite, numbers.values())):
            state.waited += 1
            console.notice(f"note: step {state.step}: the validation has NaN or Inf; it cannot be the best")
            return
        by_loss = self.best_metric == "valid_loss" or "valid_pair_accuracy" not in numbers
        loss = numbers["valid_loss"]
        value = loss if by_loss else -numbers["valid_pair_accuracy"]
        better = state.best is None or (value, loss) < (state.best[0], state.best[2])
        state.waited = 0 if better else state.waited + 1
        if better:
            state.best = (value, state.step, loss)
        users = len({(e.domain, e.user) for e in self.source.examples})
        report.validated(numbers, better, users if users > 1 else len(self.source.examples))
