"""A baseline as a Scorer: a function of a history and candidates, whatever is behind it"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from ..errors import UserError
from ..records import Example
from ..scores import Scores
from .corpus import Corpus, ranking


class Ranker(Protocol):
    """Scores every item of a corpus for a history of items."""

    def scores(self, history: np.ndarray) -> np.ndarray:
        """history (n,) items of the corpus, oldest first -> (I,) float64; higher ranks higher."""
        ...


class ItemScorer:
    """A `Scorer` on top of a `Ranker`. A candidate that fitting never met ranks below all that it did; two such tie."""

    def __init__(self, name: str, corpus: Corpus, ranker: Ranker):
        self.name, self.corpus, self.ranker = name, corpus, ranker
        self.candidates = self.unknown = 0

    def catalogue(self, history: Sequence[str]) -> np.ndarray:
        """(I,) scores of all items of the corpus."""
        items = self.corpus.items(history)
        return np.asarray(self.ranker.scores(items[items >= 0]), np.float64)

    def score(self, examples: Sequence[Example]) -> Iterator[Scores]:
        """Raises UserError for free text, and for a score that is NaN or Inf."""
        for example in ranking(examples):
            whole = self.catalogue(example.history)
            if not np.isfinite(whole).all():
                raise UserError(
                    f"{example.source or example.user}: {self.name} gives NaN or Inf: lower --learning-rate"
                )
            candidates = self.corpus.items((example.positive, *example.negatives))
            items = np.where(candidates >= 0, whole[candidates], whole.min() - 1)
            self.candidates += len(candidates)
            self.unknown += int((candidates < 0).sum())
            yield Scores(example, items[0] - items[1:], None, items)

    def note(self) -> str:
        """A line where a good part of the candidates was unknown, else empty."""
        if self.unknown <= 0.2 * self.candidates:
            return ""
        return (
            f"note: {self.name} was not fitted on {self.unknown:,} of {self.candidates:,} candidates, which rank last: "
            "give more training users, --fit all, or --match-titles short where the files spell titles differently"
        )


class FirstListed:
    """A `Scorer` that always prefers what is printed first.

    Without a printed order in the file, every pair is a tie.
    """

    name = "first-listed"

    def score(self, examples: Sequence[Example]) -> Iterator[Scores]:
        for example in ranking(examples):
            first = example.positive_first
            margins = np.zeros(len(example.negatives)) if first is None else np.where(first, 1.0, -1.0)
            yield Scores(example, margins)
