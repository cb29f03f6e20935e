"""The loop: what it changes, what it must not depend on, what it writes."""

import json
import math
import threading
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

from mlx_dmpo.config import DmpoSettings, Lora, SftSettings
from mlx_dmpo.core.scorer import plain_logps, shared_logps
from mlx_dmpo.core.selfcheck import GroupScorer
from mlx_dmpo.core.tree import pad_groups
from mlx_dmpo.data import formats
from mlx_dmpo.errors import UserError
from mlx_dmpo.machine import files, run_directory
from mlx_dmpo.machine.prefetch import prefetch
from mlx_dmpo.model import adapters, device, loading, score
from mlx_dmpo.model.encode import Encoder
from mlx_dmpo.model.frozen_cache import cache_key
from mlx_dmpo.prompts.orders import printed_orders
from mlx_dmpo.train import batches, inputs, objective, optimizer, reference, setup
from mlx_dmpo.train import run as train_run
from mlx_dmpo.train import step as train_step
from mlx_dmpo.train.batches import epoch_steps


@pytest.fixture
def sft_settings(model_directory, data_directory, tmp_path):
    return SftSettings(
        model=str(model_directory),
        data=str(data_directory),
        adapter_path=str(tmp_path / "sft"),
        epochs=2.0,
        learning_rate=2e-3,
    )


def adapter(path, name="adapters.safetensors"):
    return {k: np.array(v) for k, v in mx.load(str(path / name)).items()}


def metric_lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def furthest(a, b):
    assert a.keys() == b.keys()
    return max(float(np.abs(a[k] - b[k]).max()) for k in a)


def test_only_the_adapter_changes_and_the_base_stays_bit_identical(dmpo_settings, monkeypatch):
    kept = {}
    original = train_run.open_policy

    def spy(settings):
        policy, resolved = original(settings)
        kept["model"] = policy.base.model
        kept["before"] = {k: np.array(v) for k, v in tree_flatten(policy.base.model.parameters())}
        return policy, resolved

    monkeypatch.setattr(train_run, "open_policy", spy)
    train_run.train(replace(dmpo_settings, quantize=4, quantize_group_size=32, grad_checkpoint=True), "test")
    after = {k: np.array(v) for k, v in tree_flatten(kept["model"].parameters())}
    changed = {k for k, v in kept["before"].items() if not np.array_equal(v, after[k])}
    trainable = {k for k, _ in tree_flatten(kept["model"].trainable_parameters())}
    assert changed == trainable and all(k.endswith(("lora_a", "lora_b")) for k in trainable)
    assert len(trainable) == 3 * 7 * 2  # layers x linear layers x (a, b)


@pytest.mark.parametrize("settings", [pytest.param("sft_settings", marks=pytest.mark.slow), "dmpo_settings"])
def test_accumulation_does_not_change_the_step(settings, request, tmp_path):
    """4 micro-batches of 1 = 1 of 4, with groups of different shapes."""
    settings = request.getfixturevalue(settings)
    one = train_run.train(
        replace(settings, batch_size=1, grad_accumulation_steps=4, optimizer="sgd", learning_rate=0.1), "test"
    )
    four = train_run.train(
        replace(
            settings,
            batch_size=4,
            grad_accumulation_steps=1,
            optimizer="sgd",
            learning_rate=0.1,
            adapter_path=str(tmp_path / "four"),
        ),
        "test",
    )
    assert furthest(adapter(one), adapter(four)) < 1e-5
    change = dict(batch_size=4, grad_accumulation_steps=1, batch_tokens=1, adapter_path=str(tmp_path / "cut"))
    cut = train_run.train(replace(settings, optimizer="sgd", learning_rate=0.1, **change), "test")
    assert furthest(adapter(one), adapter(cut)) == 0  # no two groups fit: the same micro-batches of 1
    ours, theirs = metric_lines(one), metric_lines(four)
    assert ours[-1]["valid_loss"] == pytest.approx(theirs[-1]["valid_loss"], abs=1e-4)


