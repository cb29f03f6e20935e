"""Popularity and like ratio: the counters that a language model has to beat"""

from __future__ import annotations

import numpy as np

from .corpus import Corpus


class Popularity:
    """An item's score is the number of users who liked it."""

    def __init__(self, corpus: Corpus):
        self._scores = corpus.likes.astype(np.float64)

    def scores(self, history: np.ndarray) -> np.ndarray:
        return self._scores


class LikeRatio:
    """(likes + 1) / (likes + dislikes + 2): the share of ratings that are likes, with one of each added."""

    def __init__(self, corpus: Corpus):
        self._scores = (corpus.likes + 1) / (corpus.likes + corpus.dislikes + 2)

    def scores(self, history: np.ndarray) -> np.ndarray:
        return self._scores
