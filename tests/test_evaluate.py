"""Evaluation: every pair in both orders with both answers, and files that say so."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_dmpo.cli.main import main
from mlx_dmpo.config import EvaluateSettings
from mlx_dmpo.data import formats
from mlx_dmpo.judge import evaluate, metrics
from mlx_dmpo.machine import files
from mlx_dmpo.model import loading
from mlx_dmpo.prompts import pairwise


@pytest.fixture
def settings(model_directory, data_directory, tmp_path):
    return EvaluateSettings(model=str(model_directory), data=str(data_directory), out=str(tmp_path / "eval"))


def by_hand(base, branch):
    """Float64 log-prob of a branch's answer and end of turn, from the model's own logits."""
    import mlx.core as mx

    tokenizer = base.tokenizer
    prompt = tokenizer.apply_chat_template(list(branch.messages), add_generation_prompt=True)
    tokens = prompt + tokenizer.encode(branch.answer, add_special_tokens=False) + [tokenizer.eos_token_id]
    logits = np.array(base.model(mx.array(tokens)[None])[0], np.float64)
    logits -= logits.max(-1, keepdims=True)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(logps[t - 1, tokens[t]] for t in range(len(prompt), len(tokens)))


def test_scores_are_the_models_own(settings, pictures):
    result = evaluate.evaluate(settings)
    rows = files.read_lines(Path(settings.out) / "scores.jsonl")
    examples = formats.load_examples(settings.data, "test")
    assert [(r["user"], r["positive"], r["negative"]) for r in rows] == [
        (e.user, e.positive, n) for e in examples for n in e.negatives
    ]
    base = loading.load(settings)
    row = 0
    for example in examples[:4]:
        group = pairwise.build_group(example, [(True, False)] * len(example.negatives))
        for k in range(len(example.negatives)):
            for order, name in enumerate(("positive_first", "positive_second")):
                chosen, rejected = group.branches[4 * k + 2 * order : 4 * k + 2 * order + 2]
                assert rows[row][name]["chosen_logp"] == pytest.approx(by_hand(base, chosen), abs=5e-4)
                assert rows[row][name]["rejected_logp"] == pytest.approx(by_hand(base, rejected), abs=5e-4)
            summed = sum(
                rows[row][n]["chosen_logp"] - rows[row][n]["rejected_logp"]
                for n in ("positive_first", "positive_second")
            )
            assert rows[row]["margin"] == pytest.approx(summed, abs=1e-9)
            row += 1
    assert result == json.loads((Path(settings.out) / "metrics.json").read_text())
    assert result["popularity"].pop("source") == "how often the title was liked in train.jsonl"
    assert result == metrics.ranking_metrics(rows)  # the rows hold all that the metrics are made of
    manifest = json.loads((Path(settings.out) / "manifest.json").read_text())
    assert list(manifest["inputs"]) == [f"{settings.data}/test.jsonl"] and manifest["adapter"] is None
    for picture in ("accuracy.png", "margins.png"):
        assert (Path(settings.out) / picture).read_bytes()[:4] == b"\x89PNG"


def test_the_plain_scorer_gives_the_same_numbers(settings, tmp_path):
    shared = evaluate.evaluate(replace(settings, limit=5))
    plain = evaluate.evaluate(replace(settings, limit=5, scoring="plain", out=str(tmp_path / "plain")))
    assert plain["n"] == shared["n"]
    assert plain["mean_margin"]["value"] == pytest.approx(shared["mean_margin"]["value"], abs=1e-3)


def test_negatives_and_limit(settings):
    result = evaluate.evaluate(replace(settings, num_negatives=1, limit=7))
    assert (result["n"], result["k"], result["users"]) == (7, 1, 7)


def test_the_commands_table_and_a_finished_directory(settings, capsys):
    arguments = ["evaluate", "--model", settings.model, "--data", settings.data, "--out", settings.out, "--limit", "11"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "pair accuracy" in out and "position bias" in out and "AUC (release)" in out and "[" in out
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "finished run" in capsys.readouterr().err
