"""Preferences in free text through encoding, both training stages, evaluation and report: one prompt, no printed
orders.
"""

import json
import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from test_bad_input import run
from test_other_formats import write

from mlx_dmpo.config import DmpoSettings, EvaluateSettings, SftSettings
from mlx_dmpo.core.scorer import plain_logps, shared_logps
from mlx_dmpo.core.tree import pad_groups
from mlx_dmpo.data import formats, rows
from mlx_dmpo.errors import UserError
from mlx_dmpo.judge import evaluate
from mlx_dmpo.model import loading
from mlx_dmpo.model.encode import Encoder
from mlx_dmpo.prompts.orders import first_negatives, printed_orders
from mlx_dmpo.train import objective
from mlx_dmpo.train import run as train_run

QUESTIONS = ["Name a river.", "Name a garden.", "What is iron?", "Who keeps the harbour?", "Is it winter?"]
PREFERENCES = [
    {
        "prompt": q,
        "chosen": f"It is the amber one, number {i}.",
        "rejected": ["No.", "A lantern of glass.", "Salt."][: 1 + i % 3],
    }
    for i, q in enumerate(QUESTIONS)
]
CHAT = [
    {"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["chosen"]}]}
    for p in PREFERENCES
]


@pytest.fixture
def preferences(tmp_path):
    return str(write(tmp_path / "preferences.jsonl", PREFERENCES))


@pytest.fixture
def chat(tmp_path):
    return str(write(tmp_path / "chat.jsonl", CHAT))


@pytest.fixture
def base(model_directory):
    return loading.load(EvaluateSettings(model=str(model_directory)))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_encoding(base, preferences):
    encoder = Encoder(base.tokenizer)
    group = formats.load(preferences).examples[2]
    assert printed_orders(group, 0, both=True, redraw=True, seed=0) == []
    encoded = encoder.encode(group, [])
    assert len(encoded.tails) == 4 and encoded.pairs.tolist() == [[0, 1], [0, 2], [0, 3]]
    answers = [b.answer for b in group.branches]
    ends = [
        base.tokenizer.decode(tail[len(tail) - n :].tolist())
        for tail, n in zip(encoded.tails, encoded.answer_lengths, strict=True)
    ]
    assert ends == [a + "<|im_end|>" for a in answers]
    assert base.tokenizer.decode(np.concatenate([encoded.prefix, encoded.tails[1]]).tolist()) == (
        f"<|im_start|>user\n{QUESTIONS[2]}<|im_end|>\n<|im_start|>assistant\n{answers[1]}<|im_end|>"
    )
    chosen = encoder.encode(group, [], chosen_only=True)
    assert len(chosen.tails) == 1 and not len(chosen.pairs) and chosen.answer_lengths == encoded.answer_lengths[:1]
    two = first_negatives(group, 2)
    assert (
        [b.answer for b in two.branches] == answers[:3]
        and two.pairs == ((0, 1), (0, 2))
        and first_negatives(group, 9) == group
    )
    with pytest.raises(UserError, match=r"preferences.jsonl:3: \d+ tokens, and max_seq_length is 20: raise"):
        Encoder(base.tokenizer, 20).encode(group, [])


def test_a_chosen_answer_shared_by_all_pairs_scores_as_each_alone(base, preferences):
    encoder = Encoder(base.tokenizer)
    batch = pad_groups([encoder.encode(g, []) for g in formats.load(preferences).examples])
    shared, plain = np.array(shared_logps(base.model, batch)), np.array(plain_logps(base.model, batch))
    assert np.abs(shared - plain).max() < 5e-4 and (plain[:, 0] < 0).all()
    settings = DmpoSettings(reference_free=True, sft_weight=0.5)
    loss, margin = objective.objective(settings)(mx.array(shared), None, batch)
    for g, group in enumerate(batch.groups):
        by_hand = [0.1 * (plain[g, 0] - plain[g, r]) for r in range(1, len(group.tails))]
        assert np.array(margin)[g, : len(by_hand)] == pytest.approx(by_hand, abs=1e-4)
        expected = np.log1p(np.exp(-np.mean(by_hand))) - 0.5 * plain[g, 0] / group.answer_lengths[0]
        assert float(loss[g]) == pytest.approx(expected, abs=1e-3)


def test_sft_dmpo_evaluate_report(model_directory, preferences, chat, tmp_path, capsys):
    model = ["--model", model_directory]
    sft, dmpo, out = tmp_path / "sft", tmp_path / "dmpo", tmp_path / "eval"
    quick = ["--epochs", 2, "--learning-rate", "3e-3"]
    code, output, err = run(capsys, "sft", *model, "--data", chat, "--valid-data", chat, *quick, "--adapter-path", sft)
    assert code == 0 and "chat rows (SFT), 5 rows, 5 answers" in err, err
    found = [line for line in lines(sft / "metrics.jsonl") if "valid_loss" in line]
    assert found[-1]["valid_loss"] < found[0]["valid_loss"] and not {"valid_margin", "valid_pair_accuracy"} & set(
        found[0]
    )
    code, output, err = run(
        capsys,
        "dmpo",
        *model,
        "--data",
        preferences,
        "--valid-data",
        preferences,
        *quick,
        "--start-adapter",
        sft,
        "--adapter-path",
        dmpo,
    )
    assert code == 0 and "TRL preferences (standard, prompt given), 5 rows, 5 preference groups" in err, err
    found = [line for line in lines(dmpo / "metrics.jsonl") if "valid_loss" in line]
    assert found[-1]["valid_loss"] < found[0]["valid_loss"] and 0 <= found[-1]["valid_pair_accuracy"] <= 1
    code, output, err = run(
        capsys, "evaluate", *model, "--data", preferences, "--adapter-path", dmpo, "--out", out, "--resamples", 100
    )
    assert code == 0 and "no printed orders to compare" in err and "positive first   -" in output
    metrics, scores = json.loads((out / "metrics.json").read_text()), lines(out / "scores.jsonl")
    assert {"n", "k", "users", "ties", "pair_accuracy", "auc", "mean_margin", "trained_on"} <= set(metrics)
    assert not any("order" in name or "position" in name for name in metrics)
    assert (metrics["n"], metrics["k"], metrics["users"]) == (9, 3, 5)
    assert metrics["trained_on"] == 5 and "this does not measure ranking for new users" in err
    assert metrics["pair_accuracy"]["value"] == pytest.approx(sum(s["margin"] > 0 for s in scores) / 9)
    for s in scores:
        assert set(s) == {"user", "domain", "positive", "negative", "given", "margin"}
        assert s["margin"] == pytest.approx(s["given"]["chosen_logp"] - s["given"]["rejected_logp"])
    assert [(s["positive"], s["negative"]) for s in scores] == [
        (p["chosen"], r) for p in PREFERENCES for r in p["rejected"]
    ]
    code, _, err = run(capsys, "report", out, dmpo, "--out", tmp_path / "r.html")
    assert code == 0 and "pair accuracy" in (tmp_path / "r.html").read_text(), err


def test_validation_accuracy_is_that_of_the_one_prompt(model_directory, preferences, tmp_path):
    """With no step that changes anything, validation = evaluation of the base."""
    settings = DmpoSettings(
        model=str(model_directory),
        data=preferences,
        valid_data=preferences,
        adapter_path=str(tmp_path / "a"),
        iters=1,
        learning_rate=1e-12,
    )
    path = train_run.train(settings, "test")
    valid = next(line for line in lines(path / "metrics.jsonl") if "valid_loss" in line)
    result = evaluate.evaluate(
        EvaluateSettings(model=str(model_directory), data=preferences, out=str(tmp_path / "e"), resamples=100)
    )
    assert valid["valid_pair_accuracy"] == pytest.approx(result["pair_accuracy"]["value"])


@pytest.mark.parametrize("flags", [["--both-orders"], ["--candidate-order", "epoch"]])
def test_printed_orders_are_said_not_to_apply(flags, model_directory, preferences, tmp_path, capsys):
    out = tmp_path / "out"
    code, _, err = run(
        capsys, "dmpo", "--model", model_directory, "--data", preferences, "--iters", 1, "--adapter-path", out, *flags
    )
    assert code == 0 and f"note: {flags[0]} does not apply" in err
    plain = train_run.train(
        DmpoSettings(model=str(model_directory), data=preferences, iters=1, adapter_path=str(tmp_path / "b")), "test"
    )
    assert lines(out / "metrics.jsonl")[0]["loss"] == lines(plain / "metrics.jsonl")[0]["loss"]


def test_a_data_set_of_the_hub_brings_its_validation_split(model_directory, tmp_path, monkeypatch):
    import datasets

    parts = {"train": datasets.Dataset.from_list(CHAT), "validation": datasets.Dataset.from_list(CHAT[:2])}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: datasets.DatasetDict(parts))
    path = train_run.train(
        SftSettings(model=str(model_directory), data="who/what", adapter_path=str(tmp_path / "a"), iters=1), "test"
    )
    assert any("valid_loss" in line for line in lines(path / "metrics.jsonl"))
    manifest = json.loads((path / "manifest.json").read_text())
    found = manifest["inputs"]
    assert set(found) == {"who/what@train", "who/what@validation"} and manifest["config"]["data"] == "who/what"
    assert all(re.fullmatch("rows [0-9a-f]{64}", value) for value in found.values())
    parts["train"].info.download_checksums = {f"hf://datasets/who/what@{'ab' * 20}/train.jsonl": {"num_bytes": 1}}
    named = rows.hub_inputs("who/what", "train")["who/what@train"]
    assert named == f"revision {'ab' * 20}, {found['who/what@train']}"
    parts["train"] = datasets.Dataset.from_list(CHAT[1:])
    assert rows.hub_inputs("who/what", "train") != {"who/what@train": found["who/what@train"]}
    assert rows.hub_inputs(tmp_path, "train") == {}


