"""The rank of the liked title among N candidates: HR@k, NDCG@k, MRR, mean rank.

Tied candidates share the ranks that they occupy: each figure is its mean over all orders of the tied ones, as in
scikit-learn's ndcg_score, so that a scorer without an opinion gets what chance gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .bootstrap import Bootstrap

HIT_RATES, NDCGS = (1, 3, 5, 10), (5, 10)


def _shared(gains: np.ndarray, better: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """Mean gain over the ranks better + 1 … better + tied + 1.  gains[r − 1] of rank r; better, tied (n,) -> (n,)."""
    below = np.concatenate([[0.0], np.cumsum(gains)])
    return (below[better + tied + 1] - below[better]) / (tied + 1)


def hit_rate(better: np.ndarray, tied: np.ndarray, k: int) -> np.ndarray:
    """Chance that the positive is among the first k.  better, tied (n,): candidates scored above it, and equal to
    it."""
    ranks = np.arange(1, int((better + tied).max()) + 2)
    return _shared((ranks <= k).astype(float), better, tied)


def ndcg(better: np.ndarray, tied: np.ndarray, k: int) -> np.ndarray:
    """1 / log2(1 + rank) up to rank k, else 0: one title is relevant, so the ideal DCG is 1."""
    ranks = np.arange(1, int((better + tied).max()) + 2)
    return _shared(np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0), better, tied)


def reciprocal_rank(better: np.ndarray, tied: np.ndarray) -> np.ndarray:
    ranks = np.arange(1, int((better + tied).max()) + 2)
    return _shared(1 / ranks, better, tied)


def per_example(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Rows of candidates.jsonl -> each metric's (n,) values, under its key in metrics.json."""
    better, tied = (np.array([row[name] for row in rows], np.int64) for name in ("better", "tied"))
    return {
        **{f"hr@{k}": hit_rate(better, tied, k) for k in HIT_RATES},
        **{f"ndcg@{k}": ndcg(better, tied, k) for k in NDCGS},
        "mrr": reciprocal_rank(better, tied),
        "mean_rank": better + 1 + tied / 2,
    }


def candidate_metrics(rows: Sequence[Mapping[str, Any]], *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """`hr@1`, `hr@3`, … `mean_rank`, each {"value", "low", "high"}, of rows of candidates.jsonl. ValueError for no
    rows."""
    if not rows:
        raise ValueError("no rows to measure")
    bootstrap = Bootstrap([row["user"] for row in rows], resamples, seed)
    means = {name: bootstrap.mean(values) for name, values in per_example(rows).items()}
    bootstrap.run()
    return {name: bootstrap.metric(mean) for name, mean in means.items()}


def copeland(margins: np.ndarray) -> np.ndarray:
    """Copeland scores: how many candidates each one beats, a tie ½.  margins (N, N), antisymmetric -> (N,)."""
    return (margins > 0).sum(axis=1) + 0.5 * ((margins == 0).sum(axis=1) - 1)  # −1: against itself
