"""--memory auto: what it chooses, that the result is the same, what it does when nothing fits or the plan was wrong."""

import gc
import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from test_resume import adapter, settings_of

from mlx_dmpo.cli.main import main
from mlx_dmpo.config import EvaluateSettings
from mlx_dmpo.core import head, selfcheck
from mlx_dmpo.core.scorer import shared_logps
from mlx_dmpo.core.selfcheck import GroupScorer, Probe, choose_scorer
from mlx_dmpo.core.tree import BATCH_TOKENS, by_length, pad_groups
from mlx_dmpo.errors import UserError
from mlx_dmpo.judge.evaluate import read_examples
from mlx_dmpo.machine import memory
from mlx_dmpo.model import cost, device, fit, probe
from mlx_dmpo.model import shape as model_shape
from mlx_dmpo.model.open import open_scorer
from mlx_dmpo.model.random import random_qwen3
from mlx_dmpo.train import run as train_run
from mlx_dmpo.train import step as train_step

FAILED = "[malloc] Unable to allocate 8000000000 bytes."


@pytest.fixture
def settings(model_directory, data_directory, tmp_path):
    change = dict(batch_size=4, epochs=1.0, iters=None, steps_per_report=1, learning_rate=0.01, warmup=0.0)
    return settings_of("dmpo", model_directory, data_directory, tmp_path / "run", **change)


def trained(settings):
    """The manifest and the losses of a run."""
    path = train_run.train(settings, "test")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return json.loads((path / "manifest.json").read_text()), [x["loss"] for x in lines if "loss" in x]


@pytest.mark.slow
def test_from_a_generous_limit_to_one_that_nothing_fits(settings, tmp_path, capsys):
    """Each limit is a little below what the choice before it needs, until even the leanest is refused.

    On a wider model: of a few megabytes, the buffers that MLX has not yet given back are a third.
    """
    wide = tiny.save_model(tmp_path / "wide", hidden_size=256, intermediate_size=768, num_hidden_layers=4)
    settings = replace(settings, model=str(wide))
    manifest, losses = trained(settings)
    assert manifest["memory"]["batch_tokens"] == BATCH_TOKENS and not manifest["memory"]["grad_checkpoint"]
    assert len(losses) > 1
    chosen, limit, refused = [manifest["memory"]], math.inf, ""
    while len(chosen) < 30:
        limit = 0.97 * min(limit, chosen[-1]["planned_gb"] * fit.ROOM)
        path = tmp_path / f"run{len(chosen)}"
        try:
            manifest, found = trained(replace(settings, memory_limit=limit, adapter_path=str(path)))
        except UserError as error:
            refused = str(error)
            break
        chosen.append(manifest["memory"])
        assert manifest["peak_memory_gb"] <= limit
        assert found == pytest.approx(losses, abs=1e-5)
    capsys.readouterr()
    order = [(c["grad_checkpoint"], -c["batch_tokens"]) for c in chosen]
    assert order == sorted(order) and len(set(order)) >= 4  # both kinds of change, the fastest first
    assert chosen[-1]["grad_checkpoint"] and chosen[-1]["batch_tokens"] < 500
    assert "\n" not in refused and "the leanest plan" in refused and "recomputed" in refused
    assert "--max-seq-length" in refused or "add --" in refused
    with pytest.raises(SystemExit) as end:
        main(["dmpo", "--model", settings.model, "--data", settings.data, "--memory-limit", f"{limit:.6f}",
              "--batch-size", "4", "--adapter-path", str(tmp_path / "no")])  # fmt: skip
    assert end.value.code == 2 and "the leanest plan" in capsys.readouterr().err


def test_with_ample_memory_nothing_changes(settings, tmp_path):
    train_run.train(settings, "test")
    train_run.train(replace(settings, memory="fixed", adapter_path=str(tmp_path / "fixed")), "test")
    one, other = adapter(tmp_path / "run"), adapter(tmp_path / "fixed")
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_resume_keeps_to_the_choice_unless_told(settings, tmp_path):
    first, _ = trained(replace(settings, batch_tokens=300, grad_checkpoint=True, save_every=1))
    assert first["memory"]["chosen_by"] == "as given"
    again = replace(settings, resume=True, memory_limit=0.0)
    (tmp_path / "run" / "manifest.json").unlink()
    kept, _ = trained(again)
    assert kept["memory"]["chosen_by"] == "as in the checkpoint"
    assert (kept["memory"]["batch_tokens"], kept["memory"]["grad_checkpoint"]) == (300, True)
    (tmp_path / "run" / "manifest.json").unlink()
    told, _ = trained(replace(again, batch_tokens=4096, grad_checkpoint=False))
    assert (told["memory"]["batch_tokens"], told["memory"]["grad_checkpoint"]) == (4096, False)


