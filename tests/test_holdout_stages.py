"""Holding users out, from the first stage to the second: renamed users, and training on everyone"""

import json
from dataclasses import replace

import numpy as np
import pytest

from mlx_dmpo import assets, config
from mlx_dmpo.cli.main import main
from mlx_dmpo.data import formats
from mlx_dmpo.machine import files, trained_on
from mlx_dmpo.records import RankingExample
from mlx_dmpo.train import holdout


def rows(users):
    """Two rows a user; each user's history is his own."""
    return [
        RankingExample(
            f"u{u}",
            "movie",
            tuple(f"title {u}-{i}" for i in range(6)),
            f"liked {u}-{n}",
            (f"bad {u}",),
            source=f"f:{u}-{n}",
        )
        for u in range(users)
        for n in range(2)
    ]


@pytest.mark.parametrize("seed", range(10))
def test_held_out_users_are_found_again_by_history(tmp_path, seed):
    """The later file has other names, another order, and histories of which the first title is missing."""
    data = rows(40)
    train, held = holdout.hold_out(data, 0.1, seed)
    holdout.write(tmp_path, held)
    trained_on.write(tmp_path, train)
    later = [replace(e, user=f"other {e.user}", history=e.history[1:]) for e in data]
    later = [later[i] for i in np.random.default_rng(seed).permutation(len(later))]
    _, found = holdout.hold_out(later, 0.1, seed + 1, str(tmp_path))
    assert {e.source for e in found} == {e.source for e in held}


def test_the_setting(tmp_path):
    assert config.resolve(config.DmpoSettings, None, {"preset": "released-code"}).holdout == 0
    (tmp_path / "c.yaml").write_text("holdout: 0\n")
    assert config.resolve(config.SftSettings, tmp_path / "c.yaml", {}).holdout == 0


@pytest.fixture
def demo_file(tmp_path):
    """Training users of the demo as one file, without a validation split."""
    path = tmp_path / "demo.jsonl"
    examples = formats.load_examples(assets.data_dir(), "train")[:40]
    path.write_text("".join(json.dumps(e.to_json()) + "\n" for e in examples))
    return path


def trained(command, data, out, *more):
    with pytest.raises(SystemExit) as stop:
        main([command, "--data", str(data), "--adapter-path", str(out), "--plain", "--iters", "2", *more])
    assert stop.value.code == 0
    return files.read_json(out / "manifest.json")


def test_both_stages_of_the_demo_hold_the_same_users_out(demo_file, tmp_path):
    first = trained("sft", demo_file, tmp_path / "sft")
    second = trained("dmpo", demo_file, tmp_path / "dmpo", "--start-adapter", str(tmp_path / "sft"))
    assert first["held_out"] == second["held_out"] and first["held_out"]["users"] >= 5


@pytest.mark.slow
def test_no_holdout_is_the_training_without_validation_byte_for_byte(demo_file, tmp_path, capsys):
    made = trained("sft", demo_file, tmp_path / "a", "--no-holdout")
    captured = capsys.readouterr()
    assert "nothing is held out" in captured.out + captured.err and made["held_out"] is None
    trained("sft", demo_file, tmp_path / "b", "--val-batches", "0")
    trained("sft", demo_file, tmp_path / "c", "--holdout", "0")
    assert len({(tmp_path / name / "adapters.safetensors").read_bytes() for name in "abc"}) == 1
    assert trained("sft", demo_file, tmp_path / "d", "--holdout", "0.2")["held_out"]["users"] > 5
