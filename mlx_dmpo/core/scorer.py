"""Log-probabilities of a group's answers; what its sequences share is run once.

A group is its prefix tree in depth-first order: the history, then each question with its answers (see GroupBatch). All
groups of a batch are one array of tokens; only attention sees them as prefixes and blocks. A token attends to what
comes before it in its own branch, at the rotary position of its depth. In the last layer only the tokens that predict
an answer token are queries and reach the vocabulary. Values and gradients are exact: tests compare them with
`plain_logps`, which runs each sequence alone through the model's own forward. A model of another architecture falls
back to it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from . import family
from .attention import _advance
from .head import _head, _token_logps, answer_token_logps
from .layout import PREFIX_CHUNK, Layout, layout
from .recompute import recomputed
from .tree import GroupBatch

SCORER_VERSION = 4  # part of the reference cache's key: raise it when log-probs change


# (model, batch) -> (G, R) float32: summed log-probs of each branch's answer in nats, 0 for a padded branch
Scorer = Callable[[nn.Module, GroupBatch], mx.array]


def _layouts(model: nn.Module, batch: GroupBatch, dtype: mx.Dtype, chunk: int) -> list[Layout]:
    """Of each layer. Layers of one attention window and equally many heads share it."""
    kinds = list(zip(family.windows(model), family.heads(model), strict=True))
    made = {(window, heads): layout(batch, dtype, heads, window, chunk) for window, heads in set(kinds)}
    return [made[kind] for kind in kinds]


def frozen_layers(model: nn.Module) -> int:
    """How many of the first layers no gradient reaches: below the first that trains; 0 if the embedding trains."""
    model = family.decoder(model)
    if tree_flatten(model.model.embed_tokens.trainable_parameters()):
        return 0
    trains = [bool(tree_flatten(layer.trainable_parameters())) for layer in model.model.layers]
    return trains.index(True) if True in trains else len(trains) - 1


class Kept(Protocol):
    """Hidden states that outlive the process: (N, D) by a key of their tokens."""

    def get(self, key: bytes) -> mx.array | None: ...
    def put(self, key: bytes, h: mx.array) -> None: ...


class FrozenOutputs:
    """What enters the first layer that trains: computed outside gradient tracing, and kept, since it never changes.

    budget  bytes of hidden states kept at most, group by group; what does not fit is computed each time
    epoch   groups per epoch. A kept group that two epochs did not use is dropped when room is needed: every epoch of
            fixed groups uses each one, and a group of redrawn orders may never come again.
    disk    where they are kept as well, for other adapters on the same layers
    """

    def __init__(self, model: nn.Module, budget: float, epoch: int, disk: Kept | None = None):
        self.disk = disk
        self.model, self.budget, self.epoch, self.layers = family.decoder(model), budget, epoch, frozen_layers(model)
        self.kept: OrderedDict[bytes, tuple[mx.array, int]] = OrderedDict()  # least recently used first; last use
        self.bytes = 0
        self._used = 0  # groups so far

    def _compute(self, batch: GroupBatch) -> mx.array:
        h = family.embed(self.model, mx.array(batch.tokens))
        layouts = _layouts(self.model, batch, h.dtype, PREFIX_CHUNK)
        for layer, at in zip(self.model.model.layers[: self.layers], layouts, strict=False):
            h = _advance(layer, h, at, at.every)
        return h

    def _stored(self, key: bytes, tokens: int) -> mx.array | None:
        if key in self.kept or not self.disk:
            return self.kept[key][0] if key in self.kept else None
        h = self.disk.get(key)
        return h if h is not None and h.shape == (tokens, self.model.args.hidden_size) else None

    def _keep(self, key: bytes, h: mx.array) -> None:
        while self.bytes + h.nbytes > self.budget and self.kept:
            oldest = next(iter(self.kept))
            if self._used - self.kept[oldest][1] <= 2 * self.epoch:
                return
            self.bytes -= self.kept.pop(oldest)[0].nbytes
        if self.bytes + h.nbytes <= self.budget:
            self.kept[key] = mx.contiguous(h), self._used
            self.bytes += h.nbytes

    def __call__(self, batch: GroupBatch) -> mx.array:
        """(N, D)."""
        spans = list(itertools.pairwise(batch.starts.tolist()))
        keys = [
            hashlib.blake2b(batch.tokens[a:b].tobytes() + batch.positions[a:b].tobytes(), digest_size=16).digest()
            for a, b in spans
        ]
        self._used += len(keys)
        for key in keys:
            if key in self.kept:
                self.kept[key] = self.kept[key][0], self._used
                self.kept.move_to_end(key)
        found = [self._stored(key, b - a) for key, (a, b) in zip(keys, spans, strict=True)]
        known = [h for h in found if h is not None]
        if len(known) == len(keys):
            for key, h in zip(keys, known, strict=True):
                if key not in self.kept:
                    self._keep(key, h)
            real = mx.concatenate(known)
            return mx.pad(real, [(0, len(batch.tokens) - len(real)), (0, 0)])
        h = self._compute(batch)
        mx.eval(h)
        for key, (a, b), stored in zip(keys, spans, found, strict=True):
            if key not in self.kept:
                self._keep(key, h[a:b])
            if self.disk and stored is None:
                self.disk.put(key, h[a:b])
        mx.eval([self.kept[key][0] for key in keys if key in self.kept])
        return h


def shared_logps(
    model: nn.Module,
    batch: GroupBatch,
    *,
    checkpoint: bool = False,
    dropout_seed: int | None = None,
    frozen: mx.array | None = None,
    per_token: bool = False,
    chunk: int = PREFIX_CHUNK,
) -> mx.array:
    """Log-probs of every branch's answer, shared tokens run once.  -> (G, R) float32, nats; 0 for a padded branch.

    checkpoint    recompute each adapted layer in the backward pass. The unit is a function of arrays alone: what a
                  closure or a cache carries past it gets no gradient.
    dropout_seed  reseeds the generator in each layer, so that a recomputed layer draws the same dropout mask.
    frozen        (N, D): what FrozenOutputs gives; the run starts at the first layer that trains.
    per_token     each answer token's log-prob instead of their sum.  -> (G, R, A), 0 for padding
    chunk         queries of a prefix that attention runs at once; the result is the same for each
    """
    begin, training, model = 0 if frozen is None else frozen_layers(model), model.training, family.decoder(model)
    h = family.embed(model, mx.array(batch.tokens)) if frozen is None else frozen
    layouts = _layouts(model, batch, h.dtype, chunk)
    last = len(model.model.layers) - 1
    for index, layer in enumerate(model.model.layers[begin:], begin):

        def advance(parameters: Any, h: mx.array, layer: nn.Module = layer, index: int = index) -> mx.array:
            layer.update(parameters)
            at, seed = layouts[index], None if dropout_seed is None else dropout_seed + index
            return _advance(layer, h, at, at.answers if index == last else at.every, training, seed)

        parameters = layer.trainable_parameters()
        recompute = checkpoint and bool(tree_flatten(parameters))
        h = recomputed(advance, parameters, h) if recompute else advance(parameters, h)
    head = _head(model)
    tokens = answer_token_logps(head, model.model.norm(h), model.args.vocab_size, batch, training)
    return tokens if per_token else tokens.sum(axis=-1)


def plain_logps(
    model: nn.Module,
    batch: GroupBatch,
    *,
    checkpoint: bool = False,
    dropout_seed: int | None = None,
    per_token: bool = False,
) -> mx.array:
    """The plain scorer: each sequence alone through the model's own forward.  Shapes as `shared_logps`.

    checkpoint  recompute each sequence in the backward pass: one sequence's activations at a time.
    """
    G, R, A = batch.answer_mask.shape
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
                logps = _token_logps(model(tokens[None, :-1])[0, -n:], tokens[-n:])
                return mx.pad(logps, (0, A - n)) if per_token else logps.sum()

            row.append((mx.checkpoint(alone) if checkpoint else alone)(parameters))
        padding = mx.zeros((A,)) if per_token else mx.zeros(())
        rows.append(mx.stack(row + [padding] * (R - len(row))))
    return mx.stack(rows)
