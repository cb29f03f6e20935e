"""NaN and Inf reach neither the weights nor the optimizer, wherever they come from."""

import json
import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import tiny
from hooks import before_steps, on_outputs
from mlx.utils import tree_map
from test_resume import settings_of

from mlx_dmpo.core import scorer as core_scorer
from mlx_dmpo.core import selfcheck
from mlx_dmpo.core.finite import is_finite
from mlx_dmpo.errors import UserError
from mlx_dmpo.machine import files, run_directory
from mlx_dmpo.model import open as open_module
from mlx_dmpo.train import checkpoint, reference, reporting, validation
from mlx_dmpo.train import run as train_run
from mlx_dmpo.train import step as train_step
from mlx_dmpo.train.nan import locate


@pytest.fixture
def settings(model_directory, data_directory, tmp_path):
    """Four steps of two groups, each saved."""
    change = dict(
        iters=4,
        save_every=1,
        steps_per_report=1,
        val_batches=0,
        keep_checkpoints=9,
        candidate_order="fixed",
        debug_nan=True,
    )
    return settings_of("dmpo", model_directory, data_directory, tmp_path / "run", **change)


def saved_files(path, step):
    return [
        (checkpoint.directory(path, step) / name).read_bytes()
        for name in ("adapters.safetensors", "optimizer.safetensors")
    ]


def poison(monkeypatch, at, spoil):
    """`spoil(outputs)` of the micro-batches of the steps `at` alone."""
    now = []
    before_steps(monkeypatch, lambda model, step: now.append(step.number))
    on_outputs(monkeypatch, lambda result: spoil(result) if now[-1] in at else result)


def nan_gradients(result):
    value, gradients = result
    return value, tree_map(lambda g: g * mx.array(float("inf")) * 0, gradients)


def nan_loss(result):
    (total, value, margin, logps), gradients = result
    return (total, value * mx.array(float("nan")), margin, logps), gradients


@pytest.mark.parametrize("spoil", [nan_gradients, nan_loss])
def test_one_bad_step_is_left_out_counted_and_its_rows_named(spoil, settings, monkeypatch, capsys):
    poison(monkeypatch, {3}, spoil)
    path = train_run.train(settings, "test")
    assert saved_files(path, 3) == saved_files(path, 2) != saved_files(path, 4)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("bad_steps", 0) for line in lines] == [0, 0, 1, 1]
    assert ["loss" in line for line in lines] == [True, True, False, True]
    assert files.read_json(path / "manifest.json")["bad_steps"] == 1
    reported = capsys.readouterr().err
    assert (
        len(
            re.findall(
                r"train\.jsonl:\d+",
                next(line for line in reported.splitlines() if "step 3: NaN or Inf, skipped" in line),
            )
        )
        == 2
    )
    place = "the gradient of model.layers.2" if spoil is nan_gradients else "the loss"
    assert "step 3: first in" in reported and place in reported


def test_too_many_in_a_row_end_the_run_with_what_was_good(settings, monkeypatch, capsys):
    poison(monkeypatch, {2, 3}, nan_gradients)
    with pytest.raises(
        UserError,
        match=(
            r"step 3: 2 steps in a row had NaN or Inf .*train.jsonl:\d+.*--learning-rate.*--start-adapter "
            r".*0000003.*--resume"
        ),
    ):
        train_run.train(replace(settings, max_bad_steps=2), "test")
    run = checkpoint.Path(settings.adapter_path)
    assert saved_files(run, 3) == saved_files(run, 1)
    path = train_run.train(replace(settings, max_bad_steps=2, resume=True), "test")  # past them
    assert saved_files(path, 4) != saved_files(path, 3) and files.read_json(path / "manifest.json")["bad_steps"] == 2


def test_weights_that_are_not_finite_are_never_saved(settings, monkeypatch, capsys):
    """As a fault of memory would leave them, in the base and in the adapter."""
    for number, leaf in enumerate(("weight", "lora_b")):
        settings = replace(settings, adapter_path=f"{settings.adapter_path}{number}")

        def strike(model, step, leaf=leaf):
            if step.number == 2:
                module = model.layers[1].self_attn.q_proj
                module = module.linear if leaf == "weight" else module
                module[leaf] = module[leaf] * mx.array(float("nan"))

        with monkeypatch.context() as patch, pytest.raises(UserError, match="step 4: 3 steps in a row had NaN or Inf"):
            before_steps(patch, strike)
            train_run.train(settings, "test")
        assert (
            f"first in the weights: model.layers.1.self_attn.q_proj.{'linear.weight' if leaf == 'weight' else leaf}"
            in capsys.readouterr().err
        )
        run = checkpoint.Path(settings.adapter_path)
        kept = sorted(int(p.name) for p in (run / "checkpoints").iterdir())
        assert kept == ([1] if leaf == "lora_b" else [1, 2, 3, 4])  # the adapter itself is sound in the second case
        assert all(
            is_finite(checkpoint.newest(run).arrays(name)) for name in ("adapters.safetensors", "optimizer.safetensors")
        )