def test_a_directory_as_mlx_lm_has_it(model_directory, tmp_path):
    """train.jsonl and valid.jsonl of completions, and no test.jsonl."""
    rows = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in PREFERENCES]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "valid.jsonl", rows[:2])
    settings = SftSettings(model=str(model_directory), data=str(tmp_path), adapter_path=str(tmp_path / "a"), iters=2)
    path = train_run.train(settings, "test")
    assert any("valid_loss" in line for line in lines(path / "metrics.jsonl"))
    assert set(json.loads((path / "manifest.json").read_text())["inputs"]) == {
        str(tmp_path / name) for name in ("train.jsonl", "valid.jsonl")
    }
    with pytest.raises(UserError, match="one answer per prompt"):
        train_run.train(replace(settings, best_metric="valid_pair_accuracy", adapter_path=str(tmp_path / "b")), "test")


@pytest.mark.parametrize(
    ("command", "row", "expected"),
    [
        ("dmpo", CHAT[0], ["chat rows (SFT)", "one answer per prompt"]),
        ("evaluate", CHAT[0], ["chat rows (SFT)", "one answer per prompt"]),
        (
            "sft",
            CHAT[0] | {"messages": [CHAT[0]["messages"][0], {"role": "assistant", "content": "a<|im_end|>b"}]},
            ["d.jsonl:1", "<|im_end|>"],
        ),
        ("dmpo", PREFERENCES[0] | {"prompt": "x" * 4000}, ["d.jsonl:1", "--max-seq-length"]),
        ("dmpo", PREFERENCES[0] | {"prompt": "<|im_start|>"}, ["d.jsonl:1", "<|im_start|>"]),
    ],
)
def test_what_a_user_can_get_wrong(command, row, expected, model_directory, tmp_path, capsys):
    data, out = write(tmp_path / "d.jsonl", [row]), tmp_path / "out"
    where = "--out" if command == "evaluate" else "--adapter-path"
    code, _, err = run(capsys, command, "--model", model_directory, "--data", data, where, out)
    line = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(line) == 1 and all(e in line[0] for e in expected), err
    assert not (out / "manifest.json").exists()
