"""The optimizer and its learning rate."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.optimizers as optimizers

from ..config import TrainSettings
from ..errors import UserError
from ..model import schedule

KINDS = {
    "adamw": optimizers.AdamW,
    "adam": optimizers.Adam,
    "sgd": optimizers.SGD,
    "adafactor": optimizers.Adafactor,
    "muon": optimizers.Muon,
    "lion": optimizers.Lion,
}


def learning_rate(settings: TrainSettings, step: int, steps: int) -> float:
    """The rate of a 0-based `step` of `steps`.

    Warm-up to the peak, which its last step reaches, then the schedule down to 0.
    """
    if isinstance(settings.lr_schedule, dict):
        return schedule.schedule_rate(settings.lr_schedule, step)
    warmup = round(settings.warmup * steps) if settings.warmup < 1 else int(settings.warmup)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    fall = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[settings.lr_schedule]
    return settings.learning_rate * fall


def build_optimizer(settings: TrainSettings) -> optimizers.Optimizer:
    """Raises UserError for arguments that the optimizer does not take."""
    arguments = dict(settings.optimizer_config)
    if settings.weight_decay or settings.optimizer == "adamw":  # adamw's own default is not 0
        arguments.setdefault("weight_decay", settings.weight_decay)
    if settings.optimizer == "adafactor":
        arguments.setdefault("relative_step", False)
    try:
        return KINDS[settings.optimizer](learning_rate=settings.learning_rate, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer: {settings.optimizer}: {error}: change optimizer_config or weight_decay") from None


def check_optimizer(settings: TrainSettings) -> None:
    """Raises UserError for a schedule or optimizer arguments that fail when they are first used."""
    rates = [learning_rate(settings, step, 1000) for step in (0, 1, 10, 100, 999)]
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise UserError(f"lr_schedule: gives rates such as {min(rates):g}: give one that stays at 0 or above")
    optimizer, weights = build_optimizer(settings), {"weight": mx.zeros((2, 2))}
    try:
        mx.eval(optimizer.apply_gradients({"weight": mx.ones((2, 2))}, weights))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"optimizer_config: {settings.optimizer} fails ({first}): change its values") from None