def test_an_adapter_spoilt_in_the_last_step_is_not_the_result(settings, monkeypatch):
    original, models = reporting.Report.step_done, []

    def strike(self, *arguments):
        original(self, *arguments)
        if self.state.step == 4:
            models[0].layers[1].self_attn.q_proj.lora_b *= mx.array(float("nan"))

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"step 4: the adapter has NaN or Inf: continue from step 3 with .*--resume"),
    ):
        before_steps(patch, lambda model, step: models.append(model))
        patch.setattr(reporting.Report, "step_done", strike)
        train_run.train(settings, "test")
    assert not (checkpoint.Path(settings.adapter_path) / "adapters.safetensors").exists()
    assert run_directory.is_complete(train_run.train(replace(settings, resume=True), "test"))


def test_an_update_that_overflows_is_taken_back(settings, capsys):
    with pytest.raises(UserError, match="step 3: 3 steps in a row"):
        train_run.train(
            replace(settings, learning_rate=3e38, weight_decay=10.0, lr_schedule="constant", warmup=0.0), "test"
        )
    adapter = checkpoint.newest(checkpoint.Path(settings.adapter_path)).arrays("adapters.safetensors")
    assert is_finite(adapter) and not any(
        v.any() for k, v in tiny.leaves(adapter).items() if k.endswith("lora_b")
    )  # as it began
    assert "step 1: first in the update" in capsys.readouterr().err


def test_activations_are_traced_to_their_layer(settings, monkeypatch, capsys):
    kept = {}

    def overflow(model, step):
        norm = model.layers[1].post_attention_layernorm
        kept.setdefault("weight", norm.weight)  # 3e38: finite, and too much for what it scales
        norm.weight = mx.full(norm.weight.shape, 3e38) if step.number == 3 else kept["weight"]

    before_steps(monkeypatch, overflow)
    path = train_run.train(settings, "test")
    assert saved_files(path, 3) == saved_files(path, 2) != saved_files(path, 4)
    assert "step 3: first in the forward pass: the output of model.layers.1 (" in capsys.readouterr().err


def test_layers_are_watched_only_while_they_are_searched():
    model = tiny.model()
    groups = tiny.ragged_groups(np.random.default_rng(0))
    before = list(model.layers)
    assert locate(model, groups, {"a": mx.array([1.0])}).startswith("the loss")
    assert (
        locate(model, groups, {"a": mx.array([1.0]), "b": mx.array([float("inf")])})
        == "the backward pass: the gradient of b"
    )
    assert all(a is b for a, b in zip(model.layers, before, strict=True)) and model.training


def test_reference_values_that_are_not_finite(settings, monkeypatch, capsys):
    path = train_run.train(replace(settings, iters=1), "test")
    stored = next(files.cache_directory().rglob("*.npz"))
    with np.load(stored) as file:
        table = dict(file)
    np.savez(
        stored,
        sequences=table["sequences"],
        logps=table["logps"] * np.where(np.arange(len(table["logps"])) == 2, np.nan, 1),
    )
    again = train_run.train(
        replace(settings, iters=1, adapter_path=settings.adapter_path + "2"), "test"
    )  # scored again
    assert "1 groups scored" in capsys.readouterr().out
    np.testing.assert_allclose(
        *(
            np.array(mx.load(str(p / "adapters.safetensors"))["model.layers.2.mlp.down_proj.lora_b"])
            for p in (path, again)
        ),
        atol=1e-6,
    )

    original = reference.Reference.logps  # in memory: the step is skipped
    monkeypatch.setattr(
        reference.Reference,
        "logps",
        lambda self, groups: original(self, groups) * (np.nan if groups[0].source.endswith(":3") else 1),
    )
    path = train_run.train(replace(settings, iters=6, adapter_path=settings.adapter_path + "3"), "test")
    assert files.read_json(path / "manifest.json")["bad_steps"] == 1
    assert re.search(r"step \d: NaN or Inf, skipped \(\S*train.jsonl:3\)", capsys.readouterr().err)

    monkeypatch.setattr(
        core_scorer, "shared_logps", lambda model, batch, **how: mx.full(batch.answer_mask.shape[:2], float("nan"))
    )
    monkeypatch.setattr(open_module, "choose_scorer", lambda *a: selfcheck.GroupScorer(core_scorer.shared_logps, True))
    with pytest.raises(UserError, match=r"train.jsonl:\d+: its reference log-prob is NaN or Inf"):
        train_run.train(
            replace(
                settings, adapter_path=settings.adapter_path + "4", dtype="float32", quantize=4, quantize_group_size=32
            ),
            "test",
        )


def test_a_validation_that_is_not_finite_is_no_best(settings, monkeypatch, capsys):
    original, calls = train_step.right_pairs, []

    def bad(difference, mask):
        calls.append(1)
        return original(difference, mask) * (
            float("nan") if len(calls) == 5 else 1
        )  # two micro-batches a step, then validation

    monkeypatch.setattr(train_step, "right_pairs", bad)
    monkeypatch.setattr(validation, "right_pairs", bad)
    path = train_run.train(replace(settings, val_batches=1, steps_per_eval=2), "test")
    assert "step 2: the validation has NaN or Inf" in capsys.readouterr().err
    assert files.read_json(path / "manifest.json")["best_step"] == 4
