"""Whether the shared-prefix scorer equals the plain one on a model."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from . import family
from .layout import PREFIX_CHUNK
from .scorer import plain_logps, shared_logps
from .tree import EncodedGroup, GroupBatch, pad_groups

LONG = 2 * PREFIX_CHUNK + 16  # tokens of the longest prefix that is compared
SHORT, LARGE = 72, 10_000  # tokens of the only prefix that is compared on slow models; a vocabulary of a real model
NARROW = 48  # tokens of an attention window while scorers are compared


R = TypeVar("R")


@dataclass(frozen=True)
class Probe:
    """What the shared-prefix scorer took on this device for a small batch."""

    batch: GroupBatch
    peak: int  # bytes above what was in use before


@dataclass(frozen=True)
class GroupScorer:
    """The scorer in use, and why it is the plain one where it is.

    forward, kept, recomputed  what the self-check took for values, and for gradients without and with recomputation;
                               None where it did not measure that
    """

    logps: Callable[..., mx.array]
    shared: bool
    reason: str = ""
    forward: Probe | None = None
    kept: Probe | None = None
    recomputed: Probe | None = None


def _probed(batch: GroupBatch, run: Callable[[], R]) -> tuple[R, Probe]:
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    found = run()
    return found, Probe(batch, mx.get_peak_memory() - before)


@contextlib.contextmanager
def _narrow_windows(model: nn.Module) -> Iterator[None]:
    """Attention windows of NARROW tokens in both scorers, so that short probes are longer than a window."""
    inner = family.decoder(model)
    name, width = family.window_name(inner), None
    if any(family.windows(inner)):
        width = getattr(inner.model, name)
        setattr(inner.model, name, min(width, NARROW))
    try:
        yield
    finally:
        if width is not None:
            setattr(inner.model, name, width)


def _probes(vocabulary: int, short: bool = False) -> tuple[GroupBatch, GroupBatch]:
    """Groups of random tokens: for values, prefixes of one chunk, one token more, and a long one; for the gradient.

    short  one prefix of SHORT tokens for each
    """
    rng = np.random.default_rng(0)

    def draw(n: int) -> np.ndarray:
        return rng.integers(0, vocabulary, n).astype(np.int32)

    def group(prefix: int, *tails: tuple[int, int]) -> EncodedGroup:
        lengths = tuple(n for _, n in tails)
        return EncodedGroup(draw(prefix), tuple(draw(t) for t, _ in tails), lengths, np.zeros((0, 2), np.int32))

    if short:
        return pad_groups([group(SHORT, (4, 2), (3, 2))]), pad_groups([group(SHORT, (4, 2), (3, 2))])
    values = [group(13, (6, 3), (4, 2), (5, 4)), group(PREFIX_CHUNK, (4, 2)), group(PREFIX_CHUNK + 1, (3, 1))]
    values.append(group(LONG, (9, 3), (7, 2)))
    return pad_groups(values), pad_groups([group(9, (5, 2), (4, 3)), group(PREFIX_CHUNK + 5, (6, 3))])


def _gradient(model: nn.Module, score: Callable[..., mx.array], probe: GroupBatch, **how: Any) -> np.ndarray:
    """The adapter's gradient of a weighted sum of the probe's log-probs, as one vector."""
    parameters = model.trainable_parameters()
    weights = mx.array(np.random.default_rng(1).normal(size=probe.answer_mask.shape[:2]).astype(np.float32))

    def total(parameters: Any) -> mx.array:
        model.update(parameters)
        return (weights * score(model, probe, **how)).sum()

    try:
        found = mx.grad(total)(parameters)
        mx.eval(found)  # all at once, as in a step: one by one, the others' graphs keep their arrays
        return np.concatenate([np.array(g.astype(mx.float32)).reshape(-1) for _, g in tree_flatten(found)])
    finally:
        model.update(parameters)


def _difference(
    model: nn.Module, vocabulary: int, shared_logps: Callable[..., mx.array]
) -> tuple[str, dict[str, Probe]]:
    """How the scorers differ, or an empty string, and what the shared one took.

    The gradient is compared where the model is to be trained.
    """
    # float32 agrees to about 1e-5 nats per token; in 16 bits each logit carries about 3 digits
    wide, trains = family.decoder(model).model.norm.weight.dtype == mx.float32, model.training
    quantized = any(isinstance(m, nn.QuantizedLinear | nn.QuantizedEmbedding) for m in model.modules())
    on_cpu = mx.default_device() == mx.Device(mx.cpu)  # where a quantized product takes a hundred times longer
    values, gradient = _probes(vocabulary, short=quantized and on_cpu and vocabulary > LARGE)
    model.eval()
    mx.eval(model.parameters())  # a file that is read late is not the scorer's memory
    gc.collect()  # nor is an earlier model that would be freed meanwhile
    fast, forward = _probed(values, lambda: np.array(shared_logps(model, values)))
    slow = np.array(plain_logps(model, values))
    difference = np.abs(fast - slow)
    if not (difference <= (1e-3 if wide else 0.05 + 0.03 * np.abs(slow))).all():  # also for NaN
        return f"the shared-prefix scorer differs from the plain one by {float(difference.max()):.2g} nats", {}
    if not trains or not tree_flatten(model.trainable_parameters()):
        return "", {"forward": forward}
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    slow = _gradient(model, plain_logps, gradient)
    probes = {"forward": forward}
    for name, checkpoint in (("recomputed", True), ("kept", False)):
        fast, probes[name] = _probed(gradient, partial(_gradient, model, shared_logps, gradient, checkpoint=checkpoint))
        worst = float(np.linalg.norm(fast - slow)) / max(float(np.linalg.norm(slow)), 1e-30)
        if not worst <= (1e-3 if wide else 0.2):  # also for NaN
            return f"the gradients of the shared-prefix scorer and of the plain one differ by {100 * worst:.2g} %", {}
    return "", probes


def choose_scorer(model: nn.Module, vocabulary: int, scoring: str = "auto", chunk: int = PREFIX_CHUNK) -> GroupScorer:
    """The shared-prefix scorer where it equals the plain one on this very model; else the plain one, and why.

    Compared are values, also with prefixes around PREFIX_CHUNK and a long one, and for a model in training mode one
    gradient, with and without recomputation, and with `chunk` queries of a prefix at once; where that fails, with
    PREFIX_CHUNK. Where layers attend within a window, it is narrowed for that, so that prefixes are longer than it.
    What the shared one took for them is kept, for the plan of a run.
    """
    if scoring == "plain":
        return GroupScorer(plain_logps, False, "--scoring plain was given")
    reason, training, probes = family.unsupported(model), model.training, dict[str, Probe]()
    for size in () if reason else dict.fromkeys((chunk, PREFIX_CHUNK)):
        scorer = shared_logps if size == PREFIX_CHUNK else partial(shared_logps, chunk=size)
        try:
            with _narrow_windows(model):
                reason, probes = _difference(model, vocabulary, scorer)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            reason = f"the shared-prefix scorer fails on this model ({error})"
        finally:
            model.train(training)
        if not reason:
            return GroupScorer(scorer, True, "", **probes)
    return GroupScorer(plain_logps, False, reason)
