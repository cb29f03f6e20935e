"""Log-probabilities of a group's answers, whatever its sequences share run once.

A group is its prefix tree in depth-first order: the history, then each question with its answers (see GroupBatch). Groups
stand one after another as one line of tokens; only attention looks at them as arrays of prefixes and of blocks. A token
attends to what comes before it in its own branch, at the rotary position of its depth. In the last layer only the tokens
that predict an answer's token ask and go on to the vocabulary. Exact in values and gradients: `sequence_logps`,
each sequence alone through the model's own forward, is the plain road that tests compare with and that a model
of another build falls back to.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .batches import pad_groups
from .records import EncodedGroup, GroupBatch

SCORER_VERSION = 2  # part of the reference cache's key: raise it when log-probs change
LOGITS_BYTES = 128 << 20  # of one chunk of float32 logits
PREFIX_CHUNK = 128  # queries of a prefix at once: none meets more than so many keys that it may not see

# (model, batch) -> (G, R) float32: summed log-probs of each branch's answer in nats, 0 for a padded branch
Scorer = Callable[[nn.Module, GroupBatch], mx.array]


@dataclass(frozen=True)
class _Queries:
    """Tokens below the prefixes that ask, as attention takes them."""

    rows: mx.array | None  # (M,) of the N tokens; None for all of them
    index: mx.array  # (G, C, Q) which row stands in a block
    place: mx.array  # (M,) where a row stands in what attention puts out
    unseen: mx.array  # (G, 1, C, 1, Q, T) additive mask of a block's own tokens: 0 or a very low value


@dataclass(frozen=True)
class _Tree:
    """A batch's shape as attention takes it."""

    positions: mx.array  # (N,)
    prefix: mx.array  # (G, P)
    block: mx.array  # (G, C, T)
    unseen: mx.array | None  # (G, 1, 1, P) additive mask of padded prefixes
    every: _Queries  # place: first the G*P places of the prefixes
    answers: _Queries


def _tree(batch: GroupBatch, dtype: mx.Dtype) -> _Tree:
    lowest, nothing = mx.array(mx.finfo(dtype).min / 2, dtype), mx.zeros((), dtype)
    ends, lengths = mx.array(batch.block_ends), mx.array(batch.prefix_lengths)
    P, T = batch.prefix_index.shape[1], ends.shape[-1]

    def unseen(at: mx.array) -> mx.array:
        seen = (mx.arange(T) <= at[..., None]) & (at[..., None] < ends[:, :, None])
        return mx.where(seen, nothing, lowest)[:, None, :, None]

    block = mx.array(batch.block_index)
    padded = None
    if not isinstance(batch.prefix_lengths, np.ndarray) or batch.prefix_lengths.min() < P:  # traced lengths may be any
        padded = mx.where(mx.arange(P) < lengths[:, None], nothing, lowest)[:, None, None]
    every = _Queries(None, block, mx.array(batch.place), unseen(mx.arange(T)[None, None]))
    answers = _Queries(mx.array(batch.rows), mx.array(batch.query_rows), mx.array(batch.row_place), unseen(mx.array(batch.query_at)))
    return _Tree(mx.array(batch.positions), mx.array(batch.prefix_index), block, padded, every, answers)


def _turn(attention: nn.Module, x: mx.array, positions: mx.array) -> mx.array:
    """Each token turned by its own rotary position.  (N, H, d), (N,) -> (N, H, d)."""
    return attention.rope(x[:, :, None], offset=positions)[:, :, 0]


