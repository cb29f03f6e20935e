"""Candidates -> an order: by each item's own score, or by pairs that are compared and aggregated"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import UserError
from ..machine.progress import Progress
from . import bradley_terry
from .scoring import FIRST_LINE, History, Scoring, check_history, check_titles

ALL_PAIRS = 20  # up to so many candidates every pair is compared
ROUND = 64  # pairs compared at once: what an interrupt can lose
METHODS = ("items", "pairs")


@dataclass(frozen=True, slots=True)
class Ranked:
    """One place of a ranking. Equal scores share a rank.

    score            items: the scorer's score; pairs: Bradley-Terry strength (log-odds, mean 0 over the list)
    win_probability  pairs: mean probability of being put above another candidate of the list
    low, high        pairs: 95 % interval of the score, from its standard error
    copeland         pairs: comparisons won minus comparisons lost
    """

    rank: int
    title: str
    score: float
    win_probability: float | None = None
    low: float | None = None
    high: float | None = None
    copeland: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields of `rank --json`; those that the method lacks are left out."""
        names = ("rank", "title", "score", "win_probability", "low", "high")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class Ranking:
    """An ordered list, best first, and what it cost. `possible` is the number of pairs that exist."""

    method: str
    prompt: str
    ranking: tuple[Ranked, ...]
    pairs_scored: int = 0
    tokens: int = 0
    seconds: float = 0.0
    possible: int = 0
    cyclic_triples: int | None = None
    finished: bool = True

    @property
    def titles(self) -> list[str]:
        return [r.title for r in self.ranking]

    def top(self, n: int) -> Ranking:
        """The first n places; all for 0."""
        return replace(self, ranking=self.ranking[: n or None])

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "prompt": self.prompt,
            "ranking": [r.to_json() for r in self.ranking],
            "pairs_scored": self.pairs_scored,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
        }


def check_candidates(candidates: Sequence[str]) -> tuple[str, ...]:
    """The candidates in a fixed order, so that the given order does not matter.

    Raises UserError for none, an empty one, a duplicate.
    """
    if not candidates:
        raise UserError("candidates: there are none: give at least one title")
    check_titles("candidates", candidates)
    ordered = sorted(candidates)
    for a, b in itertools.pairwise(ordered):
        if a == b:
            raise UserError(f'candidates: "{a}" is listed twice: list each title once')
    return tuple(ordered)


def default_budget(n: int) -> int:
    """Pairs compared of n candidates: all pairs of up to ALL_PAIRS candidates, else about n log2 n."""
    every = n * (n - 1) // 2
    return every if n <= ALL_PAIRS else min(every, math.ceil(n * math.log2(n)))


def _places(titles: Sequence[str], score: np.ndarray) -> list[tuple[int, int]]:
    """[(rank, index)], best first. Scores that differ by less than 1e-6 share a rank, in the order of their titles."""
    key = np.round(score, 6) + 0.0
    order = sorted(range(len(titles)), key=lambda i: (-key[i], titles[i]))
    ranks: list[tuple[int, int]] = []
    for place, i in enumerate(order, 1):
        tied = ranks and key[ranks[-1][1]] == key[i]
        ranks.append((ranks[-1][0] if tied else place, i))
    return ranks


