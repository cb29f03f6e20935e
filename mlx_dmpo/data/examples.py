"""Histories -> ranking examples: positives, the liked items before each, and negatives."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..config import PrepareSettings
from ..errors import UserError
from ..records import RankingExample
from .sources.files import text_lines
from .splits import DRAWN, SHARES, SPLITS, Histories, is_one, unit

SCORES = "scores:"


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """margins[domain or "", user, positive][negative]; a low margin is a hard negative."""

    path: Path
    margins: dict[tuple[str, str, str], dict[str, float]]

    def of(self, domain: str, user: str, positive: str) -> dict[str, float]:
        """Margins by negative, {} where this user and positive have none."""
        return self.margins.get((domain, user, positive)) or self.margins.get(("", user, positive)) or {}


def read_scores(path: Path) -> Scores:
    """JSON lines of user, positive, negative, margin (nats), as evaluate's scores.jsonl has them. Raises UserError."""
    margins: dict[tuple[str, str, str], dict[str, float]] = {}
    for n, line in text_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{n}: not valid JSON ({getattr(error, 'msg', error)}): fix the syntax") from None
        for name in ("user", "positive", "negative"):
            if not isinstance(row, dict) or not isinstance(row.get(name), str):
                raise UserError(f'{path}:{n}: no text "{name}": give user, positive, negative and margin')
        margin = row.get("margin")
        if not isinstance(margin, int | float) or isinstance(margin, bool) or not math.isfinite(margin):
            raise UserError(f'{path}:{n}: "margin" is not a finite number: give it in nats')
        of_user = margins.setdefault((str(row.get("domain", "")), row["user"], row["positive"]), {})
        if row["negative"] in of_user:
            raise UserError(f"{path}:{n}: the pair occurs twice: keep one margin of each")
        of_user[row["negative"]] = float(margin)
    return Scores(path, margins)


def draw_without_replacement(weights: np.ndarray, number: int, *key: object) -> list[int]:
    """Indices drawn one after another in proportion to whole-numbered weights (N,), at most as many as have any."""
    weights = weights.astype(np.int64)
    drawn: list[int] = []
    for n in range(min(number, int((weights > 0).sum()))):
        total = np.cumsum(weights)
        drawn.append(int(np.searchsorted(total, int(unit(*key, n) * int(total[-1])), side="right")))
        weights[drawn[-1]] = 0
    return drawn


