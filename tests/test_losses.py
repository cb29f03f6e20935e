"""Hand-worked numbers, and what must hold for any."""

import math
from dataclasses import fields

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_dmpo.config import DmpoSettings, SftSettings
from mlx_dmpo.core import losses
from mlx_dmpo.core.tree import pad_groups
from mlx_dmpo.train.objective import objective

MARGIN, MASK = mx.array([[0.5, -0.1]]), mx.ones((1, 2))
PREFERENCE = [losses.dpo, losses.dmpo, losses.s_dpo]


def softplus(x):
    return math.log1p(math.exp(x))


def test_margins_by_hand():
    policy, reference = mx.array([[-3.0, -5.0, -4.0, -2.0]]), mx.array([[-4.0, -4.5, -4.0, -2.5]])
    pairs = mx.array([[[0, 1], [2, 3]]])
    # (-3+4) - (-5+4.5) = 1.5;  (-4+4) - (-2+2.5) = -0.5
    np.testing.assert_allclose(np.array(losses.margins(policy, reference, pairs, 0.1)), [[0.15, -0.05]], rtol=1e-5)
    np.testing.assert_allclose(np.array(losses.margins(policy, None, pairs, 0.1)), [[0.2, -0.2]], rtol=1e-5)


def test_dmpo_averages_inside_the_sigmoid():
    assert float(losses.dmpo(MARGIN, MASK)[0]) == pytest.approx(softplus(-0.2), rel=1e-5)  # .598139


def test_dpo_averages_outside():
    assert float(losses.dpo(MARGIN, MASK)[0]) == pytest.approx(
        (softplus(-0.5) + softplus(0.1)) / 2, rel=1e-5
    )  # .609234


def test_s_dpo_by_hand():
    assert float(losses.s_dpo(MARGIN, MASK)[0]) == pytest.approx(math.log1p(math.exp(-0.5) + math.exp(0.1)), rel=1e-5)


def test_simpo_by_hand():
    found = losses.simpo(mx.array([[1.5]]), mx.ones((1, 1)), gamma=0.5)
    assert float(found[0]) == pytest.approx(softplus(-1.0), rel=1e-5)


def test_sft_is_the_mean_over_the_groups_tokens():
    # -(−6 −2) / (3 + 1): tokens are weighed alike, the branch of length 0 is left out
    found = losses.sft(mx.array([[-6.0, -2.0, -9.0]]), mx.array([[3.0, 1.0, 0.0]]))
    assert float(found[0]) == pytest.approx(2.0)
    assert float(losses.sft(mx.array([[-6.0]]), mx.array([[0.0]]))[0]) == 0.0  # no answer token: 0, not 0/0


def test_label_smoothing():
    found = losses.dmpo(MARGIN, MASK, 0.1)
    assert float(found[0]) == pytest.approx(0.9 * softplus(-0.2) + 0.1 * softplus(0.2), rel=1e-5)


@pytest.mark.parametrize("value", [-3.0, 0.0, 0.7])
def test_with_one_pair_all_agree(value):
    margin, mask = mx.array([[value]]), mx.ones((1, 1))
    found = [float(loss(margin, mask)[0]) for loss in PREFERENCE]
    assert found == pytest.approx([softplus(-value)] * 3, rel=1e-6)


@pytest.mark.parametrize("loss", PREFERENCE)
def test_a_masked_pair_counts_for_nothing(loss):
    ragged = loss(mx.array([[0.5, -0.1, 77.0]]), mx.array([[1.0, 1.0, 0.0]]))
    assert float(ragged[0]) == pytest.approx(float(loss(MARGIN, MASK)[0]), rel=1e-6)


@pytest.mark.parametrize("loss", PREFERENCE)
@pytest.mark.parametrize("values", [[500.0, 500.0], [-500.0, -500.0], [500.0, -500.0], [-500.0, 0.0]])
def test_extreme_margins_stay_finite_in_value_and_gradient(loss, values):
    value, gradient = mx.value_and_grad(lambda m: loss(m, MASK).sum())(mx.array([values]))
    assert math.isfinite(float(value)) and np.isfinite(np.array(gradient)).all()
    if values == [-500.0, -500.0]:  # the slope of a hopeless pair is -1 in all, not 0 or NaN
        assert float(gradient.sum()) == pytest.approx(-1.0, rel=1e-5)


@pytest.mark.parametrize("name", ["dmpo", "dpo", "s-dpo"])
def test_loss_at_step_0_is_log_2_when_policy_is_reference(name):
    batch = pad_groups([tiny.group(np.random.default_rng(0), 5, [4, 4], [2, 2])])
    logps = mx.array([[-7.0, -3.0]])
    value, margin = objective(DmpoSettings(loss=name))(logps, logps, batch)
    assert float(value[0]) == pytest.approx(math.log(2), rel=1e-6) and float(margin[0, 0]) == 0


def test_every_loss_has_a_name_and_every_name_a_loss():
    choices = next(f for f in fields(DmpoSettings) if f.name == "loss").metadata["choices"]
    assert set(choices) == set(losses.REDUCTIONS)
    with pytest.raises(KeyError):
        losses.preference_loss("kto", beta=0.1)


def test_a_preference_loss_takes_no_settings():
    """DMPO + 0.5 x SFT on margins .15 and -.05: softplus(-.05) + .5 x (4 + 6) / 5."""
    batch = pad_groups([tiny.group(np.random.default_rng(0), 5, [4, 4, 6, 6], [2, 2, 3, 3])])
    policy, reference = mx.array([[-4.0, -6.0, -6.0, -5.0]]), mx.array([[-4.0, -4.5, -6.0, -5.5]])
    value, margin = losses.preference_loss("dmpo", beta=0.1, sft_weight=0.5)(policy, reference, batch)
    np.testing.assert_allclose(np.array(margin), [[0.15, -0.05]], rtol=1e-5)
    assert float(value[0]) == pytest.approx(softplus(-0.05) + 0.5 * 10 / 5, rel=1e-5)


def test_sft_weight_adds_the_chosen_answers_only():
    batch = pad_groups([tiny.group(np.random.default_rng(0), 5, [4, 4, 6, 6], [2, 2, 3, 3])])
    logps = mx.array([[-4.0, -30.0, -6.0, -40.0]])
    plain, _ = objective(DmpoSettings())(logps, logps, batch)
    more, _ = objective(DmpoSettings(sft_weight=0.5))(logps, logps, batch)
    assert float(more[0] - plain[0]) == pytest.approx(0.5 * (4 + 6) / (2 + 3), rel=1e-5)


def test_simpo_normalizes_by_length_and_ignores_the_reference():
    batch = pad_groups([tiny.group(np.random.default_rng(0), 5, [4, 6], [2, 4])])
    value, margin = objective(DmpoSettings(loss="simpo", beta=2.0, gamma=0.5))(mx.array([[-4.0, -12.0]]), None, batch)
    assert float(margin[0, 0]) == pytest.approx(2.0)  # 2 (-4/2 + 12/4)
    assert float(value[0]) == pytest.approx(softplus(-1.5), rel=1e-5)


def test_sft_objective_scores_every_branch_of_a_chosen_only_group():
    group = tiny.group(np.random.default_rng(0), 5, [4], [2])
    value, _ = objective(SftSettings())(mx.array([[-4.0]]), None, pad_groups([group]))
    assert float(value[0]) == pytest.approx(2.0)
