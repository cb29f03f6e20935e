"""A group as a prefix tree: encoded groups, and the padded arrays of a batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_TAILS = 4  # a block holds at most so many times a tail's tokens


def _common(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


@dataclass(frozen=True, slots=True, eq=False)
class EncodedGroup:
    """A group in tokens. Branch r is `prefix + tails[r]`; its answer is the last `answer_lengths[r]` tokens.

    prefix 1 2 3, tails  [7, 8, 9, 4, 5]   # rest of the prompt 7 8, answer 9 4 5; answer_lengths 3
    Every tail starts with at least one token of the prompt: the position that predicts the answer's first.
    """

    prefix: np.ndarray  # (P,) int32
    tails: tuple[np.ndarray, ...]  # R arrays (T_r,) int32
    answer_lengths: tuple[int, ...]  # R
    pairs: np.ndarray  # (K, 2) int32
    user: str = ""
    domain: str = ""
    source: str = ""
    dropped: int = 0  # history items left out to fit max_seq_length
    targets: tuple[int, ...] | None = (
        None  # branches that SFT learns; None: the chosen ones, or all where there are no pairs
    )
    utilities: tuple[float, ...] | None = None  # of each branch (see losses.recpo_margin)

    def tree(self) -> list[tuple[int, int]]:
        """(branch, tokens that its tail shares with the branch before it), so ordered that each token comes once."""
        order = sorted(range(len(self.tails)), key=lambda r: self.tails[r].tolist())
        return [(r, _common(self.tails[order[i - 1]], self.tails[r]) if i else 0) for i, r in enumerate(order)]

    @property
    def shared_tokens(self) -> int:
        """Tokens when whatever branches have in common from the start is counted once."""
        return len(self.prefix) + sum(len(self.tails[r]) - shared for r, shared in self.tree())

    @property
    def separate_tokens(self) -> int:
        return sum(len(self.prefix) + len(t) for t in self.tails)


@dataclass(frozen=True, slots=True, eq=False)
class GroupBatch:
    """G encoded groups as arrays. R, A, K are the batch's largest sizes; N, M, P, B, C, T, S, Q its own or planned
    ones.

    What branches share from the start is run once: `tokens` has each group's prefix tree in depth-first order, one
    group after another. A token below a prefix attends to the prefix and, in one of C blocks, each a question with its
    answers, to what came before it in its own branch. The few tokens that several blocks start with are keys in each of
    them, and queries in the first. A branch's very last token predicts nothing and is left out.

        1 2 7 4 9, 1 2 7 5 9, 1 2 8 6 9   # sequences
        1 2 | 7 4 5 | 8 6                 # tokens: prefix, two blocks
        0 1 | 2 3 3 | 2 3                 # positions
              3 2 3 | 2 2                 # block_ends

    tokens           (N,)       int32
    positions        (N,)       int32: depth in the tree, the token's position in its own sequence
    prefix_index     (G, P)     int32: where the prefix's tokens are in `tokens`
    prefix_lengths   (G,)       int32
    below_index      (G, B)     int32: where the tokens below a prefix are in `tokens`
    block_index      (G, C, T)  int32: where a block's tokens are in `tokens`
    block_ends       (G, C, T)  int32: in its block, one past the last token that follows it in a branch; 0 for padding
    place            (N,)       int32: where a token is a query: the G*P places of prefixes, then the G*B below them
    block_place      (G, B)     int32: where a token below a prefix is a query in the G*C*T places of blocks
    rows             (M,)       int32: the tokens that predict an answer's token, each once, as places in `tokens`
    group_rows       (G, S)     int32: which of `rows` are a group's
    row_place        (M,)       int32: where a row is in these G*S
    query_rows       (G, C, Q)  int32: which of `rows` are queries in a block
    query_at         (G, C, Q)  int32: and where they are in it
    query_place      (G, S)     int32: where a group's row is in the G*C*Q queries of blocks
    answer_rows      (G, R, A)  int32: which of `rows` predicts the answer's token
    answer_targets   (G, R, A)  int32
    answer_mask      (G, R, A)  float32
    chosen_lengths   (G, R)     float32: answer tokens of the branches that SFT learns, 0 elsewhere
    utilities        (G, R)     float32: of each branch's answer (see losses.recpo_margin); 1 where there is none
    pairs            (G, K, 2)  int32: chosen, rejected branch
    pair_mask        (G, K)     float32
    starts           (G + 1,)   int32: where each group's tokens begin in `tokens`; the last is the count of real ones
    """

    tokens: np.ndarray
    positions: np.ndarray
    prefix_index: np.ndarray
    prefix_lengths: np.ndarray
    below_index: np.ndarray
    block_index: np.ndarray
    block_ends: np.ndarray
    place: np.ndarray
    block_place: np.ndarray
    rows: np.ndarray
    group_rows: np.ndarray
    row_place: np.ndarray
    query_rows: np.ndarray
    query_at: np.ndarray
    query_place: np.ndarray
    answer_rows: np.ndarray
    answer_targets: np.ndarray
    answer_mask: np.ndarray
    chosen_lengths: np.ndarray
    utilities: np.ndarray
    pairs: np.ndarray
    pair_mask: np.ndarray
    starts: np.ndarray
    groups: tuple[EncodedGroup, ...]

    @property
    def padding_share(self) -> float:
        return 1 - float(self.starts[-1]) / len(self.tokens)


@dataclass(frozen=True)
class _Below:
    """A group's tree below its prefix. Blocks hold places in `tokens`."""

    tokens: np.ndarray
    depths: np.ndarray
    owner: np.ndarray  # (tokens, 2): the block in which a token is a query, and its place there
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
        shared = min(shared, len(tail), len(path))  # the branch before may be a prefix of this one
        new = np.arange(size, size + len(tail) - shared, dtype=np.int32)
        path = np.concatenate([path[:shared], new])
        room = BLOCK_TAILS * max(len(tail), 16)  # one long block would pad all others to its length
        if (
            blocks and 2 * shared >= len(tail) and len(blocks[-1]) + len(new) <= room
        ):  # another answer to the same question
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