def test_a_failed_allocation_steps_down_to_recomputation(settings, tmp_path, monkeypatch, capsys):
    settings = replace(settings, optimizer="sgd", learning_rate=0.1)  # AdamW scales rounding up where gradients are 0
    whole = adapter(train_run.train(replace(settings, adapter_path=str(tmp_path / "whole")), "test"))
    original, failed = train_step.StepFunction.prepare, []

    def prepare(self, micro_batch, weight):
        if not self.checkpoint:
            failed.append(len(micro_batch.rows))
            raise RuntimeError(FAILED)
        return original(self, micro_batch, weight)

    monkeypatch.setattr(train_step.StepFunction, "prepare", prepare)
    manifest, _ = trained(settings)
    leaner = adapter(tmp_path / "run")
    assert failed == [4, 2]  # whole, its first half; then both halves with recomputation
    assert max(float(np.abs(whole[k] - leaner[k]).max()) for k in whole) < 1e-6
    assert manifest["memory"]["stepped_down"] == 1 and manifest["memory"]["grad_checkpoint"]
    assert "step 1: memory did not suffice" in (err := capsys.readouterr().err) and "recomputed" in err
    with pytest.raises(UserError, match="memory: this needs about"):  # an explicit flag is kept to
        train_run.train(replace(settings, grad_checkpoint=False, adapter_path=str(tmp_path / "given")), "test")


def opened(settings, **change):
    found = EvaluateSettings(**{"model": settings.model, "data": settings.data, "batch_size": 8, **change})
    return open_scorer(found), read_examples(found)


def margins(scorer, examples):
    return np.concatenate([scores.margins.reshape(-1) for scores in scorer.score(examples)])


def test_scoring_runs_fewer_tokens_at_once_and_keeps_to_the_limit(settings, capsys):
    scorer, examples = opened(settings)
    expected = margins(scorer, examples)
    assert "tokens at once" not in capsys.readouterr().err
    groups = [scorer.encoder.encode(e, [(True, False)] * len(e.negatives)) for e in examples]
    shape, base = scorer.shape, probe.beside(scorer.base.model, 0.0)
    needs = {f: fit.tokens_at_once(shape, groups, 8, f, 4) for f in (1e12, 0.0)}
    (most, ample), (fewest, least) = needs[1e12], needs[0.0]
    assert most == BATCH_TOKENS and fewest < 500 and least < ample
    limit = fit.ROOM * (base + 0.5 * (least + ample)) / 1e9
    lean, examples = opened(settings, memory_limit=limit)
    lean.groups  # noqa: B018  (its check has a peak of its own)
    mx.reset_peak_memory()
    found = margins(lean, examples)
    assert mx.get_peak_memory() / 1e9 <= limit
    assert "tokens at once in scoring" in capsys.readouterr().err
    assert np.abs(found - expected).max() < 1e-3


def test_scoring_steps_down_once(settings, capsys):
    scorer, examples = opened(settings, batch_size=4)
    expected, tried = margins(scorer, examples), []
    real = scorer.groups.logps

    def logps(model, batch, **how):
        tried.append(len(batch.groups))
        if len(batch.groups) > 2:
            raise RuntimeError(FAILED)
        return real(model, batch, **how)

    scorer.groups = GroupScorer(logps, True)
    found = margins(scorer, examples)
    assert np.abs(found - expected).max() < 1e-4 and tried.count(4) < 3
    assert "do not fit in memory" in capsys.readouterr().err


SHAPE = model_shape.ModelShape(4, 256, 768, 4, 2, 64, 4096, True)


def test_the_account_is_scaled_by_what_the_device_takes():
    """A device that keeps half of what a CPU keeps: measured by a probe, and no run is refused for the other half."""
    training = cost.Training(4, activation_bytes=4)
    batch = pad_groups(cost.assumed_groups(1, 2, history=8, vocabulary=4096))
    counted = cost.memory(SHAPE, cost.Work.of(batch), replace(training, optimizer_states=0))

    def scale(share):
        peak = int(share * probe.SMALL_BATCH[False] * counted["activations"] + counted["gradients"] + counted["logits"])
        return probe.scale_of(SHAPE, training, GroupScorer(shared_logps, True, kept=Probe(batch, peak)))

    assert scale(0.5).kept == 0.5 and scale(2.1).kept == 2.0 and scale(0.01).kept == 0.25
    assert scale(0.8) == scale(1.2) == cost.AS_COUNTED  # as near as a small batch can tell
    case = fit.Case(SHAPE, training, cost.assumed_groups(4, 5, vocabulary=4096), 4)
    limit = 0.8 * fit.ROOM * case.peak()
    chosen = fit.choose(replace(case, scale=scale(0.5)), limit)
    assert (chosen.batch_tokens, chosen.training.checkpoint) == (BATCH_TOKENS, False)
    assert fit.choose(case, limit).batch_tokens < BATCH_TOKENS


