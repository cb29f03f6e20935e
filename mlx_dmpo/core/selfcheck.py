"""Whether the shared-prefix scorer equals the plain one on the model at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .scorer import plain_logps, shared_logps
from .tree import EncodedGroup, GroupBatch, pad_groups


@dataclass(frozen=True)
class GroupScorer:
    """The scorer in use, and one line that says why if it is the plain one."""

    logps: Callable[..., mx.array]
    shared: bool
    reason: str = ""


def _unsupported(model: nn.Module) -> str:
    """Why the shared-prefix scorer does not know this model, or an empty string."""
    body = getattr(model, "model", None)
    if getattr(model, "model_type", "") not in ("qwen3", "qwen2", "llama") or body is None:
        return f"model type {getattr(model, 'model_type', '?')} is not one that the shared-prefix scorer knows"
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


def choose_scorer(model: nn.Module, vocabulary: int, scoring: str = "auto") -> GroupScorer:
    """The shared-prefix scorer where it equals the plain one on a small batch of this very model; else the plain one, and why."""
    if scoring == "plain":
        return GroupScorer(plain_logps, False, "asked for by --scoring plain")
    reason = _unsupported(model)
    if reason:
        return GroupScorer(plain_logps, False, reason)
    probe = _probe(vocabulary)
    training = model.training
    model.eval()
    try:
        fast, slow = np.array(shared_logps(model, probe)), np.array(plain_logps(model, probe))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        return GroupScorer(plain_logps, False, f"the shared-prefix scorer fails on this model ({error})")
    finally:
        model.train(training)
    # float32 agrees to about 1e-5 nats a token; in 16 bits each logit carries about 3 digits
    wide = model.model.norm.weight.dtype == mx.float32
    tolerance = 1e-3 if wide else 0.05 + 0.03 * np.abs(slow)
    worst = float(np.max(np.abs(fast - slow) - tolerance))
    if not worst <= 0:
        return GroupScorer(
            plain_logps,
            False,
            f"the shared-prefix scorer differs from the plain one by {float(np.max(np.abs(fast - slow))):.2g} nats",
        )
    return GroupScorer(shared_logps, True)
