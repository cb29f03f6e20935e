"""ALS, BPR and item-kNN, through `implicit` (extra [baselines]). One thread and a seed: a run repeats bit for bit.

A tested user is folded in from the history alone, so that no model ever holds a row of that user's targets.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np

from ..machine import extras
from .corpus import Corpus


def _module(name: str) -> Any:
    """A module of implicit or of what comes with it. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise extras.not_installed("baseline", "implicit", extras.BASELINES) from None


def _csr(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> Any:
    """A scipy CSR matrix of ones at these places."""
    return _module("scipy.sparse").csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=shape)


def _matrix(corpus: Corpus) -> Any:
    """(users, items)."""
    users = np.repeat(np.arange(len(corpus.sequences)), [len(s) for s in corpus.sequences])
    return _csr(users, np.concatenate(corpus.sequences), (len(corpus.sequences), len(corpus.keys)))


def _one_thread() -> Any:
    """No threads in BLAS within the block: implicit warns of them, and their sums differ from run to run."""
    return _module("threadpoolctl").threadpool_limits(1, "blas")


class Als:
    """Implicit-feedback matrix factorization (Hu et al., ICDM 2008), a liked item has confidence `alpha`."""

    def __init__(self, corpus: Corpus, *, factors: int, epochs: int, seed: int, alpha: float = 40.0):
        als = _module("implicit.cpu.als").AlternatingLeastSquares
        with _one_thread():
            self._model = als(factors, alpha=alpha, iterations=epochs, num_threads=1, random_state=seed)
            self._model.fit(_matrix(corpus), show_progress=False)
        self._items = np.asarray(self._model.item_factors, np.float64)

    def scores(self, history: np.ndarray) -> np.ndarray:
        """One more half-step of ALS, for this user."""
        row = _csr(np.zeros(len(history), np.int64), history, (1, len(self._items)))
        with _one_thread():
            user = self._model.recalculate_user(0, row)
        return self._items @ np.asarray(user, np.float64)


class Bpr:
    """Bayesian personalised ranking (Rendle et al., arXiv 1205.2618)."""

    def __init__(self, corpus: Corpus, *, factors: int, epochs: int, seed: int, learning_rate: float, steps: int = 30):
        bpr = _module("implicit.cpu.bpr").BayesianPersonalizedRanking
        how = {"learning_rate": learning_rate, "iterations": epochs, "num_threads": 1, "random_state": seed}
        with _one_thread():
            model = bpr(factors, **how)
            model.fit(_matrix(corpus), show_progress=False)
        # implicit keeps an item's bias as its last factor, and a 1 there for every user
        self._items = np.asarray(model.item_factors, np.float64)
        self.regularization, self.steps = float(model.regularization), steps

    def user(self, history: np.ndarray) -> np.ndarray:
        """(F + 1,) factors of a new user: gradient steps from 0 on BPR's own objective over all pairs, items fixed.

        mean over liked i and other j of log sigmoid(u · (v_i - v_j)) - regularization |u|² / 2
        """
        user = np.zeros(self._items.shape[1])
        user[-1] = 1.0
        others = np.setdiff1d(np.arange(len(self._items)), history)
        if not len(history) or not len(others):
            return user
        liked, other = self._items[history], self._items[others]
        step = 1.0 / (float((self._items**2).sum(axis=1).max()) + self.regularization)  # at most 1 / curvature
        for _ in range(self.steps):
            margin = (liked @ user)[:, None] - (other @ user)[None, :]  # (liked, others)
            slope = 1 / (1 + np.exp(np.clip(margin, -30, 30)))
            gradient = (slope.mean(axis=1) @ liked) / len(liked) - (slope.mean(axis=0) @ other) / len(other)
            user[:-1] += step * (gradient - self.regularization * user)[:-1]
        return user

    def scores(self, history: np.ndarray) -> np.ndarray:
        return self._items @ self.user(history)


class ItemKnn:
    """Cosine similarity of the sets of users who liked two items; a candidate's score is the sum over the history."""

    def __init__(self, corpus: Corpus, *, neighbours: int):
        knn = _module("implicit.nearest_neighbours").CosineRecommender(K=neighbours, num_threads=1)
        with _one_thread(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own conversion of its own matrix
            knn.fit(_matrix(corpus), show_progress=False)
        self._similar = knn.similarity.tocsr()
        self._items = len(corpus.keys)

    def scores(self, history: np.ndarray) -> np.ndarray:
        if not len(history):
            return np.zeros(self._items)
        return np.asarray(self._similar[history].sum(axis=0)).ravel()
