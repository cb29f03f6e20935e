"""Losses of after DMPO: hand-worked numbers, and what must hold for any"""

import itertools
import math

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_dmpo import config
from mlx_dmpo.config import DmpoSettings
from mlx_dmpo.core import boundary, losses
from mlx_dmpo.core.tree import pad_groups
from mlx_dmpo.errors import UserError
from mlx_dmpo.train.objective import needs_reference, objective


def softplus(x):
    return math.log1p(math.exp(x))


# --- MPPO


def test_mean_likelihood_by_hand():
    # two tokens of probability .5 and .125: sqrt(.0625) = .25; a padded branch is 0
    logps = mx.array([[math.log(0.5) + math.log(0.125), 0.0]])
    np.testing.assert_allclose(np.array(losses.mean_likelihood(logps, mx.array([[2.0, 0.0]]))), [[0.25, 0]], rtol=1e-6)


def test_mppo_by_hand():
    # p_w = .5, p_l = .2 and .4: 2 x .5 - .6 = .4; softplus(-.4) = .513
    likelihood = mx.array([[0.5, 0.2, 0.4]])
    difference = losses.pair_difference(likelihood, mx.array([[[0, 1], [0, 2]]]))
    assert float(losses.mppo(difference, mx.ones((1, 2)))[0]) == pytest.approx(softplus(-0.4), rel=1e-5)
    ragged = losses.mppo(mx.array([[0.3, 0.1, 0.9]]), mx.array([[1.0, 1.0, 0.0]]))
    assert float(ragged[0]) == pytest.approx(softplus(-0.4), rel=1e-5)


# --- RecPO


def test_recpo_target_by_hand():
    # phi: rating 4 at once; 2 after four steps, 2 / sqrt(4) = 1; 1 at once: 4 / 1 and 4 / 1
    utility = mx.array([[4.0, 2.0 / math.sqrt(4), 1.0]])
    found = losses.recpo_margin(utility, mx.array([[[0, 1], [0, 2]]]))
    np.testing.assert_allclose(np.array(found), [[4.0, 4.0]], rtol=1e-6)


def test_recpo_by_hand_and_without_gamma():
    margin, mask, target = mx.array([[0.5, -0.1]]), mx.ones((1, 2)), mx.array([[2.0, 1.25]])
    # margins less .1 x target: .3, -.225; log(1 + e^-.3 + e^.225)
    found = losses.recpo(margin, mask, target, gamma=0.1)
    assert float(found[0]) == pytest.approx(math.log1p(math.exp(-0.3) + math.exp(0.225)), rel=1e-5)
    plain = losses.recpo(margin, mask, target, gamma=0.0)
    assert float(plain[0]) == pytest.approx(float(losses.s_dpo(margin, mask)[0]), rel=1e-6)


# --- Mult-DPO


def plackett_luce(reward, chosen):
    """-log of the chance that the chosen answers fill the first places, in any order: by all orders."""
    weights, total = np.exp(reward), 0.0
    for order in itertools.permutations(chosen):
        left, chance = weights.sum(), 1.0
        for c in order:
            chance *= weights[c] / left
            left -= weights[c]
        total += chance
    return -math.log(total)


def test_mult_dpo_by_hand():
    # e^r = 2, 1, 1: chosen are the first two: -log(2/4) - log(1/4) = log 8
    reward = mx.log(mx.array([[2.0, 1.0, 1.0, 5.0]]))
    found = losses.mult_dpo(reward, mx.array([[1.0, 1.0, 0.0, 0.0]]), mx.array([[1.0, 1.0, 1.0, 0.0]]))
    assert float(found[0]) == pytest.approx(math.log(8), rel=1e-5)