def _attend(attention: nn.Module, x: mx.array, tree: _Tree, queries: _Queries) -> mx.array:
    """Attention of one layer over prefix trees.  x (N, D) -> (N, D), or (M, D) at the queries' rows."""
    H, Hkv = attention.n_heads, attention.n_kv_heads
    n = H // Hkv  # query heads a key head serves
    (G, P), (C, Q), T = tree.prefix.shape, queries.index.shape[1:], tree.block.shape[-1]
    asking, positions = (x, tree.positions) if queries.rows is None else (x[queries.rows], tree.positions[queries.rows])
    q = attention.q_proj(asking).reshape(len(asking), H, -1)
    k = attention.k_proj(x).reshape(len(x), Hkv, -1)
    v = attention.v_proj(x).reshape(len(x), Hkv, -1)
    if "q_norm" in attention:
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = _turn(attention, q, positions), _turn(attention, k, tree.positions)
    d = q.shape[-1]

    kp, vp = k[tree.prefix].transpose(0, 2, 1, 3), v[tree.prefix].transpose(0, 2, 1, 3)  # (G, Hkv, P, d)
    kb, vb = k[tree.block].transpose(0, 3, 1, 2, 4), v[tree.block].transpose(0, 3, 1, 2, 4)  # (G, Hkv, C, T, d)
    qb = (q * attention.scale)[queries.index].reshape(G, C, Q, Hkv, n, d).transpose(0, 3, 1, 4, 2, 5)  # (G, Hkv, C, n, Q, d)
    to_prefix = qb.reshape(G, Hkv, C * n * Q, d) @ kp.swapaxes(-1, -2)
    if tree.unseen is not None:
        to_prefix = to_prefix + tree.unseen
    to_block = (qb.reshape(G, Hkv, C, n * Q, d) @ kb.swapaxes(-1, -2)).reshape(G, Hkv, C, n, Q, T) + queries.unseen
    weights = mx.softmax(mx.concatenate([to_prefix.reshape(G, Hkv, C, n, Q, P), to_block], axis=-1), axis=-1, precise=True)
    out = (weights[..., :P].reshape(G, Hkv, C * n * Q, P) @ vp).reshape(G, Hkv, C, n * Q, d)
    out = out + weights[..., P:].reshape(G, Hkv, C, n * Q, T) @ vb
    out = out.reshape(G, Hkv, C, n, Q, d).transpose(0, 2, 4, 1, 3, 5).reshape(G * C * Q, H * d)
    if queries.rows is None:  # the prefixes ask too: plain causal attention; right padding is seen by nobody before it
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


def _head(model: nn.Module) -> nn.Module:
    return model.lm_head if "lm_head" in model else model.model.embed_tokens


def _logits(head: nn.Module, x: mx.array) -> mx.array:
    """(..., D) -> (..., V) float32."""
    return (head.as_linear(x) if hasattr(head, "as_linear") else head(x)).astype(mx.float32)


def _columns(head: nn.Module, targets: mx.array) -> mx.array | None:
    """The head's weights of some tokens, (...) -> (..., D); None for a head that trains or is of another kind."""
    if tree_flatten(head.trainable_parameters()):
        return None
    if type(head) in (nn.Embedding, nn.QuantizedEmbedding):
        return head(targets)
    if type(head) is nn.Linear and "bias" not in head:
        return head.weight[targets]
    if type(head) is nn.QuantizedLinear and "bias" not in head:
        some = {name: head[name][targets] for name in ("weight", "scales", "biases") if head.get(name) is not None}
        return mx.dequantize(some.pop("weight"), **some, group_size=head.group_size, bits=head.bits, mode=head.mode)
    return None


