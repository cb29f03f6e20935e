"""Both stages on a real language model, SmolLM2-135M-Instruct: 20 training and 40 other users of the embedded data."""

import json
import subprocess
import sys

import pytest
from test_bad_input import run

from mlx_dmpo import assets

pytestmark = pytest.mark.slow


def part(split, rows, path):
    lines = (assets.data_dir() / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_both_stages_on_twenty_users(smollm2, tmp_path, capsys):
    """DMPO raises the margin, over both printed orders, of what it was trained on, and mlx-lm loads its adapter."""
    model = str(smollm2[0])
    train, test = part("train", 20, tmp_path / "train.jsonl"), part("test", 40, tmp_path / "test.jsonl")

    def ran(*arguments):
        code, _, err = run(capsys, *arguments)
        assert code == 0, err

    def evaluated(data, name, *more):
        ran("evaluate", "--model", model, "--data", data, "--num-negatives", 1, "--out", tmp_path / name, *more)
        return json.loads((tmp_path / name / "metrics.json").read_text())

    train_on = ["--model", model, "--data", train, "--no-holdout"]
    sft, dmpo = tmp_path / "sft", tmp_path / "dmpo"
    ran("sft", *train_on, "--adapter-path", sft, "--epochs", 2)
    ran("dmpo", *train_on, "--start-adapter", sft, "--adapter-path", dmpo, "--epochs", 2, "--learning-rate", 5e-5)

    base, after_sft = evaluated(train, "base"), evaluated(train, "of-sft", "--adapter-path", sft)
    after = evaluated(train, "of-dmpo", "--adapter-path", dmpo)
    others = evaluated(test, "others", "--adapter-path", dmpo)
    for name, found in {"base": base, "sft": after_sft, "dmpo": after, "dmpo, other users": others}.items():
        print(name, found["n"], found["mean_margin"], found["pair_accuracy"], found.get("position_bias"))
    assert (base["n"], after["n"], others["n"]) == (20, 20, 40)
    assert after["mean_margin"]["value"] > max(base["mean_margin"]["value"], after_sft["mean_margin"]["value"])

    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", model, "--adapter-path", str(dmpo)]
    done = subprocess.run([*command, "--prompt", "Name a film.", "--max-tokens", "8"], capture_output=True, text=True)
    assert done.returncode == 0 and "Generation: 8 tokens" in done.stdout, done.stderr
