"""Steps with NaN or Inf: counted, reported, and traced to the module they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..core.finite import is_finite
from ..core.tree import EncodedGroup
from ..errors import UserError
from ..machine import console
from ..machine.ranks import world
from .batches import Step
from .checkpoint import Checkpoints


@dataclass(frozen=True)
class BadSteps:
    """Counts steps that were skipped; ends the run after `limit` of them in a row."""

    model: nn.Module
    checkpoints: Checkpoints
    limit: int
    trace: bool  # find the module
    lower: str  # the flags that help
    resume: str  # the command that resumes

    def skipped(self, step: Step, bad: Sequence[EncodedGroup], gradients: Any) -> None:
        """Raises UserError where it is one too many in a row."""
        state, number = self.checkpoints.state, step.number
        state.bad_steps, state.bad_in_a_row = state.bad_steps + 1, state.bad_in_a_row + 1
        names = ", ".join(g.source or g.user for g in bad[:4]) + (", …" if len(bad) > 4 else "")
        if bad or world().first:
            console.notice(f"note: step {number}: NaN or Inf, skipped{f' ({names})' if names else ''}")
            if self.trace:
                in_update = not bad and is_finite(gradients)
                place = "the update: loss and gradient are finite"
                if not in_update:
                    place = locate(self.model, list(bad or step.groups), gradients)
                console.notice(f"note: step {number}: first in {place}")
        if state.bad_in_a_row < self.limit:
            return
        state.bad_in_a_row = 0
        self.checkpoints.save()
        saved = self.checkpoints.last()
        raise UserError(
            f"step {number}: {self.limit} steps in a row had NaN or Inf{f' (rows {names})' if names else ''}; "
            f"the weights are as before them: lower {self.lower} in a new run"
            + (f" from --start-adapter {saved}, or skip these steps and continue: {self.resume}" if saved else "")
        )


def locate(model: nn.Module, groups: list[EncodedGroup], gradients: Any) -> str:
    """Where the first NaN or Inf of a step is: in a weight, a layer's output, the loss or a gradient.

    Runs the sequences one by one through the model, layer by layer: slow, for a step that was skipped.
    """
    bad = [name for name, value in tree_flatten(model.parameters()) if not is_finite(value)]
    if bad:
        return f"the weights: {bad[0]}"
    training = model.training
    model.eval()
    try:
        for group in groups:
            for tail in group.tails:
                layer = _first_layer(model, np.concatenate([group.prefix, tail]))
                if layer:
                    return f"the forward pass: the output of {layer} ({group.source or group.user})"
    finally:
        model.train(training)
    bad = [name for name, value in tree_flatten(gradients) if not is_finite(value)]
    if bad:  # the backward pass reaches the last layers first
        return f"the backward pass: the gradient of {bad[-1]}"
    return "the loss: the model's own outputs are finite"


class _Probe:
    """A layer whose first call with NaN or Inf in its output puts its name into `found`."""

    def __init__(self, layer: nn.Module, name: str, found: list[str]):
        self.layer, self.name, self.found = layer, name, found

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        output = self.layer(*arguments, **keywords)
        if not self.found and not is_finite(output):
            self.found.append(self.name)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def _first_layer(model: nn.Module, tokens: np.ndarray) -> str:
    """The name of the first layer whose output has NaN or Inf, of (T,) tokens; "" for none."""
    names = {id(module): name for name, module in model.named_modules()}
    layers, found = list(model.layers), list[str]()
    model.layers[:] = [_Probe(layer, names[id(layer)], found) for layer in layers]
    try:
        finite = is_finite(model(mx.array(tokens)[None]))
    finally:
        model.layers[:] = layers
    return found[0] if found else "" if finite else "the final norm and the head"
