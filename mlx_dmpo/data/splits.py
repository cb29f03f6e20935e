"""Interactions -> users of train, valid and test -> ranking examples, by the paper's rules (Bai et al., arXiv 2405.16127), each settable.

Everything random is a hash of the seed and of names (`unit`), so it is the same on every machine, for any order of work, and
a user's lot does not hang on the other users'. Only random order is drawn by row (PCG64's raw stream, which numpy keeps fixed).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..config import PrepareSettings
from ..errors import UserError
from ..records import RankingExample
from .sources import Ratings, text_lines
from .titles import Catalogue

SPLITS = ("train", "valid", "test")


SCORES = "scores:"


def unit(*parts: object) -> float:
    """A number in [0, 1) that looks random and hangs on `parts` alone: 53 bits of BLAKE2b."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


@dataclass(frozen=True, slots=True)
class LikedRule:
    """Ratings above `threshold`, or above the user's own `quantile`, are liked; all others are disliked."""

    threshold: float | None
    quantile: float | None
    told: str


def liked_rule(settings: PrepareSettings, ratings: Ratings) -> LikedRule:
    """Flags, else the source's own rule, else > 3 on a scale up to 5, else the midpoint of the scale. Raises UserError."""
    above, quantile = settings.liked_above, settings.liked_quantile
    if above is not None and quantile is not None:
        raise UserError("--liked-quantile: --liked-above is given too: keep one of them")
    if above is None and quantile is None:
        quantile = ratings.liked_quantile
    if quantile is not None:
        return LikedRule(None, quantile, f"liked: above the {quantile:g} quantile of the user's own ratings")
    found = ratings.interactions.rating
    low, high = ratings.scale or (float(found.min()), float(found.max()))
    if above is not None:
        return LikedRule(above, None, f"liked: ratings > {above:g} (--liked-above)")
    if low == high:
        raise UserError(
            f"{ratings.files[0]}: every rating is {low:g}: nothing tells liked from disliked: use another column or source"
        )
    if high == 5:
        return LikedRule(3.0, None, "liked: ratings > 3 of 5")
    middle = (low + high) / 2
    return LikedRule(middle, None, f"liked: ratings > {middle:g}, the midpoint of {low:g} to {high:g}")


def is_liked(rule: LikedRule, user: np.ndarray, rating: np.ndarray, start: np.ndarray) -> np.ndarray:
    """(M,) bool for ratings (M,) that lie user by user, those of user u from start[u] to start[u + 1].

    A user's q-quantile is the least of the user's ratings that a share of q does not exceed (numpy's inverted_cdf).
    """
    if rule.quantile is None:
        return rating > rule.threshold
    counts = np.diff(start)
    # less a trifle: 0.28 * 25 is 7.000000000000001
    place = start[:-1] + np.maximum(np.ceil(counts * rule.quantile - 1e-9).astype(np.int64) - 1, 0)
    ascending = rating[np.lexsort((rating, user))]
    threshold = ascending[np.minimum(place, len(rating) - 1)]
    return rating > threshold[user]


@dataclass(frozen=True, slots=True, eq=False)
class Histories:
    """M interactions, user by user, each user's in order, each title once; user u's stand from start[u] to start[u + 1].

    title, liked, rating  (M,) int32, bool, float64
    row                   (M,) int64: where the interaction stands in the source, whatever its order here
    start                 (U + 1,) int64
    """

    title: np.ndarray
    liked: np.ndarray
    rating: np.ndarray
    row: np.ndarray
    start: np.ndarray
    users: list[str]
    order: str
    untitled: int  # interactions left out since their item has no title
    repeated: int  # interactions left out since a later one has the same user and title

    def of(self, user: int, last: int = 0) -> slice:
        """The places of a user's (last so many) interactions."""
        begin, end = int(self.start[user]), int(self.start[user + 1])
        return slice(max(begin, end - last) if last else begin, end)


def choose_order(settings: PrepareSettings, ratings: Ratings) -> str:
    """Raises UserError where time is asked for and there is none."""
    has_time = ratings.interactions.time is not None
    if settings.order == "time" and not has_time:
        raise UserError(f"--order: {ratings.files[0]} has no timestamps: take --order file or random")
    return settings.order or ratings.order or ("time" if has_time else "file")


