"""Where the queries and keys of prefix trees lie, as attention takes them: a batch's index arrays, with heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .tree import GroupBatch

PREFIX_CHUNK = 128  # queries of a prefix at once: at most so many of their keys are masked
WHOLE = 1 << 30  # all of them: fastest where a device has a fused causal backward, as Metal since MLX 0.32.4


@dataclass(frozen=True)
class Queries:
    """The queries of a layer. A row is one head of one of M queries; n heads share a head of keys, H = Hkv * n.

    Rows have slots: those of prefixes (G, H, P), if they are queries, and then those below prefixes (G, Hkv, n, B).
    """

    tokens: mx.array | None  # (M,) which of the N tokens; None for all of them
    slots: mx.array  # (slots,) which of the M*H rows is in each
    place: mx.array  # (M, H) and in which slot each row is
    filled: mx.array | None  # (slots, 1) whether a slot is more than padding; None: all are
    real: mx.array | None  # (M, H, 1) whether a row is; None: all are
    far: mx.array | None  # (G, 1, 1, B, P) or (G, 1, 1, 1, P) additive mask of the prefix; None masks nothing
    spread: mx.array  # (G, Hkv, C, n, Q) which slot below prefixes is in a block
    back: mx.array  # (G, Hkv, n, B) and where in these blocks each of them is
    own: mx.array  # (G, 1, C, 1, Q, 1) whether it is this block's query, not another's nor padding
    near: mx.array  # (G, 1, C, 1, Q, T) additive mask of a block's own tokens: 0 or a very low value


@dataclass(frozen=True)
class Chunk:
    """Queries of the prefixes that are run at once, and the keys that they see."""

    queries: slice
    keys: slice
    mask: mx.array | str  # "causal", or (queries, keys) bool


@dataclass(frozen=True)
class Layout:
    """A batch as attention takes it."""

    positions: mx.array  # (N,)
    prefix: mx.array  # (G, Hkv, P) which of the N*Hkv rows of keys
    block: mx.array  # (G, Hkv, C, T)
    chunks: list[Chunk]
    every: Queries
    answers: Queries  # those that predict an answer's token; no prefix is among them


def layout(
    batch: GroupBatch, dtype: mx.Dtype, heads: tuple[int, int], window: int | None = None, chunk: int = PREFIX_CHUNK
) -> Layout:
    """heads: H, Hkv. window: a token sees so many tokens of its own sequence, the last of them itself; None: all."""
    Hkv = heads[1]
    (G, P), T, N = batch.prefix_index.shape, batch.block_index.shape[2], len(batch.positions)
    traced = not isinstance(batch.positions, np.ndarray)  # then a length may be any
    if window and window >= (P + T if traced else int(batch.positions.max()) + 1):
        window = None  # no sequence is longer
    block, place, row_place = mx.array(batch.block_index), mx.array(batch.place), mx.array(batch.row_place)
    of_every = _queries(
        batch,
        dtype,
        heads,
        window,
        tokens=None,
        place=place,
        below=mx.array(batch.below_index),
        home=mx.array(batch.block_place),
        inside=mx.maximum(place[block] - G * P, 0),
        at=mx.broadcast_to(mx.arange(T), block.shape),
        padding=_padding([batch.prefix_index, batch.below_index], batch.place),
    )
    of_answers = _queries(
        batch,
        dtype,
        heads,
        window,
        tokens=mx.array(batch.rows),
        place=row_place,
        below=mx.array(batch.group_rows),
        home=mx.array(batch.query_place),
        inside=row_place[mx.array(batch.query_rows)],
        at=mx.array(batch.query_at),
        padding=_padding([batch.group_rows], batch.row_place),
    )
    keys = _numbered(N, Hkv)
    return Layout(
        mx.array(batch.positions),
        prefix=keys[mx.array(batch.prefix_index)].swapaxes(1, 2),
        block=keys[block].transpose(0, 3, 1, 2),
        chunks=prefix_chunks(P, window, chunk),
        every=of_every,
        answers=of_answers,
    )


def _numbered(*shape: int) -> mx.array:
    return mx.arange(math.prod(shape)).reshape(shape)


def _padding(slots: list[Any], place: Any) -> tuple[bool, bool]:
    """Whether slots, and queries, may be padding. place (M,): in which slot a query is."""
    if not isinstance(place, np.ndarray):
        return True, True
    query = np.concatenate([s.ravel() for s in slots])
    return bool((place[query] != np.arange(len(query))).any()), bool((query[place] != np.arange(len(place))).any())


def _queries(
    batch: GroupBatch,
    dtype: mx.Dtype,
    heads: tuple[int, int],
    window: int | None,
    *,
    tokens: mx.array | None,
    place: mx.array,
    below: mx.array,
    home: mx.array,
    inside: mx.array,
    at: mx.array,
    padding: tuple[bool, bool],
) -> Queries:
    """Queries, given without heads.

    place    (M,) where each of the M queries is: the G*P places of prefixes, if they are queries, then the G*B below
    below    (G, B) which of the M queries is there
    home     (G, B) where it is in the (G, C, Q) of the blocks
    inside   (G, C, Q) which of the G*B is in a block
    at       (G, C, Q) where it is in its block
    padding  whether slots, and queries, may be that
    """
    (H, Hkv), (G, P), (_, C, Q), B, M = heads, batch.prefix_index.shape, inside.shape, below.shape[1], len(place)
    n = H // Hkv
    lowest, nothing = mx.array(mx.finfo(dtype).min / 2, dtype), mx.zeros((), dtype)
    positions, block, ends = mx.array(batch.positions), mx.array(batch.block_index), mx.array(batch.block_ends)
    depth = positions[below if tokens is None else tokens[below]]  # (G, B)
    own = mx.arange(ends.shape[2])
    far = (mx.arange(P) < mx.array(batch.prefix_lengths)[:, None])[:, None, None, None]
    near = (own <= at[..., None]) & (at[..., None] < ends[:, :, None])  # (G, C, Q, T)
    if window:
        far = far & (depth[:, None, None, :, None] - mx.arange(P) < window)
        near = near & (depth.reshape(-1)[inside][..., None] - positions[block][:, :, None] < window)
    lengths = batch.prefix_lengths
    all_seen = isinstance(lengths, np.ndarray) and lengths.min() == P and not window

    slots = _numbered(M, Hkv, n)[below].transpose(0, 2, 3, 1).reshape(-1)
    slot = _numbered(G, Hkv, n, B).transpose(0, 3, 1, 2).reshape(G * B, Hkv, n)
    spread = slot[inside].transpose(0, 3, 1, 4, 2)
    back = _numbered(G, Hkv, C, n, Q).transpose(0, 2, 4, 1, 3).reshape(G * C * Q, Hkv, n)[home].transpose(0, 2, 3, 1)
    slot = slot.reshape(G * B, H)
    if tokens is None:
        slots = mx.concatenate([_numbered(M, H)[mx.array(batch.prefix_index)].swapaxes(1, 2).reshape(-1), slots])
        slot = mx.concatenate([_numbered(G, H, P).swapaxes(1, 2).reshape(G * P, H), G * H * P + slot])
    of_rows = slot[place]
    return Queries(
        tokens,
        slots,
        of_rows,
        filled=(of_rows.reshape(-1)[slots] == mx.arange(len(slots)))[:, None] if padding[0] else None,
        real=(slots[of_rows] == _numbered(M, H))[..., None] if padding[1] else None,
        far=None if all_seen else mx.where(far, nothing, lowest),
        spread=spread,
        back=back,
        own=(home.reshape(-1)[inside] == _numbered(G, C, Q))[:, None, :, None, :, None],
        near=mx.where(near, nothing, lowest)[:, None, :, None],
    )


def prefix_chunks(P: int, window: int | None, chunk: int) -> list[Chunk]:
    """Causal attention over P tokens, `chunk` queries at a time. Right padding comes after every query."""
    chunks = []
    for a in range(0, P, chunk):
        b, first = min(a + chunk, P), 0
        mask: mx.array | str = "causal"
        if window and b > window:
            first = max(0, a - window + 1)
            back = mx.arange(a, b)[:, None] - mx.arange(first, b)
            mask = (back >= 0) & (back < window)
        chunks.append(Chunk(slice(a, b), slice(first, b), mask))
    return chunks
