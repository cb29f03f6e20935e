"""Log-probabilities of a group's answers, whatever its sequences share run once.

A group is its prefix tree in depth-first order: the history, then each question with its answers (see GroupBatch). Groups
stand one after another as one line of tokens; only attention looks at them as arrays of prefixes and of blocks. A token
attends to what comes before it in its own branch, at the rotary position of its depth. In the last layer only the tokens
that predict an answer's token ask and go on to the vocabulary. Exact in values and gradients: `plain_logps`,
each sequence alone through the model's own forward, is the plain scorer that tests compare with and that a model
of another build falls back to.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .attention import _advance, _tree
from .head import _answer_logps, _head, _token_logps
from .tree import GroupBatch

SCORER_VERSION = 2  # part of the reference cache's key: raise it when log-probs change


# (model, batch) -> (G, R) float32: summed log-probs of each branch's answer in nats, 0 for a padded branch
Scorer = Callable[[nn.Module, GroupBatch], mx.array]


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
        keys = [
            hashlib.blake2b(batch.tokens[a:b].tobytes() + batch.positions[a:b].tobytes(), digest_size=16).digest()
            for a, b in spans
        ]
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


def shared_logps(
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


def plain_logps(
    model: nn.Module, batch: GroupBatch, *, checkpoint: bool = False, dropout_seed: int | None = None
) -> mx.array:
    """The plain scorer: each sequence alone through the model's own forward.  -> (G, R) float32, as `shared_logps`.

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
