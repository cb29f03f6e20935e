"""From examples to padded arrays: printed orders, epochs, steps, micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any, TypeVar

import numpy as np

from .records import EncodedGroup, Example, GroupBatch, PreferenceGroup, RankingExample

E = TypeVar("E", RankingExample, PreferenceGroup)
T = TypeVar("T")


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


@dataclass(frozen=True)
class _Below:
    """A group's tree below its prefix. Blocks hold places in `tokens`."""

    tokens: np.ndarray
    depths: np.ndarray
    owner: np.ndarray  # (tokens, 2): the block in which a token asks, and its place there
    blocks: list[np.ndarray]
    ends: list[np.ndarray]
    predictors: list[np.ndarray]  # of each branch: the tokens that predict its answer


def _below(group: EncodedGroup) -> _Below:
    tokens, depths, owner = [], [], []
    blocks: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    predictors = [np.zeros(0, np.int32)] * len(group.tails)
    path = own = np.zeros(0, np.int32)  # the branch at hand, as places in tokens and in its block
    size = 0
    for r, shared in group.tree():
        tail = group.tails[r][:-1]
        shared = min(shared, len(tail), len(path))  # the branch before may end where this one goes on
        new = np.arange(size, size + len(tail) - shared, dtype=np.int32)
        path = np.concatenate([path[:shared], new])
        if blocks and 2 * shared >= len(tail):  # mostly the same: another answer to the question before
            own = np.concatenate([own[:shared], len(blocks[-1]) + np.arange(len(new), dtype=np.int32)])
            blocks[-1] = np.concatenate([blocks[-1], new])
            ends[-1] = np.concatenate([ends[-1], np.zeros(len(new), np.int32)])
        else:
            own = np.arange(len(path), dtype=np.int32)
            blocks.append(path)
            ends.append(np.zeros(len(path), np.int32))
        ends[-1][own] = len(blocks[-1])  # depth first: the last branch through a token is the end of what follows it
        tokens.append(tail[shared:])
        depths.append(np.arange(shared, len(tail), dtype=np.int32))
        owner.append(np.stack([np.full(len(new), len(blocks) - 1, np.int32), own[shared:]], axis=1))
        size += len(new)
        predictors[r] = path[len(path) - group.answer_lengths[r] :]
    return _Below(np.concatenate(tokens), np.concatenate(depths), np.concatenate(owner), blocks, ends, predictors)


