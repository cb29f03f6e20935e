"""A run that was interrupted and resumed is the run that was not: adapters bit for bit, metrics line for line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from hooks import before_steps

from mlx_dmpo.config import DmpoSettings, SftSettings
from mlx_dmpo.errors import Interrupted, UserError
from mlx_dmpo.machine import files, run_directory
from mlx_dmpo.machine.interrupts import Stop
from mlx_dmpo.model import adapters, device, loading, score
from mlx_dmpo.train import checkpoint, resume, validation
from mlx_dmpo.train import run as train_run
from mlx_dmpo.train import step as train_step

TIMES = {"groups_per_second", "tokens_per_second", "peak_memory_gb"}


class Crash(BaseException):
    """Nothing in the package catches it."""


def crash_before(number):
    def call(model, step):
        if step.number == number:
            raise Crash

    return call


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("small") / "ratings", users=5, negatives=2)


def settings_of(kind, model_directory, data, path, **change):
    """5 groups, 2 per step in two micro-batches: 3 steps per epoch, the last smaller; validations between saves."""
    common = dict(
        model=str(model_directory), data=str(data), adapter_path=str(path), batch_size=1, iters=5, learning_rate=1e-3,
        save_every=2, steps_per_eval=2, val_batches=2, steps_per_report=3, candidate_order="epoch", warmup=2,
    )  # fmt: skip
    return (SftSettings if kind == "sft" else DmpoSettings)(**{**common, **change})


def adapter(path):
    return {k: np.array(v) for k, v in mx.load(str(path / "adapters.safetensors")).items()}


def metrics(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def same(a, b):
    assert (a / "adapters.safetensors").read_bytes() == (b / "adapters.safetensors").read_bytes()
    assert metrics(a) == metrics(b)
    wanted = ("steps", "best_step", "bad_steps")
    assert [files.read_json(a / "manifest.json")[k] for k in wanted] == [
        files.read_json(b / "manifest.json")[k] for k in wanted
    ]


def count_points(monkeypatch, crash_at=()):
    """Counts the moments at which a run can die; at the given ones, it does. -> the names of those passed."""
    passed = []

    def point(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **keywords):
            passed.append(name)
            if len(passed) in crash_at:
                raise Crash
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, call)

    point(train_step.StepFunction, "prepare")
    point(files, "append_line")
    point(checkpoint, "save_arrays")
    point(files, "write_json")
    point(checkpoint.os, "rename")
    point(checkpoint, "prune")
    point(train_step, "right_pairs")
    point(validation, "right_pairs")  # in the middle of a validation
    point(score, "in_halves")
    return passed


@pytest.mark.parametrize("kind", ["sft", pytest.param("dmpo", marks=pytest.mark.slow)])
def test_a_run_that_dies_anywhere_goes_on_to_the_same_end(kind, model_directory, small_data, tmp_path, monkeypatch):
    whole = train_run.train(settings_of(kind, model_directory, small_data, tmp_path / "whole"), "test")
    with monkeypatch.context() as patch:
        passed = count_points(patch)
        train_run.train(settings_of(kind, model_directory, small_data, tmp_path / "counted"), "test")
    assert {"prepare", "append_line", "save_arrays", "rename", "right_pairs", "in_halves"} <= set(passed)
    spread = range(len(passed) // 6, len(passed), len(passed) // 3)  # test_faults.py: at all of them
    settings = settings_of(kind, model_directory, small_data, tmp_path / "broken")
    for at in spread:  # one run after another in one directory, each from the start
        monkeypatch.setenv("MLX_DMPO_CACHE", str(tmp_path / f"cache{at}"))
        with monkeypatch.context() as patch, pytest.raises(Crash):
            count_points(patch, {at})
            train_run.train(replace(settings, overwrite=True), "test")
        with monkeypatch.context() as patch, pytest.raises(Crash):  # and again, a little later
            count_points(patch, {4})
            train_run.train(replace(settings, resume=True), "test")
        same(train_run.train(replace(settings, resume=True), "test"), whole)
        shutil.rmtree(settings.adapter_path)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adafactor", "muon", "lion"])  # adamw: everywhere else
def test_every_optimizer_goes_on(optimizer, model_directory, small_data, tmp_path, monkeypatch):
    change = dict(optimizer=optimizer, iters=2, save_every=1, steps_per_eval=9, val_batches=0)
    if optimizer == "sgd":
        change["optimizer_config"] = {"momentum": 0.9}
    whole = train_run.train(settings_of("sft", model_directory, small_data, tmp_path / "whole", **change), "test")
    settings = settings_of("sft", model_directory, small_data, tmp_path / "broken", **change)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        before_steps(patch, crash_before(2))
        train_run.train(settings, "test")
    same(train_run.train(replace(settings, resume=True), "test"), whole)


def test_dropout_and_patience_go_on(model_directory, small_data, tmp_path, monkeypatch):
    from mlx_dmpo.config import Lora

    change = dict(
        lora_parameters=Lora(dropout=0.3),
        patience=1,
        steps_per_eval=1,
        iters=9,
        learning_rate=0.5,
        lr_schedule="constant",
        max_grad_norm=0.0,
    )
    whole = train_run.train(settings_of("dmpo", model_directory, small_data, tmp_path / "whole", **change), "test")
    assert files.read_json(whole / "manifest.json")["steps"] < 9
    settings = settings_of("dmpo", model_directory, small_data, tmp_path / "broken", **change)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        count_points(patch, {40})
        train_run.train(settings, "test")
    same(train_run.train(replace(settings, resume=True), "test"), whole)


def test_the_last_checkpoints_and_the_best_are_kept(model_directory, small_data, tmp_path, monkeypatch):
    change = dict(
        iters=6, save_every=1, steps_per_eval=1, learning_rate=0.5, lr_schedule="constant", max_grad_norm=0.0, warmup=0
    )
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])  # of the validations: the second is the best

    monkeypatch.setattr(validation.Validation, "measure", lambda self: {"valid_loss": next(losses)})
    path = train_run.train(settings_of("dmpo", model_directory, small_data, tmp_path / "run", **change), "test")
    best = files.read_json(path / "manifest.json")["best_step"]
    kept = sorted(p.name for p in (path / "checkpoints").iterdir())
    assert best == 2 and kept == ["0000002", "0000005", "0000006"]
    for name in kept:
        assert checkpoint.read(path / "checkpoints" / name).state.step == int(name)
    assert (path / "adapters.safetensors").read_bytes() == (
        path / "checkpoints" / kept[0] / "adapters.safetensors"
    ).read_bytes()
    base = loading.load(settings_of("sft", model_directory, small_data, "x"))
    adapters.load_adapter(base, path / "checkpoints" / kept[1])


@pytest.fixture
def unfinished(model_directory, small_data, tmp_path, monkeypatch):
    """Settings of a DMPO run that died with a checkpoint at step 2 and one at step 4."""
    settings = settings_of("dmpo", model_directory, small_data, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Crash):
        before_steps(patch, crash_before(5))
        train_run.train(settings, "test")
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["0000002", "0000004"]
    return replace(settings, resume=True)


def test_what_changes_the_course_is_refused_and_the_rest_is_not(unfinished, tmp_path, monkeypatch):
    for name, value in {
        "learning_rate": 2e-3,
        "seed": 1,
        "iters": 6,
        "beta": 0.2,
        "optimizer": "sgd",
        "batch_size": 2,
        "steps_per_eval": 1,
    }.items():
        with pytest.raises(UserError, match=f"--resume: .*{name} .*would change"):
            train_run.train(replace(unfinished, **{name: value}), "test")
    moved = tmp_path / "moved.jsonl"
    shutil.copytree(unfinished.data, tmp_path / "moved")
    rows = (tmp_path / "moved" / "train.jsonl").read_text().splitlines()
    with pytest.raises(UserError, match="train data is not the one that the run started with"):
        moved.write_text("\n".join(rows[1:] + rows[:1]) + "\n")
        train_run.train(
            replace(unfinished, data=str(moved), valid_data=str(tmp_path / "moved" / "valid.jsonl")), "test"
        )
    free = dict(
        data=str(tmp_path / "moved"),
        steps_per_report=1,
        save_every=7,
        batch_size=2,
        grad_accumulation_steps=1,
        val_batches=1,
        grad_checkpoint=True,
    )
    path = train_run.train(replace(unfinished, **free), "test")
    assert run_directory.is_complete(path)
    assert "resume" not in (path / "config.yaml").read_text()


def test_a_run_is_not_begun_anew_by_chance(unfinished):
    with pytest.raises(UserError, match=r"unfinished run.*--resume"):
        train_run.train(replace(unfinished, resume=False), "test")
    with pytest.raises(UserError, match="keep one of them"):
        train_run.train(replace(unfinished, overwrite=True), "test")
    path = train_run.train(unfinished, "test")
    with pytest.raises(UserError, match="nothing to resume"):
        train_run.train(unfinished, "test")
    train_run.train(replace(unfinished, resume=False, overwrite=True, iters=1), "test")
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["0000001"]


def test_a_damaged_checkpoint_is_named_and_left_out(unfinished, model_directory, small_data, tmp_path, capsys):
    whole = train_run.train(settings_of("dmpo", model_directory, small_data, tmp_path / "whole"), "test")
    weights = tmp_path / "run" / "checkpoints" / "0000004" / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    (tmp_path / "run" / ".partial-left-behind").write_text("by a killed process")
    same(train_run.train(unfinished, "test"), whole)
    assert "0000004/adapters.safetensors: is damaged" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob(".partial-*"))


def damage_manifest(path):
    (path / "manifest.json").write_text('{"state": {"best": 1}, "identity"')


def damage_weights(path):
    weights = path / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")


def replace_by_a_file(path):
    shutil.rmtree(path)
    path.write_text("no directory")


DAMAGES = [damage_manifest, damage_weights, replace_by_a_file, lambda path: (path / "manifest.json").write_text("[]")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_run_survives_a_damaged_newest_checkpoint(damage, unfinished, tmp_path):
    """Resumed, saved and pruned; `save_every` 1, so that it saves below, at and above the damaged step."""
    damage(tmp_path / "run" / "checkpoints" / "0000004")
    path = train_run.train(replace(unfinished, save_every=1, keep_checkpoints=3), "test")
    kept = sorted(int(p.name) for p in (path / "checkpoints").iterdir())
    assert {3, 4, 5} <= set(kept)
    for step in kept:
        assert checkpoint.read(checkpoint.directory(path, step)).state.step == step


@pytest.mark.parametrize("damage", DAMAGES[:2])
def test_a_damaged_best_is_forgotten_and_the_run_continues(damage, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for step, best in ((1, (0.5, 1, 0.7)), (2, (0.5, 1, 0.7)), (3, (0.5, 1, 0.7))):
        state = checkpoint.State(step=step, best=best)
        checkpoint.write(run, state, {}, {"a": mx.ones(3)}, {}, {"b": mx.ones(3)})
    assert checkpoint.newest(run).state.best == (0.5, 1, 0.7)
    damage(checkpoint.directory(run, 1))
    found = checkpoint.newest(run)
    assert found.state.step == 3 and found.state.best is None
    assert "the best adapter of step 3 is lost" in capsys.readouterr().err
    checkpoint.prune(run, 2)
    assert {"0000002", "0000003"} <= {p.name for p in (run / "checkpoints").iterdir()}
    made = checkpoint.Checkpoints(run, nn.Linear(1, 1), None, {}, {}, keep=2)
    made.state = checkpoint.State(step=3, best=(0.5, 1, 0.7))
    made.load_best()  # damaged after the start
    assert made.state.best is None and "the last one, of step 3, is kept" in capsys.readouterr().err


def test_a_best_that_an_older_checkpoint_still_has_is_used(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for step, best in ((1, (0.5, 1, 0.7)), (2, (0.5, 1, 0.7)), (3, (0.4, 3, 0.6)), (4, (0.4, 3, 0.6))):
        checkpoint.write(run, checkpoint.State(step=step, best=best), {}, {"a": mx.ones(3)}, {}, {"b": mx.ones(3)})
    damage_weights(checkpoint.directory(run, 3))
    found = checkpoint.newest(run)
    assert (found.state.step, found.state.best) == (2, (0.5, 1, 0.7))


def test_another_environment_is_a_note_and_another_model_an_error(unfinished, monkeypatch, tmp_path, capsys):
    original = device.environment
    monkeypatch.setattr(device, "environment", lambda: original() | {"mlx": "0.32.99"})
    path = train_run.train(replace(unfinished, iters=5), "test")
    output = capsys.readouterr()
    version = run_directory.versions()["mlx"]
    assert f"note: the run continues with mlx {version} -> 0.32.99: its result may differ" in output.err
    assert "the model" not in output.err and run_directory.is_complete(path)
    assert "reference" in output.out and "; 0 groups scored" not in output.out  # under a key of its own


def test_what_differs_is_named():
    given = {"checkpoint format": 2, "dtype of the weights": "bfloat16", "model": "b", "environment": {"mlx": "2"}}
    stored = given | {"dtype of the weights": "float32", "model": "a"}
    with pytest.raises(UserError, match="dtype of the weights was float32 and is now bfloat16"):
        resume.check_identity(stored, given)
    with pytest.raises(UserError, match="the model is not the one that the run started with"):
        resume.check_identity(given | {"model": "a"}, given)
    resume.check_identity(given | {"environment": {"mlx": "1"}}, given)


def test_resume_without_a_checkpoint_begins_at_step_0(model_directory, small_data, tmp_path, capsys):
    path = train_run.train(
        settings_of("sft", model_directory, small_data, tmp_path / "run", iters=1, resume=True), "test"
    )
    assert run_directory.is_complete(path) and "holds no checkpoint" in capsys.readouterr().err


# --- Ctrl-C and SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", [pytest.param("prepare", marks=pytest.mark.slow), "right_pairs"])
def test_a_signal_ends_the_step_saves_and_says_how_to_resume(
    number, where, model_directory, small_data, tmp_path, monkeypatch
):
    whole = train_run.train(settings_of("dmpo", model_directory, small_data, tmp_path / "whole"), "test")
    settings = settings_of("dmpo", model_directory, small_data, tmp_path / "run")
    owner = train_step.StepFunction if where == "prepare" else validation
    original, calls = getattr(owner, where), []

    def signalled(*arguments):
        calls.append(arguments)
        if len(calls) == (6 if where == "prepare" else 2):  # in the third step; in the first validation
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # the thread that watches takes note
        return original(*arguments)

    with (
        monkeypatch.context() as patch,
        pytest.raises(
            Interrupted,
            match=r"stopped at step \d of 5, saved at \d: continue with mlx-dmpo dmpo -c .*config.yaml --resume",
        ) as stop,
    ):
        patch.setattr(owner, where, signalled)
        train_run.train(settings, "test")
    assert stop.value.signal == number
    assert not run_directory.is_complete(tmp_path / "run")
    assert checkpoint.newest(tmp_path / "run").state.step == int(str(stop.value).split()[3])
    same(train_run.train(replace(settings, resume=True), "test"), whole)


def test_handlers_are_put_back():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], signal.set_wakeup_fd(-1)
    with Stop():
        assert signal.getsignal(signal.SIGINT) != before[0][0]
    assert ([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], signal.set_wakeup_fd(-1)) == before
    found = []
    thread = threading.Thread(
        target=lambda: found.append(Stop().__enter__().requested)
    )  # a notebook's thread cannot take signals
    thread.start()
    thread.join()
    assert found == [0]


# --- the lock


def test_two_runs_into_one_directory(unfinished, tmp_path):
    with (
        run_directory.RunDirectory(tmp_path / "run", "test", unfinished, resume=True),
        pytest.raises(UserError, match=f"process {os.getpid()} is writing it"),
    ):
        train_run.train(unfinished, "test")
    train_run.train(unfinished, "test")


def test_a_lock_goes_with_its_process(tmp_path):
    hold = (
        "import os, sys; from mlx_dmpo.machine import run_directory; "
        "r = run_directory.RunDirectory(sys.argv[1], 'test', {}); os.kill(os.getpid(), 9)"
    )
    child = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)])
    assert child.wait() == -signal.SIGKILL
    assert (tmp_path / ".lock").read_text() == str(child.pid)
    run_directory.RunDirectory(tmp_path, "test", {}).close()