def test_host_work_is_prefetched_on_a_thread(dmpo_settings, monkeypatch):
    """Padding of every step and of every batch that is scored; the encoding of every epoch after the first."""
    encoded, padded, scored = [], [], []

    def watched(owner, name, seen):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner,
            name,
            lambda *given, **how: (
                seen.append(threading.current_thread() is threading.main_thread()) or original(*given, **how)
            ),
        )

    watched(batches.GroupSource, "epoch", encoded)
    watched(batches.Batches, "_micro_batch", padded)
    watched(score, "pad_groups", scored)
    train_run.train(replace(dmpo_settings, epochs=3.0, candidate_order="epoch"), "test")
    assert padded and scored and not any(padded) and not any(scored)
    assert encoded.count(False) == 3


def test_prefetch_is_early_and_changes_nothing():
    second = threading.Event()

    def items():
        yield 1
        second.set()
        yield 2
        raise ValueError("the third")

    taken = prefetch(items())
    assert next(taken) == 1 and second.wait(10)
    assert next(taken) == 2
    with pytest.raises(ValueError, match="the third"):
        next(taken)
    assert list(prefetch(iter(range(100)))) == list(range(100)) and list(prefetch(iter(()))) == []


def test_who_stops_early_waits_for_nothing():
    released, left = threading.Event(), threading.Event()

    def items():
        yield 1
        released.wait(10)
        left.set()
        yield 2

    taken = prefetch(items())
    assert next(taken) == 1
    taken.close()
    assert not left.is_set()
    released.set()


def test_seeds_repeat_a_run_bit_for_bit(dmpo_settings, tmp_path):
    first = adapter(train_run.train(dmpo_settings, "test"))
    again = adapter(train_run.train(replace(dmpo_settings, adapter_path=str(tmp_path / "again")), "test"))
    other = adapter(train_run.train(replace(dmpo_settings, adapter_path=str(tmp_path / "other"), seed=1), "test"))
    assert furthest(first, again) == 0 and furthest(first, other) > 1e-4


@pytest.mark.slow
def test_checkpointing_and_the_plain_scorer_give_the_same_adapter(dmpo_settings, tmp_path):
    settings = replace(dmpo_settings, optimizer="sgd", learning_rate=0.1)
    expected = adapter(train_run.train(settings, "test"))
    for name, change in (
        ("recomputed", {"grad_checkpoint": True}),
        ("plain", {"scoring": "plain"}),
        ("both", {"scoring": "plain", "grad_checkpoint": True}),
    ):
        found = adapter(train_run.train(replace(settings, adapter_path=str(tmp_path / name), **change), "test"))
        assert furthest(found, expected) < 1e-5, name