@dataclass
class PairRanking:
    """Ranks by comparing pairs: `next_pairs` says which to compare next, `add` takes the results, `ranking` is the best
    so far.

    titles  in any order
    budget  pairs to compare; default_budget for 0. Where it is not all of them: first `start` scores or a random
            tournament (two random cycles, so that everything is connected), then neighbours in the order so far, round
            by round
    start   (N,) scores of the titles as given, to begin from
    """

    titles: Sequence[str]
    budget: int = 0
    start: Sequence[float] | np.ndarray | None = None
    seed: int = 0
    counts: np.ndarray = field(init=False)
    done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        given = list(self.titles)
        self.titles = check_candidates(given)
        n = len(self.titles)
        if self.start is not None:
            self.start = np.asarray(self.start, np.float64)[[given.index(t) for t in self.titles]]
        self.possible = n * (n - 1) // 2
        self.budget = min(self.budget or default_budget(n), self.possible)
        self.counts = np.zeros((n, n))
        self._compared = np.eye(n, dtype=bool)
        self._planned = list(itertools.combinations(range(n), 2)) if self.budget == self.possible else self._first()

    def _first(self) -> list[tuple[int, int]]:
        """The first comparisons under a budget: neighbours by `start`, or two random cycles."""
        n = len(self.titles)
        if self.start is not None:
            return []
        rng = np.random.default_rng([self.seed, n])
        pairs: dict[tuple[int, int], None] = {}
        for _ in range(2):
            order = rng.permutation(n).tolist()
            for a, b in zip(order, order[1:] + order[:1], strict=True):
                pairs[min(a, b), max(a, b)] = None
        return list(pairs)[: self.budget]

    def _strength(self) -> np.ndarray:
        return bradley_terry.fit(self.counts).strength

    def _neighbours(self) -> list[tuple[int, int]]:
        """Pairs not yet compared that are closest in the order so far: next neighbours first, then those two places
        apart, ...
        """
        n = len(self.titles)
        score = self.start if self.start is not None and not self.done else self._strength()
        order = [i for _, i in _places(self.titles, np.asarray(score))]
        for gap in range(1, n):
            pairs = [(min(a, b), max(a, b)) for a, b in zip(order, order[gap:], strict=False)]
            fresh = [(a, b) for a, b in pairs if not self._compared[a, b]]
            if fresh:
                return fresh
        return []

    def next_pairs(self) -> list[tuple[str, str]]:
        """The pairs to compare next, at most ROUND; empty at the end."""
        if not self._planned and self.done < self.budget:
            self._planned = self._neighbours()
        left = min(ROUND, self.budget - self.done)
        self._current, self._planned = self._planned[:left], self._planned[left:]
        return [(self.titles[a], self.titles[b]) for a, b in self._current]

    def add(self, probabilities: Sequence[float] | np.ndarray) -> None:
        """P(first above second) of each pair that `next_pairs` gave last."""
        for (a, b), p in zip(self._current, probabilities, strict=True):
            self.counts[a, b], self.counts[b, a] = p, 1 - p
            self._compared[a, b] = self._compared[b, a] = True
        self.done += len(self._current)
        self._current = []

    @property
    def finished(self) -> bool:
        return self.done >= self.budget

    def ranking(self, prompt: str = "", tokens: int = 0, seconds: float = 0.0) -> Ranking:
        found = bradley_terry.fit(self.counts)
        score = found.strength
        if not self.done and self.start is not None:
            score = np.asarray(self.start) - np.mean(self.start)
        wins = bradley_terry.win_probability(score).tolist() if len(score) > 1 else [None]
        copeland = bradley_terry.copeland(self.counts)
        rows = tuple(
            Ranked(
                rank,
                self.titles[i],
                float(score[i]),
                wins[i],
                float(score[i] - 1.96 * found.error[i]),
                float(score[i] + 1.96 * found.error[i]),
                int(copeland[i]),
            )
            for rank, i in _places(self.titles, score)
        )
        cycles = bradley_terry.cyclic_triples(self.counts)
        return Ranking("pairs", prompt, rows, self.done, tokens, seconds, self.possible, cycles, self.finished)


