"""Hidden states -> log-probabilities of answers, a chunk of the vocabulary's logits at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .tree import GroupBatch

LOGITS_BYTES = 128 << 20  # of one chunk of float32 logits


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


def chunk_bytes(rows: int, vocabulary: int) -> float:
    """Of the float32 logits of so many rows that exist at a time."""
    return min(4.0 * rows * vocabulary, max(LOGITS_BYTES, 4 * vocabulary))


def _chunks(step: Callable[[mx.array, int], mx.array], x: mx.array, vocabulary: int, wait: bool) -> mx.array:
    """`step(part, its first row)` over pieces of x's rows, in turn, so that only one piece's logits exist at a time.

    wait  evaluate each piece before the next is begun, since MLX allocates for many operations ahead. Not while a
          gradient is traced, where evaluating keeps everything, nor in a compiled step: see `Case.wait_at`.
    """
    size = max(1, LOGITS_BYTES // (4 * vocabulary))
    done: list[mx.array] = []
    for start in range(0, len(x), size):
        part = x[start : start + size]
        done.append(step(mx.depends([part], done[-1:])[0] if done else part, start))
        if wait:
            mx.eval(done[-1])
    return mx.concatenate(done)


def _normalizer(head: nn.Module, x: mx.array, vocabulary: int, differentiate: bool) -> mx.array:
    """log sum_v exp logits_v of each row.  (M, D) -> (M,) float32.

    differentiate  d/dx is a row's probabilities times the head, whatever the loss is: it is computed with the value,
                   chunk by chunk, and kept instead of the logits. Only for a frozen head.
    """
    if not differentiate:
        return _chunks(lambda part, _: mx.logsumexp(_logits(head, part), axis=-1), x, vocabulary, wait=True)

    def value_and_slope(part: mx.array, start: int) -> mx.array:
        logits = _logits(head, part)
        probabilities = mx.softmax(logits, axis=-1)
        # the largest probability is 1 / sum exp(logits - max)
        value = logits.max(axis=-1) - mx.log(probabilities.max(axis=-1))
        _, (slope,) = mx.vjp(lambda rows: _logits(head, rows), [part], [probabilities])
        return mx.concatenate([slope.astype(mx.float32), value[:, None]], axis=-1)

    def with_slope(x: mx.array) -> tuple[mx.array, mx.array]:
        both = _chunks(value_and_slope, x, vocabulary, wait=False)
        return both[:, -1], both[:, :-1]

    normalizer: Any = mx.custom_function(with_slope)

    normalizer.vjp(lambda x, cotangents, outputs: (cotangents[0][:, None] * outputs[1]).astype(x.dtype))
    return normalizer(x)[0]


def answer_token_logps(head: nn.Module, x: mx.array, vocabulary: int, batch: GroupBatch, training: bool) -> mx.array:
    """(M, D) final hidden states of the rows -> (G, R, A) float32: log p of each answer token, 0 for padding."""
    rows, targets, mask = mx.array(batch.answer_rows), mx.array(batch.answer_targets), mx.array(batch.answer_mask)
    columns = _columns(head, targets)
    if columns is not None:
        chosen = (x[rows].astype(mx.float32) * columns.astype(mx.float32)).sum(axis=-1)
        return (chosen - _normalizer(head, x, vocabulary, training)[rows]) * mask

    parameters, wanted = head.trainable_parameters(), targets.reshape(-1)

    def some(part: mx.array, start: int) -> mx.array:
        def logps(parameters: Any, part: mx.array) -> mx.array:
            head.update(parameters)
            return _token_logps(_logits(head, part), wanted[start : start + len(part)])

        return mx.checkpoint(logps)(parameters, part)

    found = _chunks(some, x[rows.reshape(-1)], vocabulary, wait=not training)
    return found.reshape(targets.shape) * mask


def _token_logps(logits: mx.array, targets: mx.array) -> mx.array:
    """log p of each target.  (..., V), (...) -> (...) float32."""
    logits = logits.astype(mx.float32)
    return mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - mx.logsumexp(logits, axis=-1)
