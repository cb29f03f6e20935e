"""DynamicPO (Hu et al., arXiv 2605.00327): train on the negatives near the decision boundary, each with its own beta.

With many negatives the policy already ranks most of them right, and their gradients outweigh those of the few that it
does not: DMPO gets worse as K grows. The selection is a constant to the gradient. The rules are those of the authors'
released trainer; its k-means, which starts at random, is replaced by the best clustering.
"""

from __future__ import annotations

import mlx.core as mx

FIXED_MARGIN = 2.0  # nats; the released trainer's
FAR = 1e9


def boundary_mask(difference: mx.array, mask: mx.array) -> mx.array:
    """Which pairs are trained on.  difference, mask (G, K) -> (G, K) of 0 and 1.

    difference  log pi(chosen) - log pi(rejected) of the policy, in nats
    Those with difference <= 0: the policy prefers the negative. Where a group has none: the nearest of three clusters
    of its differences.
    """
    wrong = (difference <= 0) * mask
    nearest = _first_cluster(difference, mask) * mask
    return mx.stop_gradient(mx.where(wrong.sum(axis=-1, keepdims=True) > 0, wrong, nearest))


def _first_cluster(difference: mx.array, mask: mx.array) -> mx.array:
    """Which numbers fall into the lowest of three clusters (least squares).  (G, K), (G, K) -> (G, K).

    Sorted numbers x_1 .. x_n fall into x_1 .. x_i, x_(i+1) .. x_j, x_(j+1) .. x_n: all pairs i <= j are compared.
    """
    K = difference.shape[-1]
    count = mask.sum(axis=-1, keepdims=True)
    centred = difference - (difference * mask).sum(axis=-1, keepdims=True) / mx.maximum(count, 1)
    sorted_ = mx.sort(mx.where(mask > 0, centred, FAR), axis=-1)
    real = mx.arange(K) < count
    x = mx.where(real, sorted_, 0.0)
    sums, squares = (
        mx.concatenate([mx.zeros_like(part[:, :1]), mx.cumsum(part, axis=-1)], axis=-1) for part in (x, x * x)
    )  # (G, K + 1)

    first, second = zip(*[(i, j) for i in range(1, K + 1) for j in range(i, K + 1)], strict=True)
    i, j = mx.array(first), mx.array(second)
    zero, end = mx.zeros_like(i), mx.full(i.shape, K)  # beyond the real ones the sums no longer grow

    def spread(start: mx.array, stop: mx.array, numbers: mx.array) -> mx.array:
        """Sum of squared distances of x_(start + 1) .. x_stop, which are so many, from their mean."""
        total, square = sums[:, stop] - sums[:, start], squares[:, stop] - squares[:, start]
        return square - total * total / mx.maximum(numbers, 1)

    cost = spread(zero, i, i) + spread(i, j, j - i) + spread(j, end, count - j)
    inside = j <= mx.maximum(count, 1)
    best = mx.argmin(mx.where(inside, cost, FAR), axis=-1)
    return centred <= mx.take_along_axis(sorted_, (i[best] - 1)[:, None], axis=-1)


def dynamic_factor(difference: mx.array, mask: mx.array, selected: mx.array) -> mx.array:
    """What beta is multiplied by, pair by pair.  difference, mask, selected (G, K) -> (G, K), between 1/2 and 3/2.

    1 + tanh((a - b - 2) / (|a| + |b|)) / 2. a = difference: from the chosen answer to the negative. b: from the
    negative to the mean of those not selected, or of the selected ones where none is left.
    """
    rest = mask * (1 - selected)
    rest = mx.where(rest.sum(axis=-1, keepdims=True) > 0, rest, selected)
    mean = (difference * rest).sum(axis=-1, keepdims=True) / mx.maximum(rest.sum(axis=-1, keepdims=True), 1)
    a, b = difference, mean - difference
    ratio = (a - b - FIXED_MARGIN) / mx.maximum(mx.abs(a) + mx.abs(b), 1e-6)
    return mx.stop_gradient(1 + 0.5 * mx.tanh(ratio))
