"""The judge's statistics against scikit-learn, scipy and statsmodels, and where none has the statistic, by hand."""

import ast
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_dmpo.judge import bootstrap, calibration, metrics, ranking, significance

sklearn_metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")


def rows_of_margins(margins, users=None, **fields):
    """Rows of a scorer without log-probs."""
    rows = []
    for i, margin in enumerate(margins):
        user = str(i if users is None else users[i])
        rows.append(
            {"user": user, "domain": "movie", "positive": f"p{i}", "negative": f"n{i}", "margin": float(margin)}
        )
        rows[-1] |= {name: values[i] for name, values in fields.items()}
    return rows


def margins_with_ties(n=300, seed=0):
    return np.round(np.random.default_rng(seed).normal(0.4, 1.5, n), 1)


def test_auc_is_scikit_learns():
    margin = margins_with_ties()
    assert (margin == 0).any() and len(np.unique(margin)) < len(margin)
    label = np.r_[np.ones(len(margin)), np.zeros(len(margin))]
    expected = sklearn_metrics.roc_auc_score(label, np.r_[margin, -margin])
    assert metrics.ranking_metrics(rows_of_margins(margin))["auc"]["value"] == pytest.approx(expected, abs=1e-9)
    rng = np.random.default_rng(1)
    label, score = rng.random(200) < 0.3, rng.integers(0, 20, 200).astype(float)
    assert metrics.roc_auc(label, score) == pytest.approx(sklearn_metrics.roc_auc_score(label, score), abs=1e-9)


def test_auc_of_one_class_is_undefined():
    assert metrics.roc_auc(np.array([True, True]), np.array([1.0, 2.0])) is None
    assert metrics.roc_auc(np.array([False]), np.array([1.0])) is None


def test_the_release_auc_is_the_notebooks():
    """auc.ipynb of the release: random.seed(42); one random.random() a pair; roc_auc_score of the kept side."""
    rng = np.random.default_rng(2)
    pairs = rng.normal(-40, 12, (150, 2))
    rows = [
        r | {o: {"chosen_logp": c, "rejected_logp": d} for o in ("positive_first", "positive_second")}
        for r, (c, d) in zip(rows_of_margins(2 * (pairs[:, 0] - pairs[:, 1])), pairs.tolist(), strict=True)
    ]
    coin = random.Random(42)
    label, prediction = [], []
    for chosen, rejected in pairs:
        if coin.random() < 0.5:
            label.append(1)
            prediction.append(chosen)
        else:
            label.append(0)
            prediction.append(rejected)
    expected = sklearn_metrics.roc_auc_score(label, prediction)
    assert metrics.release_auc(rows) == pytest.approx(expected, abs=1e-9)
    assert metrics.ranking_metrics(rows, resamples=100, seed=5)["auc_release"]["value"] == pytest.approx(
        expected, abs=1e-9
    )


def test_brier_and_reliability_are_scikit_learns():
    calibration_curve = pytest.importorskip("sklearn.calibration").calibration_curve
    margin = np.random.default_rng(3).normal(0.7, 2, 500)
    found = metrics.ranking_metrics(rows_of_margins(margin))["calibration"]
    p, label = 1 / (1 + np.exp(-np.abs(margin))), margin > 0
    assert found["brier"]["value"] == pytest.approx(sklearn_metrics.brier_score_loss(label, p), abs=1e-9)
    # both readings of each pair: 20 bins of [0, 1], of which the upper ten are ours
    both, outcome = np.r_[p, 1 - p], np.r_[label, ~label]
    share, mean = calibration_curve(outcome, both, n_bins=20)
    curve = found["curve"]
    assert [c["accuracy"]["value"] for c in curve] == pytest.approx(share[-len(curve) :].tolist(), abs=1e-9)
    assert [c["confidence"] for c in curve] == pytest.approx(mean[-len(curve) :].tolist(), abs=1e-9)
    expected = sum(c["n"] / 500 * abs(c["accuracy"]["value"] - c["confidence"]) for c in curve)
    assert found["ece"]["value"] == pytest.approx(expected, abs=1e-9)


def test_a_calibrated_and_an_overconfident_scorer():
    rng = np.random.default_rng(4)
    size = rng.exponential(1.5, 20000)
    margin = np.where(rng.random(20000) < calibration.sigmoid(size), size, -size)
    assert metrics.ranking_metrics(rows_of_margins(margin), resamples=100)["calibration"]["ece"]["value"] < 0.015
    sure = metrics.ranking_metrics(rows_of_margins(5 * margin), resamples=100)["calibration"]
    assert sure["ece"]["value"] > 0.1


