"""--memory auto: what it chooses, that the result is the same, what it does when nothing fits or the plan was wrong."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from test_resume import adapter, settings_of
from tiny import group

from mlx_dmpo.cli.main import main
from mlx_dmpo.core.selfcheck import GroupScorer, Probe
from mlx_dmpo.core.tree import BATCH_TOKENS, pad_groups
from mlx_dmpo.errors import UserError
from mlx_dmpo.model import cost, fit, open as opened, probe, score
from mlx_dmpo.model import shape as model_shape
from mlx_dmpo.train import memory_plan, step as train_step
from mlx_dmpo.train import run as train_run

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


def test_from_a_generous_limit_to_one_that_nothing_fits(settings, tmp_path, capsys):
    """Each limit is a little below what the choice before it needs, until even the leanest is refused."""
    manifest, losses = trained(settings)
    assert manifest["memory"]["batch_tokens"] == BATCH_TOKENS and not manifest["memory"]["grad_checkpoint"]
    assert len(losses) > 1
    chosen, limit = [manifest["memory"]], 0.0
    while len(chosen) < 30:
        last = chosen[-1]["planned_gb"]
        limit = 0.999 * (last * fit.ROOM if limit == 0 or limit > 1.05 * last else last)
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
