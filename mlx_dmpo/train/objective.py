"""The settings' loss."""

from __future__ import annotations

from ..config import DmpoSettings, TrainSettings
from ..core import losses


def objective(settings: TrainSettings) -> losses.Loss:
    """The loss that the settings name; SFT's margins are policy differences in nats."""
    if not isinstance(settings, DmpoSettings):
        return losses.sft_loss
    return losses.preference_loss(
        settings.loss,
        beta=settings.beta,
        gamma=settings.gamma,
        smoothing=settings.label_smoothing,
        sft_weight=settings.sft_weight,
        boundary=settings.negatives_select == "boundary",
        dynamic_beta=settings.dynamic_beta,
    )


def needs_reference(settings: TrainSettings) -> bool:
    return (
        isinstance(settings, DmpoSettings)
        and settings.loss not in losses.WITHOUT_REFERENCE
        and not settings.reference_free
    )


def lower(settings: TrainSettings) -> str:
    """The flags by which a run learns more slowly, for messages."""
    return "--learning-rate" + (" or --beta" if isinstance(settings, DmpoSettings) else "")