def _blank(
    groups: Sequence[EncodedGroup],
    starts: np.ndarray,
    *,
    N: int,
    P: int,
    B: int,
    C: int,
    T: int,
    M: int,
    S: int,
    Q: int,
    A: int,
) -> GroupBatch:
    """A batch of these sizes, all zeros."""
    G, R, K = len(groups), max(len(g.tails) for g in groups), max([1, *(len(g.pairs) for g in groups)])

    def ints(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int32)

    return GroupBatch(
        tokens=ints(N),
        positions=ints(N),
        prefix_index=ints(G, P),
        prefix_lengths=np.array([len(g.prefix) for g in groups], np.int32),
        below_index=ints(G, B),
        block_index=ints(G, C, T),
        block_ends=ints(G, C, T),
        place=ints(N),
        block_place=ints(G, B),
        rows=ints(M),
        group_rows=ints(G, S),
        row_place=ints(M),
        query_rows=ints(G, C, Q),
        query_at=ints(G, C, Q),
        query_place=ints(G, S),
        answer_rows=ints(G, R, A),
        answer_targets=ints(G, R, A),
        answer_mask=np.zeros((G, R, A), np.float32),
        chosen_lengths=np.zeros((G, R), np.float32),
        utilities=np.ones((G, R), np.float32),
        pairs=ints(G, K, 2),
        pair_mask=np.zeros((G, K), np.float32),
        starts=starts,
        groups=tuple(groups),
    )


