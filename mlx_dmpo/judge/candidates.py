"""`evaluate --candidates`: the candidates, and the liked title's rank among them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import EvaluateSettings
from ..errors import UserError
from ..machine.console import notice
from ..records import Example, RankingExample
from ..scores import Scorer, check_finite
from .facts import Facts, catalogue
from .ranking import copeland

ROUND_ROBIN = 20  # candidates up to which a scorer that only compares pairs compares all of them
PAIRS = 20  # negatives a scorer that only compares pairs is given at once


def parse_count(text: str) -> int | None:
    """--candidates: a number of at least 2, or None for "all". Raises UserError."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 2:
        raise UserError(f"--candidates: {text!r} is neither a number of at least 2 nor all: give one of them")
    return int(text)


def _draw(
    example: RankingExample, titles: list[str], weights: np.ndarray | None, count: int | None, rng: np.random.Generator
) -> tuple[str, ...]:
    """The negatives of an example: `count` of the catalogue, or all, without what the user has in the history."""
    taken = {*example.history, example.positive}
    free = np.array([title not in taken for title in titles])
    if count is None:
        return tuple(title for title, kept in zip(titles, free, strict=True) if kept)
    if weights is not None:
        free &= weights > 0
    if free.sum() < count:
        raise UserError(
            f"{example.source or example.user}: {int(free.sum())} titles can be drawn, and --candidates needs {count}: "
            "lower --candidates, or draw with --candidate-negatives uniform"
        )
    p = (free if weights is None else weights * free).astype(np.float64)
    return tuple(titles[i] for i in rng.choice(len(titles), count, replace=False, p=p / p.sum()))


def candidate_examples(settings: EvaluateSettings, examples: Sequence[Example], facts: Facts) -> list[RankingExample]:
    """The examples with their candidates as negatives. Raises UserError for free text, and where there are too few
    titles.

    Every draw is a function of --seed and the example's place, so that --limit does not change it.
    """
    count = parse_count(settings.candidates)
    if not all(isinstance(e, RankingExample) for e in examples):
        raise UserError("--candidates: the data is free text, which has no titles to rank: leave --candidates out")
    ranking = [e for e in examples if isinstance(e, RankingExample)]
    if settings.candidate_negatives == "file":
        if count is None:
            raise UserError(
                "--candidates all: ranks the whole catalogue: leave --candidate-negatives out, or give a number"
            )
        # --num-negatives cuts the negatives, not the candidates
        listed = [e.negatives if e.candidates is None else e.candidates for e in ranking]
        short = sum(len(titles) < count - 1 for titles in listed)
        if short:
            notice(f"note: {short} of {len(ranking)} examples list fewer than {count - 1} titles: all of them are used")
        return [
            replace(e, negatives=titles[: count - 1], positive_first=None)
            for e, titles in zip(ranking, listed, strict=True)
        ]
    titles: dict[str, list[str]] = {}
    for domain, title in catalogue(Path(settings.data), examples, facts):
        titles.setdefault(domain, []).append(title)
    weights: dict[str, np.ndarray] = {}
    if settings.candidate_negatives == "popularity":
        weights = {d: np.array([facts.counts.get((d, t), 0) for t in ts], np.float64) for d, ts in titles.items()}
    drawn = []
    for place, e in enumerate(ranking):
        rng = np.random.default_rng([settings.seed, 2, place])
        negatives = _draw(e, titles.get(e.domain, []), weights.get(e.domain), count and count - 1, rng)
        drawn.append(replace(e, negatives=negatives, positive_first=None))
    return drawn


@dataclass(frozen=True)
class Ranker:
    """Places of positives among their candidates.

    how  "scores"      the scorer has one score per candidate
         "round robin" it only compares pairs: every candidate with every other, Copeland's count of wins
         "direct"      it only compares pairs, and there are many: the positive with each candidate
    """

    scorer: Scorer
    how: str

    @classmethod
    def of(cls, scorer: Scorer, examples: Sequence[RankingExample]) -> Ranker:
        """Scores one pair of the first example, to see whether the scorer scores candidates or only compares
        them."""
        first = replace(examples[0], negatives=examples[0].negatives[:1])
        if next(iter(scorer.score([first]))).items is not None:
            return cls(scorer, "scores")
        most = max(len(e.negatives) for e in examples) + 1
        how = "round robin" if most <= ROUND_ROBIN else "direct"
        pairs = sum(len(e.negatives) * (len(e.negatives) + 1 if how == "round robin" else 2) // 2 for e in examples)
        what = "every candidate with every other" if how == "round robin" else "the liked title with every candidate"
        notice(f"note: {scorer.name} only compares pairs: {what}, {pairs:,} pairs in all")
        return cls(scorer, how)

    def rows(self, examples: Sequence[RankingExample]) -> Iterator[dict[str, Any]]:
        """One row per example: how many candidates are ranked above the positive, and how many equal it."""
        places = self._by_scores(examples) if self.how == "scores" else self._by_pairs(examples)
        for e, (better, tied) in zip(examples, places, strict=True):
            yield {
                "user": e.user,
                "domain": e.domain,
                "positive": e.positive,
                "candidates": len(e.negatives) + 1,
                "better": better,
                "tied": tied,
            }

    def _by_scores(self, examples: Sequence[RankingExample]) -> Iterator[tuple[int, int]]:
        for scores in self.scorer.score(examples):
            if scores.items is None:
                raise UserError(f"{self.scorer.name}: scores candidates of some examples only: report this scorer")
            yield _place(check_finite(scores, self.scorer.name).items)  # type: ignore[arg-type]

    def _by_pairs(self, examples: Sequence[RankingExample]) -> Iterator[tuple[int, int]]:
        parts: list[RankingExample] = []
        for e in examples:
            titles = (e.positive, *e.negatives)
            firsts = range(len(titles) - 1) if self.how == "round robin" else range(1)
            for i in firsts:
                rest = titles[i + 1 :]
                parts += [
                    replace(e, positive=titles[i], negatives=rest[s : s + PAIRS]) for s in range(0, len(rest), PAIRS)
                ]
        margins = np.concatenate([check_finite(s, self.scorer.name).margins for s in self.scorer.score(parts)])
        ends = np.cumsum([0] + [sum(1 for _ in _pairs(len(e.negatives) + 1, self.how)) for e in examples])
        for e, start, end in zip(examples, ends[:-1], ends[1:], strict=True):
            table = np.zeros((len(e.negatives) + 1,) * 2)
            for (i, j), margin in zip(_pairs(len(table), self.how), margins[start:end], strict=True):
                table[i, j], table[j, i] = margin, -margin
            if self.how == "direct":
                yield int((table[0, 1:] < 0).sum()), int((table[0, 1:] == 0).sum())
            else:
                yield _place(copeland(table))


def _pairs(n: int, how: str) -> Iterator[tuple[int, int]]:
    return itertools.combinations(range(n), 2) if how == "round robin" else ((0, j) for j in range(1, n))


def _place(scores: np.ndarray) -> tuple[int, int]:
    """(candidates above the first, candidates equal to it).  scores (N,), the positive first."""
    return int((scores[1:] > scores[0]).sum()), int((scores[1:] == scores[0]).sum())
