"""Log-probabilities of a group's answers, its shared history run once.

Every layer advances the prefix (one a group) and the tails (one a branch) together: the tails attend to that
layer's keys and values of the prefix and to themselves, with rotary positions that go on where the prefix ends.
Only the positions that predict an answer token meet the vocabulary. Exact in values and gradients: `sequence_logps`,
each sequence alone through the model's own forward, is the plain road that tests compare with and that a model
of another build falls back to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .batches import pad_groups
from .records import EncodedGroup, GroupBatch

SCORER_VERSION = 1  # part of the reference cache's key: raise it when log-probs change

# (model, batch) -> (G, R) float32: summed log-probs of each branch's answer in nats, 0 for a padded branch
Scorer = Callable[[nn.Module, GroupBatch], mx.array]


def _project(attention: nn.Module, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """(G, S, D) -> queries (G, H, S, d), keys and values (G, Hkv, S, d), before rotary positions."""
    G, S, _ = x.shape
    q = attention.q_proj(x).reshape(G, S, attention.n_heads, -1)
    k = attention.k_proj(x).reshape(G, S, attention.n_kv_heads, -1)
    v = attention.v_proj(x).reshape(G, S, attention.n_kv_heads, -1)
    if "q_norm" in attention:
        q, k = attention.q_norm(q), attention.k_norm(k)
    return q.transpose(0, 2, 1, 3), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def _attend(attention: nn.Module, x: mx.array, prefix_lengths: mx.array, branches: int, tail: int) -> mx.array:
    """Attention of one layer over `[prefix | tail_1 | ... | tail_R]`.  x (G, P + R*T, D) -> (G, P + R*T, D)."""
    G, S, _ = x.shape
    R, T = branches, tail
    P = S - R * T
    H, Hkv = attention.n_heads, attention.n_kv_heads
    q, k, v = _project(attention, x)
    d = q.shape[-1]

    def per_tail(a: mx.array, heads: int) -> mx.array:  # (G, heads, R*T, d) -> (G*R, heads, T, d)
        return a.reshape(G, heads, R, T, d).transpose(0, 2, 1, 3, 4).reshape(G * R, heads, T, d)

    # the prefix: plain causal attention; right padding is seen by nobody before it
    qp, kp, vp = attention.rope(q[:, :, :P]), attention.rope(k[:, :, :P]), v[:, :, :P]
    prefix_out = mx.fast.scaled_dot_product_attention(qp, kp, vp, scale=attention.scale, mask="causal")

    # the tails: rotary positions go on from each group's own prefix length
    offset = mx.repeat(prefix_lengths, R)
    qt = attention.rope(per_tail(q[:, :, P:], H), offset=offset)
    kt = attention.rope(per_tail(k[:, :, P:], Hkv), offset=offset)
    n = H // Hkv  # query heads a key head serves
    qt = qt.reshape(G, R, Hkv, n * T, d).transpose(0, 2, 1, 3, 4) * attention.scale  # (G, Hkv, R, n*T, d)
    kt = kt.reshape(G, R, Hkv, T, d).transpose(0, 2, 1, 3, 4)
    vt = v[:, :, P:].reshape(G, Hkv, R, T, d)
    to_prefix = (qt.reshape(G, Hkv, R * n * T, d) @ kp.swapaxes(-1, -2)).reshape(G, Hkv, R, n, T, P)
    to_self = (qt @ kt.swapaxes(-1, -2)).reshape(G, Hkv, R, n, T, T)
    seen = mx.arange(P) < prefix_lengths[:, None]
    lowest = mx.finfo(to_self.dtype).min
    to_prefix = mx.where(seen.reshape(G, 1, 1, 1, 1, P), to_prefix, lowest)
    to_self = mx.where(mx.arange(T)[:, None] >= mx.arange(T), to_self, lowest)
    weights = mx.softmax(mx.concatenate([to_prefix, to_self], axis=-1), axis=-1, precise=True)
    out = (weights[..., :P].reshape(G, Hkv, R * n * T, P) @ vp).reshape(G, Hkv, R, n, T, d)
    out = out + (weights[..., P:].reshape(G, Hkv, R, n * T, T) @ vt).reshape(G, Hkv, R, n, T, d)
    tail_out = out.transpose(0, 2, 4, 1, 3, 5).reshape(G, R * T, H * d)

    prefix_out = prefix_out.transpose(0, 2, 1, 3).reshape(G, P, H * d)
    return attention.o_proj(mx.concatenate([prefix_out, tail_out], axis=1))


def _advance(layer: nn.Module, h: mx.array, prefix_lengths: mx.array, branches: int, tail: int) -> mx.array:
    """One transformer block over the joint sequence.  (G, P + R*T, D) -> (G, P + R*T, D)."""
    h = h + _attend(layer.self_attn, layer.input_layernorm(h), prefix_lengths, branches, tail)
    return h + layer.mlp(layer.post_attention_layernorm(h))


def _head(model: nn.Module, x: mx.array) -> mx.array:
    return model.lm_head(x) if "lm_head" in model else model.model.embed_tokens.as_linear(x)


def _answer_logps(logits: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
    """(..., A, V), (..., A), (..., A) -> (...): float32 sums of log p(target)."""
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return ((chosen - mx.logsumexp(logits, axis=-1)) * mask).sum(axis=-1)


def group_logps(model: nn.Module, batch: GroupBatch, *, checkpoint: bool = False, dropout_seed: int | None = None) -> mx.array:
    """Summed log-probs of every branch's answer, the prefix run once.  -> (G, R) float32, nats; 0 for a padded branch.

    checkpoint    recompute each adapted layer in the backward pass. The unit is a function of arrays alone: what a
                  closure or a cache carries past `mx.checkpoint` gets no gradient.
    dropout_seed  reseeds the generator in each layer, so that a recomputed layer draws the same dropout mask.
    """
    G, R, T = batch.tails.shape
    tokens = np.concatenate([batch.prefix, batch.tails.reshape(G, R * T)], axis=1)
    prefix_lengths = mx.array(batch.prefix_lengths)
    h = model.model.embed_tokens(mx.array(tokens))
    for index, layer in enumerate(model.model.layers):

        def advance(parameters: Any, h: mx.array, layer: nn.Module = layer, index: int = index) -> mx.array:
            if dropout_seed is not None:
                mx.random.seed(dropout_seed + index)
            layer.update(parameters)
            return _advance(layer, h, prefix_lengths, R, T)

        parameters = layer.trainable_parameters()
        recompute = checkpoint and bool(nn.utils.tree_flatten(parameters))
        h = (mx.checkpoint(advance) if recompute else advance)(parameters, h)
    tails = h[:, batch.prefix.shape[1] :].reshape(G, R, T, -1)
    rows = mx.take_along_axis(tails, mx.array(batch.answer_positions)[..., None], axis=2)  # (G, R, A, D)
    return _answer_logps(_head(model, model.model.norm(rows)), mx.array(batch.answer_targets), mx.array(batch.answer_mask))


def sequence_logps(model: nn.Module, batch: GroupBatch, *, checkpoint: bool = False, dropout_seed: int | None = None) -> mx.array:
    """The plain road: each sequence alone through the model's own forward.  -> (G, R) float32, as `group_logps`.

    checkpoint  recompute each sequence in the backward pass: one sequence's activations at a time.
    """
    G, R, _ = batch.tails.shape
    parameters = model.trainable_parameters()

    rows = []
    for g, group in enumerate(batch.groups):
        row = []
        for r, (tail, n) in enumerate(zip(group.tails, group.answer_lengths, strict=True)):
            tokens = mx.array(np.concatenate([group.prefix, tail]))

            def alone(parameters: Any, tokens: mx.array = tokens, n: int = n, seed: int = g * R + r) -> mx.array:
                if dropout_seed is not None:
                    mx.random.seed(dropout_seed + seed)
                model.update(parameters)
                logits = model(tokens[None, :-1])[0, -n:]
                return _answer_logps(logits, tokens[-n:], mx.ones(n))

            row.append((mx.checkpoint(alone) if checkpoint else alone)(parameters))
        rows.append(mx.stack(row + [mx.zeros(())] * (R - len(row))))
    return mx.stack(rows)


@dataclass(frozen=True)
class Road:
    """The scorer in use, and one line that says why if it is the plain one."""

    logps: Callable[..., mx.array]
    shared: bool
    reason: str = ""


def _unsupported(model: nn.Module) -> str:
    """Why the fast road does not know this model, or an empty string."""
    body = getattr(model, "model", None)
    if getattr(model, "model_type", "") not in ("qwen3", "qwen2", "llama") or body is None:
        return f"model type {getattr(model, 'model_type', '?')} is not one that the shared road knows"
    for layer in body.layers:
        if getattr(layer, "use_sliding", False):
            return "the model has sliding-window layers"
    return ""


def _probe(vocabulary: int) -> GroupBatch:
    """Two small ragged groups of arbitrary tokens."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> np.ndarray:
        return rng.integers(0, vocabulary, n).astype(np.int32)

    pairs = np.array([[0, 1]], np.int32)
    return pad_groups(
        [
            EncodedGroup(draw(13), (draw(6), draw(4), draw(5)), (3, 2, 4), pairs),
            EncodedGroup(draw(9), (draw(5), draw(7)), (2, 3), pairs),
        ]
    )


def choose_road(model: nn.Module, vocabulary: int, scoring: str = "auto") -> Road:
    """The shared road where it equals the plain one on a small batch of this very model; else the plain one, and why."""
    if scoring == "plain":
        return Road(sequence_logps, False, "asked for by --scoring plain")
    reason = _unsupported(model)
    if reason:
        return Road(sequence_logps, False, reason)
    probe = _probe(vocabulary)
    training = model.training
    model.eval()
    try:
        fast, slow = np.array(group_logps(model, probe)), np.array(sequence_logps(model, probe))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        return Road(sequence_logps, False, f"the shared road fails on this model ({error})")
    finally:
        model.train(training)
    # float32 agrees to about 1e-5 nats a token; in 16 bits each logit carries about 3 digits
    wide = model.model.norm.weight.dtype == mx.float32
    tolerance = 1e-3 if wide else 0.05 + 0.03 * np.abs(slow)
    worst = float(np.max(np.abs(fast - slow) - tolerance))
    if not worst <= 0:
        return Road(sequence_logps, False, f"the shared road differs from the plain one by {float(np.max(np.abs(fast - slow))):.2g} nats")
    return Road(group_logps, True)