def histories(ratings: Ratings, catalogue: Catalogue, rule: LikedRule, order: str, seed: int) -> Histories:
    """Sorts all interactions; where a user met a title more than once, the last time counts."""
    i = ratings.interactions
    row = np.flatnonzero(catalogue.of_item[i.item] >= 0)
    untitled = len(i.user) - len(row)
    if order == "time":
        assert i.time is not None
        row = row[np.lexsort((i.time[row], i.user[row]))]  # stable: equal times stay in the file's order
    elif order == "random":
        keys = np.random.PCG64(seed).random_raw(len(i.user))
        row = row[np.lexsort((keys[row], i.user[row]))]
    else:
        row = row[np.argsort(i.user[row], kind="stable")]
    pair = i.user[row].astype(np.int64) * len(catalogue.titles) + catalogue.of_item[i.item[row]]
    by_pair = np.argsort(pair, kind="stable")
    pair = pair[by_pair]
    is_last = np.ones(len(row), bool)
    is_last[:-1] = pair[1:] != pair[:-1]
    keep = np.zeros(len(row), bool)
    keep[by_pair[is_last]] = True
    del pair, by_pair
    repeated = len(row) - int(keep.sum())
    row = row[keep]
    user, rating = i.user[row], i.rating[row]
    start = np.searchsorted(user, np.arange(len(i.users) + 1))
    liked = is_liked(rule, user, rating, start)
    return Histories(catalogue.of_item[i.item[row]], liked, rating, row, start, i.users, order, untitled, repeated)


def eligible_users(h: Histories, settings: PrepareSettings, titles: int) -> tuple[list[int], dict[str, int]]:
    """Users with enough liked and disliked items among their last ones, and how many fail for which reason.

    Negatives that are disliked items need at least one; drawn ones, a title that the user has not met.
    """
    counts = np.diff(h.start)
    user = np.repeat(np.arange(len(counts)), counts)
    window = np.ones(len(user), bool)
    if settings.max_interactions:
        window = h.start[1:][user] - np.arange(len(user)) <= settings.max_interactions
    liked = np.bincount(user[window & h.liked], minlength=len(counts))
    disliked = np.bincount(user[window & ~h.liked], minlength=len(counts))
    drawn = settings.negatives in ("uniform", "popularity")
    few_liked = liked < settings.min_liked
    min_disliked = settings.min_disliked if drawn else max(1, settings.min_disliked)
    few_disliked = disliked < min_disliked
    all_met = (counts >= titles) if drawn else np.zeros(len(counts), bool)
    reasons = {
        f"fewer than {settings.min_liked} liked": few_liked & ~few_disliked,
        f"fewer than {min_disliked} disliked": few_disliked & ~few_liked,
        "too few of both": few_liked & few_disliked,
        "every title met": all_met & ~few_liked & ~few_disliked,
    }
    present = counts > 0
    good = present & ~few_liked & ~few_disliked & ~all_met
    return np.flatnonzero(good).tolist(), {
        reason: int((which & present).sum()) for reason, which in reasons.items() if which[present].any()
    }


def assign(
    users: Sequence[str], wanted: Mapping[str, int], settings: PrepareSettings, taken: dict[str, str]
) -> dict[str, list[str]]:
    """The users of each split, `wanted` of each, drawn by hash. `taken` (user -> split) keeps people apart across domains, and grows.

    Training users come from one end of the draw, validation and then test users from the other: with any number of training
    users the others stay as they are, and fewer are a subset of more. Fewer than --train-users still keep the others off them.
    """
    drawn = sorted(users, key=lambda u: (unit(settings.seed, "user", u), u))
    reserved = max(wanted["train"], settings.train_users) if wanted["train"] else 0
    splits: dict[str, list[str]] = {}
    used: set[str] = set()
    for split, candidates, number in (
        ("train", drawn[::-1], reserved),
        ("valid", drawn, wanted["valid"]),
        ("test", drawn, wanted["test"]),
    ):
        splits[split] = [u for u in candidates if u not in used and taken.get(u, split) == split][:number]
        used.update(splits[split])
        taken.update(dict.fromkeys(splits[split], split))
    splits["train"] = splits["train"][: wanted["train"]]
    return splits


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """margins[domain or "", user, positive][negative]; a low margin is a hard negative."""

    path: Path
    margins: dict[tuple[str, str, str], dict[str, float]]

    def of(self, domain: str, user: str, positive: str) -> dict[str, float]:
        return self.margins.get((domain, user, positive)) or self.margins.get(("", user, positive)) or {}


