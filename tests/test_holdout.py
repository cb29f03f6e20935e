"""Held-out training users, the choice of the best step, and the overfitting line"""

import json
from dataclasses import replace

import numpy as np
import pytest

from mlx_dmpo import assets, config
from mlx_dmpo.cli.main import main
from mlx_dmpo.data import formats
from mlx_dmpo.machine import files, trained_on
from mlx_dmpo.records import RankingExample
from mlx_dmpo.report.live import validation_text
from mlx_dmpo.train import holdout, overfitting, validation
from mlx_dmpo.train import run as train_run
from mlx_dmpo.train.checkpoint import State


def rows(rng, users, most=4):
    """1 to `most` rows a user, shuffled; each user's history is his own."""
    made = []
    for u in range(users):
        history = tuple(f"title {u}-{n}" for n in range(6))
        made += [
            RankingExample(f"u{u}", "movie", history, f"liked {u}-{n}", (f"bad {u}",), source=f"f:{u}-{n}")
            for n in range(rng.integers(1, most + 1))
        ]
    return [made[i] for i in rng.permutation(len(made))]


@pytest.mark.parametrize("seed", range(20))
def test_users_stay_together_and_the_choice_does_not_depend_on_the_order(seed):
    rng = np.random.default_rng(seed)
    users = int(rng.integers(10, 120))
    data = rows(rng, users)
    train, held = holdout.hold_out(data, 0.1, seed)
    assert not holdout.users(train) & holdout.users(held)
    assert len(holdout.users(held)) == max(5, round(0.1 * users))
    assert sorted(e.source for e in train + held) == sorted(e.source for e in data)
    again = holdout.hold_out([data[i] for i in rng.permutation(len(data))], 0.1, seed)[1]
    assert holdout.digest(again) == holdout.digest(held)


@pytest.mark.parametrize("seed", range(10))
def test_a_later_stage_never_validates_on_the_earlier_ones_training_users(tmp_path, seed):
    """Other names, another seed, and histories of which one title is missing: found by the history."""
    data = rows(np.random.default_rng(seed), 40)
    train, held = holdout.hold_out(data, 0.1, seed)
    holdout.write(tmp_path, held)
    trained_on.write(tmp_path, train)
    later = [replace(e, user=f"other {e.user}", history=e.history[1:]) for e in data]
    _, found = holdout.hold_out(later, 0.1, seed + 1, str(tmp_path))
    assert {e.source for e in found} == {e.source for e in held}


def test_after_a_stage_that_held_nobody_out_new_users_come_first(tmp_path):
    data = rows(np.random.default_rng(0), 40, most=1)
    trained_on.write(tmp_path, data[:30])
    assert holdout.users(holdout.hold_out(data, 0.1, 0, str(tmp_path))[1]) <= holdout.users(data[30:])
    trained_on.write(tmp_path, data)
    train, held = holdout.hold_out(data, 0.1, 0, str(tmp_path))
    assert "was trained on 5 of their 5 rows" in holdout.describe(train, held, 0.1, str(tmp_path))


def test_too_few_users_and_no_holdout_say_so():
    few = rows(np.random.default_rng(0), 9)
    train, held = holdout.hold_out(few, 0.1, 0)
    assert train == few and not held
    assert "9 training users are fewer than 10" in holdout.describe(train, held, 0.1)
    many = rows(np.random.default_rng(0), 50)
    assert holdout.hold_out(many, 0.0, 0) == (many, [])
    assert "--no-holdout" in holdout.describe(many, [], 0.0)


def test_the_setting(tmp_path):
    assert config.DmpoSettings(holdout=False).holdout == 0 and config.SftSettings(holdout=True).holdout == 0.1
    assert config.resolve(config.DmpoSettings, None, {"preset": "released-code"}).holdout == 0
    (tmp_path / "c.yaml").write_text("holdout: false\n")
    assert config.resolve(config.SftSettings, tmp_path / "c.yaml", {}).holdout == 0


def test_upper_bound():
    """0 right of 10: z^2 / (10 + z^2) = 6.635 / 16.635 = .3989."""
    assert overfitting.upper_bound(0.0, 10) == pytest.approx(0.3989, abs=1e-4)
    assert overfitting.is_overfitting(0.93, 0.55, 20) and not overfitting.is_overfitting(0.93, 0.55, 3)
    assert not overfitting.is_overfitting(0.70, 0.56, 10_000)  # the gap is .14


