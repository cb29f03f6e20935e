"""Is σ(margin) a probability? Reliability curve, expected calibration error and Brier score of the preferred title.

A pair read the other way round has margin −m and the other outcome, so both readings say the same: the confidence
σ(|m|) ≥ ½ in the preferred title, against how often that title is the liked one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .bootstrap import Bootstrap

BINS = 10  # of equal width over confidences from ½ to 1


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(−x)), without overflow."""
    return np.exp(-np.logaddexp(0, -x))


def calibration(bootstrap: Bootstrap, margin: np.ndarray, right: np.ndarray) -> Callable[[], dict[str, Any]]:
    """Registers its statistics; the returned function reads them after `bootstrap.run`.

    margin, right  (n,): margins in nats; 1 where the liked title is preferred, ½ at a tie
    ece            Σ_b n_b / n · |accuracy_b − confidence_b| over the bins
    brier          mean of (1 − σ(m))²
    curve          a row per occupied bin: confidence, accuracy with its interval, n
    """
    confidence = sigmoid(np.abs(margin))
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    rows, gaps = [], []
    for b in range(BINS):
        mask = bins == b
        gaps.append(bootstrap.column(np.where(mask, right - confidence, 0.0)))
        if mask.any():
            rows.append((b, mask, bootstrap.mean(confidence, mask), bootstrap.mean(right, mask)))
    n = bootstrap.column(np.ones(len(margin)))
    brier = bootstrap.mean((1 - sigmoid(margin)) ** 2)

    def ece(sums: np.ndarray) -> np.ndarray:
        return np.abs(sums[..., gaps]).sum(axis=-1) / sums[..., n]

    def found() -> dict[str, Any]:
        curve = [
            {
                "low_edge": 0.5 + b / (2 * BINS),
                "high_edge": 0.5 + (b + 1) / (2 * BINS),
                "n": int(mask.sum()),
                "confidence": bootstrap.metric(mean)["value"],
                "accuracy": bootstrap.metric(accuracy, mask),
            }
            for b, mask, mean, accuracy in rows
        ]
        return {"ece": bootstrap.metric(ece), "brier": bootstrap.metric(brier), "curve": curve}

    return found
