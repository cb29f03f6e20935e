"""Losses that need more of the data than pairs: RecPO's ratings and times, Mult-DPO's several positives, from rows to steps"""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_dmpo import config
from mlx_dmpo.cli.main import main
from mlx_dmpo.config import DmpoSettings
from mlx_dmpo.core import losses
from mlx_dmpo.core.tree import pad_groups
from mlx_dmpo.data import formats
from mlx_dmpo.errors import UserError
from mlx_dmpo.machine import trained_on
from mlx_dmpo.prompts import template as prompts
from mlx_dmpo.prompts.groups import build_group, utilities
from mlx_dmpo.prompts.orders import first_negatives, last_positives, printed_orders
from mlx_dmpo.records import PreferenceGroup, RankingExample
from mlx_dmpo.train.inputs import _for_loss
from mlx_dmpo.train.objective import objective

DAY = 86400.0
EXAMPLE = RankingExample(
    "u",
    "movie",
    ("amber", "lantern", "river"),
    "glass",
    ("winter", "garden"),
    times=(0.0, 1 * DAY, 2 * DAY),
    answer_ratings=(4.0, 2.0, 1.0),
    answer_times=(3 * DAY, 5 * DAY, 3 * DAY),
)


def softplus(x):
    return math.log1p(math.exp(x))


def group_of(example, form):
    return build_group(
        example, printed_orders(example, 0, both=True, redraw=False, seed=0, form=form), prompts.built_in(form)
    )


# --- RecPO's rows


def test_utilities_by_hand():
    # 1, 3 and 1 days after the history's end: the two nearest have delay 1, the other 3; 4, 2 / sqrt(3), 1
    assert utilities(EXAMPLE) == pytest.approx((4.0, 2 / math.sqrt(3), 1.0))
    # of fewer negatives, the delays are among those that are left: 1 and 2
    assert utilities(first_negatives(EXAMPLE, 1)) == pytest.approx((4.0, 2 / math.sqrt(2)))
    assert utilities(RankingExample("u", "movie", ("a",), "b", ("c",))) is None


@pytest.mark.parametrize("form", ["pairwise", "listwise", "direct", "pointwise"])
def test_each_branch_has_the_utility_of_the_title_that_it_speaks_for(form):
    group = group_of(EXAMPLE, form)
    assert len(group.utilities) == len(group.branches)
    own = dict(zip(("glass", "winter", "garden"), utilities(EXAMPLE), strict=True))
    for n, branch in enumerate(group.branches):
        if form == "pairwise":  # "A, B": A is ranked first
            said = min(own, key=lambda t: branch.answer.find(t) if t in branch.answer else math.inf)
        elif form == "pointwise":
            said = next(t for t in own if t in branch.messages[0]["content"])
        else:
            said = next(t for t in own if t in branch.answer)
        assert group.utilities[n] == own[said]
    targets = [group.utilities[c] / group.utilities[r] for c, r in group.pairs]
    assert set(np.round(targets, 5)) == {round(4 / (2 / math.sqrt(3)), 5), 4.0}


def test_rows_hold_ratings_and_times_of_the_answers(tmp_path):
    row = EXAMPLE.to_json()
    assert row["answer_ratings"] == [4.0, 2.0, 1.0] and "more_positives" not in row
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    (read,) = formats.load_examples(tmp_path / "d.jsonl")
    assert read.to_json() == row
    for name in ("answer_ratings", "answer_times"):
        with pytest.raises(UserError, match=f'"{name}" does not fit: give one finite number for the positive, then'):
            RankingExample.from_json({**row, name: [1.0, 2.0]}, "d:1")


# --- Mult-DPO's rows


def test_the_last_of_the_history_become_positives():
    several = last_positives(EXAMPLE, 3)
    assert (several.history, several.more_positives) == (("amber",), ("lantern", "river"))
    assert last_positives(EXAMPLE, 9) == several  # one title of the history stays
    assert last_positives(EXAMPLE, 1) == EXAMPLE
    repeated = RankingExample("u", "movie", ("a", "b", "c", "b", "n"), "p", ("n",))
    assert last_positives(repeated, 5).more_positives == ("b", "c")
    assert trained_on.example_key(several) == trained_on.example_key(EXAMPLE)  # the same user's same titles