def test_both_stages_learn_the_training_rows(sft_settings, dmpo_settings, data_directory):
    settings = replace(sft_settings, epochs=12.0, learning_rate=3e-3, steps_per_report=1, lr_schedule="constant")
    sft = train_run.train(settings, "test")
    losses = [line["loss"] for line in metric_lines(sft) if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    dmpo = train_run.train(
        replace(
            dmpo_settings,
            start_adapter=str(sft),
            num_negatives=1,
            both_orders=True,
            epochs=16.0,
            learning_rate=2e-3,
            beta=1.0,
            steps_per_report=1,
        ),
        "test",
    )
    lines = [line for line in metric_lines(dmpo) if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # policy = reference at step 0
    assert lines[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert lines[-1]["loss"] < 0.4 and lines[-1]["margin"] > 0.5


@pytest.mark.parametrize("loss", ["dpo", "dmpo", "s-dpo", "simpo"])
@pytest.mark.parametrize(
    "extra", [{}, {"sft_weight": 1.0, "reference_free": True, "label_smoothing": 0.1, "both_orders": True}]
)
def test_every_loss_runs(dmpo_settings, loss, extra):
    path = train_run.train(replace(dmpo_settings, loss=loss, iters=2, **extra), "test")
    assert run_directory.is_complete(path) and all(
        math.isfinite(v) for line in metric_lines(path) for v in line.values()
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "adafactor", "muon", "lion"])
def test_every_optimizer_moves_the_adapter(dmpo_settings, optimizer):
    path = train_run.train(replace(dmpo_settings, optimizer=optimizer, iters=2, save_every=1), "test")
    first, last = (adapter(path / "checkpoints" / step) for step in ("0000001", "0000002"))
    assert furthest(first, last) > 0


@pytest.mark.slow
def test_a_reference_is_computed_once_and_never_met_stale(dmpo_settings, sft_settings, tmp_path, monkeypatch):
    computed = []
    original = reference.Reference

    class Spy(original):
        def add(self, groups):
            super().add(groups)
            computed.append(self.computed)

    monkeypatch.setattr(setup, "Reference", Spy)
    quick = replace(dmpo_settings, iters=1)

    def run(name, **change):
        train_run.train(replace(quick, adapter_path=str(tmp_path / name), **change), "test")
        return computed.pop()

    assert run("a") == 24  # 12 training and 12 validation groups
    assert run("b") == 0
    assert run("c", max_seq_length=95) > 0  # other tokens
    assert run("d", candidate_order="epoch") > 0  # both orders of every pair
    assert run("e", candidate_order="epoch") == 0
    first = train_run.train(replace(sft_settings, adapter_path=str(tmp_path / "s1")), "test")
    second = train_run.train(replace(sft_settings, adapter_path=str(tmp_path / "s2"), seed=5), "test")
    assert run("f", start_adapter=str(first)) == 24
    assert run("g", start_adapter=str(second)) == 24  # another adapter
    assert run("h", start_adapter=str(first)) == 0
    assert run("i", quantize=4, quantize_group_size=32) == 24  # another base


def test_reference_is_the_start_adapter_not_the_base(dmpo_settings, sft_settings):
    sft = train_run.train(replace(sft_settings, learning_rate=2e-2, epochs=5.0), "test")
    path = train_run.train(replace(dmpo_settings, start_adapter=str(sft), iters=1), "test")
    line = next(line for line in metric_lines(path) if "loss" in line)
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-4)
    free = train_run.train(
        replace(dmpo_settings, start_adapter=str(sft), iters=1, reference_free=True, beta=20.0, overwrite=True), "test"
    )
    assert abs(next(line for line in metric_lines(free) if "loss" in line)["loss"] - math.log(2)) > 1e-3


def test_the_best_adapter_is_kept_and_patience_ends_the_run(sft_settings):
    """A rate that ruins the model: the first validation is the best."""
    path = train_run.train(
        replace(
            sft_settings,
            learning_rate=0.5,
            lr_schedule="constant",
            epochs=20.0,
            patience=2,
            steps_per_eval=1,
            max_grad_norm=0.0,
            optimizer="sgd",
            best_metric="valid_loss",
        ),
        "test",
    )
    manifest = json.loads((path / "manifest.json").read_text())
    valid = {line["step"]: line["valid_loss"] for line in metric_lines(path) if "valid_loss" in line}
    assert manifest["best_step"] == min(valid, key=valid.get)
    assert manifest["steps"] < 40
    assert max(valid) - manifest["best_step"] == 2
    last = sorted((path / "checkpoints").iterdir())[-1]
    assert furthest(adapter(path), adapter(last)) > 0


def test_adapters_load_in_mlx_lm_with_the_same_log_probs(dmpo_settings, model_directory, data_directory):
    from mlx_lm import generate, load

    path = train_run.train(dmpo_settings, "test")
    theirs, tokenizer = load(str(model_directory), adapter_path=str(path))
    base = loading.load(dmpo_settings)
    adapters.load_adapter(base, path)
    examples = formats.load_examples(data_directory, "test")
    encoder = Encoder(base.tokenizer)
    batch = pad_groups([encoder.encode(e, [(True, False)] * len(e.negatives)) for e in examples[:3]])
    ours = np.array(shared_logps(base.model.eval(), batch))
    np.testing.assert_allclose(np.array(plain_logps(theirs, batch)), ours, atol=5e-4)
    bare, _ = load(str(model_directory))
    assert np.abs(np.array(plain_logps(bare, batch)) - ours).max() > 1e-3
    assert isinstance(generate(theirs, tokenizer, prompt="amber", max_tokens=3), str)


def test_a_run_directory_explains_and_repeats_itself(dmpo_settings, tmp_path, pictures):
    from mlx_dmpo.config import resolve

    path = train_run.train(dmpo_settings, "mlx-dmpo dmpo")
    manifest = json.loads((path / "manifest.json").read_text())
    assert {
        "command",
        "config",
        "inputs",
        "versions",
        "device",
        "seconds",
        "finished",
        "steps",
        "best_step",
    } <= manifest.keys()
    assert manifest["inputs"][f"{dmpo_settings.data}/train.jsonl"] == files.sha256(
        tiny_path(dmpo_settings, "train.jsonl")
    )
    assert (path / "training.png").read_bytes()[:4] == b"\x89PNG"
    again = resolve(DmpoSettings, path / "config.yaml", {"adapter_path": str(tmp_path / "again")})
    assert furthest(adapter(train_run.train(again, "test")), adapter(path)) == 0


def tiny_path(settings, name):
    from pathlib import Path

    return Path(settings.data) / name


def test_a_finished_run_is_not_overwritten_by_chance(sft_settings):
    path = train_run.train(replace(sft_settings, iters=1), "test")
    before = adapter(path)
    with pytest.raises(UserError, match="finished run"):
        train_run.train(replace(sft_settings, iters=1), "test")
    assert furthest(before, adapter(path)) == 0


def test_start_adapter_keeps_its_shape(sft_settings, dmpo_settings):
    sft = train_run.train(
        replace(sft_settings, iters=1, lora_parameters=Lora(rank=2, keys=("self_attn.q_proj",)), num_layers=1), "test"
    )
    path = train_run.train(replace(dmpo_settings, iters=1, start_adapter=str(sft)), "test")
    assert {k: v.shape for k, v in adapter(path).items()} == {k: v.shape for k, v in adapter(sft).items()}
    assert len(adapter(path)) == 2
    with pytest.raises(UserError, match="lora_parameters"):
        train_run.train(
            replace(dmpo_settings, iters=1, start_adapter=str(sft), lora_parameters=Lora(rank=4), overwrite=True),
            "test",
        )


BAD_SETTINGS = {
    "no such schedule": (dict(lr_schedule={"name": "no_such_decay", "arguments": [1e-4]}), "lr_schedule: "),
    "no arguments": (dict(lr_schedule={"name": "cosine_decay"}), "lr_schedule: "),
    "a schedule of text": (dict(lr_schedule={"name": "cosine_decay", "arguments": ["fast", 10]}), "lr_schedule: "),
    "a rate below 0": (
        dict(lr_schedule={"name": "linear_schedule", "arguments": [1e-4, -1e-4, 9]}),
        "lr_schedule: gives",
    ),
    "a rate of NaN": (
        dict(lr_schedule={"name": "cosine_decay", "arguments": [float("nan"), 10]}),
        "lr_schedule: gives",
    ),
    "an unknown optimizer argument": (dict(optimizer_config={"beta": 1}), "optimizer: adamw: .*optimizer_config"),
    "betas of text": (dict(optimizer_config={"betas": ["a", "b"]}), "optimizer: adamw: .*optimizer_config"),
    "one beta": (dict(optimizer_config={"betas": [0.9]}), "optimizer_config: adamw fails"),
    "too many layers": (dict(num_layers=4), "num_layers: 4 does not fit a model of 3 layers"),
    "no layers": (dict(num_layers=0), "num_layers: 0 does not fit"),
    "DoRA on 3 bits": (dict(fine_tune_type="dora", quantize=3), "no DoRA on 3-bit weights"),
    "an unknown tracker": (dict(report_to="wandb,mlflow"), "report_to: (mlflow is not|wandb is not installed)"),
    "patience without validation": (dict(patience=2, val_batches=0), "patience: there is nothing to validate on"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_what_can_be_refused_is_refused_before_the_model_is_loaded(name, dmpo_settings, monkeypatch):
    change, message = BAD_SETTINGS[name]

    def loaded(settings):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(loading, "load", loaded)
    with pytest.raises(UserError, match=message):
        train_run.train(replace(dmpo_settings, **change), "test")
    assert not run_directory.Path(dmpo_settings.adapter_path).exists()
    with pytest.raises(AssertionError, match="is loaded"):
        train_run.train(dmpo_settings, "test")


def test_every_optimizer_passes_the_check():
    for name in optimizer.KINDS:
        optimizer.check_optimizer(DmpoSettings(optimizer=name))


def test_the_validation_sample(capsys):
    examples = list(range(2500))
    default = inputs.validation_sample(DmpoSettings(), examples)
    assert len(default) == 1000 and default == sorted(set(default)) and default[-1] > 2000
    assert "validation takes 1,000 of 2,500 groups, drawn at random" in capsys.readouterr().err
    assert inputs.validation_sample(DmpoSettings(seed=5), examples) == default
    assert inputs.validation_sample(DmpoSettings(), examples[:1000]) == examples[:1000]
    assert inputs.validation_sample(DmpoSettings(val_batches=-1), examples) == examples
    assert inputs.validation_sample(DmpoSettings(val_batches=0), examples) == []
    capsys.readouterr()
    assert len(inputs.validation_sample(DmpoSettings(val_batches=3, batch_size=4), examples)) == 12
    assert "12 of 2,500" in capsys.readouterr().err


def test_the_cache_key_holds_what_can_change_a_log_prob():
    environment = device.environment()
    assert {"mlx", "mlx-lm", "device"} <= environment.keys() and all(environment.values())
    assert ("BLAS" in environment) == device.on_cpu()
    given = dict(fingerprint="f", adapter="", shared=True, environment=environment)
    changes = [dict(fingerprint="g"), dict(adapter="a"), dict(shared=False)]
    changes += [dict(environment=environment | {name: "other"}) for name in environment]
    keys = [cache_key(**{**given, **change}) for change in [{}, *changes]]
    assert len(set(keys)) == len(keys) and keys[0] == cache_key(**given)


def test_learning_rate_by_hand():
    settings = DmpoSettings(learning_rate=1.0, warmup=4, lr_schedule="linear")
    assert [optimizer.learning_rate(settings, s, 8) for s in range(8)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]
    )
    settings = replace(settings, warmup=0.0, lr_schedule="cosine")
    assert [optimizer.learning_rate(settings, s, 4) for s in range(4)] == pytest.approx(
        [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )
    assert optimizer.learning_rate(replace(settings, lr_schedule="constant"), 3, 4) == 1
    assert optimizer.learning_rate(replace(settings, warmup=0.5, lr_schedule="constant"), 0, 4) == 0.5
    mlx_lm_form = {"name": "cosine_decay", "warmup": 2, "warmup_init": 1e-7, "arguments": [1e-5, 10, 1e-7]}
    assert optimizer.learning_rate(replace(settings, lr_schedule=mlx_lm_form), 2, 12) == pytest.approx(1e-5)


def test_every_group_is_seen_once_an_epoch():
    steps = epoch_steps(11, 4, seed=0, epoch=3)
    assert [len(s) for s in steps] == [4, 4, 3] and sorted(np.concatenate(steps)) == list(range(11))
    assert not np.array_equal(np.concatenate(steps), np.concatenate(epoch_steps(11, 4, seed=0, epoch=4)))


def test_printed_orders():
    from mlx_dmpo.records import RankingExample

    example = RankingExample("u", "movie", ("a",), "p", tuple("bcdefgh"), (True, False, True, True, True, True, True))
    given = [(flag,) for flag in example.positive_first]
    assert printed_orders(example, 0, both=False, redraw=False, seed=0) == given
    assert printed_orders(example, 0, both=True, redraw=True, seed=0) == [(True, False)] * 7
    drawn = [printed_orders(example, 0, both=False, redraw=True, seed=0, epoch=e) for e in range(200)]
    assert drawn[0] != drawn[1]
    assert np.mean([flag for epoch in drawn for (flag,) in epoch]) == pytest.approx(0.5, abs=0.05)
    free = replace(example, positive_first=None)
    fixed = [printed_orders(free, i, both=False, redraw=False, seed=0, epoch=e) for i in range(3) for e in (0, 1)]
    assert fixed[0] == fixed[1] and fixed[0] != fixed[2]


@pytest.mark.slow  # on a CPU every program goes through a C++ compiler
@pytest.mark.parametrize("layers", [2, 3])
def test_a_compiled_step_equals_the_plain_scorer(layers):
    """In planned shapes, with and without frozen layers below; a second batch of the same shape, the same program."""
    model = tiny.model(lora_layers=layers)
    loss = objective.objective(DmpoSettings(sft_weight=0.5))
    compiled = train_step.StepFunction(model, GroupScorer(shared_logps, True), loss, True, keep=1e9, compiled=True)
    plain = train_step.StepFunction(model, GroupScorer(plain_logps, False), loss, False)
    for seed in (20, 21):
        batch = train_step.padding(GroupScorer(shared_logps, True), compiled=True)(
            tiny.equal_groups(np.random.default_rng(seed))
        )
        reference = np.random.default_rng(seed).normal(-30, 1, batch.answer_mask.shape[:2]).astype(np.float32)
        (total, values, margins, logps), found = compiled(batch, reference, 0.5, None)
        (total_plain, values_plain, margins_plain, logps_plain), expected = plain(batch, reference, 0.5, None)
        for a, b in ((total, total_plain), (values, values_plain), (margins, margins_plain), (logps, logps_plain)):
            np.testing.assert_allclose(np.array(a), np.array(b), atol=5e-4)
        assert tiny.relative_error(found, expected) <= 1e-4


def test_the_number_of_compiled_shapes_is_bounded(monkeypatch):
    """Past the bound a new shape is not compiled; a known shape still has its program.

    Values are the plain scorer's.
    """
    met = []
    monkeypatch.setattr(train_step, "COMPILED_SHAPES", 2)
    monkeypatch.setattr(
        train_step.mx,
        "compile",
        lambda f: lambda *given: met.append(tuple(a.shape for a in given[1].values())) or f(*given),
    )
    model, loss = tiny.model(), objective.objective(DmpoSettings())
    step = train_step.StepFunction(model, GroupScorer(shared_logps, True), loss, False, compiled=True)
    sizes = [20, 60, 100, 140, 20]
    for size in sizes:
        batch = train_step.padding(GroupScorer(shared_logps, True), compiled=True)(
            [tiny.group(np.random.default_rng(size), size, [size // 2] * 4, [5] * 4)]
        )
        reference = np.zeros(batch.answer_mask.shape[:2], np.float32)
        (_, values, _, _), _ = step(batch, reference, 1.0, None)
        expected, _ = loss(plain_logps(model, batch), mx.array(reference), batch)
        np.testing.assert_allclose(np.array(values), np.array(expected), atol=5e-4)
    assert len(set(met)) == 2 and len(met) == 3
