"""One transformer block over prefix trees."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .family import project, rest_of_layer, scale_queries
from .tree import GroupBatch

PREFIX_CHUNK = 128  # queries of a prefix at once: at most so many of their keys are masked
WHOLE = 1 << 30  # all of them: fastest where a device has a fused causal backward, as Metal since MLX 0.32.4


@dataclass(frozen=True)
class _Queries:
    """Queries below the prefixes, as attention takes them."""

    rows: mx.array | None  # (M,) of the N tokens; None for all of them
    index: mx.array  # (G, C, Q) which row is in a block
    place: mx.array  # (M,) where a row is in the output of attention
    masked: mx.array  # (G, 1, C, 1, Q, T) additive mask of a block's own tokens: 0 or a very low value
    far: mx.array | None  # (G, 1, C, 1, Q, P) or (G, 1, 1, 1, 1, P) additive mask of the prefix; None masks nothing


@dataclass(frozen=True)
class Chunk:
    """Queries of the prefixes that are run at once, and the keys that they see."""

    queries: slice
    keys: slice
    mask: mx.array | str  # "causal", or (queries, keys) bool


@dataclass(frozen=True)
class _Tree:
    """A batch's shape as attention takes it."""

    positions: mx.array  # (N,)
    prefix: mx.array  # (G, P)
    block: mx.array  # (G, C, T)
    chunks: list[Chunk]
    every: _Queries  # place: first the G*P places of the prefixes
    answers: _Queries


def _tree(batch: GroupBatch, dtype: mx.Dtype, window: int | None = None, chunk: int = PREFIX_CHUNK) -> _Tree:
    """window: a token sees so many tokens of its own sequence, the last of them itself; None: all of them."""
    lowest, nothing = mx.array(mx.finfo(dtype).min / 2, dtype), mx.zeros((), dtype)
    ends, lengths = mx.array(batch.block_ends), mx.array(batch.prefix_lengths)
    P, T = batch.prefix_index.shape[1], ends.shape[-1]
    block, positions = mx.array(batch.block_index), mx.array(batch.positions)
    depths = positions[block]  # (G, C, T)
    traced = not isinstance(batch.positions, np.ndarray)  # then a length may be any
    if window and window >= (P + T if traced else int(batch.positions.max()) + 1):
        window = None  # no sequence is longer
    padded = traced or batch.prefix_lengths.min() < P
    real = mx.arange(P) < lengths[:, None]

    def queries(rows: mx.array | None, index: mx.array, place: mx.array, at: mx.array, depth: mx.array) -> _Queries:
        """at, depth (G, C, Q): a query's place in its block, its position."""
        seen, near = (mx.arange(T) <= at[..., None]) & (at[..., None] < ends[:, :, None]), real[:, None, None]
        if window:
            seen = seen & (depth[..., None] - depths[:, :, None] < window)
            near = near & (depth[..., None] - mx.arange(P) < window)
        masked = mx.where(seen, nothing, lowest)[:, None, :, None]
        far = mx.where(near, nothing, lowest)[:, None, :, None] if padded or window else None
        return _Queries(rows, index, place, masked, far)

    every = queries(None, block, mx.array(batch.place), mx.arange(T)[None, None], depths)
    rows, index = mx.array(batch.rows), mx.array(batch.query_rows)
    answers = queries(rows, index, mx.array(batch.row_place), mx.array(batch.query_at), positions[rows[index]])
    return _Tree(positions, mx.array(batch.prefix_index), block, prefix_chunks(P, window, chunk), every, answers)


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


def attend_prefix(q: mx.array, k: mx.array, v: mx.array, scale: float, chunks: list[Chunk]) -> mx.array:
    """Each prefix's tokens attend to those before them.  (G, H, P, d), (G, Hkv, P, d) twice -> (G, H, P, d)."""
    seen = [
        mx.fast.scaled_dot_product_attention(
            q[:, :, c.queries], k[:, :, c.keys], v[:, :, c.keys], scale=scale, mask=c.mask
        )
        for c in chunks
    ]
    return seen[0] if len(seen) == 1 else mx.concatenate(seen, axis=2)