@pytest.mark.parametrize("form", ["direct", "listwise"])
def test_every_positive_is_paired_with_every_negative(form):
    several = last_positives(EXAMPLE, 2)
    orders = printed_orders(several, 0, both=False, redraw=False, seed=0, form=form)
    group = build_group(several, orders, prompts.built_in(form))
    answers = [b.answer.strip() for b in group.branches]
    assert [next(t for t in tiny.WORDS if t in a) for a in answers] == ["glass", "river", "winter", "garden"]
    assert group.pairs == ((0, 2), (0, 3), (1, 2), (1, 3)) and group.utilities is None
    asked = group.branches[0].messages[0]["content"]
    assert all(b.messages == group.branches[0].messages for b in group.branches)
    assert ("river" in asked) == (form == "listwise") and "lantern" in asked


# --- as `dmpo` computes them


def batch(utilities=None, pairs=((0, 1), (2, 3)), answers=(2, 2, 2, 2)):
    made = tiny.group(np.random.default_rng(0), 5, [n + 2 for n in answers], answers)
    fields = {f: getattr(made, f) for f in ("prefix", "tails", "answer_lengths")}
    return pad_groups([type(made)(**fields, pairs=np.array(pairs, np.int32), utilities=utilities)])


POLICY, REFERENCE = [-2.0, -5.0, -4.0, -3.0], [-4.0, -1.0, -4.0, -5.0]


def test_recpo_of_a_batch_by_hand():
    # margins .1 x (2 + 4) = .6 and .1 x (0 - 2) = -.2; targets 4 / 2 = 2 and 3 / 1 = 3, times .1: .4 and -.5
    made = batch((4.0, 2.0, 3.0, 1.0))
    value, margin = objective(DmpoSettings(loss="recpo", gamma=0.1))(mx.array([POLICY]), mx.array([REFERENCE]), made)
    np.testing.assert_allclose(np.array(margin), [[0.6, -0.2]], rtol=1e-4)
    assert float(value[0]) == pytest.approx(math.log1p(math.exp(-0.4) + math.exp(0.5)), rel=1e-5)
    assert DmpoSettings(loss="recpo").gamma == 2.0 and DmpoSettings(loss="simpo").gamma == 0.5


def test_mult_dpo_of_a_batch_by_hand():
    # rewards .1 x (2, -4, 0, 2); the first two are chosen: 2 log sum exp - .2 + .4
    made = batch(pairs=((0, 2), (0, 3), (1, 2), (1, 3)))
    value, margin = objective(DmpoSettings(loss="mult-dpo"))(mx.array([POLICY]), mx.array([REFERENCE]), made)
    total = math.log(sum(math.exp(r) for r in (0.2, -0.4, 0.0, 0.2)))
    assert float(value[0]) == pytest.approx(2 * total - 0.2 + 0.4, rel=1e-5)
    np.testing.assert_allclose(np.array(margin), [[0.2, 0.0, -0.4, -0.6]], atol=1e-5)


def test_with_one_pair_both_are_dpo():
    for name in ("recpo", "mult-dpo"):
        made = batch((4.0, 2.0), pairs=((0, 1),), answers=(2, 2))
        settings = DmpoSettings(loss=name, gamma=0.0) if name == "recpo" else DmpoSettings(loss=name)
        value, _ = objective(settings)(mx.array([POLICY[:2]]), mx.array([REFERENCE[:2]]), made)
        assert float(value[0]) == pytest.approx(softplus(-0.6), rel=1e-5)


def test_loss_at_step_0():
    """Policy = reference: log 2 of one pair, log(1 + K) of K; RecPO starts with its target margin, softplus(gamma x 2)."""
    logps = mx.array([POLICY])
    one = batch((4.0, 2.0), pairs=((0, 1),), answers=(2, 2))
    many = batch(pairs=((0, 1), (0, 2), (0, 3)))

    def start(made, n, **settings):
        return float(objective(DmpoSettings(**settings))(logps[:, :n], logps[:, :n], made)[0][0])

    assert start(one, 2, loss="mult-dpo") == pytest.approx(math.log(2), rel=1e-6)
    assert start(one, 2, loss="recpo", gamma=0.0) == pytest.approx(math.log(2), rel=1e-6)
    assert start(one, 2, loss="recpo", gamma=0.5) == pytest.approx(softplus(0.5 * 2), rel=1e-6)
    assert start(many, 4, loss="mult-dpo") == pytest.approx(math.log(4), rel=1e-6)