def pad_groups(groups: Sequence[EncodedGroup], sized: Callable[[int, bool], int] = lambda size, coarse: size) -> GroupBatch:
    """The groups as one batch, its sizes N, M and, coarsely, P, T, Q, A enlarged by `sized`; see GroupBatch for the shapes."""
    trees = [_below(g) for g in groups]
    predicting = [np.unique(np.concatenate(t.predictors)) for t in trees]
    in_block = [np.bincount(t.owner[p, 0], minlength=len(t.blocks)) for t, p in zip(trees, predicting, strict=True)]
    G = len(groups)
    prefix_lengths = np.array([len(g.prefix) for g in groups], np.int32)
    starts = np.cumsum([0, *(len(g.prefix) + len(t.tokens) for g, t in zip(groups, trees, strict=True))], dtype=np.int32)
    N = sized(int(starts[-1]), False)
    P = sized(int(prefix_lengths.max()), True)
    C = max(len(t.blocks) for t in trees)
    T = sized(max(len(b) for t in trees for b in t.blocks), True)
    M = sized(sum(map(len, predicting)), False)
    Q = sized(int(max(n.max() for n in in_block)), True)
    R = max(len(g.tails) for g in groups)
    A = sized(max(n for g in groups for n in g.answer_lengths), True)
    K = max([1, *(len(g.pairs) for g in groups)])
    tokens = np.zeros(N, np.int32)
    positions = np.zeros(N, np.int32)
    place = np.zeros(N, np.int32)
    prefix_index = np.zeros((G, P), np.int32)
    block_index = np.zeros((G, C, T), np.int32)
    block_ends = np.zeros((G, C, T), np.int32)
    rows = np.zeros(M, np.int32)
    query_rows = np.zeros((G, C, Q), np.int32)
    query_at = np.zeros((G, C, Q), np.int32)
    row_place = np.zeros(M, np.int32)
    answer_rows = np.zeros((G, R, A), np.int32)
    answer_targets = np.zeros((G, R, A), np.int32)
    answer_mask = np.zeros((G, R, A), np.float32)
    chosen_lengths = np.zeros((G, R), np.float32)
    pairs = np.zeros((G, K, 2), np.int32)
    pair_mask = np.zeros((G, K), np.float32)
    at = row = 0
    for g, (group, tree, predicts) in enumerate(zip(groups, trees, predicting, strict=True)):
        p = len(group.prefix)
        below = at + p
        prefix_index[g, :p] = np.arange(at, below)
        tokens[at:below], positions[at:below], place[at:below] = group.prefix, np.arange(p), g * P + np.arange(p)
        at = below + len(tree.tokens)
        tokens[below:at], positions[below:at] = tree.tokens, p + tree.depths
        place[below:at] = G * P + (g * C + tree.owner[:, 0]) * T + tree.owner[:, 1]
        for c, (block, end) in enumerate(zip(tree.blocks, tree.ends, strict=True)):
            block_index[g, c, : len(block)], block_ends[g, c, : len(block)] = below + block, end
            asking = np.flatnonzero(tree.owner[predicts, 0] == c)
            query_rows[g, c, : len(asking)], query_at[g, c, : len(asking)] = row + asking, tree.owner[predicts[asking], 1]
            row_place[row + asking] = (g * C + c) * Q + np.arange(len(asking))
        rows[row : row + len(predicts)] = below + predicts
        for r, (tail, predictor) in enumerate(zip(group.tails, tree.predictors, strict=True)):
            n = len(predictor)
            answer_rows[g, r, :n] = row + np.searchsorted(predicts, predictor)
            answer_targets[g, r, :n] = tail[len(tail) - n :]
            answer_mask[g, r, :n] = 1
        row += len(predicts)
        pairs[g, : len(group.pairs)] = group.pairs
        pair_mask[g, : len(group.pairs)] = 1
        chosen = group.pairs[:, 0] if len(group.pairs) else np.arange(len(group.tails))
        chosen_lengths[g, chosen] = np.array(group.answer_lengths)[chosen]
    return GroupBatch(
        tokens,
        positions,
        prefix_index,
        prefix_lengths,
        block_index,
        block_ends,
        place,
        rows,
        query_rows,
        query_at,
        row_place,
        answer_rows,
        answer_targets,
        answer_mask,
        chosen_lengths,
        pairs,
        pair_mask,
        starts,
        tuple(groups),
    )


def epoch_steps(count: int, groups_per_step: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The epoch's steps as arrays of group indices: a fresh permutation, the last step the remainder."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return [order[i : i + groups_per_step] for i in range(0, count, groups_per_step)]


def planned(size: int, coarse: bool = False) -> int:
    """The next of a few sizes: at most an eighth (or 32) above, or `coarse` for what costs little to enlarge."""
    coarse_step = 32 if size <= 32 else 64 if size <= 256 else 128
    step = coarse_step if coarse else max(32, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


BATCH_TOKENS = 8192  # shared ones once; more in one piece is no faster anywhere


def by_length(groups: Sequence[EncodedGroup], batch_size: int, tokens: int = BATCH_TOKENS) -> Iterator[np.ndarray]:
    """Indices of micro-batches of like groups, at most `batch_size` of them and, beyond the first, `tokens`. Every group is in exactly one."""
    order = sorted(range(len(groups)), key=lambda i: (len(groups[i].tails), len(groups[i].prefix), i))
    batch: list[int] = []
    total = 0
    for i in order:
        size = groups[i].shared_tokens
        if batch and (len(batch) == batch_size or total + size > tokens):
            yield np.array(batch)
            batch, total = [], 0
        batch.append(i)
        total += size
    if batch:
        yield np.array(batch)


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made on a thread while the one before is in use. What goes wrong there is raised where the item is asked for.

    Whoever stops early waits for nothing.
    """
    end: Any = object()

    def start() -> Future[T]:
        coming: Future[T] = Future()

        def make() -> None:
            try:
                coming.set_result(next(items, end))
            except BaseException as error:
                coming.set_exception(error)

        Thread(target=make, daemon=True).start()
        return coming

    coming = start()
    while (item := coming.result()) is not end:
        coming = start()
        yield item