@pytest.mark.parametrize("users", (5, 10, 20, 100))
@pytest.mark.parametrize("accuracy", (0.5, 0.6, 0.75, 0.9))
def test_no_false_alarm_where_both_accuracies_are_one(users, accuracy):
    """Training accuracy of 9 times as many users, as a holdout of 10 % leaves them, but at least 45."""
    rng, n = np.random.default_rng(0), 4000
    train = rng.binomial(9 * users, accuracy, n) / (9 * users)
    held = rng.binomial(users, accuracy, n) / users
    alarms = sum(overfitting.is_overfitting(t, h, users) for t, h in zip(train, held, strict=True))
    assert alarms / n < 0.02


def test_the_best_is_the_most_accurate_and_ties_go_to_the_lower_loss(monkeypatch):
    state, told = State(), []
    numbers = iter([(0.6, 0.7), (0.9, 0.8), (0.5, 0.8), (0.4, 0.7), (0.5, 0.8)])  # loss, accuracy

    class Silent:
        def validated(self, line, best, users):
            told.append(best)

    class Source:
        examples = ()

    made = validation.Validation(None, None, Source(), None, None, 1, "auto", lambda: False)
    monkeypatch.setattr(
        validation.Validation,
        "measure",
        lambda self: dict(zip(("valid_loss", "valid_pair_accuracy"), next(numbers), strict=True)),
    )
    for state.step in range(1, 6):
        made.run(state, Silent())
    assert told == [True, True, True, False, False] and state.best == (-0.8, 3, 0.5)


def test_the_validation_line():
    line = {"step": 9, "valid_loss": 0.5, "valid_pair_accuracy": 0.55, "train_pair_accuracy": 0.93}
    assert validation_text({**line, "overfitting": True}, False).endswith("; train 0.93, held out 0.55: overfitting")
    assert "overfitting" not in validation_text({**line, "overfitting": False}, False)
    text = overfitting.last_line([{**line, "overfitting": True}], 9, True)
    assert text.startswith("train 0.93, held out 0.55: overfitting; the best step was 9: lower --learning-rate")
    assert overfitting.last_line([{**line, "overfitting": False}], 9, True) == ""


@pytest.fixture
def demo_file(tmp_path):
    """The demo's training users as one file, without a validation split."""
    data = formats.load_examples(assets.data_dir(), "train")[:40]
    path = tmp_path / "demo.jsonl"
    path.write_text("".join(json.dumps(e.to_json()) + "\n" for e in data))
    return path


def trained(command, data, out, *more):
    assert main([command, "--data", str(data), "--adapter-path", str(out), "--plain", *map(str, more)]) == 0
    return files.read_json(out / "manifest.json")


def test_both_stages_of_the_demo_hold_the_same_users_out(demo_file, tmp_path, capsys):
    first = trained("sft", demo_file, tmp_path / "sft", "--iters", 2)
    second = trained("dmpo", demo_file, tmp_path / "dmpo", "--iters", 2, "--start-adapter", tmp_path / "sft")
    assert first["held_out"] == second["held_out"] and first["held_out"]["users"] >= 5
    assert "held out" in capsys.readouterr().out


def test_no_holdout_trains_on_everyone(demo_file, tmp_path, capsys):
    made = trained("sft", demo_file, tmp_path / "a", "--iters", 2, "--no-holdout")
    assert "nothing is held out" in capsys.readouterr().out and made["held_out"] is None
    trained("sft", demo_file, tmp_path / "b", "--iters", 2, "--val-batches", 0)  # validates nothing, holds out nobody
    same = [(tmp_path / name / "adapters.safetensors").read_bytes() for name in "ab"]
    assert same[0] == same[1]


def test_train_accuracy_stands_beside_the_held_out_one(demo_file, tmp_path):
    settings = config.DmpoSettings(data=str(demo_file), adapter_path=str(tmp_path / "d"), epochs=1.0, plain=True)
    path = train_run.train(settings, "test")
    line = [x for x in files.read_lines(path / "metrics.jsonl") if "valid_loss" in x][-1]
    assert 0 <= line["train_pair_accuracy"] <= 1 and line["overfitting"] in (True, False)
