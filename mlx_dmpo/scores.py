"""The contract between whatever scores examples and whatever uses the scores.

A language model, popularity and SASRec are Scorers alike; evaluation, comparison, ranking and reports see nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .errors import UserError
from .records import Example


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """The scores of one example with K pairs: its positive against each of its K negatives.

    margins  (K,) float64: above 0 where the positive is ranked above the negative, 0 for a tie. For prompts in two
             printed orders, the sum over both.
    logps    (K, O, 2) float64, nats: pair, printed order (O = 2: the positive printed first, then second; O = 1: one
             prompt without an order, or the mean over several), answer (chosen, rejected). The numbers that a margin is
             made of: log-probs, or for pointwise the log-odds of Yes. None for a scorer without log-probabilities.
    items    (1 + K,) float64: one score per candidate, the positive first, then the negatives; a higher score ranks
             higher. None for a scorer that only compares pairs.
    places   (1 + K,) float64, of prompts that print all candidates (listwise): the share of the printed orders in which
             the candidate printed in this place had the highest score; ties share. None where nothing is printed.
    """

    example: Example
    margins: np.ndarray
    logps: np.ndarray | None = None
    items: np.ndarray | None = None
    places: np.ndarray | None = None


def check_finite(scores: Scores, name: str) -> Scores:
    """The scores. Raises UserError where one is NaN or Inf; `name` is the scorer's."""
    if not np.isfinite(scores.margins).all() or (scores.items is not None and not np.isfinite(scores.items).all()):
        example = scores.example
        raise UserError(f"{example.source or f'user {example.user}'}: {name}: a score is NaN or Inf: look at the model")
    return scores


class Scorer(Protocol):
    """Scores examples one by one, in their order. The order of an example's negatives must not change a score."""

    name: str

    def score(self, examples: Sequence[Example]) -> Iterator[Scores]:
        """One Scores per example.

        Raises UserError for an example it cannot score, and for a score that is NaN or Inf.
        """
        ...
