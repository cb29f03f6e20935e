"""Log-probabilities of a batch -> its losses and margins."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx

from ..config import DmpoSettings, TrainSettings
from ..core import losses
from ..core.tree import GroupBatch

# (policy (G, R), reference (G, R) or None, batch) -> losses (G,), margins (G, K)
Objective = Callable[[mx.array, mx.array | None, GroupBatch], tuple[mx.array, mx.array]]


def objective(settings: TrainSettings) -> Objective:
    """The settings' loss of a batch's log-probs, and its margins (SFT's are policy differences in nats)."""

    def sft(policy: mx.array, reference: mx.array | None, batch: GroupBatch) -> tuple[mx.array, mx.array]:
        return losses.sft(policy, mx.array(batch.chosen_lengths)), losses.pair_difference(policy, mx.array(batch.pairs))

    if not isinstance(settings, DmpoSettings):
        return sft
    reductions: dict[str, Callable[..., mx.array]] = {
        "dpo": losses.dpo,
        "dmpo": losses.dmpo,
        "s-dpo": losses.s_dpo,
        "simpo": partial(losses.simpo, gamma=settings.gamma),
    }
    reduce = reductions[settings.loss]

    def preference(policy: mx.array, reference: mx.array | None, batch: GroupBatch) -> tuple[mx.array, mx.array]:
        scored = (
            policy / mx.maximum(mx.array(batch.answer_mask).sum(axis=-1), 1) if settings.loss == "simpo" else policy
        )
        margin = losses.margins(scored, reference, mx.array(batch.pairs), settings.beta)
        loss = reduce(margin, mx.array(batch.pair_mask), smoothing=settings.label_smoothing)
        if settings.sft_weight:
            loss = loss + settings.sft_weight * losses.sft(policy, mx.array(batch.chosen_lengths))
        return loss, margin

    return preference


def needs_reference(settings: TrainSettings) -> bool:
    return isinstance(settings, DmpoSettings) and settings.loss != "simpo" and not settings.reference_free
