"""Which negatives of an example are used, and in which order each pair is printed."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np

from ..records import Example, PreferenceGroup, RankingExample

E = TypeVar("E", RankingExample, PreferenceGroup)


def printed_orders(
    example: Example, index: int, *, both: bool, redraw: bool, seed: int, epoch: int = 0
) -> list[tuple[bool, ...]]:
    """For each negative, the orders in which its pair is printed, as positive-first flags.

    both    both orders
    redraw  drawn afresh each epoch; else the order the file fixed, or one drawn by seed for good

    Free text has one prompt as it is: none.
    """
    if isinstance(example, PreferenceGroup):
        return []
    k = len(example.negatives)
    if both:
        return [(True, False)] * k
    if not redraw and example.positive_first is not None:
        return [(flag,) for flag in example.positive_first]
    draws = np.random.default_rng([seed, epoch if redraw else 0, index]).random(k) < 0.5
    return [(bool(flag),) for flag in draws]


def first_negatives(example: E, count: int) -> E:
    """The example with its first `count` negatives, or rejected answers; 0 keeps all."""
    if isinstance(example, PreferenceGroup):
        pairs = example.pairs[: count or None]
        kept = sorted({branch for pair in pairs for branch in pair}) or range(len(example.branches))
        renumbered = tuple((kept.index(chosen), kept.index(rejected)) for chosen, rejected in pairs)
        return replace(example, branches=tuple(example.branches[b] for b in kept), pairs=renumbered)
    if count == 0 or count >= len(example.negatives):
        return example
    first = example.positive_first
    return replace(example, negatives=example.negatives[:count], positive_first=first and first[:count])