def test_sigmoid_of_large_margins():
    assert calibration.sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]
    found = metrics.ranking_metrics(rows_of_margins([1e4, -1e4]))["calibration"]
    assert found["brier"]["value"] == 0.5 and found["ece"]["value"] == 0.5


def test_correlation_is_scipys_spearman():
    rng = np.random.default_rng(5)
    margin, popular = np.round(rng.normal(size=200), 1), rng.integers(0, 9, (200, 2))
    found = metrics.ranking_metrics(rows_of_margins(margin, popularity=popular.tolist()))["popularity"]
    expected = stats.spearmanr(margin, popular[:, 0] - popular[:, 1]).statistic
    assert found["correlation"]["value"] == pytest.approx(expected, abs=1e-9)
    assert bootstrap.average_ranks(margin).tolist() == stats.rankdata(margin).tolist()


def test_a_correlation_without_variance_is_undefined():
    found = metrics.ranking_metrics(rows_of_margins([1.0] * 20, popularity=[[3, 3]] * 20))["popularity"]
    assert found["correlation"] == {"value": None} and found["prefers_popular"] == {"value": None} and found["n"] == 0
    assert found["popularity_accuracy"]["value"] == 0.5


@pytest.mark.parametrize("k", [1, 3, 5, 10])
def test_ranks_of_ties_are_scikit_learns(k):
    rng = np.random.default_rng(6)
    scores = rng.integers(0, 6, (200, 12)).astype(float)  # the positive first, many ties
    better, tied = (scores[:, 1:] > scores[:, :1]).sum(1), (scores[:, 1:] == scores[:, :1]).sum(1)
    relevant = np.zeros_like(scores)
    relevant[:, 0] = 1
    expected = sklearn_metrics.ndcg_score(relevant, scores, k=k)
    assert ranking.ndcg(better, tied, k).mean() == pytest.approx(expected, abs=1e-9)
    ranks = stats.rankdata(-scores, method="average", axis=1)[:, 0]
    assert (better + 1 + tied / 2).tolist() == ranks.tolist()
    # hit rate and reciprocal rank: the mean over all orders of the tied ones, by hand
    for row in range(20):
        places = range(better[row] + 1, better[row] + tied[row] + 2)
        hits = ranking.hit_rate(better, tied, k)[row]
        assert hits == pytest.approx(np.mean([r <= k for r in places]), abs=1e-12)
        assert ranking.reciprocal_rank(better, tied)[row] == pytest.approx(np.mean([1 / r for r in places]), abs=1e-12)


def test_ranking_metrics_by_hand():
    # ranks 1; 2; 4 and 5 shared
    rows = [{"user": u, "better": b, "tied": t} for u, b, t in (("a", 0, 0), ("b", 1, 0), ("c", 3, 1))]
    found = ranking.candidate_metrics(rows)
    assert found["hr@1"]["value"] == pytest.approx(1 / 3) and found["hr@3"]["value"] == pytest.approx(2 / 3)
    assert found["hr@5"]["value"] == found["hr@10"]["value"] == 1
    assert found["mrr"]["value"] == pytest.approx((1 + 1 / 2 + (1 / 4 + 1 / 5) / 2) / 3)
    assert found["mean_rank"]["value"] == pytest.approx((1 + 2 + 4.5) / 3)
    with pytest.raises(ValueError, match="no rows"):
        ranking.candidate_metrics([])


def test_a_scorer_without_an_opinion_gets_what_chance_gets():
    found = ranking.candidate_metrics([{"user": str(u), "better": 0, "tied": 19} for u in range(20)])
    assert found["hr@1"]["value"] == pytest.approx(1 / 20) and found["hr@10"]["value"] == pytest.approx(1 / 2)
    assert found["mean_rank"]["value"] == pytest.approx(10.5)


def test_mcnemar_is_statsmodels():
    mcnemar = pytest.importorskip("statsmodels.stats.contingency_tables").mcnemar
    rng = np.random.default_rng(7)
    for n, shift in ((12, 0.2), (400, 0.1), (5000, 0.02), (5, 0.0)):
        a, b = rng.random(n) < 0.6 + shift, rng.random(n) < 0.6
        table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        assert significance.mcnemar(a, b) == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-9)
    same = np.array([True, False])
    assert significance.mcnemar(same, same) == 1.0


def test_holm_is_statsmodels():
    multipletests = pytest.importorskip("statsmodels.stats.multitest").multipletests
    for p in ([0.01, 0.04, 0.03, 0.005], [0.9, 0.8], [0.02], [0.01, 0.01, 0.2, 1.0, 0.04]):
        assert significance.holm(p) == pytest.approx(multipletests(p, method="holm")[1].tolist(), abs=1e-12)
    assert significance.holm([]) == []


