"""Ranking metrics by hand, and what their intervals must and must not depend on."""

import numpy as np
import pytest

from mlx_dmpo.judge import bootstrap, metrics


def row(user, first, second, positive="p", **more):
    """A pair with the given margins in the two printed orders."""
    orders = {
        "positive_first": {"chosen_logp": first, "rejected_logp": 0.0},
        "positive_second": {"chosen_logp": second, "rejected_logp": 0.0},
    }
    return {
        "user": user,
        "domain": "movie",
        "positive": positive,
        "negative": "n",
        **orders,
        "margin": first + second,
        **more,
    }


HAND = [row("a", 3.0, -1.0), row("b", 2.0, -4.0), row("c", 1.0, -1.0), row("d", -1.0, 5.0)]


def test_by_hand():
    found = metrics.ranking_metrics(HAND)
    assert (found["n"], found["k"], found["users"], found["ties"]) == (4, 1, 4, 1)
    # margins 2, -2, 0, 4: two right, one tie
    assert found["pair_accuracy"]["value"] == pytest.approx(2.5 / 4)
    assert found["pair_accuracy_positive_first"]["value"] == pytest.approx(3 / 4)
    assert found["pair_accuracy_positive_second"]["value"] == pytest.approx(1 / 4)
    # first-listed wins in 3 of 4 prompts that list the positive first, and in 3 of 4 that list it second
    assert found["position_bias"]["value"] == pytest.approx(0.25)
    assert found["mean_margin"]["value"] == pytest.approx(1.0)
    # {2, -2, 0, 4} against {-2, 2, 0, -4}: of 16 comparisons 10 won and 3 tied
    assert found["auc"]["value"] == pytest.approx((10 + 3 / 2) / 16)
    assert "low" not in found["pair_accuracy"] and "fewer than 10" in found["intervals"]["note"]
    many = metrics.ranking_metrics([{**r, "user": f"{r['user']}{i}"} for i in range(5) for r in HAND])
    for name in ("pair_accuracy", "auc", "position_bias", "mean_margin"):
        assert many[name]["value"] == pytest.approx(found[name]["value"])
        assert many[name]["low"] <= many[name]["value"] <= many[name]["high"]


def test_auc_is_the_mean_over_all_pairs():
    margin = np.random.default_rng(0).integers(-3, 6, 40).astype(float)
    mirrored = -margin
    expected = np.mean([(m > o) + 0.5 * (m == o) for m in margin for o in mirrored])
    assert metrics.auc(margin)[0] == pytest.approx(expected)
    doubled = metrics.auc(margin, np.full((1, 40), 2.0))
    assert doubled[0] == pytest.approx(expected)
    weights = np.random.default_rng(1).integers(0, 4, (1, 40)).astype(float)
    repeated = np.repeat(margin, weights[0].astype(int))
    assert metrics.auc(margin, weights)[0] == pytest.approx(metrics.auc(repeated)[0])


def test_a_pure_position_bias_is_seen_and_cancels():
    rng = np.random.default_rng(2)
    taste = rng.normal(0.5, 1, 500)
    plain = metrics.ranking_metrics([row(str(i), m, m) for i, m in enumerate(taste)])
    biased = metrics.ranking_metrics([row(str(i), m + 3, m - 3) for i, m in enumerate(taste)])
    assert biased["pair_accuracy"]["value"] == pytest.approx(plain["pair_accuracy"]["value"])
    assert biased["auc"]["value"] == pytest.approx(plain["auc"]["value"])
    assert abs(plain["position_bias"]["value"]) < 1e-9 and biased["position_bias"]["value"] > 0.4
    assert (
        biased["pair_accuracy_positive_first"]["value"] > 0.95 > 0.1 > biased["pair_accuracy_positive_second"]["value"]
    )


def test_intervals_cover_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        found = metrics.ranking_metrics(
            [row(str(i), m, m) for i, m in enumerate(np.where(rng.random(150) < 0.7, 1.0, -1.0))], resamples=400
        )
        covered += found["pair_accuracy"]["low"] <= 0.7 <= found["pair_accuracy"]["high"]
    assert 180 <= covered <= 199


def test_intervals_are_over_users_not_rows():
    """Ten copies of each user's row say nothing new."""
    rng = np.random.default_rng(4)
    rows = [row(str(i), m, m) for i, m in enumerate(rng.normal(0.3, 1, 60))]
    once, often = metrics.ranking_metrics(rows), metrics.ranking_metrics([r for r in rows for _ in range(10)])
    width = [m["pair_accuracy"]["high"] - m["pair_accuracy"]["low"] for m in (once, often)]
    assert width[1] == pytest.approx(width[0], rel=0.15)


def test_the_seed_repeats_and_the_chunks_do_not_matter(monkeypatch):
    rows = [row(str(i), m, m) for i, m in enumerate(np.random.default_rng(5).normal(0, 1, 50))]
    first = metrics.ranking_metrics(rows, seed=7)
    assert metrics.ranking_metrics(rows, seed=7) == first
    monkeypatch.setattr(bootstrap, "CHUNK", 300)
    again = metrics.ranking_metrics(rows, seed=7)
    for name in ("pair_accuracy", "auc", "mean_margin"):
        assert again[name] == pytest.approx(first[name], abs=1e-12)
    assert metrics.ranking_metrics(rows, seed=8)["pair_accuracy"] != first["pair_accuracy"]


def test_the_release_auc_is_driven_by_title_length():
    """A model without taste, and long titles among the liked: the raw pooled statistic sees a difference, margins do
    not."""
    rng = np.random.default_rng(6)
    rows = []
    for i in range(400):
        length = rng.uniform(5, 50)
        chosen, rejected = -length, -length + rng.normal(0, 0.1)
        rows.append(
            row(str(i), chosen - rejected, 0.0) | {"positive_first": {"chosen_logp": chosen, "rejected_logp": rejected}}
        )
    assert metrics.release_auc(rows, 0) == pytest.approx(0.5, abs=0.08)
    better = [
        r
        | {
            "positive_first": {
                "chosen_logp": r["positive_first"]["chosen_logp"] + 1,
                "rejected_logp": r["positive_first"]["rejected_logp"],
            },
            "source_positive_first": True,
        }
        for r in rows
    ]
    assert metrics.release_auc(better, 0) < 0.6  # a nat of margin in every pair drowns in lengths
    assert (
        np.mean(
            metrics.wins(
                np.array([r["positive_first"]["chosen_logp"] - r["positive_first"]["rejected_logp"] for r in better])
            )
        )
        > 0.99
    )


def test_the_release_auc_scores_the_order_that_the_file_printed():
    rows = [row(str(i), 5.0, -5.0, source_positive_first=False) for i in range(40)]
    assert metrics.release_auc(rows, 0) == 0.0  # only the second order's log-probs: chosen -5 against rejected 0
    assert metrics.release_auc(rows[:1], 0) is None  # one class only


def test_k_is_the_most_negatives_of_an_example():
    rows = [row("a", 1, 1), row("a", 1, 1), row("a", 1, 1, positive="q"), row("b", 1, 1)]
    assert metrics.ranking_metrics(rows)["k"] == 2


def test_what_cannot_be_measured():
    with pytest.raises(ValueError, match="no rows"):
        metrics.ranking_metrics([])
    with pytest.raises(ValueError, match="user b: a log-prob is not finite"):
        metrics.ranking_metrics([row("a", 1, 1), row("b", float("nan"), 1)])