@pytest.mark.parametrize("name", ["recpo", "mult-dpo"])
def test_gradients_are_the_differences(name):
    pairs = ((0, 2), (0, 3), (1, 2), (1, 3)) if name == "mult-dpo" else ((0, 1), (2, 3))
    made, loss = batch((4.0, 2.0, 3.0, 1.0), pairs=pairs), objective(DmpoSettings(loss=name, beta=1.0))
    value = lambda p: loss(p, mx.array([REFERENCE]), made)[0].sum()  # noqa: E731
    gradient = np.array(mx.grad(value)(mx.array([POLICY])))[0]
    for n in range(4):
        step = np.eye(4)[n] * 0.01
        up, down = (float(value(mx.array((np.array([POLICY]) + s * step).astype(np.float32)))) for s in (1, -1))
        assert gradient[n] == pytest.approx((up - down) / 0.02, abs=1e-3)
    assert gradient[0] < 0 < gradient[3]  # up with the chosen, down with the rejected


@pytest.mark.parametrize("name", ["recpo", "mult-dpo"])
def test_padding_changes_nothing(name):
    pairs = ((0, 2), (0, 3), (1, 2), (1, 3)) if name == "mult-dpo" else ((0, 1), (2, 3))
    first, second = batch((4.0, 2.0, 3.0, 1.0), pairs=pairs), batch((5.0, 1.0), pairs=((0, 1),), answers=(3, 1))
    both = pad_groups([*first.groups, *second.groups])
    loss = objective(DmpoSettings(loss=name))
    wide = mx.array([POLICY, [-3.0, -1.0, 0.0, 0.0]])
    together, _ = loss(wide, mx.zeros((2, 4)), both)
    alone = [loss(wide[:1], mx.zeros((1, 4)), first)[0], loss(wide[1:, :2], mx.zeros((1, 2)), second)[0]]
    np.testing.assert_allclose(np.array(together), [float(a[0]) for a in alone], rtol=1e-6)
    assert set(losses.REDUCTIONS) >= {"recpo", "mult-dpo"}


# --- what does not fit


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"loss": "mult-dpo", "negatives_select": "boundary"}, "negatives-select"),
        ({"loss": "mult-dpo", "label_smoothing": 0.1}, "label-smoothing"),
        ({"loss": "recpo", "num_positives": 2}, "num-positives"),
        ({"loss": "mult-dpo", "gamma": 1.0}, "gamma"),
    ],
)
def test_a_setting_without_effect_is_refused(given, name):
    with pytest.raises(UserError, match=name):
        config.resolve(DmpoSettings, None, given)


def test_rows_that_do_not_give_what_recpo_needs():
    plain = RankingExample("u", "movie", ("a",), "b", ("c",), source="d.jsonl:7")
    with pytest.raises(UserError, match=r"^d.jsonl:7: no times, answer_ratings and answer_times, which recpo needs"):
        _for_loss(DmpoSettings(loss="recpo"), [plain])
    zero = RankingExample("u", "movie", ("a",), "b", ("c",), times=(0,), answer_ratings=(1, 0), answer_times=(1, 2))
    with pytest.raises(UserError, match="a rating of 0 or less"):
        _for_loss(DmpoSettings(loss="recpo"), [zero])
    for name in ("recpo", "mult-dpo"):
        with pytest.raises(UserError, match="the data is free text"):
            _for_loss(DmpoSettings(loss=name), [PreferenceGroup("u", "", (), ())])


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code


@pytest.mark.parametrize(
    "more", [("--prompt", "pairwise"), ("--prompt", "pointwise"), ("--prompt", "listwise", "--orders", 2)]
)
def test_mult_dpo_refuses_forms_with_several_prompts(more, model_directory, data_directory, tmp_path, capfd):
    given = ("--model", model_directory, "--data", data_directory, "--adapter-path", tmp_path / "run", *more)
    assert run("dmpo", "--loss", "mult-dpo", *given) == 2
    assert "mult-dpo needs all answers after one prompt" in capfd.readouterr().err


