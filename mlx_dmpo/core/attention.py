"""One transformer block over prefix trees."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .tree import GroupBatch

PREFIX_CHUNK = 128  # queries of a prefix at once: at most so many of their keys are masked


@dataclass(frozen=True)
class _Queries:
    """Queries below the prefixes, as attention takes them."""

    rows: mx.array | None  # (M,) of the N tokens; None for all of them
    index: mx.array  # (G, C, Q) which row is in a block
    place: mx.array  # (M,) where a row is in the output of attention
    masked: mx.array  # (G, 1, C, 1, Q, T) additive mask of a block's own tokens: 0 or a very low value


@dataclass(frozen=True)
class _Tree:
    """A batch's shape as attention takes it."""

    positions: mx.array  # (N,)
    prefix: mx.array  # (G, P)
    block: mx.array  # (G, C, T)
    masked: mx.array | None  # (G, 1, 1, P) additive mask of padded prefixes
    every: _Queries  # place: first the G*P places of the prefixes
    answers: _Queries


def _tree(batch: GroupBatch, dtype: mx.Dtype) -> _Tree:
    lowest, nothing = mx.array(mx.finfo(dtype).min / 2, dtype), mx.zeros((), dtype)
    ends, lengths = mx.array(batch.block_ends), mx.array(batch.prefix_lengths)
    P, T = batch.prefix_index.shape[1], ends.shape[-1]

    def masked(at: mx.array) -> mx.array:
        seen = (mx.arange(T) <= at[..., None]) & (at[..., None] < ends[:, :, None])
        return mx.where(seen, nothing, lowest)[:, None, :, None]

    block = mx.array(batch.block_index)
    padded = None
    if not isinstance(batch.prefix_lengths, np.ndarray) or batch.prefix_lengths.min() < P:  # traced lengths may be any
        padded = mx.where(mx.arange(P) < lengths[:, None], nothing, lowest)[:, None, None]
    every = _Queries(None, block, mx.array(batch.place), masked(mx.arange(T)[None, None]))
    answers = _Queries(
        mx.array(batch.rows), mx.array(batch.query_rows), mx.array(batch.row_place), masked(mx.array(batch.query_at))
    )
    return _Tree(mx.array(batch.positions), mx.array(batch.prefix_index), block, padded, every, answers)


def apply_rope(attention: nn.Module, x: mx.array, positions: mx.array) -> mx.array:
    """Rotary embedding of each token at its own position.  (N, H, d), (N,) -> (N, H, d)."""
    return attention.rope(x[:, :, None], offset=positions)[:, :, 0]


def _attend(attention: nn.Module, x: mx.array, tree: _Tree, queries: _Queries) -> mx.array:
    """Attention of one layer over prefix trees.  x (N, D) -> (N, D), or (M, D) at the queries' rows."""
    H, Hkv = attention.n_heads, attention.n_kv_heads
    n = H // Hkv  # query heads a key head serves
    (G, P), (C, Q), T = tree.prefix.shape, queries.index.shape[1:], tree.block.shape[-1]
    rows, positions = (x, tree.positions) if queries.rows is None else (x[queries.rows], tree.positions[queries.rows])
    q = attention.q_proj(rows).reshape(len(rows), H, -1)
    k = attention.k_proj(x).reshape(len(x), Hkv, -1)
    v = attention.v_proj(x).reshape(len(x), Hkv, -1)
    if "q_norm" in attention:
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = apply_rope(attention, q, positions), apply_rope(attention, k, tree.positions)
    d = q.shape[-1]

    kp, vp = k[tree.prefix].transpose(0, 2, 1, 3), v[tree.prefix].transpose(0, 2, 1, 3)  # (G, Hkv, P, d)
    kb, vb = k[tree.block].transpose(0, 3, 1, 2, 4), v[tree.block].transpose(0, 3, 1, 2, 4)  # (G, Hkv, C, T, d)
    qb = (
        (q * attention.scale)[queries.index].reshape(G, C, Q, Hkv, n, d).transpose(0, 3, 1, 4, 2, 5)
    )  # (G, Hkv, C, n, Q, d)
    to_prefix = qb.reshape(G, Hkv, C * n * Q, d) @ kp.swapaxes(-1, -2)
    if tree.masked is not None:
        to_prefix = to_prefix + tree.masked
    to_block = (qb.reshape(G, Hkv, C, n * Q, d) @ kb.swapaxes(-1, -2)).reshape(G, Hkv, C, n, Q, T) + queries.masked
    weights = mx.softmax(
        mx.concatenate([to_prefix.reshape(G, Hkv, C, n, Q, P), to_block], axis=-1), axis=-1, precise=True
    )
    out = (weights[..., :P].reshape(G, Hkv, C * n * Q, P) @ vp).reshape(G, Hkv, C, n * Q, d)
    out = out + weights[..., P:].reshape(G, Hkv, C, n * Q, T) @ vb
    out = out.reshape(G, Hkv, C, n, Q, d).transpose(0, 2, 4, 1, 3, 5).reshape(G * C * Q, H * d)
    if queries.rows is None:  # prefixes are queries too: plain causal attention; right padding is after every query
        qp = q[tree.prefix].transpose(0, 2, 1, 3)
        seen = [
            mx.fast.scaled_dot_product_attention(
                qp[:, :, a : a + PREFIX_CHUNK],
                kp[:, :, : a + PREFIX_CHUNK],
                vp[:, :, : a + PREFIX_CHUNK],
                scale=attention.scale,
                mask="causal",
            )
            for a in range(0, P, PREFIX_CHUNK)
        ]
        out = mx.concatenate([mx.concatenate(seen, axis=2).transpose(0, 2, 1, 3).reshape(G * P, H * d), out])
    return attention.o_proj(out[queries.place])


def _advance(layer: nn.Module, h: mx.array, tree: _Tree, queries: _Queries) -> mx.array:
    """One transformer block over prefix trees.  (N, D) -> (N, D), or (M, D) at the queries' rows."""
    attended = _attend(layer.self_attn, layer.input_layernorm(h), tree, queries)
    h = (h if queries.rows is None else h[queries.rows]) + attended
    return h + layer.mlp(layer.post_attention_layernorm(h))
