"""Which module a NaN or Inf comes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..core.finite import is_finite
from ..core.tree import EncodedGroup


@contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Calls of the model's modules put the names of those whose output is not finite into `found`, in the order they return."""
    names = {id(module): name or "the model" for name, module in model.named_modules()}
    classes = {type(module) for _, module in model.named_modules() if "__call__" in vars(type(module))}
    original = {cls: cls.__call__ for cls in classes}

    def wrap(cls: Any) -> Any:
        def call(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
            output = original[cls](self, *arguments, **keywords)
            if isinstance(output, mx.array) and id(self) in names and not is_finite(output):
                found.append(names[id(self)])
            return output

        return call

    try:
        for cls in classes:
            cls.__call__ = wrap(cls)
        yield
    finally:
        for cls in classes:
            cls.__call__ = original[cls]


def locate(model: nn.Module, groups: list[EncodedGroup], gradients: Any) -> str:
    """Where a step's numbers first ceased to be finite: a parameter, a module's output, the loss or a gradient.

    Runs each group's sequences through the model's own forward, module by module: slow, for a step that went wrong.
    """
    bad = [name for name, value in tree_flatten(model.parameters()) if not is_finite(value)]
    if bad:
        return f"the weights: {bad[0]} is not finite"
    training, found = model.training, list[str]()
    model.eval()
    try:
        with _watched(model, found):
            for group in groups:
                for tail in group.tails:
                    mx.eval(model(mx.array(np.concatenate([group.prefix, tail]))[None]))
                    if found:
                        return (
                            f"the forward pass: the output of {found[0]} is not finite ({group.source or group.user})"
                        )
    finally:
        model.train(training)
    bad = [name for name, value in tree_flatten(gradients) if not is_finite(value)]
    if bad:  # the backward pass comes to the last layers first
        return f"the backward pass: the gradient of {bad[-1]} is not finite"
    return "the loss: the model's own outputs are finite"
