"""Parts of a model that are run again in the backward pass instead of being kept for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten


def recomputed(run: Callable[..., Any], parameters: Any, *arrays: mx.array) -> Any:
    """run(parameters, *arrays): an array or a tuple of them. Of it only the arrays are kept for the backward pass.

    What the gradient does not need is not run again: of a frozen product, only the input is computed again. Unlike with
    `mx.checkpoint`, a part is run again only when its gradient has arrived, and finishes before the part below starts:
    in MLX's own order parts of several layers are in memory at once.
    """
    names = [name for name, _ in tree_flatten(parameters)]
    several = False

    def flat(*given: mx.array) -> list[mx.array]:
        nonlocal several
        values, inputs = given[: len(names)], given[len(names) :]
        tree = tree_unflatten(list(zip(names, values, strict=True))) if names else {}
        outputs = run(tree, *inputs)
        several = isinstance(outputs, tuple)
        return list(outputs) if several else [outputs]

    def backward(given: Any, cotangents: Any, _: Any) -> Any:
        given = [given] if isinstance(given, mx.array) else list(given)  # a lone argument comes without its tuple
        _, gradients = mx.vjp(flat, mx.depends(given, list(cotangents)), list(cotangents))
        of_parameters, of_arrays = gradients[: len(names)], gradients[len(names) :]
        found = *of_parameters, *(mx.depends(of_arrays, of_parameters) if of_parameters else of_arrays)
        return found if len(found) > 1 else found[0]

    part: Any = mx.custom_function(flat)
    part.vjp(backward)
    outputs = part(*(value for _, value in tree_flatten(parameters)), *arrays)
    return tuple(outputs) if several else outputs[0]