def units_per_second(times: np.ndarray | None) -> float | None:
    """1 for seconds since 1970, 1e3 for milliseconds, 1e6, 1e9; None where the times are no such numbers."""
    if times is None or not len(times):
        return None
    middle = abs(float(np.median(times)))
    for unit_, low in ((1.0, 1e8), (1e3, 1e11), (1e6, 1e14), (1e9, 1e17)):
        if low <= middle < 1000 * low:
            return unit_
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Rankings:
    """Makes a domain's examples.

    popularity  (T,) int64: how often each title was rated, catalogue titles included
    seen        user -> titles (indices) that were met but not rated: never a negative
    time        (M,) float64: when each interaction of the histories took place, None where that is unknown
    per_second  units of `time` in a second, None where it is unknown: then no times are written
    rated       the source has ratings that differ, so that they are worth writing
    """

    domain: str
    histories: Histories
    titles: list[str]
    settings: PrepareSettings
    scores: Scores | None
    popularity: np.ndarray
    seen: Mapping[str, Sequence[int]] = field(default_factory=dict)
    time: np.ndarray | None = None
    per_second: float | None = None
    rated: bool = True
    dropped: Counter[str] = field(default_factory=Counter)  # user -> positives without a negative, filled on the way

    def of_user(self, user: int) -> dict[str, list[tuple[RankingExample, bool]]]:
        """A user's examples, oldest first, each with whether scores chose its negatives.

        By user they are all under ""; by time, under the split they belong to. A positive without a single negative
        gives none.
        """
        if is_one(self.settings):
            places = self.histories.of(user, self.settings.max_interactions)
            liked = np.flatnonzero(self.histories.liked[places]) + places.start
            return {"": self._examples(user, [int(liked[-1])], places, places.stop)}
        places = self.histories.of(user)
        positives = self._positives(places)
        if self.settings.split != "time":
            return {"": self._examples(user, positives, places, places.stop)}
        found = {}
        for split, part in _cut(positives).items():
            later = [p for p in positives if part and p > part[-1]]
            # negatives of train are older than the first positive of valid: nothing of the future is learnt
            found[split] = self._examples(user, part, places, later[0] if later else places.stop)
        return found

    def _positives(self, places: slice) -> list[int]:
        """The liked items that have enough liked ones before them: all, or N spread evenly up to the last."""
        h, s = self.histories, self.settings
        liked = np.flatnonzero(h.liked[places]) + places.start
        usable = [
            int(p)
            for p in liked[s.min_liked - 1 :]
            if h.liked[self._window(int(p), places)].any()  # a history of at least one
        ]
        if s.examples_per_user == "all" or int(s.examples_per_user) >= len(usable):
            return usable
        number = int(s.examples_per_user)
        chosen = np.unique(np.ceil(np.arange(1, number + 1) * len(usable) / number).astype(int) - 1)
        return [usable[n] for n in chosen]

    def _window(self, positive: int, places: slice) -> slice:
        """The interactions before a positive that an example looks back on."""
        last = self.settings.max_interactions
        return slice(max(places.start, positive + 1 - last) if last else places.start, positive)

    def _examples(
        self, user: int, positives: Sequence[int], places: slice, end: int
    ) -> list[tuple[RankingExample, bool]]:
        disliked = self._disliked(user, places)
        made = [self._example(user, p, places, disliked, end) for p in positives]
        kept = [(example, scored) for example, scored in made if example.negatives]
        self.dropped[self.histories.users[user]] += len(made) - len(kept)
        return kept

    def _example(
        self, user: int, place: int, places: slice, of_user: np.ndarray, end: int
    ) -> tuple[RankingExample, bool]:
        """The example of a positive; its negatives are from before `end`."""
        h, name = self.histories, self.histories.users[user]
        before = self._window(place, places)
        liked = np.flatnonzero(h.liked[before]) + before.start
        positive = self.titles[h.title[place]]
        negatives, scored = self._negatives(user, name, positive, place, of_user, end)
        taken = {*negatives, positive}
        disliked = [self.titles[t] for t in h.title[before][~h.liked[before]]]
        answers = np.array([], int)  # drawn negatives were never rated
        if self.settings.negatives not in DRAWN:
            place_of = {self.titles[h.title[p]]: p for p in of_user}
            answers = np.array([place, *(place_of[n] for n in negatives)])
        rated, timed = self.rated, self.time is not None and self.per_second
        example = RankingExample(
            name,
            self.domain,
            tuple(self.titles[t] for t in h.title[liked]),
            positive,
            tuple(negatives),
            disliked=tuple(t for t in disliked if t not in taken) or None,
            ratings=tuple(h.rating[liked].tolist()) if rated else None,
            times=self._seconds(liked) if timed else None,
            answer_ratings=tuple(h.rating[answers].tolist()) if rated and len(answers) else None,
            answer_times=self._seconds(answers) if timed and len(answers) else None,
        )
        return example, scored

    def _seconds(self, places: np.ndarray) -> tuple[float, ...]:
        assert self.time is not None and self.per_second
        return tuple((self.time[places] / self.per_second).tolist())

    def _disliked(self, user: int, places: slice) -> np.ndarray:
        """The places of a user's disliked items, in the order of the draw."""
        h, name = self.histories, self.histories.users[user]
        rows = np.flatnonzero(~h.liked[places]) + places.start
        titles = [self.titles[t] for t in h.title[rows]]
        lots = [(unit(self.settings.seed, "negative", name, title), title) for title in titles]
        return rows[sorted(range(len(rows)), key=lots.__getitem__)]

    def _negatives(
        self, user: int, name: str, positive: str, place: int, disliked: np.ndarray, end: int
    ) -> tuple[list[str], bool]:
        h, s = self.histories, self.settings
        if s.negatives in DRAWN:
            weights = self.popularity.copy() if s.negatives == "popularity" else (self.popularity > 0).astype(np.int64)
            weights[h.title[h.of(user)]] = 0
            weights[list(self.seen.get(name, ()))] = 0
            key = ("draw", name) if is_one(s) else ("draw", name, positive)
            return [self.titles[t] for t in draw_without_replacement(weights, s.num_negatives, s.seed, *key)], False
        disliked = disliked[disliked < end]
        if not is_one(s) and self.time is not None:  # the nearest in time first; among equals the draw decides
            disliked = disliked[np.argsort(np.abs(self.time[disliked] - self.time[place]), kind="stable")]
        names = [self.titles[t] for t in h.title[disliked]]
        margins = self.scores.of(self.domain, name, positive) if self.scores else {}
        scored = any(title in margins for title in names)
        names.sort(key=lambda title: margins.get(title, math.inf))  # stable: those without a margin keep their order
        return names[: s.num_negatives or None], scored


def _cut(positives: Sequence[int]) -> dict[str, list[int]]:
    """One user's positives, oldest first, in train, valid and test: 70, 10 and 20 per cent, at least one of each from
    3.
    """
    n = len(positives)
    test = max(round(SHARES["test"] * n), int(n >= 2))
    valid = max(round(SHARES["valid"] * n), int(n >= 3))
    train = n - valid - test
    return dict(
        zip(
            SPLITS,
            (list(positives[:train]), list(positives[train : train + valid]), list(positives[train + valid :])),
            strict=True,
        )
    )


def split_examples(
    rankings: Rankings, splits: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[RankingExample]], Counter[str]]:
    """The examples of each split, and how many of each have their negatives by scores.

    splits  split -> users; with --split time the users of "train" are all, and each is in every split
    """
    number = {name: n for n, name in enumerate(rankings.histories.users)}
    found: dict[str, list[RankingExample]] = {split: [] for split in SPLITS}
    scored: Counter[str] = Counter()
    for split, users in splits.items():
        for name in users:
            for part, examples in rankings.of_user(number[name]).items():
                for example, by_scores in examples:
                    found[part or split].append(replace(example, source=part or split))
                    scored[part or split] += by_scores
    return found, scored