def apply_rope(attention: nn.Module, x: mx.array, positions: mx.array) -> mx.array:
    """Rotary embedding of each token at its own position.  (N, H, d), (N,) -> (N, H, d)."""
    return attention.rope(x[:, :, None], offset=positions)[:, :, 0]


def _attend(attention: nn.Module, x: mx.array, tree: _Tree, queries: _Queries) -> mx.array:
    """Attention of one layer over prefix trees.  x (N, D) -> (N, D), or (M, D) at the queries' rows."""
    H, Hkv = attention.n_heads, attention.n_kv_heads
    n = H // Hkv  # query heads a key head serves
    (G, P), (C, Q), T = tree.prefix.shape, queries.index.shape[1:], tree.block.shape[-1]
    rows, positions = (x, tree.positions) if queries.rows is None else (x[queries.rows], tree.positions[queries.rows])
    if queries.rows is None:
        q, k, v = project([attention.q_proj, attention.k_proj, attention.v_proj], x)
    else:
        (q,), (k, v) = project([attention.q_proj], rows), project([attention.k_proj, attention.v_proj], x)
    q, k, v = q.reshape(len(rows), H, -1), k.reshape(len(x), Hkv, -1), v.reshape(len(x), Hkv, -1)
    if "q_norm" in attention:
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = apply_rope(attention, q, positions), apply_rope(attention, k, tree.positions)
    q = scale_queries(attention, q, positions)
    d = q.shape[-1]

    kp, vp = k[tree.prefix].transpose(0, 2, 1, 3), v[tree.prefix].transpose(0, 2, 1, 3)  # (G, Hkv, P, d)
    kb, vb = k[tree.block].transpose(0, 3, 1, 2, 4), v[tree.block].transpose(0, 3, 1, 2, 4)  # (G, Hkv, C, T, d)
    qb = (
        (q * attention.scale)[queries.index].reshape(G, C, Q, Hkv, n, d).transpose(0, 3, 1, 4, 2, 5)
    )  # (G, Hkv, C, n, Q, d)
    to_prefix = (qb.reshape(G, Hkv, C * n * Q, d) @ kp.swapaxes(-1, -2)).reshape(G, Hkv, C, n, Q, P)
    if queries.far is not None:
        to_prefix = to_prefix + queries.far
    to_block = (qb.reshape(G, Hkv, C, n * Q, d) @ kb.swapaxes(-1, -2)).reshape(G, Hkv, C, n, Q, T) + queries.masked
    weights = mx.softmax(mx.concatenate([to_prefix, to_block], axis=-1), axis=-1, precise=True)
    out = (weights[..., :P].reshape(G, Hkv, C * n * Q, P) @ vp).reshape(G, Hkv, C, n * Q, d)
    out = out + weights[..., P:].reshape(G, Hkv, C, n * Q, T) @ vb
    out = out.reshape(G, Hkv, C, n, Q, d).transpose(0, 2, 4, 1, 3, 5).reshape(G * C * Q, H * d)
    if queries.rows is None:  # prefixes are queries too
        seen = attend_prefix(q[tree.prefix].transpose(0, 2, 1, 3), kp, vp, attention.scale, tree.chunks)
        out = mx.concatenate([seen.transpose(0, 2, 1, 3).reshape(G * P, H * d), out])
    return project([attention.o_proj], out[queries.place])[0]


def _advance(
    layer: nn.Module, h: mx.array, tree: _Tree, queries: _Queries, lean: bool = False, seed: int | None = None
) -> mx.array:
    """One transformer block over prefix trees.  (N, D) -> (N, D), or (M, D) at the queries' rows.

    lean  keep less of the MLP for the backward pass; the result is the same
    seed  of the layer's dropout masks
    """
    if seed is not None:
        mx.random.seed(seed)
    attended = _attend(layer.self_attn, layer.input_layernorm(h), tree, queries)
    return rest_of_layer(layer, h if queries.rows is None else h[queries.rows], attended, lean, seed)