def test_mult_dpo_with_one_chosen_answer_is_s_dpo():
    reward = mx.array([[0.3, -0.2, 0.9]])
    margin = reward[:, :1] - reward[:, 1:]
    found = losses.mult_dpo(reward, mx.array([[1.0, 0.0, 0.0]]), mx.ones((1, 3)))
    assert float(found[0]) == pytest.approx(float(losses.s_dpo(margin, mx.ones((1, 2)))[0]), rel=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_mult_dpo_bounds_plackett_luce(n):
    """Above the exact loss by at most (n - 1) log(1 + A / B); A and B are the weights of chosen and others."""
    rng = np.random.default_rng(n)
    for _ in range(20):
        reward = rng.normal(0, 1.5, 6)
        chosen = np.arange(6) < n
        bound = float(losses.mult_dpo(mx.array(reward[None]), mx.array(chosen[None] * 1.0), mx.ones((1, 6)))[0])
        gap = bound - math.log(math.factorial(n)) - plackett_luce(reward, range(n))
        weights = np.exp(reward)
        assert -1e-5 <= gap <= (n - 1) * math.log1p(weights[:n].sum() / weights[n:].sum()) + 1e-5


# --- per-pair smoothing


def test_smoothing_of_each_pair_by_hand():
    margin, mask = mx.array([[0.5, -0.1]]), mx.ones((1, 2))
    found = losses.dpo(margin, mask, mx.array([[0.0, 0.4]]))
    assert float(found[0]) == pytest.approx((softplus(-0.5) + 0.6 * softplus(0.1) + 0.4 * softplus(-0.1)) / 2, rel=1e-5)
    same = losses.dpo(margin, mask, mx.full((1, 2), 0.1))
    assert float(same[0]) == pytest.approx(float(losses.dpo(margin, mask, 0.1)[0]), rel=1e-6)


# --- DynamicPO


@pytest.mark.parametrize(
    ("difference", "selected"),
    [
        ([3.0, -1.0, 0.0, 5.0], [0, 1, 1, 0]),  # the policy prefers two negatives: these
        ([0.1, 0.2, 3.0, 9.0], [1, 1, 0, 0]),  # none: the nearest of the clusters .1 .2 | 3 | 9
        ([9.0, 4.0, 0.5], [0, 0, 1]),  # three clusters of one
        ([2.0, 1.0], [0, 1]),
        ([2.0], [1]),
        ([1.0, 1.0, 1.0], [1, 1, 1]),  # one number: one cluster
    ],
)
def test_boundary_by_hand(difference, selected):
    found = boundary.boundary_mask(mx.array([difference]), mx.ones((1, len(difference))))
    assert np.array(found)[0].tolist() == selected


def clusters(numbers):
    """The lowest of the best three clusters: by all assignments of the sorted numbers."""
    x, best = np.sort(numbers), (np.inf, 0.0)
    for i in range(1, len(x) + 1):
        for j in range(i, len(x) + 1):
            cost = sum(((p - p.mean()) ** 2).sum() for p in (x[:i], x[i:j], x[j:]) if len(p))
            best = min(best, (round(cost, 6), x[i - 1]))
    return numbers <= best[1] + 1e-6


@pytest.mark.parametrize("k", [3, 5, 10, 19])
def test_clusters_are_the_best_ones_in_ragged_batches(k):
    rng = np.random.default_rng(k)
    difference = rng.gamma(2.0, 3.0, (30, k)).astype(np.float32)
    mask = np.ones((30, k), np.float32)
    for row, n in enumerate(rng.integers(1, k + 1, 30)):
        mask[row, n:] = 0
    found = np.array(boundary.boundary_mask(mx.array(difference), mx.array(mask)))
    for row in range(30):
        real = mask[row] > 0
        assert found[row][real].tolist() == clusters(difference[row][real]).tolist()
        assert not found[row][~real].any()


def test_dynamic_factor_by_hand():
    # differences -1, 3, 5, the first selected: a = -1, mean of the others 4, b = 4 - (-1) = 5
    # (-1 - 5 - 2) / 6 = -4/3; 1 + tanh(-4/3) / 2 = .5648
    difference, mask = mx.array([[-1.0, 3.0, 5.0]]), mx.ones((1, 3))
    found = boundary.dynamic_factor(difference, mask, boundary.boundary_mask(difference, mask))
    assert float(found[0, 0]) == pytest.approx(1 + math.tanh(-4 / 3) / 2, rel=1e-5)
    # all selected: the mean is their own, 0; a = 0, b = 0: the limit is the least factor, not NaN
    nothing = boundary.dynamic_factor(mx.zeros((1, 2)), mx.ones((1, 2)), mx.ones((1, 2)))
    np.testing.assert_allclose(np.array(nothing), [[0.5, 0.5]], atol=1e-6)


def test_selection_is_a_constant_to_the_gradient():
    """The gradient of the selected loss is that of the selected pairs alone, as if they were all that there is."""
    margin, mask = mx.array([[0.4, -0.3, 2.0]]), mx.ones((1, 3))

    def loss(m):
        return losses.dmpo(m, boundary.boundary_mask(m, mask)).sum()

    gradient = np.array(mx.grad(loss)(margin))[0]
    assert gradient[1] == pytest.approx(-1 / (1 + math.exp(-0.3)), rel=1e-5) and gradient[[0, 2]].tolist() == [0, 0]


def test_boundary_keeps_dmpo_from_drowning():
    """One wrong pair among k: DMPO's gradient on it shrinks as k grows, with the boundary it does not."""

    def slope(k, select):
        margin, mask = mx.array([[-1.0] + [3.0] * (k - 1)]), mx.ones((1, k))
        chosen = boundary.boundary_mask(margin, mask) if select else mask
        return -float(mx.grad(lambda m: losses.dmpo(m, chosen).sum())(margin)[0, 0])

    assert slope(15, False) < 0.1 * slope(1, False)
    assert slope(15, True) == pytest.approx(slope(1, True), rel=1e-5)


# --- as `dmpo` computes them


def batch_of(policy, answers):
    rng = np.random.default_rng(0)
    return mx.array([policy]), pad_groups([tiny.group(rng, 5, [n + 2 for n in answers], answers)])


def test_mppo_of_a_batch_by_hand():
    # answers of 1, 2, 1 and 1 tokens; mean likelihoods .5, .25, .8, .4: pairs .25 and .4; softplus(-.65)
    logps = [math.log(0.5), 2 * math.log(0.25), math.log(0.8), math.log(0.4)]
    policy, batch = batch_of(logps, [1, 2, 1, 1])
    value, margin = objective(DmpoSettings(loss="mppo"))(policy, None, batch)
    np.testing.assert_allclose(np.array(margin), [[0.25, 0.4]], rtol=1e-5)
    assert float(value[0]) == pytest.approx(softplus(-0.65), rel=1e-5)


def test_mppo_needs_no_reference_and_refuses_what_has_no_effect():
    assert not needs_reference(DmpoSettings(loss="mppo")) and needs_reference(DmpoSettings())
    with pytest.raises(UserError, match="reference"):
        config.resolve(DmpoSettings, None, {"loss": "mppo", "reference_free": True})
    with pytest.raises(UserError, match="dynamic-beta"):
        config.resolve(DmpoSettings, None, {"dynamic_beta": True})


@pytest.mark.parametrize("name", ["dmpo", "dpo", "s-dpo"])
def test_boundary_of_a_batch_selects_by_the_policy_alone(name):
    """Pairs of differences 3 and -1 nats: the second alone counts, whatever the reference says."""
    policy, batch = batch_of([-2.0, -5.0, -4.0, -3.0], [2, 2, 2, 2])
    reference = mx.array([[-4.0, -1.0, -4.0, -5.0]])
    value, margin = objective(DmpoSettings(loss=name, negatives_select="boundary"))(policy, reference, batch)
    # .1 x ((-2 + 4) - (-5 + 1)) = .6;  .1 x ((-4 + 4) - (-3 + 5)) = -.2
    np.testing.assert_allclose(np.array(margin), [[0.6, -0.2]], rtol=1e-4)
    assert float(value[0]) == pytest.approx(softplus(0.2), rel=1e-4)
    scaled, _ = objective(DmpoSettings(loss=name, negatives_select="boundary", dynamic_beta=True))(
        policy, reference, batch
    )
    # a = -1, b = 3 - (-1) = 4: (-1 - 4 - 2) / 5
    assert float(scaled[0]) == pytest.approx(softplus(0.2 * (1 + math.tanh(-1.4) / 2)), rel=1e-4)
