"""Interactions -> histories -> users of train, valid and test, by the paper's rules (Bai et al., arXiv 2405.16127),
each settable.

Everything random is a hash of the seed and of names (`unit`), so it is the same on every machine, for any order of
work, and what a user gets does not depend on the other users. Only random order is drawn by row (PCG64's raw stream,
fixed in numpy).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..config import PrepareSettings
from ..errors import UserError
from .sources import Ratings
from .titles import Catalogue

SPLITS = ("train", "valid", "test")
DRAWN = ("uniform", "popularity")  # negatives that the user has not seen
SHARES = {"valid": 0.1, "test": 0.2}  # of the users, or of one user's examples
MOST = {"valid": 100, "test": 1000}
PAPER = {"train": 100, "valid": 100, "test": 1000}


def unit(*parts: object) -> float:
    """A number in [0, 1) that looks random and depends on `parts` alone: 53 bits of BLAKE2b."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


@dataclass(frozen=True, slots=True)
class LikedRule:
    """Ratings above `threshold`, or above the user's own `quantile`, are liked; all others are disliked."""

    threshold: float | None
    quantile: float | None
    words: str


def liked_rule(settings: PrepareSettings, ratings: Ratings) -> LikedRule:
    """Flags, else the source's own rule, else > 3 on a scale up to 5, else the midpoint of the scale.

    Where all ratings are the same, every row is a like, which needs drawn negatives. Raises UserError without them.
    """
    above, quantile = settings.liked_above, settings.liked_quantile
    if above is not None and quantile is not None:
        raise UserError("--liked-quantile: --liked-above is given too: keep one of them")
    found = ratings.interactions.rating
    low, high = ratings.scale or (float(found.min()), float(found.max()))
    if above is not None:
        return LikedRule(above, None, f"liked: ratings > {above:g} (--liked-above)")
    if low == high:
        if settings.negatives in DRAWN:
            return LikedRule(-np.inf, None, f"liked: every row (all ratings are {low:g})")
        raise UserError(
            f"{ratings.files[0]}: every rating is {low:g}, so nothing separates liked from disliked: where every row "
            "is a like, add --negatives popularity --catalogue FILE (titles not met, to draw negatives from; several "
            "users have those of each other); else use another rating column"
        )
    if quantile is None:
        quantile = ratings.liked_quantile
    if quantile is not None:
        return LikedRule(None, quantile, f"liked: above the {quantile:g} quantile of the user's own ratings")
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
    # minus a small number: 0.28 * 25 is 7.000000000000001
    place = start[:-1] + np.maximum(np.ceil(counts * rule.quantile - 1e-9).astype(np.int64) - 1, 0)
    ascending = rating[np.lexsort((rating, user))]
    threshold = ascending[np.minimum(place, len(rating) - 1)]
    return rating > threshold[user]


@dataclass(frozen=True, slots=True, eq=False)
class Histories:
    """M interactions, user by user, each user's in order, each title once; user u's stand from start[u] to start[u +
    1].

    title, liked, rating  (M,) int32, bool, float64
    row                   (M,) int64: the place of the interaction in the source, whatever its order here
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


def is_one(settings: PrepareSettings) -> bool:
    """Whether each user gives a single example, whose positive is the last liked item."""
    return settings.examples_per_user in ("", "1") or settings.recipe == "paper"


def for_this(settings: PrepareSettings, users: int, personal: bool) -> PrepareSettings:
    """The settings with `split` and `examples_per_user` decided: by time and all for a single person.

    Raises UserError.
    """
    number = settings.examples_per_user
    if number not in ("", "all") and not (number.isdecimal() and int(number)):
        raise UserError(f"--examples-per-user: {number!r} does not fit: give a number from 1, or all")
    alone = users == 1 and settings.recipe != "paper"
    split = settings.split or ("time" if alone else "user")
    number = number or ("all" if split == "time" or personal else "1")
    if split == "time":
        for name in ("train_users", "valid_users", "test_users", "few_shot"):
            if getattr(settings, name):
                why = "--split time" if settings.split else "a single person's examples are split by time, which"
                raise UserError(
                    f"--{name.replace('_', '-')}: {why} puts each person into train, valid and test: leave it out"
                )
        if number.isdecimal() and int(number) < len(SPLITS):
            raise UserError(
                f"--examples-per-user: {number} is too few for --split time: give at least {len(SPLITS)}, or all"
            )
        if settings.order == "random":
            raise UserError("--order: random order has no earlier and later: leave out --split time or --order")
    return replace(settings, split=split, examples_per_user=number)


def least_disliked(settings: PrepareSettings, all_liked: bool) -> int:
    """Disliked items that a user needs; none for drawn negatives where there are no disliked items at all."""
    if settings.negatives in DRAWN:
        return 0 if all_liked else settings.min_disliked
    return max(1, settings.min_disliked)


def eligible_users(h: Histories, settings: PrepareSettings, titles: int) -> tuple[list[int], dict[str, int]]:
    """Users with enough liked and disliked items, and how many fail for which reason.

    With one example a user, items are counted among the last ones (--max-interactions), else among all. Negatives that
    are disliked items need at least one; drawn ones, a title that the user has not met.
    """
    counts = np.diff(h.start)
    user = np.repeat(np.arange(len(counts)), counts)
    window = np.ones(len(user), bool)
    if settings.max_interactions and is_one(settings):
        window = h.start[1:][user] - np.arange(len(user)) <= settings.max_interactions
    liked = np.bincount(user[window & h.liked], minlength=len(counts))
    disliked = np.bincount(user[window & ~h.liked], minlength=len(counts))
    drawn = settings.negatives in DRAWN
    few_liked = liked < settings.min_liked
    min_disliked = least_disliked(settings, bool(h.liked.all()))
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


def sizes(eligible: int, settings: PrepareSettings, trains: bool = True, tests: bool = True) -> dict[str, int]:
    """Users of each split of a domain: as given, the paper's, or scaled to how many are eligible; training gets the
    rest.
    """
    wanted: dict[str, int] = {}
    for split, here in (("valid", trains), ("test", tests)):
        given = getattr(settings, f"{split}_users")
        share = eligible if split == "test" and not trains else round(SHARES[split] * eligible)
        auto = min(MOST[split], max(share, int(eligible >= (3 if split == "valid" else 2))))
        wanted[split] = here * (given if given is not None else PAPER[split] if settings.recipe == "paper" else auto)
    rest = max(0, eligible - wanted["valid"] - wanted["test"])
    train = PAPER["train"] if settings.recipe == "paper" else rest
    train = settings.train_users if settings.train_users is not None else train
    return {"train": trains * (settings.few_shot or train), **wanted}


def assign(
    users: Sequence[str], wanted: Mapping[str, int], settings: PrepareSettings, taken: dict[str, str]
) -> dict[str, list[str]]:
    """The users of each split, `wanted` of each, drawn by hash. `taken` (user -> split) keeps people apart across
    domains, and grows.

    Training users come from one end of the draw, validation and then test users from the other: with any number of
    training users the others stay as they are, and fewer are a subset of more. With --few-shot the others still avoid
    all --train-users.
    """
    drawn = sorted(users, key=lambda u: (unit(settings.seed, "user", u), u))
    reserved = max(wanted["train"], settings.train_users or 0) if wanted["train"] else 0
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


def popularity(h: Histories, titles: int) -> np.ndarray:
    """How many users rated each title.  (T,) int64"""
    return np.bincount(h.title, minlength=titles)
