"""When training and held-out numbers part by more than chance explains"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

GAP = 0.15  # of pair accuracy, at least
RISE = 1.05  # of the validation loss over its lowest, where training has no pairs
Z = 2.5758  # two-sided 99 %: a run validates many times


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 99 % interval of a share of n trials (Wilson 1927, J. Am. Stat. Assoc. 22:209)."""
    z2 = Z * Z / n
    half = Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n))
    return (share + z2 / 2 - half) / (1 + z2), (share + z2 / 2 + half) / (1 + z2)


def compared(
    numbers: Mapping[str, float],
    since: Mapping[str, float],
    earlier: Sequence[Mapping[str, Any]],
    users: int,
    best: bool,
) -> dict[str, Any]:
    """A validation beside the training steps since the last one: train_pair_accuracy or train_loss, and overfitting.

    since    sums over these steps: right, pairs, loss, groups. They lag behind the present weights.
    earlier  the lines of metrics.jsonl before this one
    users    of the validation: pairs of one user are not independent, so users are counted, not pairs
              (of a single user, examples)
    best     whether this validation is the best so far

    With pairs, a run overfits where the training accuracy exceeds the held-out one by more than GAP and their 99 %
    intervals are apart, while the held-out one is no longer improving or is not above one half. A gap alone is not a
    fault.
    Without (SFT), where the validation loss is 5 % above its lowest and the training loss below that lowest.
    """
    if since.get("pairs") and "valid_pair_accuracy" in numbers:
        train, held_out = since["right"] / since["pairs"], numbers["valid_pair_accuracy"]
        low, high = wilson(held_out, users)
        parted = train - held_out > GAP and high < wilson(train, int(since["groups"]))[0]
        return {"train_pair_accuracy": train, "overfitting": parted and (not best or low < 0.5)}
    if not since.get("groups"):
        return {}
    train, loss = since["loss"] / since["groups"], numbers["valid_loss"]
    lowest = min((line["valid_loss"] for line in earlier if "valid_loss" in line), default=loss)
    return {"train_loss": train, "overfitting": loss > RISE * lowest and train < lowest}


def last_line(lines: Sequence[Mapping[str, Any]], best_step: int, lower: str) -> str:
    """What to change, where the last validation of metrics.jsonl found overfitting; else nothing.

    lower  the flags by which the run would learn more slowly
    """
    validations = [line for line in lines if "valid_loss" in line]
    if not validations or not validations[-1].get("overfitting"):
        return ""
    last = validations[-1]
    if "train_pair_accuracy" in last:
        shown = f"train {last['train_pair_accuracy']:.2f}, held out {last['valid_pair_accuracy']:.2f}"
    else:
        lowest = min(line["valid_loss"] for line in validations)
        shown = f"training loss {last['train_loss']:.3f}, held out {last['valid_loss']:.3f} (lowest {lowest:.3f})"
    return f"{shown}: overfitting; the best step was {best_step}: lower {lower} or --epochs, or train on more users"
