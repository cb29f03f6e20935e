"""When training and held-out accuracy part by more than chance explains"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

GAP = 0.15  # of pair accuracy, at least
Z = 2.5758  # two-sided 99 %: a run validates many times


def upper_bound(accuracy: float, users: int) -> float:
    """Upper end of Wilson's 99 % interval of an accuracy measured on so many users."""
    z2 = Z * Z / users
    spread = Z * math.sqrt(accuracy * (1 - accuracy) / users + z2 / (4 * users))
    return (accuracy + z2 / 2 + spread) / (1 + z2)


def is_overfitting(train: float, held_out: float, users: int) -> bool:
    """Whether training pair accuracy exceeds the held-out one by more than GAP and lies above its 99 % interval.

    train  running mean over the steps since the last validation, so it lags behind the present one
    users  validation users: pairs of one user are not independent, so users are counted, not pairs
    """
    return train - held_out > GAP and upper_bound(held_out, users) < train


def last_line(lines: Sequence[Mapping[str, Any]], best_step: int, dmpo: bool) -> str:
    """What to lower, where the last validation of metrics.jsonl found overfitting; else nothing."""
    found = next((line for line in reversed(lines) if "valid_loss" in line), {})
    if not found.get("overfitting"):
        return ""
    train, held_out = found["train_pair_accuracy"], found["valid_pair_accuracy"]
    lower = "--learning-rate, --epochs or --num-negatives" if dmpo else "--learning-rate or --epochs"
    return (
        f"train {train:.2f}, held out {held_out:.2f}: overfitting; the best step was {best_step}: lower {lower}, "
        "or train on more users"
    )