def pad_groups(
    groups: Sequence[EncodedGroup], sized: Callable[[int, bool], int] = lambda size, coarse: size
) -> GroupBatch:
    """The groups as one batch (see GroupBatch); `sized` enlarges its sizes N, M and, coarsely, P, B, T, S, Q, A."""
    trees = [_below(g) for g in groups]
    predicting = [np.unique(np.concatenate(t.predictors)) for t in trees]
    in_block = [np.bincount(t.owner[p, 0], minlength=len(t.blocks)) for t, p in zip(trees, predicting, strict=True)]
    ends = itertools.accumulate(len(g.prefix) + len(t.tokens) for g, t in zip(groups, trees, strict=True))
    starts = np.array([0, *ends], np.int32)
    C, most = max(len(t.blocks) for t in trees), max(int(n.max()) for n in in_block)
    b = _blank(
        groups,
        starts,
        N=sized(int(starts[-1]), False),
        P=sized(max(1, *(len(g.prefix) for g in groups)), True),
        B=sized(max(len(t.tokens) for t in trees), True),
        C=C,
        T=sized(max(len(block) for t in trees for block in t.blocks), True),
        M=sized(sum(map(len, predicting)), False),
        S=sized(max(map(len, predicting)), True),
        Q=sized(most, True),
        A=sized(max(n for g in groups for n in g.answer_lengths), True),
    )
    (G, P), B, T, S, Q = (
        b.prefix_index.shape,
        *(of.shape[-1] for of in (b.below_index, b.block_index, b.group_rows, b.query_rows)),
    )
    row = 0
    for g, (group, tree, predicts) in enumerate(zip(groups, trees, predicting, strict=True)):
        p, at, end, below = len(group.prefix), int(starts[g]), int(starts[g + 1]), int(starts[g]) + len(group.prefix)
        size, count = end - below, len(predicts)
        b.prefix_index[g, :p] = np.arange(at, below)
        b.tokens[at:below], b.positions[at:below] = group.prefix, np.arange(p)
        b.place[at:below] = g * P + np.arange(p)
        b.below_index[g, :size] = np.arange(below, end)
        b.tokens[below:end], b.positions[below:end] = tree.tokens, p + tree.depths
        b.place[below:end] = G * P + g * B + np.arange(size)
        b.block_place[g, :size] = (g * C + tree.owner[:, 0]) * T + tree.owner[:, 1]
        b.rows[row : row + count] = below + predicts
        b.group_rows[g, :count] = row + np.arange(count)
        b.row_place[row : row + count] = g * S + np.arange(count)
        for c, (block, block_end) in enumerate(zip(tree.blocks, tree.ends, strict=True)):
            b.block_index[g, c, : len(block)], b.block_ends[g, c, : len(block)] = below + block, block_end
            queries = np.flatnonzero(tree.owner[predicts, 0] == c)
            b.query_rows[g, c, : len(queries)] = row + queries
            b.query_at[g, c, : len(queries)] = tree.owner[predicts[queries], 1]
            b.query_place[g, queries] = (g * C + c) * Q + np.arange(len(queries))
        for r, (tail, predictor) in enumerate(zip(group.tails, tree.predictors, strict=True)):
            n = len(predictor)
            b.answer_rows[g, r, :n] = row + np.searchsorted(predicts, predictor)
            b.answer_targets[g, r, :n] = tail[len(tail) - n :]
            b.answer_mask[g, r, :n] = 1
        row += count
        b.pairs[g, : len(group.pairs)] = group.pairs
        b.pair_mask[g, : len(group.pairs)] = 1
        chosen = group.pairs[:, 0] if len(group.pairs) else np.arange(len(group.tails))
        if group.targets is not None:
            chosen = np.array(group.targets)
        b.chosen_lengths[g, chosen] = np.array(group.answer_lengths)[chosen]
        if group.utilities is not None:
            b.utilities[g, : len(group.tails)] = group.utilities
    return b


def planned(size: int, coarse: bool = False) -> int:
    """The next of a few sizes: at most an eighth (or 32) above, or `coarse` for what costs little to enlarge."""
    coarse_step = 32 if size <= 32 else 64 if size <= 256 else 128
    step = coarse_step if coarse else max(32, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


def pieces(group: EncodedGroup, tokens: int) -> list[np.ndarray]:
    """The branches of a group in parts of at most `tokens`, shared ones counted once and the prefix in each part.

    Branches that begin alike stay together. A part holds at least one branch.
    """
    parts: list[list[int]] = []
    total = 0
    for r, shared in group.tree():
        length = len(group.tails[r])
        if not parts or total + length - shared > tokens:
            parts.append([])
            total, shared = len(group.prefix), 0
        parts[-1].append(r)
        total += length - shared
    return [np.array(part) for part in parts]


def part(group: EncodedGroup, branches: np.ndarray) -> EncodedGroup:
    """The group with some of its branches alone, to be scored; it has no pairs."""
    tails, lengths = (tuple(of[r] for r in branches) for of in (group.tails, group.answer_lengths))
    return EncodedGroup(
        group.prefix, tails, lengths, np.zeros((0, 2), np.int32), group.user, group.domain, group.source
    )


BATCH_TOKENS = 8192  # shared ones once; more in one piece is no faster anywhere


def by_length(groups: Sequence[EncodedGroup], batch_size: int, tokens: int = BATCH_TOKENS) -> Iterator[np.ndarray]:
    """Indices of micro-batches of groups of similar length; every group is in exactly one.

    A micro-batch has at most `batch_size` groups, and more than one only within `tokens`.
    """
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