def test_this_device_takes_what_is_counted(monkeypatch):
    """The probes of the self-check, on the CPU that the coefficients were fitted on, while an earlier model is freed."""
    model = random_qwen3(SHAPE, mx.float32)
    model.train()
    earlier = [mx.zeros((4 << 20,))]
    earlier.append(earlier)  # only the garbage collector finds it
    mx.eval(earlier[0])
    del earlier
    monkeypatch.setattr(
        selfcheck, "shared_logps", lambda *args, **how: (gc.collect() and None) or shared_logps(*args, **how)
    )
    scorer = choose_scorer(model, SHAPE.vocabulary)
    assert scorer.shared and scorer.kept.peak > scorer.recomputed.peak > 0 and scorer.forward.peak > 0
    if device.on_cpu():
        assert probe.scale_of(SHAPE, cost.Training(4, activation_bytes=4), scorer) == cost.AS_COUNTED


def test_a_long_group_among_short_ones_is_planned_for():
    groups = [
        *cost.assumed_groups(3, 1, history=1, vocabulary=4096),
        *cost.assumed_groups(2, 1, history=200, vocabulary=4096),
    ]
    alone = cost.Work.of(pad_groups(groups[-1:]))
    heavy = max(cost.heaviest(groups, 4, groups[-1].shared_tokens + 400), key=lambda work: work.prefix_scores)
    assert heavy.branches == 8 and heavy.prefix_scores == 4 * alone.prefix_scores > 0


@pytest.mark.parametrize("tokens", [300, 500, 1000, 3000])
def test_no_micro_batch_takes_more_than_is_planned(tokens):
    """Whatever groups come into one step: also where two middling ones run together and the longest runs alone."""
    rng, training = np.random.default_rng(tokens), cost.Training(4, activation_bytes=4)
    groups = [
        cost.assumed_groups(1, int(rng.integers(1, 4)), history=int(h), vocabulary=4096, seed=int(h))[0]
        for h in rng.integers(1, 40, 120)
    ]

    def peak(work):
        return cost.memory(SHAPE, work, training)["peak"]

    for _ in range(20):
        some = [groups[i] for i in rng.choice(len(groups), rng.integers(4, 40), replace=False)]
        planned = max(map(peak, cost.heaviest(some, 4, tokens)))
        for _ in range(5):
            step = [some[i] for i in rng.permutation(len(some))[:12]]
            for rows in by_length(step, 4, tokens):
                assert peak(cost.Work.of(pad_groups([step[i] for i in rows]))) <= 1.02 * planned
        assert max(map(peak, cost.heaviest(fit.deciding(some, 4), 4, tokens))) == planned


def test_the_chunks_of_the_head_do_not_add_up(monkeypatch):
    """MLX allocates for many operations ahead: without waiting, every chunk's logits would be there at once."""
    monkeypatch.setattr(head, "LOGITS_BYTES", 4 << 20)
    shape = replace(SHAPE, layers=2, hidden=64, intermediate=96, vocabulary=65_536)
    model, groups = (
        random_qwen3(shape, mx.float32, 2),
        cost.assumed_groups(4, 5, history=4, vocabulary=shape.vocabulary),
    )
    batch, training = pad_groups(groups), cost.Training(2, activation_bytes=4, optimizer_states=0)
    logits = 4 * len(batch.rows) * shape.vocabulary
    assert logits > 40 * head.LOGITS_BYTES

    def above(run):
        mx.eval(model.parameters())
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(run())
        return mx.get_peak_memory() - before

    model.eval()
    assert above(lambda: shared_logps(model, batch)) < 0.25 * logits
    model.train()
    step = mx.value_and_grad(lambda parameters: (model.update(parameters), shared_logps(model, batch).sum())[1])
    case = fit.Case(shape, training, groups, len(groups))
    model_bytes = case.memory()["weights"] + case.memory()["adapter"]
    planned = case.peak() - model_bytes
    assert above(lambda: step(model.trainable_parameters())) > 1.5 * planned
    with memory.waiting_at(case.wait_at(fit.ROOM * case.peak()) + mx.get_active_memory() - model_bytes):
        assert above(lambda: step(model.trainable_parameters())) < 1.25 * planned


@pytest.mark.slow
def test_planned_peaks_are_within_12_percent_of_measured_ones(monkeypatch):
    """The configurations and families of docs/plan.md, and what --memory auto chooses under ever smaller limits."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import plan_accuracy

    found = {c.name: plan_accuracy.measure(c)["error"] for c in plan_accuracy.CONFIGURATIONS}
    for name, checkpoint in product(plan_accuracy.FAMILIES, (False, True)):
        row = plan_accuracy.measure_family(name, checkpoint)
        found[row["name"]] = row["error"]
    assert {name: error for name, error in found.items() if abs(error) > 0.12} == {}
    for configuration, limit in plan_accuracy.auto_choices():
        row = plan_accuracy.measure(configuration)
        assert abs(row["error"]) <= 0.12 and row["measured_mb"] <= limit / 1e6, row