def _chunks(step: Callable[[mx.array, int], mx.array], x: mx.array, vocabulary: int) -> mx.array:
    """`step(part, its first row)` over pieces of x's rows, one after another, so that only one piece's logits exist at a time."""
    size = max(1, LOGITS_BYTES // (4 * vocabulary))
    done: list[mx.array] = []
    for start in range(0, len(x), size):
        part = x[start : start + size]
        done.append(step(mx.depends([part], done[-1:])[0] if done else part, start))
    return mx.concatenate(done)


def _normaliser(head: nn.Module, x: mx.array, vocabulary: int, differentiate: bool) -> mx.array:
    """log sum_v exp logits_v of each row.  (M, D) -> (M,) float32.

    differentiate  d/dx is a row's probabilities times the head, whatever the loss is: it is taken with the value, chunk by
                   chunk, and kept in place of logits or a second run over them. Only for a frozen head.
    """
    if not differentiate:
        return _chunks(lambda part, _: mx.logsumexp(_logits(head, part), axis=-1), x, vocabulary)

    def value_and_slope(part: mx.array, start: int) -> mx.array:
        logits = _logits(head, part)
        probabilities = mx.softmax(logits, axis=-1)
        value = logits.max(axis=-1) - mx.log(probabilities.max(axis=-1))  # the largest probability is 1 / sum exp(logits - max)
        _, (slope,) = mx.vjp(lambda rows: _logits(head, rows), [part], [probabilities])
        return mx.concatenate([slope.astype(mx.float32), value[:, None]], axis=-1)

    def with_slope(x: mx.array) -> tuple[mx.array, mx.array]:
        both = _chunks(value_and_slope, x, vocabulary)
        return both[:, -1], both[:, :-1]

    normaliser: Any = mx.custom_function(with_slope)

    normaliser.vjp(lambda x, cotangents, outputs: (cotangents[0][:, None] * outputs[1]).astype(x.dtype))
    return normaliser(x)[0]


def _answer_logps(head: nn.Module, x: mx.array, vocabulary: int, batch: GroupBatch, training: bool) -> mx.array:
    """(M, D) final hidden states of the rows -> (G, R) float32 sums of log p(answer token)."""
    rows, targets, mask = mx.array(batch.answer_rows), mx.array(batch.answer_targets), mx.array(batch.answer_mask)
    columns = _columns(head, targets)
    if columns is not None:
        chosen = (x[rows].astype(mx.float32) * columns.astype(mx.float32)).sum(axis=-1)
        return ((chosen - _normaliser(head, x, vocabulary, training)[rows]) * mask).sum(axis=-1)

    parameters, asked = head.trainable_parameters(), targets.reshape(-1)

    def some(part: mx.array, start: int) -> mx.array:
        def logps(parameters: Any, part: mx.array) -> mx.array:
            head.update(parameters)
            return _token_logps(_logits(head, part), asked[start : start + len(part)])

        return mx.checkpoint(logps)(parameters, part)

    found = _chunks(some, x[rows.reshape(-1)], vocabulary)
    return (found.reshape(targets.shape) * mask).sum(axis=-1)


def _token_logps(logits: mx.array, targets: mx.array) -> mx.array:
    """(..., V), (...) -> (...) float32: log p(target)."""
    logits = logits.astype(mx.float32)
    return mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - mx.logsumexp(logits, axis=-1)


def _recomputed(run: Callable[..., mx.array], parameters: Any, h: mx.array) -> mx.array:
    """run(parameters, h), whose inside is not kept for the backward pass but run again there.

    `mx.checkpoint`, but that a layer runs again only when its gradient has arrived and is done with before the one below begins:
    left to MLX's own order, parts of several layers are in memory at once.
    """
    names = [name for name, _ in tree_flatten(parameters)]

    def flat(*arrays: mx.array) -> mx.array:
        return run(tree_unflatten(list(zip(names, arrays[:-1], strict=True))), arrays[-1])

    def backward(arrays: Any, cotangent: Any, _: Any) -> Any:
        _, (*of_parameters, of_h) = mx.vjp(flat, mx.depends(list(arrays), [cotangent]), [cotangent])
        return *of_parameters, *mx.depends([of_h], of_parameters)

    recomputed: Any = mx.custom_function(flat)
    recomputed.vjp(backward)
    return recomputed(*(value for _, value in tree_flatten(parameters)), h)


def frozen_layers(model: nn.Module) -> int:
    """How many of the first layers no gradient reaches: below the first that trains, none where the embedding does."""
    if tree_flatten(model.model.embed_tokens.trainable_parameters()):
        return 0
    trains = [bool(tree_flatten(layer.trainable_parameters())) for layer in model.model.layers]
    return trains.index(True) if True in trains else len(trains) - 1


class FrozenOutputs:
    """What enters the first layer that trains: computed outside gradient tracing, and kept, since it never changes.

    budget  bytes of hidden states kept at most, group by group; what no longer fits is computed each time
    """

    def __init__(self, model: nn.Module, budget: float):
        self.model, self.budget, self.layers = model, budget, frozen_layers(model)
        self.kept: dict[bytes, mx.array] = {}
        self.bytes = 0

    def _compute(self, batch: GroupBatch) -> mx.array:
        h = self.model.model.embed_tokens(mx.array(batch.tokens))
        tree = _tree(batch, h.dtype)
        for layer in self.model.model.layers[: self.layers]:
            h = _advance(layer, h, tree, tree.every)
        return h

    def __call__(self, batch: GroupBatch) -> mx.array:
        """(N, D)."""
        spans = list(itertools.pairwise(batch.starts.tolist()))
        keys = [hashlib.blake2b(batch.tokens[a:b].tobytes() + batch.positions[a:b].tobytes(), digest_size=16).digest() for a, b in spans]
        if all(key in self.kept for key in keys):
            real = mx.concatenate([self.kept[key] for key in keys])
            return mx.pad(real, [(0, len(batch.tokens) - len(real)), (0, 0)])
        h = self._compute(batch)
        mx.eval(h)
        for key, (a, b) in zip(keys, spans, strict=True):
            size = h.nbytes // len(h) * (b - a)
            if key not in self.kept and self.bytes + size <= self.budget:
                self.kept[key] = mx.contiguous(h[a:b])
                self.bytes += size
        mx.eval([self.kept[key] for key in keys if key in self.kept])
        return h


def group_logps(
    model: nn.Module,
    batch: GroupBatch,
    *,
    checkpoint: bool = False,
    dropout_seed: int | None = None,
    frozen: mx.array | None = None,
) -> mx.array:
    """Summed log-probs of every branch's answer, shared tokens run once.  -> (G, R) float32, nats; 0 for a padded branch.

    checkpoint    recompute each adapted layer in the backward pass. The unit is a function of arrays alone: what a
                  closure or a cache carries past it gets no gradient.
    dropout_seed  reseeds the generator in each layer, so that a recomputed layer draws the same dropout mask.
    frozen        (N, D): what FrozenOutputs gives, to begin at the first layer that trains.
    """
    begin = 0 if frozen is None else frozen_layers(model)
    h = model.model.embed_tokens(mx.array(batch.tokens)) if frozen is None else frozen
    tree = _tree(batch, h.dtype)
    last = len(model.model.layers) - 1
    for index, layer in enumerate(model.model.layers[begin:], begin):

        def advance(parameters: Any, h: mx.array, layer: nn.Module = layer, index: int = index) -> mx.array:
            if dropout_seed is not None:
                mx.random.seed(dropout_seed + index)
            layer.update(parameters)
            return _advance(layer, h, tree, tree.answers if index == last else tree.every)

        parameters = layer.trainable_parameters()
        recompute = checkpoint and bool(tree_flatten(parameters))
        h = _recomputed(advance, parameters, h) if recompute else advance(parameters, h)
    head = _head(model)
    return _answer_logps(head, model.model.norm(h), model.args.vocab_size, batch, model.training)


def sequence_logps(model: nn.Module, batch: GroupBatch, *, checkpoint: bool = False, dropout_seed: int | None = None) -> mx.array:
    """The plain road: each sequence alone through the model's own forward.  -> (G, R) float32, as `group_logps`.

    checkpoint  recompute each sequence in the backward pass: one sequence's activations at a time.
    """
    G, R, _ = batch.answer_mask.shape
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
                return _token_logps(logits, tokens[-n:]).sum()

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