@dataclass
class Job:
    """A ranking in steps, so that it can be interrupted, and so that several can share the model.

    Each step: `tasks()` says what to score, `give(scores)` takes it; no tasks are left at the end. `ranking()` is the
    best so far.
    """

    history: History
    candidates: Sequence[str]
    method: str
    prompt: str = ""
    budget: int = 0
    seed: int = 0
    begin_with_items: bool = False  # pairs under a budget: start from the items' own scores
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method: {self.method!r} is not a choice: give one of {', '.join(METHODS)}")
        if self.budget and self.method == "items":
            raise UserError("--budget: counts pairs, and --method items compares none: leave one of them out")
        check_history(self.history)
        self._titles = check_candidates(self.candidates)
        self._items: np.ndarray | None = None
        self._pairs: PairRanking | None = None
        self._started = time.perf_counter()
        n = len(self._titles)
        budgeted = (self.budget or default_budget(n)) < n * (n - 1) // 2
        self.starts_from_items = self.begin_with_items and budgeted
        if self.method == "pairs" and not self.starts_from_items:
            self._pairs = PairRanking(self._titles, self.budget, seed=self.seed)

    def item_tasks(self) -> list[tuple[History, str]]:
        """Items to score next, as Scoring.items takes them."""
        return [] if self._items is not None or self._pairs is not None else [(self.history, t) for t in self._titles]

    def pair_tasks(self) -> list[tuple[History, str, str]]:
        """Pairs to compare next, as Scoring.margins takes them."""
        return [] if self._pairs is None else [(self.history, a, b) for a, b in self._pairs.next_pairs()]

    def give_items(self, scores: np.ndarray) -> None:
        self._items = np.asarray(scores, np.float64)
        if self.method == "pairs":
            self._pairs = PairRanking(self._titles, self.budget, self._items, self.seed)

    def give_pairs(self, probabilities: np.ndarray) -> None:
        assert self._pairs is not None
        self._pairs.add(probabilities)

    @property
    def finished(self) -> bool:
        return self._pairs.finished if self._pairs is not None else self._items is not None

    @property
    def scored(self) -> bool:
        """Whether anything has been scored, so that there is an order."""
        return self._items is not None or self.pairs_compared > 0

    @property
    def pairs_to_compare(self) -> int:
        """Pairs that the whole ranking compares; 0 for the method items."""
        n = len(self._titles)
        return min(self.budget or default_budget(n), n * (n - 1) // 2) if self.method == "pairs" else 0

    @property
    def pairs_compared(self) -> int:
        return self._pairs.done if self._pairs is not None else 0

    def again(self) -> Job:
        """The same job from its beginning; scores that are kept are not computed again."""
        return replace(self, tokens=0)

    def ranking(self) -> Ranking:
        seconds = time.perf_counter() - self._started
        if self._pairs is not None:
            return self._pairs.ranking(self.prompt, self.tokens, seconds)
        if self._items is None:
            raise UserError("rank: nothing has been scored yet: let it run longer")
        rows = tuple(Ranked(r, self._titles[i], float(self._items[i])) for r, i in _places(self._titles, self._items))
        return Ranking("items", self.prompt, rows, 0, self.tokens, seconds)


def run(job: Job, scoring: Scoring, progress: Callable[[Ranking], None] | None = None) -> Ranking:
    """The job's steps, one after another. `progress` gets the best ranking so far after each round of pairs."""
    unit = "pair" if job.method == "pairs" else "step"
    with Progress(job.pairs_to_compare or None, "rank", unit, first=FIRST_LINE) as bar:
        while step([job], scoring):
            if progress and job.method == "pairs":
                progress(job.ranking())
            bar.update(job.pairs_compared - bar.done)
    return job.ranking()


def step(jobs: Sequence[Job], scoring: Scoring) -> bool:
    """One step of several jobs, scored together. False where none had anything left to score.

    Tokens are shared out by each job's part in what was scored.
    """
    before = scoring.cost.tokens
    of_items = [(job, tasks) for job in jobs if (tasks := job.item_tasks())]
    of_pairs = [] if of_items else [(job, pairs) for job in jobs if (pairs := job.pair_tasks())]
    if of_items:
        scores = scoring.items([task for _, tasks in of_items for task in tasks])
        _hand_out([(job, len(tasks)) for job, tasks in of_items], scores, Job.give_items)
    elif of_pairs:
        scores = scoring.probabilities([pair for _, pairs in of_pairs for pair in pairs])
        _hand_out([(job, len(pairs)) for job, pairs in of_pairs], scores, Job.give_pairs)
    else:
        return False
    spent = scoring.cost.tokens - before
    shares = [(job, len(tasks)) for job, tasks in of_items] + [(job, len(pairs)) for job, pairs in of_pairs]
    for job, number in shares:
        job.tokens += round(spent * number / len(scores))
    return True


def _hand_out(parts: Sequence[tuple[Job, int]], values: np.ndarray, give: Callable[..., None]) -> None:
    at = 0
    for job, number in parts:
        give(job, values[at : at + number])
        at += number
