"""NaN and Inf checks over trees of arrays."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten


def all_finite(*trees: Any) -> mx.array:
    """Whether every floating-point number of the trees is: () bool, not evaluated."""
    checks = [
        mx.isfinite(a).all() for tree in trees for _, a in tree_flatten(tree) if mx.issubdtype(a.dtype, mx.floating)
    ]
    return mx.stack(checks).all() if checks else mx.array(True)


def is_finite(*trees: Any) -> bool:
    """Whether every floating-point number of the trees is."""
    return bool(all_finite(*trees))
