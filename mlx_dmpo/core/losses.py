"""The one equation. Functions of small arrays: log-probabilities -> margins -> one loss a group.

    margin_k = beta [ (log pi(c_k) - log ref(c_k)) - (log pi(r_k) - log ref(r_k)) ]      (G, K)

With one pair, dpo = dmpo = s-dpo. A ragged K is a mask (G, K). Everything is float32, in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx

from .boundary import boundary_mask, dynamic_factor
from .tree import GroupBatch

# (policy (G, R), reference (G, R) or None, batch) -> losses (G,), margins (G, K)
Loss = Callable[[mx.array, mx.array | None, GroupBatch], tuple[mx.array, mx.array]]


def _softplus(x: mx.array) -> mx.array:
    return mx.logaddexp(x, mx.zeros_like(x))


def _mean(x: mx.array, mask: mx.array) -> mx.array:
    """Masked mean over the last axis, 0 where nothing is left."""
    return (x * mask).sum(axis=-1) / mx.maximum(mask.sum(axis=-1), 1.0)


def _smoothed(z: mx.array, smoothing: float | mx.array) -> mx.array:
    """-log sigmoid(z), with chance `smoothing` that the preference is the wrong way round (cDPO, Mitchell 2023).

    smoothing  one number, or one for each number of z
    """
    if isinstance(smoothing, float | int) and smoothing == 0:
        return _softplus(-z)
    return (1 - smoothing) * _softplus(-z) + smoothing * _softplus(z)


def pair_difference(logps: mx.array, pairs: mx.array) -> mx.array:
    """log pi(chosen) - log pi(rejected).  logps (G, R), pairs (G, K, 2) -> (G, K)."""
    return mx.take_along_axis(logps, pairs[..., 0], axis=1) - mx.take_along_axis(logps, pairs[..., 1], axis=1)


def margins(policy: mx.array, reference: mx.array | None, pairs: mx.array, beta: float) -> mx.array:
    """DPO's implicit reward margin (Rafailov et al., arXiv 2305.18290, eq. 7).

    policy (G, R), reference (G, R) or None, pairs (G, K, 2) -> (G, K).
    """
    return beta * pair_difference(policy if reference is None else policy - reference, pairs)


def dpo(margin: mx.array, mask: mx.array, smoothing: float | mx.array = 0.0) -> mx.array:
    """mean_k -log sigmoid(margin_k) (arXiv 2305.18290, eq. 7).  margin, mask (G, K); smoothing 1 or (G, K) -> (G,)."""
    return _mean(_smoothed(margin, smoothing), mask)


def dmpo(margin: mx.array, mask: mx.array, smoothing: float = 0.0) -> mx.array:
    """-log sigmoid(mean_k margin_k): the mean is inside the sigmoid (Bai et al., arXiv 2405.16127).

    margin, mask (G, K) -> (G,).
    """
    return _smoothed(_mean(margin, mask), smoothing)


def s_dpo(margin: mx.array, mask: mx.array, smoothing: float = 0.0) -> mx.array:
    """-log sigmoid(-log sum_k exp(-margin_k)): Plackett-Luce (Chen et al., arXiv 2406.09215, eq. 10).

    margin, mask (G, K) -> (G,).
    """
    return _smoothed(-mx.logsumexp(mx.where(mask > 0, -margin, -1e30), axis=-1), smoothing)


def simpo(margin: mx.array, mask: mx.array, gamma: float, smoothing: float = 0.0) -> mx.array:
    """mean_k -log sigmoid(margin_k - gamma) (Meng et al., arXiv 2405.14734, eq. 6).  margin, mask (G, K) -> (G,).

    The margins are those of length-normalized log-probs, without a reference.
    """
    return dpo(margin - gamma, mask, smoothing)


def mean_likelihood(logps: mx.array, lengths: mx.array) -> mx.array:
    """Geometric mean of the answer tokens' probabilities, 0 for a padded branch.  logps, lengths (G, R) -> (G, R)."""
    return mx.exp(logps / mx.maximum(lengths, 1)) * (lengths > 0)


def mppo(difference: mx.array, mask: mx.array, smoothing: float = 0.0) -> mx.array:
    """-log sigmoid(sum_k (p_c - p_rk)) (Pair-MNM of Xie et al., arXiv 2412.15244, eq. 10).

    difference, mask (G, K) -> (G,). The differences are those of mean likelihoods, without a reference and beta.
    """
    return _smoothed((difference * mask).sum(axis=-1), smoothing)


def recpo_margin(utility: mx.array, pairs: mx.array) -> mx.array:
    """phi(chosen) / phi(rejected), phi = rating / sqrt(delay) (Ouyang et al., arXiv 2506.02261).

    utility (G, R) > 0: phi of each answer; pairs (G, K, 2) -> (G, K). Ratings 5 and 1, both at once: 5.
    """
    chosen, rejected = (mx.take_along_axis(utility, pairs[..., n], axis=1) for n in (0, 1))
    return chosen / rejected


