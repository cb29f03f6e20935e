"""One transformer block over prefix trees."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .family import project, rest_of_layer, scale_queries
from .layout import Chunk, Layout, Queries


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


def _moved(x: mx.array, to: mx.array, back: mx.array, kept: mx.array | None) -> mx.array:
    """x[to], where each of x's rows is once.  (rows, d) -> (*to.shape, d)

    The gradient is moved back instead of being added up: `back` says where each row of x has gone, `kept` which of x's
    rows are there at all.
    """

    def backward(_: Any, cotangent: mx.array, __: Any) -> mx.array:
        moved = cotangent.reshape(-1, x.shape[-1])[back]
        return (moved if kept is None else mx.where(kept, moved, mx.zeros((), moved.dtype))).reshape(x.shape)

    move: Any = mx.custom_function(lambda x: x[to])
    move.vjp(backward)
    moved: mx.array = move(x)
    return moved


def _softmax(scores: mx.array) -> tuple[mx.array, mx.array]:
    """Over the last axis, and the logarithm of what it is divided by, float32.  (..., K) -> (..., K), (..., 1)"""
    wide = scores.astype(mx.float32)
    found = mx.softmax(wide, axis=-1)
    # the largest probability is 1 / sum exp(scores - max)
    return found.astype(scores.dtype), wide.max(axis=-1, keepdims=True) - mx.log(found.max(axis=-1, keepdims=True))


def _attend_below(q: mx.array, kp: mx.array, vp: mx.array, kb: mx.array, vb: mx.array, queries: Queries) -> mx.array:
    """What lies below the prefixes attends to them and to its own block.

    q (G, Hkv, n*B, d) scaled, kp and vp (G, Hkv, P, d), kb and vb (G, Hkv, C, T, d) -> (G, Hkv, n*B, d)

    Two softmaxes, each where no query is padding, put together by what they were divided by (Dao et al.,
    arXiv 2205.14135). In the gradient, with p the probabilities of the whole and o the result,
    d loss / d scores = p * (do . v - do . o).
    """
    G, Hkv, C, n, Q = queries.spread.shape
    B, P, T = queries.back.shape[-1], kp.shape[2], kb.shape[3]

    def in_blocks(x: mx.array) -> mx.array:
        return x.reshape(-1, x.shape[-1])[queries.spread].reshape(G, Hkv, C, n * Q, -1)

    def from_blocks(x: mx.array) -> mx.array:
        return x.reshape(-1, x.shape[-1])[queries.back].reshape(G, Hkv, n * B, -1)

    def forward(q: mx.array, kp: mx.array, vp: mx.array, kb: mx.array, vb: mx.array) -> tuple[mx.array, ...]:
        far = q @ kp.swapaxes(-1, -2)
        if queries.far is not None:
            far = (far.reshape(G, Hkv, n, B, P) + queries.far).reshape(far.shape)
        near = (in_blocks(q) @ kb.swapaxes(-1, -2)).reshape(G, Hkv, C, n, Q, T) + queries.near
        (on_prefix, total), (on_block, part) = _softmax(far), _softmax(near.reshape(G, Hkv, C, n * Q, T))
        share = mx.sigmoid(total - from_blocks(part))  # of the prefix
        to_block = from_blocks(on_block @ vb)
        out = to_block + share * (on_prefix @ vp - to_block)
        return out.astype(q.dtype), on_prefix, on_block, share

    def backward(given: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        (q, kp, vp, kb, vb), (out, on_prefix, on_block, share), g = given, outputs, cotangents[0]
        dtype, dot = q.dtype, (g.astype(mx.float32) * out).sum(axis=-1, keepdims=True)
        to_prefix = (share * g).astype(dtype)
        d_far = on_prefix * (to_prefix @ vp.swapaxes(-1, -2) - (share * dot).astype(dtype))
        shares = (in_blocks(1 - share).reshape(G, Hkv, C, n, Q, 1) * queries.own).reshape(G, Hkv, C, n * Q, 1)
        to_block = (shares * in_blocks(g)).astype(dtype)
        d_near = on_block * (to_block @ vb.swapaxes(-1, -2) - (shares * in_blocks(dot)).astype(dtype))
        return (
            d_far @ kp + from_blocks(d_near @ kb),
            d_far.swapaxes(-1, -2) @ q,
            on_prefix.swapaxes(-1, -2) @ to_prefix,
            d_near.swapaxes(-1, -2) @ in_blocks(q),
            on_block.swapaxes(-1, -2) @ to_block,
        )

    attend: Any = mx.custom_function(forward)
    attend.vjp(backward)
    found: mx.array = attend(q, kp, vp, kb, vb)[0]
    return found


def _attend(attention: nn.Module, x: mx.array, at: Layout, queries: Queries) -> mx.array:
    """Attention of one layer over prefix trees.  x (N, D) -> (N, D), or (M, D) of the queries' tokens."""
    H, Hkv = attention.n_heads, attention.n_kv_heads
    G, _, P = at.prefix.shape
    if queries.tokens is None:
        asking, positions = x, at.positions
        q, k, v = project([attention.q_proj, attention.k_proj, attention.v_proj], x)
    else:
        asking, positions = x[queries.tokens], at.positions[queries.tokens]
        (q,), (k, v) = project([attention.q_proj], asking), project([attention.k_proj, attention.v_proj], x)
    q, k = q.reshape(len(asking), H, -1), k.reshape(len(x), Hkv, -1)
    if "q_norm" in attention:
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = apply_rope(attention, q, positions), apply_rope(attention, k, at.positions)
    q = scale_queries(attention, q, positions)
    d = q.shape[-1]
    k, v = k.reshape(-1, d), v.reshape(-1, d)
    kp, vp = k[at.prefix], v[at.prefix]  # (G, Hkv, P, d)
    kb, vb = k[at.block], v[at.block]  # (G, Hkv, C, T, d)
    q = _moved(q.reshape(-1, d), queries.slots, queries.place, queries.real)
    seen: list[mx.array] = []
    if queries.tokens is None:  # prefixes are queries too
        first, q = mx.split(q, [G * H * P], axis=0)
        seen = [attend_prefix(first.reshape(G, H, P, d), kp, vp, attention.scale, at.chunks).reshape(-1, d)]
    q = (q * attention.scale).reshape(G, Hkv, -1, d)
    seen.append(_attend_below(q, kp, vp, kb, vb, queries).reshape(-1, d))
    out = _moved(mx.concatenate(seen), queries.place, queries.slots, queries.filled)
    return project([attention.o_proj], out.reshape(len(asking), H * d))[0]


def _advance(
    layer: nn.Module, h: mx.array, at: Layout, queries: Queries, lean: bool = False, seed: int | None = None
) -> mx.array:
    """One transformer block over prefix trees.  (N, D) -> (N, D), or (M, D) of the queries' tokens.

    lean  keep less of the MLP for the backward pass; the result is the same
    seed  of the layer's dropout masks
    """
    if seed is not None:
        mx.random.seed(seed)
    attended = _attend(layer.self_attn, layer.input_layernorm(h), at, queries)
    return rest_of_layer(layer, h if queries.tokens is None else h[queries.tokens], attended, lean, seed)
