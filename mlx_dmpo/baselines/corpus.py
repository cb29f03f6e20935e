"""Examples -> what a baseline is fitted on: who liked which items, in which order. No test target is among them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import UserError
from ..records import Example, PreferenceGroup, RankingExample

Key = Callable[[str], str]  # title -> what it is known by


def exact(title: str) -> str:
    return title


def short(title: str) -> str:
    """Up to the first comma or bracket, as the DMPO release cuts titles: "Sixth Sense, The (1999)" -> "sixth sense"."""
    return re.split(r"[,(]", title)[0].strip().casefold() or title


MATCHING: dict[str, Key] = {"exact": exact, "short": short}


@dataclass(frozen=True)
class Corpus:
    """Liked items of the fitting users. Item i is known by `keys[i]`; items that only tests mention are left out.

    keys       titles, through `key`
    sequences  one (n,) int32 array a user: the items that the user liked, oldest first, each once
    likes      (I,) how many users liked an item
    dislikes   (I,) how many disliked it
    left_out   interactions left out, since the same user's test row has them as candidates
    """

    keys: tuple[str, ...]
    sequences: tuple[np.ndarray, ...]
    likes: np.ndarray
    dislikes: np.ndarray
    left_out: int = 0
    key: Key = exact
    index: dict[str, int] = field(default_factory=dict)

    def items(self, titles: Sequence[str]) -> np.ndarray:
        """(n,) int64: the items of these titles, -1 for one that was never met."""
        return np.array([self.index.get(self.key(title), -1) for title in titles], np.int64)


def ranking(examples: Iterable[Example]) -> list[RankingExample]:
    """Raises UserError for free text, which holds no titles."""
    found = list(examples)
    for example in found:
        if isinstance(example, PreferenceGroup):
            raise UserError(f"{example.source}: free text holds no titles: a baseline needs ranking examples")
    return found  # type: ignore[return-value]


def build_corpus(
    fitting: Iterable[Example], tested: Iterable[Example], *, with_histories: bool = False, matching: str = "exact"
) -> Corpus:
    """Fitting examples give history and positive as liked, negatives as disliked; tested ones their history at most.

    tested          what will be scored: an interaction of such a user with a candidate of the user's row is left out
    with_histories  the tested users' histories are fitted on too
    Raises UserError where nothing is left.
    """
    key, fitting, tested = MATCHING[matching], ranking(fitting), ranking(tested)
    targets: dict[str, set[str]] = {}
    for example in tested:
        targets.setdefault(example.user, set()).update(map(key, (example.positive, *example.negatives)))
    liked: dict[str, dict[str, None]] = {}  # user -> items, in order of first appearance
    disliked: dict[str, dict[str, None]] = {}
    left_out = 0

    def add(place: dict[str, dict[str, None]], user: str, titles: Iterable[str]) -> None:
        nonlocal left_out
        for name in map(key, titles):
            if name in targets.get(user, ()):
                left_out += 1
            else:
                place.setdefault(user, {})[name] = None

    for example in fitting:
        add(liked, example.user, (*example.history, example.positive))
        add(disliked, example.user, example.negatives)
    for example in tested if with_histories else ():
        add(liked, example.user, example.history)
    index: dict[str, int] = {}
    for names in (*liked.values(), *disliked.values()):
        for name in names:
            index.setdefault(name, len(index))
    if not liked:
        raise UserError("--data: no interaction to fit on: give training users, or --fit all")
    likes, dislikes = (_counts(part, index) for part in (liked, disliked))
    sequences = tuple(np.array([index[name] for name in names], np.int32) for names in liked.values())
    return Corpus(tuple(index), sequences, likes, dislikes, left_out, key, index)


def _counts(users: dict[str, dict[str, None]], index: dict[str, int]) -> np.ndarray:
    return np.bincount([index[name] for names in users.values() for name in names], minlength=len(index))
