"""The optimizer and its learning rate."""

from __future__ import annotations

import math

import mlx.optimizers as optimizers

from ..config import TrainSettings
from ..errors import UserError
from ..model import schedule


def learning_rate(settings: TrainSettings, step: int, steps: int) -> float:
    """The rate of 0-based `step` of `steps`: warm-up to the peak, which its last step reaches, then the schedule down to 0."""
    if isinstance(settings.lr_schedule, dict):
        return schedule.schedule_rate(settings.lr_schedule, step)
    warmup = round(settings.warmup * steps) if settings.warmup < 1 else int(settings.warmup)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    fall = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[settings.lr_schedule]
    return settings.learning_rate * fall


def build_optimizer(settings: TrainSettings) -> optimizers.Optimizer:
    """Raises UserError for arguments that the optimiser does not take."""
    kind = {
        "adamw": optimizers.AdamW,
        "adam": optimizers.Adam,
        "sgd": optimizers.SGD,
        "adafactor": optimizers.Adafactor,
        "muon": optimizers.Muon,
        "lion": optimizers.Lion,
    }[settings.optimizer]
    arguments = dict(settings.optimizer_config)
    if settings.weight_decay or settings.optimizer == "adamw":  # adamw's own default is not 0
        arguments.setdefault("weight_decay", settings.weight_decay)
    if settings.optimizer == "adafactor":
        arguments.setdefault("relative_step", False)
    try:
        return kind(learning_rate=settings.learning_rate, **arguments)
    except TypeError as error:
        raise UserError(f"optimizer: {settings.optimizer}: {error}: change optimizer_config or weight_decay") from None