def test_the_bootstrap_p_agrees_with_its_interval():
    rng = np.random.default_rng(8)
    for centre in (0.0, 0.5, 1.5, 2.5, 4.0):
        draws = rng.normal(centre, 1, 4000)
        found = bootstrap.percentiles(draws)
        assert (significance.bootstrap_p(draws) < 0.05) == (not found["low"] <= 0 <= found["high"])
    assert significance.bootstrap_p(np.ones(999)) == pytest.approx(2 / 1000)


def test_one_user_is_resampled_by_pair_and_a_few_have_no_interval():
    one = metrics.ranking_metrics(rows_of_margins(margins_with_ties(40), users=["x"] * 40))
    assert one["users"] == 1 and one["intervals"]["over"] == "examples" and "one user" in one["intervals"]["note"]
    assert one["pair_accuracy"]["low"] < one["pair_accuracy"]["value"] < one["pair_accuracy"]["high"]
    few = metrics.ranking_metrics(rows_of_margins(margins_with_ties(40), users=[i % 9 for i in range(40)]))
    assert few["intervals"]["over"] is None and "9 users" in few["intervals"]["note"]
    assert not any(isinstance(v, dict) and "low" in v for v in few.values())
    lonely = metrics.ranking_metrics(rows_of_margins([1.0]))
    assert lonely["pair_accuracy"] == {"value": 1.0} and "no intervals" in lonely["intervals"]["note"]


def test_a_slice_of_few_users_has_no_interval_and_an_empty_one_no_row():
    groups = [{"gender": "F" if u < 5 else "M"} for u in range(40)]
    found = metrics.ranking_metrics(rows_of_margins(margins_with_ties(40), groups=groups))["slices"]["gender"]
    assert [(s["name"], s["n"], "low" in s["pair_accuracy"]) for s in found["slices"]] == [
        ("F", 5, False),
        ("M", 35, True),
    ]
    assert found["largest_gap"] is None  # of two slices, one has no interval


def test_no_metric_is_nan():
    for rows in (rows_of_margins([0.0]), rows_of_margins([0.0] * 12), rows_of_margins([1e300, -1e300] * 10)):
        json.dumps(metrics.ranking_metrics(rows, resamples=100), allow_nan=False)


# --- scorers made to be found out


def test_always_the_first_listed():
    rows = [
        r
        | {"positive_first": {"chosen_logp": -1.0, "rejected_logp": -3.0}}
        | {"positive_second": {"chosen_logp": -3.0, "rejected_logp": -1.0}}
        for r in rows_of_margins([0.0] * 30)
    ]
    found = metrics.ranking_metrics(rows, resamples=100)
    assert found["position_bias"]["value"] == 0.5 and found["pair_accuracy"]["value"] == 0.5
    assert (found["pair_accuracy_positive_first"]["value"], found["pair_accuracy_positive_second"]["value"]) == (1, 0)


def test_a_popularity_scorer_is_found_out():
    rng = np.random.default_rng(9)
    counts = rng.integers(0, 1000, (400, 2))
    popular = metrics.ranking_metrics(rows_of_margins(counts[:, 0] - counts[:, 1], popularity=counts.tolist()))[
        "popularity"
    ]
    assert popular["prefers_popular"]["value"] == 1.0 and popular["correlation"]["value"] == pytest.approx(1.0)
    assert (
        popular["by_positive"][-1]["pair_accuracy"]["low"]
        > 0.7
        > 0.3
        > popular["by_positive"][0]["pair_accuracy"]["high"]
    )
    fair = metrics.ranking_metrics(rows_of_margins(rng.normal(0.5, 1, 400), popularity=counts.tolist()))["popularity"]
    assert fair["correlation"]["low"] < 0 < fair["correlation"]["high"]
    assert fair["prefers_popular"]["low"] < 0.5 < fair["prefers_popular"]["high"]


def test_an_unfair_scorer_is_found_out():
    rng = np.random.default_rng(10)
    groups = [{"gender": "FM"[u % 2], "age_band": str(u % 3)} for u in range(600)]
    right = np.where([g["gender"] == "F" for g in groups], rng.random(600) < 0.55, rng.random(600) < 0.8)
    found = metrics.ranking_metrics(rows_of_margins(np.where(right, 1, -1), groups=groups))["slices"]
    gap = found["gender"]["largest_gap"]
    assert (gap["higher"], gap["lower"]) == ("M", "F") and gap["low"] > 0.1
    assert found["age_band"]["largest_gap"]["value"] < gap["value"]


