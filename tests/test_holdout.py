"""Users held out of the training data, and what a run says when it overfits."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dmpo import assets
from mlx_dmpo.config import DmpoSettings, Lora
from mlx_dmpo.machine import files, trained_on
from mlx_dmpo.records import RankingExample
from mlx_dmpo.train import run as train_run
from mlx_dmpo.train.checkpoint import newest
from mlx_dmpo.train.holdout import HELD_OUT, hold_out, write
from mlx_dmpo.train.overfitting import compared, last_line


def rows(owners):
    histories = [tuple(f"title {u}.{n}" for n in range(8)) for u in owners]
    return [RankingExample(f"u{u}", "movie", histories[i], f"p{i}", (f"n{i}",)) for i, u in enumerate(owners)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=150), st.integers(0, 3), st.randoms())
def test_users_stay_together_whatever_the_order_of_the_rows(owners, seed, random):
    examples = rows(owners)
    train, held = hold_out(examples, 0.1, seed)
    everyone, out = {e.user for e in examples}, {e.user for e in held}
    assert sorted(e.positive for e in [*train, *held]) == sorted(e.positive for e in examples)
    assert not out & {e.user for e in train}
    assert len(out) == (max(5, round(0.1 * len(everyone))) if len(everyone) >= 10 else 0)
    mixed = list(examples)
    random.shuffle(mixed)
    assert {e.user for e in hold_out(mixed, 0.1, seed)[1]} == out
    assert hold_out(examples, 0.0, seed) == (examples, [])


@settings(max_examples=30, deadline=None)
@given(st.integers(12, 80), st.integers(0, 3), st.integers(0, 3))
def test_the_next_stage_holds_out_the_same_users(tmp_path_factory, users, seed, other_seed):
    before = tmp_path_factory.mktemp("sft")
    examples = rows(range(users))
    train, held = hold_out(examples, 0.1, seed)
    write(before, held)
    trained_on.write(before, train)
    again = [replace(e, positive="another", source=f"f:{i}") for i, e in enumerate(examples)]
    assert {e.user for e in hold_out(again, 0.1, other_seed, str(before))[1]} == {e.user for e in held}
    # where the files name users otherwise, the history tells
    renamed = [replace(e, user="x" + e.user) for e in again]
    found = hold_out(renamed, 0.1, other_seed, str(before))[1]
    assert {e.history for e in found} == {e.history for e in held}


def test_no_stage_validates_on_what_an_earlier_one_was_trained_on(tmp_path):
    examples = rows(range(40))
    trained_on.write(tmp_path, examples[:30])
    _, held = hold_out(examples, 0.1, 0, str(tmp_path))
    assert {e.user for e in held} <= {e.user for e in examples[30:]}


# --- runs


@pytest.fixture
def data(tmp_path):
    """60 users of the embedded data in a file of their own."""
    lines = (assets.data_dir() / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "all.jsonl").write_text("\n".join(lines[:60]) + "\n", encoding="utf-8")
    return tmp_path / "all.jsonl"


def dmpo(data, path, **more):
    given = {"iters": 4, "steps_per_eval": 2, "steps_per_report": 2, "learning_rate": 1e-3, "num_negatives": 1}
    return train_run.train(DmpoSettings(data=str(data), adapter_path=str(path), **(given | more)), "test")


def weights(path):
    return {k: np.array(v) for k, v in mx.load(str(path / "adapters.safetensors")).items()}


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_file_without_validation_is_split_and_the_run_says_so(data, tmp_path, capsys):
    run = dmpo(data, tmp_path / "held")
    text = capsys.readouterr()
    assert "held out 6 of 60 training users" in text.err + text.out
    manifest = files.read_json(run / "manifest.json")
    assert manifest["held_out"]["users"] == 6
    held = {row["user"] for row in files.read_json(run / HELD_OUT)}
    examples = [RankingExample.from_json(json.loads(line)) for line in data.read_text(encoding="utf-8").splitlines()]
    assert {e.user for e in examples if trained_on.example_key(e) in trained_on.read(run)} == {
        e.user for e in examples if e.user not in held
    }
    assert any("valid_pair_accuracy" in line for line in files.read_lines(run / "metrics.jsonl"))

    # the same as training on the others with the held-out ones as validation data
    for name, wanted in (("train", False), ("valid", True)):
        chosen = [json.dumps(e.to_json()) for e in examples if (e.user in held) == wanted]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    apart = dmpo(tmp_path / "train.jsonl", tmp_path / "apart", valid_data=str(tmp_path / "valid.jsonl"))
    assert same(run, apart)

    # without: every user trains, nothing is validated
    every = dmpo(data, tmp_path / "every", holdout=0.0)
    assert "--no-holdout" in (said := capsys.readouterr()).err + said.out
    assert trained_on.read(every) == {trained_on.example_key(e) for e in examples}
    assert not (every / HELD_OUT).exists() and files.read_json(every / "manifest.json")["held_out"] is None
    assert not any("valid_loss" in line for line in files.read_lines(every / "metrics.jsonl"))


def test_a_resumed_run_ends_bit_for_bit(data, tmp_path, monkeypatch):
    whole = dmpo(data, tmp_path / "whole", iters=6, steps_per_eval=3, save_every=1, keep_checkpoints=9)
    run = tmp_path / "again"
    from mlx_dmpo.train.validation import Validation

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Validation, "run", dies)
        with pytest.raises(KeyboardInterrupt):
            dmpo(data, run, iters=6, steps_per_eval=3, save_every=1, keep_checkpoints=9)
    assert newest(run).state.since["pairs"] > 0  # what training saw since the last validation is in the checkpoint
    dmpo(data, run, iters=6, steps_per_eval=3, save_every=1, keep_checkpoints=9, resume=True)
    assert same(whole, run)
    lines = [[line for line in files.read_lines(p / "metrics.jsonl") if "valid_loss" in line] for p in (whole, run)]
    assert lines[0] == lines[1] and "train_pair_accuracy" in lines[0][0]


def test_few_users_are_all_trained_on(data, tmp_path, capsys):
    lines = data.read_text(encoding="utf-8").splitlines()[:8]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    dmpo(data, tmp_path / "few", iters=1)
    text = capsys.readouterr()
    assert "nothing is held out: 8 training users" in text.err + text.out


def test_equal_accuracies_are_told_apart_by_loss(data, tmp_path, monkeypatch):
    from mlx_dmpo.train.validation import Validation

    losses = iter([0.9, 0.5, 0.7])
    numbers = lambda self: {"valid_loss": next(losses), "valid_margin": 0.0, "valid_pair_accuracy": 0.6}  # noqa: E731
    monkeypatch.setattr(Validation, "measure", numbers)
    run = dmpo(data, tmp_path / "ties", iters=3, steps_per_eval=1)
    assert files.read_json(run / "manifest.json")["best_step"] == 2


@pytest.mark.slow
def test_memorized_preferences_are_called_overfitting(data, tmp_path, capsys):
    """Labels drawn at random can only be memorized."""
    rng, changed = np.random.default_rng(0), []
    for line in data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if rng.random() < 0.5:
            row["positive"], row["negatives"][0] = row["negatives"][0], row["positive"]
        changed.append(json.dumps(row))
    data.write_text("\n".join(changed) + "\n", encoding="utf-8")
    memorizing = {"iters": 120, "steps_per_eval": 40, "learning_rate": 5e-3, "lr_schedule": "constant", "batch_size": 4}
    memorizing |= {"grad_accumulation_steps": 1, "prompt": "direct", "lora_parameters": Lora(rank=32), "holdout": 0.5}
    run = dmpo(data, tmp_path / "random", **memorizing)
    last = [line for line in files.read_lines(run / "metrics.jsonl") if "valid_loss" in line][-1]
    assert last["train_pair_accuracy"] > 0.8 and last["overfitting"] is True
    text = capsys.readouterr()
    assert ": overfitting; the best step was" in text.err + text.out
    assert "lower --learning-rate or --beta or --epochs, or train on more users" in text.err + text.out


def test_sft_that_memorizes_is_seen_by_its_loss():
    earlier = [{"valid_loss": 1.4}, {"loss": 0.3}, {"valid_loss": 1.5}]
    found = compared({"valid_loss": 1.6}, {"loss": 5.0, "groups": 100.0, "pairs": 0.0}, earlier, 20, False)
    assert found == {"train_loss": 0.05, "overfitting": True}
    assert "training loss 0.050, held out 1.600 (lowest 1.400): overfitting" in last_line(
        [*earlier, {"valid_loss": 1.6, **found}], 5, "--learning-rate"
    )
    assert not compared({"valid_loss": 1.42}, {"loss": 5.0, "groups": 100.0}, earlier, 20, False)["overfitting"]


@pytest.mark.parametrize("users", [5, 10, 20, 60])
def test_chance_is_rarely_called_overfitting(users):
    """Runs of 10 validations of the same users, whose accuracy is that of the training users."""
    rng, flagged, runs = np.random.default_rng(users), 0, 1000
    for _ in range(runs):
        accuracy, best, alarm = rng.uniform(0.5, 0.95), 0.0, False
        right = rng.random(users) < accuracy
        for _ in range(10):
            again = rng.random(users) < 0.05  # a twentieth of the users changes between two validations
            right[again] = rng.random(again.sum()) < accuracy
            held_out, train = right.mean(), rng.binomial(100, accuracy) / 100
            better, best = held_out > best, max(best, held_out)
            numbers = {"valid_loss": 1.0, "valid_pair_accuracy": held_out}
            alarm |= compared(numbers, {"right": 100 * train, "pairs": 100.0, "groups": 100.0}, [], users, better)[
                "overfitting"
            ]
        flagged += alarm
    print(f"{users} users: {flagged} of {runs} runs flagged")
    assert flagged <= 0.03 * runs


def test_what_is_called_overfitting():
    def flagged(train, held_out, users=50, best=False):
        return compared(
            {"valid_loss": 1.0, "valid_pair_accuracy": held_out},
            {"right": 500 * train, "pairs": 500.0, "groups": 100.0},
            [],
            users,
            best,
        )["overfitting"]

    assert flagged(0.93, 0.55)
    assert flagged(0.93, 0.55, best=True)  # not above one half, so not learning either
    assert not flagged(0.97, 0.76, best=True, users=100)  # a gap, but the held-out users still gain
    assert not flagged(0.88, 0.55, users=5)  # five users say too little
    assert not flagged(0.65, 0.55)