def read_scores(path: Path) -> Scores:
    """JSON lines of user, positive, negative, margin (nats), as evaluate's scores.jsonl has them. Raises UserError."""
    margins: dict[tuple[str, str, str], dict[str, float]] = {}
    for n, line in text_lines(path, "utf-8-sig"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{n}: not valid JSON ({getattr(error, 'msg', error)}): mend the syntax") from None
        for name in ("user", "positive", "negative"):
            if not isinstance(row, dict) or not isinstance(row.get(name), str):
                raise UserError(f'{path}:{n}: no text "{name}": give user, positive, negative and margin')
        margin = row.get("margin")
        if not isinstance(margin, int | float) or isinstance(margin, bool) or not math.isfinite(margin):
            raise UserError(f'{path}:{n}: "margin" is no finite number: give it in nats')
        of_user = margins.setdefault((str(row.get("domain", "")), row["user"], row["positive"]), {})
        if row["negative"] in of_user:
            raise UserError(f"{path}:{n}: the pair stands twice: keep one margin of each")
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


@dataclass(frozen=True, slots=True, eq=False)
class Rankings:
    """Makes a domain's examples: the last liked item of a user, its negatives, and the liked items before it."""

    domain: str
    histories: Histories
    titles: list[str]
    settings: PrepareSettings
    scores: Scores | None
    popularity: np.ndarray  # (T,) int64: interactions of each title

    def example(self, user: int) -> tuple[RankingExample, bool]:
        """And whether its negatives were chosen by scores."""
        h, name = self.histories, self.histories.users[user]
        places = h.of(user, self.settings.max_interactions)
        liked = h.title[places][h.liked[places]]
        positive, history = self.titles[liked[-1]], [self.titles[t] for t in liked[:-1]]
        negatives, scored = self._negatives(user, name, positive)
        return RankingExample(name, self.domain, tuple(history), positive, tuple(negatives)), scored

    def _negatives(self, user: int, name: str, positive: str) -> tuple[list[str], bool]:
        h, s = self.histories, self.settings
        if s.negatives in ("uniform", "popularity"):
            weights = self.popularity.copy() if s.negatives == "popularity" else (self.popularity > 0).astype(np.int64)
            weights[h.title[h.of(user)]] = 0
            return [
                self.titles[t] for t in draw_without_replacement(weights, s.num_negatives, s.seed, "draw", name)
            ], False
        places = h.of(user, s.max_interactions)
        disliked = [self.titles[t] for t in h.title[places][~h.liked[places]]]
        disliked.sort(key=lambda title: (unit(s.seed, "negative", name, title), title))
        margins = self.scores.of(self.domain, name, positive) if self.scores else {}
        scored = any(title in margins for title in disliked)
        disliked.sort(
            key=lambda title: margins.get(title, math.inf)
        )  # stable: those without a margin stay in the draw's order
        return disliked[: s.num_negatives or None], scored


def popularity(h: Histories, titles: int) -> np.ndarray:
    return np.bincount(h.title, minlength=titles)


def split_examples(
    rankings: Rankings, splits: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[RankingExample]], Counter[str]]:
    """The examples of each split, and how many of each have their negatives by scores. Raises UserError where none has."""
    number = {name: n for n, name in enumerate(rankings.histories.users)}
    found: dict[str, list[RankingExample]] = {}
    scored: Counter[str] = Counter()
    for split, users in splits.items():
        found[split] = []
        for name in users:
            example, by_scores = rankings.example(number[name])
            found[split].append(replace(example, source=split))
            scored[split] += by_scores
    return found, scored