def test_quantile_bins_are_complete_and_equal_values_share_one():
    from mlx_dmpo.judge.panels import quantile_bins

    values = np.array([0.0] * 50 + [1, 2, 3, 4, 5, 6, 7, 8, 9, 100])
    bins = quantile_bins(values)
    assert sum(mask.sum() for _, mask in bins) == len(values) and bins[0][0] == "0" and bins[-1][0].endswith("100")
    assert all(np.isin(values[mask], values[~mask]).sum() == 0 for _, mask in bins)
    assert [(name, int(mask.sum())) for name, mask in quantile_bins(np.array([7.0, 7.0]))] == [("7", 2)]


# --- how good the intervals are, and what they cost


@pytest.mark.slow
def test_intervals_cover_a_known_accuracy():
    """1,000 data sets of 200 users with 1 to 5 dependent pairs each, true accuracy .7."""
    rng = np.random.default_rng(11)
    covered = 0
    for draw in range(1000):
        users = np.repeat(np.arange(200), rng.integers(1, 6, 200))
        taste = rng.beta(7, 3, 200)  # a user's own accuracy: mean .7, so that the user's pairs depend on each other
        right = rng.random(len(users)) < taste[users]
        b = bootstrap.Bootstrap([str(u) for u in users], 500, draw)
        mean = b.mean(right.astype(float))
        b.run()
        found = b.metric(mean)
        covered += found["low"] <= 0.7 <= found["high"]
    print(f"covered {covered} of 1000")
    assert 930 <= covered <= 970


LARGE = """
import json, resource, sys, time
import numpy as np
from mlx_dmpo.judge import metrics
rng = np.random.default_rng(0)
rows = [
    {"user": str(u), "domain": "movie", "positive": f"p{u}", "negative": f"n{k}", "margin": float(rng.normal(.5, 1)),
     "popularity": [int(rng.integers(1000)), int(rng.integers(1000))], "history": int(rng.integers(1, 40)),
     "groups": {"gender": "FM"[u % 2]}}
    for u in range(20000) for k in range(3)
]
started = time.perf_counter()
found = metrics.ranking_metrics(rows)
if sys.platform == "darwin":
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
else:  # ru_maxrss would begin with the peak of the process that started this one
    peak = 1000 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
print(json.dumps([found["n"], found["users"], peak, time.perf_counter() - started]))
"""


@pytest.mark.slow
def test_many_users_in_bounded_memory():
    """20,000 users, 60,000 pairs, 2,000 resamples. users x resamples alone would take 320 MB."""
    run = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, timeout=600, check=True)
    n, users, peak, seconds = json.loads(run.stdout)
    peak_mb = peak / 1e6
    print(f"{n:,} pairs of {users:,} users: {peak_mb:.0f} MB, {seconds:.1f} s")
    assert (n, users) == (60000, 20000) and peak_mb < 500


# --- NaN is not JSON

HASHED = {"model.loading", "train.setup", "tools.export", "judge.pooling", "data.parse", "data.rows"}  # never written


def dumps_that_allow_nan(tree):
    """Lines of json.dumps and json.dump that would write NaN; what is encoded at once is hashed or sent, not
    written.
    """
    encoded = {
        id(n.func.value)
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "encode"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
            refuses = any(k.arg == "allow_nan" and ast.unparse(k.value) == "False" for k in node.keywords)
            if not refuses and id(node) not in encoded:
                yield node.lineno


def test_no_writer_of_json_accepts_nan():
    package = Path(__file__).resolve().parents[1] / "mlx_dmpo"
    found = {}
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        if name not in HASHED and (lines := list(dumps_that_allow_nan(ast.parse(path.read_text(encoding="utf-8"))))):
            found[name] = lines
    assert found == {}
    bad = "import json\njson.dumps(x)\njson.dumps(x, allow_nan=False)\njson.dumps(x).encode()\njson.dump(x, f)\n"
    assert list(dumps_that_allow_nan(ast.parse(bad))) == [2, 5]


def test_a_score_that_is_nan_reaches_no_file(tmp_path):
    from mlx_dmpo.config import EvaluateSettings
    from mlx_dmpo.errors import UserError
    from mlx_dmpo.judge import evaluate
    from mlx_dmpo.records import RankingExample
    from mlx_dmpo.scores import Scores

    class Broken:
        name = "broken"

        def score(self, examples):
            for e in examples:
                yield Scores(e, np.array([np.nan]), None, np.array([np.nan, 0.0]))

    data = [RankingExample("u", "movie", ("h",), "p", ("n",))]
    with pytest.raises(UserError, match="user u: broken: a score is NaN or Inf"):
        evaluate.measure(Broken(), data, EvaluateSettings(resamples=100), tmp_path, {})
    assert "NaN" not in "".join(p.read_text() for p in tmp_path.iterdir())
