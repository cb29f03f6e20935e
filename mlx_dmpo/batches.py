"""From examples to padded arrays: printed orders, epochs, steps, micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from .records import EncodedGroup, Example, GroupBatch, PreferenceGroup, RankingExample

E = TypeVar("E", RankingExample, PreferenceGroup)

E = TypeVar("E", bound=Example)


def printed_orders(example: Example, index: int, *, both: bool, redraw: bool, seed: int, epoch: int = 0) -> list[tuple[bool, ...]]:
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


def pad_groups(groups: Sequence[EncodedGroup]) -> GroupBatch:
    """Right-padded arrays of the groups' largest sizes; see GroupBatch for the shapes."""
    G = len(groups)
    R = max(len(g.tails) for g in groups)
    P = max(len(g.prefix) for g in groups)
    T = max(len(t) for g in groups for t in g.tails)
    A = max(n for g in groups for n in g.answer_lengths)
    K = max([1, *(len(g.pairs) for g in groups)])
    prefix = np.zeros((G, P), np.int32)
    prefix_lengths = np.array([len(g.prefix) for g in groups], np.int32)
    tails = np.zeros((G, R, T), np.int32)
    tail_lengths = np.zeros((G, R), np.int32)
    answer_positions = np.zeros((G, R, A), np.int32)
    answer_targets = np.zeros((G, R, A), np.int32)
    answer_mask = np.zeros((G, R, A), np.float32)
    pairs = np.zeros((G, K, 2), np.int32)
    pair_mask = np.zeros((G, K), np.float32)
    for i, group in enumerate(groups):
        prefix[i, : len(group.prefix)] = group.prefix
        pairs[i, : len(group.pairs)] = group.pairs
        pair_mask[i, : len(group.pairs)] = 1
        for r, (tail, n) in enumerate(zip(group.tails, group.answer_lengths, strict=True)):
            tails[i, r, : len(tail)] = tail
            tail_lengths[i, r] = len(tail)
            # the token at position t is predicted at t - 1
            answer_positions[i, r, :n] = np.arange(len(tail) - n - 1, len(tail) - 1)
            answer_targets[i, r, :n] = tail[len(tail) - n :]
            answer_mask[i, r, :n] = 1
    return GroupBatch(
        prefix, prefix_lengths, tails, tail_lengths, answer_positions, answer_targets, answer_mask, pairs, pair_mask, tuple(groups)
    )


def epoch_steps(count: int, groups_per_step: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The epoch's steps as arrays of group indices: a fresh permutation, the last step the remainder."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return [order[i : i + groups_per_step] for i in range(0, count, groups_per_step)]


def by_length(groups: Sequence[EncodedGroup], batch_size: int) -> Iterator[np.ndarray]:
    """Indices of micro-batches of groups of like size, so that little is padded. Every group is in exactly one."""
    order = sorted(range(len(groups)), key=lambda i: (len(groups[i].tails), len(groups[i].prefix), i))
    for i in range(0, len(order), batch_size):
        yield np.array(order[i : i + batch_size])
