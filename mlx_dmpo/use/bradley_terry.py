"""Win probabilities of pairs -> one strength an item: Bradley-Terry, with standard errors; Copeland; cyclic triples.

All functions take a table of the comparisons: counts (N, N) float64, counts[i, j] = how often i was put above j. A win
probability p of i over j is p wins for i and 1 - p for j.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PRIOR = 0.1  # precision of the Gaussian prior on a strength: a standard deviation of about 3.2


@dataclass(frozen=True, slots=True, eq=False)
class Strengths:
    """strength (N,), mean 0: P(i above j) = sigmoid(strength_i - strength_j). error (N,): its standard error."""

    strength: np.ndarray
    error: np.ndarray


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def fit(counts: np.ndarray, prior: float = PRIOR, steps: int = 200) -> Strengths:
    """The maximum a posteriori strengths (Bradley & Terry 1952, with a Gaussian prior).  counts (N, N) -> Strengths.

    Maximizes  sum_ij counts_ij log sigmoid(s_i - s_j) - prior / 2 sum_i s_i^2  by Newton's method. The prior keeps
    an item that won or lost every comparison finite, and items that were never compared at 0. The errors are the roots
    of the diagonal of the inverse Hessian: each comparison counts as one observation.
    """
    counts = np.asarray(counts, np.float64)
    N = len(counts)
    if N < 1 or counts.shape != (N, N) or not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("counts must be a square table of finite numbers that are not negative")
    together = counts + counts.T
    np.fill_diagonal(together, 0)

    def objective(s: np.ndarray) -> float:
        return float((counts * np.logaddexp(0, s[None] - s[:, None])).sum() + prior / 2 * (s @ s))

    strength = np.zeros(N)
    value = objective(strength)
    for _ in range(steps):
        wins = _sigmoid(strength[:, None] - strength[None])
        gradient = (counts - together * wins).sum(axis=1) - prior * strength
        if np.abs(gradient).max() < 1e-10:
            break
        step = np.linalg.solve(_hessian(together, wins, prior), gradient)
        size = 1.0
        while size > 1e-8 and objective(strength + size * step) > value:
            size /= 2
        if size <= 1e-8:
            break
        strength = strength + size * step
        value = objective(strength)
    strength = strength - strength.mean()
    wins = _sigmoid(strength[:, None] - strength[None])
    return Strengths(strength, np.sqrt(np.diag(np.linalg.inv(_hessian(together, wins, prior)))))


def _hessian(together: np.ndarray, wins: np.ndarray, prior: float) -> np.ndarray:
    """Of the negative log posterior.  (N, N), (N, N) -> (N, N), positive definite."""
    weight = together * wins * (1 - wins)
    return np.diag(weight.sum(axis=1) + prior) - weight


def win_probability(strength: np.ndarray) -> np.ndarray:
    """Mean probability that an item is put above another one of the list.  (N,) -> (N,); N at least 2."""
    wins = _sigmoid(strength[:, None] - strength[None])
    return (wins.sum(axis=1) - 0.5) / (len(strength) - 1)


def _beats(counts: np.ndarray) -> np.ndarray:
    return counts > counts.T


def copeland(counts: np.ndarray) -> np.ndarray:
    """Comparisons won minus comparisons lost; a tie counts for neither.  (N, N) -> (N,) int."""
    beats = _beats(counts)
    return beats.sum(axis=1) - beats.sum(axis=0)


def cyclic_triples(counts: np.ndarray) -> int:
    """Triples in which a is put above b, b above c and c above a, among those whose three pairs were compared."""
    beats = _beats(counts).astype(np.float64)  # exact: counts stay below 2^53; integer products are slow
    return int(((beats @ beats) * beats.T).sum()) // 3
