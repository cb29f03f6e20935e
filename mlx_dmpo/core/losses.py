"""The one equation. Functions of small arrays: log-probabilities -> margins -> one loss a group.

    margin_k = beta [ (log pi(c_k) - log ref(c_k)) - (log pi(r_k) - log ref(r_k)) ]      (G, K)

With one pair, dpo = dmpo = s-dpo. A ragged K is a mask (G, K). Everything is float32, in nats.
"""

from __future__ import annotations

import mlx.core as mx


def _softplus(x: mx.array) -> mx.array:
    return mx.logaddexp(x, mx.zeros_like(x))


def _mean(x: mx.array, mask: mx.array) -> mx.array:
    """Masked mean over the last axis, 0 where nothing is left."""
    return (x * mask).sum(axis=-1) / mx.maximum(mask.sum(axis=-1), 1.0)


def _smoothed(z: mx.array, smoothing: float) -> mx.array:
    """-log sigmoid(z), with chance `smoothing` that the preference is the wrong way round (cDPO, Mitchell 2023)."""
    return _softplus(-z) if smoothing == 0 else (1 - smoothing) * _softplus(-z) + smoothing * _softplus(z)


def pair_difference(logps: mx.array, pairs: mx.array) -> mx.array:
    """log pi(chosen) - log pi(rejected).  logps (G, R), pairs (G, K, 2) -> (G, K)."""
    return mx.take_along_axis(logps, pairs[..., 0], axis=1) - mx.take_along_axis(logps, pairs[..., 1], axis=1)


def margins(policy: mx.array, reference: mx.array | None, pairs: mx.array, beta: float) -> mx.array:
    """DPO's implicit reward margin (Rafailov et al., arXiv 2305.18290, eq. 7).  (G, R), (G, R) or None, (G, K, 2) -> (G, K)."""
    return beta * pair_difference(policy if reference is None else policy - reference, pairs)


def dpo(margin: mx.array, mask: mx.array, smoothing: float = 0.0) -> mx.array:
    """mean_k -log sigmoid(margin_k) (arXiv 2305.18290, eq. 7).  (G, K), (G, K) -> (G,)."""
    return _mean(_smoothed(margin, smoothing), mask)


def dmpo(margin: mx.array, mask: mx.array, smoothing: float = 0.0) -> mx.array:
    """-log sigmoid(mean_k margin_k): the negatives averaged inside the sigmoid (Bai et al., arXiv 2405.16127).  (G, K), (G, K) -> (G,)."""
    return _smoothed(_mean(margin, mask), smoothing)


def s_dpo(margin: mx.array, mask: mx.array, smoothing: float = 0.0) -> mx.array:
    """-log sigmoid(-log sum_k exp(-margin_k)): Plackett-Luce (Chen et al., arXiv 2406.09215, eq. 10).  (G, K), (G, K) -> (G,)."""
    return _smoothed(-mx.logsumexp(mx.where(mask > 0, -margin, -1e30), axis=-1), smoothing)


def simpo(margin: mx.array, mask: mx.array, gamma: float, smoothing: float = 0.0) -> mx.array:
    """mean_k -log sigmoid(margin_k - gamma), margins of length-normalised log-probs without a reference (Meng et al., arXiv 2405.14734, eq. 6)."""
    return dpo(margin - gamma, mask, smoothing)


def sft(logps: mx.array, lengths: mx.array) -> mx.array:
    """Mean negative log-likelihood of a group's answer tokens.  logps (G, R), lengths (G, R) in tokens, 0 = left out -> (G,)."""
    return -(logps * (lengths > 0)).sum(axis=-1) / mx.maximum(lengths.sum(axis=-1), 1)