def recpo(margin: mx.array, mask: mx.array, target: mx.array, gamma: float, smoothing: float = 0.0) -> mx.array:
    """S-DPO whose every pair has a target margin of its own, gamma x target (arXiv 2506.02261).  (G, K) each -> (G,).

    target  what `recpo_margin` gives; with gamma 0 it is S-DPO
    """
    return s_dpo(margin - gamma * target, mask, smoothing)


def mult_dpo(reward: mx.array, chosen: mx.array, mask: mx.array) -> mx.array:
    """sum over chosen c of -log softmax(reward)_c: several chosen answers (Zhu et al., arXiv 2606.10078).

    reward, chosen, mask (G, R) -> (G,). reward: beta (log pi - log ref) of all answers to one prompt; chosen and mask
    are 1 for chosen and for real answers. It is -log of the chance that n draws from softmax(reward) are the n chosen
    ones, each once, without the constant log n!, and bounds the Plackett-Luce loss over all orders of the chosen ones
    from above. With one chosen answer it is S-DPO.
    """
    total = mx.logsumexp(mx.where(mask > 0, reward, -1e30), axis=-1, keepdims=True)
    return ((total - reward) * chosen).sum(axis=-1)


# A new loss of margins is a function (margin (G, K), mask (G, K), smoothing=) -> (G,), and a line here.
REDUCTIONS: dict[str, Callable[..., mx.array]] = {
    "dmpo": dmpo,
    "dpo": dpo,
    "s-dpo": s_dpo,
    "simpo": simpo,
    "mppo": mppo,
    "recpo": recpo,
    "mult-dpo": mult_dpo,
}
WITHOUT_REFERENCE = frozenset({"simpo", "mppo"})


def sft(logps: mx.array, lengths: mx.array) -> mx.array:
    """Mean negative log-likelihood of a group's answer tokens.

    logps (G, R), lengths (G, R) in tokens, 0 for a branch that does not count -> (G,).
    """
    return -(logps * (lengths > 0)).sum(axis=-1) / mx.maximum(lengths.sum(axis=-1), 1)


def sft_loss(policy: mx.array, reference: mx.array | None, batch: GroupBatch) -> tuple[mx.array, mx.array]:
    """A `Loss`: SFT on the chosen answers. Its margins are the policy's own differences, in nats."""
    return sft(policy, mx.array(batch.chosen_lengths)), pair_difference(policy, mx.array(batch.pairs))


def preference_loss(
    name: str,
    *,
    beta: float,
    gamma: float = 0.0,
    smoothing: float = 0.0,
    sft_weight: float = 0.0,
    boundary: bool = False,
    dynamic_beta: bool = False,
) -> Loss:
    """The `Loss` of a name in REDUCTIONS.

    beta          factor of the margin; mppo has none
    gamma         target margin of simpo, factor of recpo's own
    smoothing     chance that a preference is the wrong way round
    sft_weight    weight of the chosen answers' mean token loss, which is added
    boundary      only negatives near the decision boundary count (see boundary.py)
    dynamic_beta  with `boundary`: each pair's margin is scaled by its distance from there
    Raises KeyError for another name.
    """
    reduce = REDUCTIONS[name]
    if name in ("simpo", "recpo"):
        reduce = partial(reduce, gamma=gamma)

    def loss(policy: mx.array, reference: mx.array | None, batch: GroupBatch) -> tuple[mx.array, mx.array]:
        pairs, mask = mx.array(batch.pairs), mx.array(batch.pair_mask)
        margin = _margins_of(name, policy, reference, batch, beta)
        counted = margin
        if boundary:
            difference = pair_difference(policy, pairs)
            selected = boundary_mask(difference, mask)
            if dynamic_beta:
                counted = margin * dynamic_factor(difference, mask, selected)
            mask = selected
        if name == "mult-dpo":
            lengths = mx.array(batch.answer_mask).sum(axis=-1)
            reward = beta * (policy if reference is None else policy - reference)
            value = mult_dpo(reward, mx.array(batch.chosen_lengths) > 0, lengths > 0)
        elif name == "recpo":
            value = reduce(counted, mask, recpo_margin(mx.array(batch.utilities), pairs), smoothing=smoothing)
        else:
            value = reduce(counted, mask, smoothing=smoothing)
        if sft_weight:
            value = value + sft_weight * sft(policy, mx.array(batch.chosen_lengths))
        return value, margin

    return loss


def _margins_of(name: str, policy: mx.array, reference: mx.array | None, batch: GroupBatch, beta: float) -> mx.array:
    """(G, K): of log-probs and the reference's, of log-probs per token (simpo), or of mean likelihoods (mppo)."""
    pairs = mx.array(batch.pairs)
    if name not in WITHOUT_REFERENCE:
        return margins(policy, reference, pairs, beta)
    lengths = mx.array(batch.answer_mask).sum(axis=-1)
    if name == "mppo":
        return pair_difference(mean_likelihood(policy, lengths), pairs)
    return margins(policy / mx.maximum(lengths, 1), None, pairs, beta)
