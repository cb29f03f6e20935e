"""Tests of a difference between two rankers on the same examples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def bootstrap_p(draws: np.ndarray) -> float:
    """Two-sided p of "no difference" from resampled differences: twice the smaller share on either side of 0.

    It agrees with the percentile interval: below .05 where that leaves out 0. The added 1 keeps it above 0 (Davison and
    Hinkley 1997, 4.2): with B resamples no p is below 2 / (B + 1).
    """
    below, above = (1 + int((draws <= 0).sum())), (1 + int((draws >= 0).sum()))
    return min(1.0, 2 * min(below, above) / (len(draws) + 1))


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """McNemar's exact test: two-sided binomial p of the pairs that only one of the two ranks right.  a, b (n,) bool.

    It takes the pairs as independent, which those of one user are not; the bootstrap over users does not.
    """
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    terms = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, terms)))


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected for testing several at once (Holm 1979): the i-th smallest of m times m − i, never
    decreasing."""
    corrected, largest = [0.0] * len(p), 0.0
    for i, index in enumerate(sorted(range(len(p)), key=lambda j: p[j])):
        largest = max(largest, min(1.0, (len(p) - i) * p[index]))
        corrected[index] = largest
    return corrected