def with_answers(directory, target):
    """The data with ratings and times, as `prepare` writes them."""
    target.mkdir()
    for file in directory.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            h, k = len(row["history"]), len(row["negatives"])
            row |= {"ratings": [5.0] * h, "times": [DAY * n for n in range(h)]}
            row |= {"answer_ratings": [4.0] + [2.0] * k, "answer_times": [DAY * (h + n) for n in range(k + 1)]}
        (target / file.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


SHORT = ("--iters", 3, "--batch-size", 2, "--grad-accumulation-steps", 1, "--steps-per-report", 1)


@pytest.mark.parametrize("prompt", ["pairwise", "listwise", "direct", "pointwise"])
def test_recpo_trains_and_its_ratings_are_part_of_the_run(prompt, model_directory, data_directory, tmp_path, capfd):
    data = with_answers(data_directory, tmp_path / "data")
    about = ("--model", model_directory, "--prompt", prompt, "--adapter-path", tmp_path / "run", *SHORT)
    assert run("dmpo", "--loss", "recpo", "--data", data, *about) == 0
    losses_ = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses_[0]["loss"] > math.log(2) and all(math.isfinite(line["loss"]) for line in losses_ if "loss" in line)
    assert run("dmpo", "--loss", "recpo", "--data", data_directory, *about, "--overwrite") == 2
    assert "which recpo needs" in capfd.readouterr().err


def test_rows_with_ratings_of_the_answers_rank_other_candidates(model_directory, data_directory, tmp_path):
    """The drawn candidates are more than the row's answers, and have no ratings."""
    data = with_answers(data_directory, tmp_path / "data")
    about = ("--model", model_directory, "--prompt", "direct", "--data", data, "--resamples", 100)
    assert run("evaluate", *about, "--candidates", 6, "--out", tmp_path / "e") == 0
    assert "hr@1" in json.loads((tmp_path / "e" / "metrics.json").read_text())


@pytest.mark.parametrize("prompt", ["listwise", "direct"])
def test_mult_dpo_trains_on_several_positives(prompt, model_directory, data_directory, tmp_path, capfd):
    about = ("--model", model_directory, "--prompt", prompt, "--data", data_directory, *SHORT)
    assert run("dmpo", "--loss", "mult-dpo", "--num-positives", 3, *about, "--adapter-path", tmp_path / "run") == 0
    said = capfd.readouterr()
    assert "examples have fewer than 3 positives" in said.err + said.out
    assert (
        run("evaluate", "--model", model_directory, "--data", data_directory, "--adapter-path", tmp_path / "run") == 0
    )


def test_prepare_writes_ratings_and_times_of_the_answers(tmp_path):
    rng, lines, known = np.random.default_rng(0), ["userId,movieId,rating,timestamp"], {}
    for user in range(12):
        for n, movie in enumerate(rng.permutation(16)[:12]):
            known[str(user), f"{tiny.WORDS[movie]} (1999)"] = (float(rng.integers(1, 6)), 1e9 + 100.0 * n + user)
            rating, time = known[str(user), f"{tiny.WORDS[movie]} (1999)"]
            lines.append(f"{user},{movie},{rating},{time:.0f}")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "ratings.csv").write_text("\n".join(lines) + "\n")
    titles = ["movieId,title,genres", *(f"{n},{word} (1999),Drama" for n, word in enumerate(tiny.WORDS))]
    (tmp_path / "raw" / "movies.csv").write_text("\n".join(titles) + "\n")
    few = ("--min-liked", 2, "--min-disliked", 2)
    assert run("prepare", "movielens", tmp_path / "raw", "--out", tmp_path / "d", "--num-negatives", 3, *few) == 0
    examples = formats.load_examples(tmp_path / "d", "train")
    for e in examples:
        answers = [known[e.user, title] for title in (e.positive, *e.negatives)]
        assert list(zip(e.answer_ratings, e.answer_times, strict=True)) == answers
        assert e.answer_ratings[0] > 3 >= max(e.answer_ratings[1:])
    drawn = ("--negatives", "uniform", "--out", tmp_path / "u")
    assert run("prepare", "movielens", tmp_path / "raw", *drawn, "--num-negatives", 3, *few) == 0
    (first, *_) = formats.load_examples(tmp_path / "u", "train")
    assert first.answer_ratings is None and first.ratings is not None  # nobody rated a drawn negative
