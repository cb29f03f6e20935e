"""Which negatives of an example are used, and in which order titles are printed."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from ..records import Example, PreferenceGroup, RankingExample
from .groups import candidates

E = TypeVar("E", RankingExample, PreferenceGroup)


def printed_orders(
    example: Example,
    index: int,
    *,
    both: bool,
    redraw: bool,
    seed: int,
    epoch: int = 0,
    form: str = "pairwise",
    count: int = 1,
) -> list[tuple[Any, ...]]:
    """The orders in which an example's titles are printed.

    pairwise  for each negative, positive-first flags: (True,), (False,) or, with `both`, (True, False). Without `both`
              the order that the file fixed, or one drawn by seed; `redraw` draws one afresh each epoch
    listwise  `count` permutations of the candidates (see `rotations`); `redraw` takes the next ones each epoch
    Other forms and free text print no order: none.
    """
    if isinstance(example, PreferenceGroup) or form not in ("pairwise", "listwise"):
        return []
    if form == "listwise":
        return rotations(example, count, seed, epoch * count if redraw else 0)
    k = len(example.negatives)
    if both:
        return [(True, False)] * k
    if not redraw and example.positive_first is not None:
        return [(flag,) for flag in example.positive_first]
    draws = np.random.default_rng([seed, epoch if redraw else 0, index]).random(k) < 0.5
    return [(bool(flag),) for flag in draws]


def rotations(example: RankingExample, count: int, seed: int, start: int = 0) -> list[tuple[int, ...]]:
    """`count` printed orders of an example's 1 + K candidates (0 is the positive), at most 1 + K; 0 takes all of them.

    One permutation, drawn by seed, user and titles, and its rotations from the `start`-th on: with all of them, each
    title is once in each place. The order in which the example lists its negatives does not matter.
    """
    titles = candidates(example)
    by_title = sorted(range(len(titles)), key=titles.__getitem__)
    key = "\0".join([str(seed), example.user, *(titles[i] for i in by_title)])
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    base = [by_title[i] for i in np.random.default_rng(int.from_bytes(digest, "little")).permutation(len(titles))]
    n = len(titles)
    return [tuple(base[r % n :] + base[: r % n]) for r in range(start, start + min(count or n, n))]


def first_negatives(example: E, count: int) -> E:
    """The example with its first `count` negatives, or rejected answers; 0 keeps all."""
    if isinstance(example, PreferenceGroup):
        pairs = example.pairs[: count or None]
        kept = sorted({branch for pair in pairs for branch in pair}) or range(len(example.branches))
        renumbered = tuple((kept.index(chosen), kept.index(rejected)) for chosen, rejected in pairs)
        return replace(example, branches=tuple(example.branches[b] for b in kept), pairs=renumbered)
    if count == 0 or count >= len(example.negatives):
        return example
    first, ratings, times = example.positive_first, example.answer_ratings, example.answer_times
    return replace(
        example,
        negatives=example.negatives[:count],
        positive_first=first and first[:count],
        answer_ratings=ratings and ratings[: 1 + count],
        answer_times=times and times[: 1 + count],
    )


def last_positives(example: RankingExample, count: int) -> RankingExample:
    """The example with the last titles of its history as further positives, `count` positives in all.

    One title of the history stays, and none counts twice or beside the same negative: so there may be fewer.
    """
    cut = max(1, len(example.history) - (count - 1))
    others = {example.positive, *example.negatives}
    more = tuple(dict.fromkeys(t for t in example.history[cut:] if t not in others))
    return replace(example, history=example.history[:cut], more_positives=more)
