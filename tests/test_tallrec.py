"""TALLRec's and S-DPO's own files, as they are, from training to metric, in each prompt form that fits"""

import json

import numpy as np
import pytest

from mlx_dmpo.baselines.in_context import in_context, worked
from mlx_dmpo.cli.main import main
from mlx_dmpo.config.baseline import BASELINES, BaselineSettings, check_baseline
from mlx_dmpo.data import formats
from mlx_dmpo.data.rows import read_rows
from mlx_dmpo.errors import UserError
from mlx_dmpo.prompts import template as prompts
from mlx_dmpo.records import RankingExample


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code


def metrics(path):
    return json.loads((path / "metrics.json").read_text())


def head(file, directory, rows):
    """The first rows of a released file, in its own form."""
    directory.mkdir(exist_ok=True)
    (directory / file.name).write_text(json.dumps([row for _, row in read_rows(file, "test")][:rows]))
    return directory / file.name


def chain(model, train, test, out, prompt, *more):
    """sft for two steps, dmpo for two, evaluate: the evaluation's metrics."""
    shared = ("--model", model, "--prompt", prompt, "--max-seq-length", 2048, *more)
    short = ("--iters", 2, "--batch-size", 2, "--grad-accumulation-steps", 1, "--steps-per-eval", 1000)
    assert run("sft", *shared, *short, "--data", train, "--adapter-path", out / "sft") == 0
    start = ("--start-adapter", out / "sft", "--num-negatives", 3)
    assert run("dmpo", *shared, *short, *start, "--data", train, "--adapter-path", out / "dmpo") == 0
    limit = ("--limit", 3, "--num-negatives", 4)
    assert run("evaluate", *shared, *limit, "--data", test, "--adapter-path", out / "dmpo") == 0
    return metrics(out / "dmpo" / "eval")


@pytest.mark.parametrize("prompt", ["pointwise", "pairwise", "direct"])
def test_tallrec_files_from_train_to_metric(shared, tmp_path, prompt):
    source = shared / "data" / "tallrec-movie"
    train, test = (head(source / f"{name}.json", tmp_path / "data", 40) for name in ("train", "test"))
    found = chain(shared / "models" / "ml1m-qwen3", train, test, tmp_path, prompt)
    assert found["n"] >= 1 and 0 <= found["auc"]["value"] <= 1
    assert ("pair_accuracy_positive_first" in found) == (prompt == "pairwise")


@pytest.mark.parametrize("prompt", ["listwise", "direct"])
def test_s_dpo_files_from_train_to_metric(shared, tmp_path, prompt):
    file = head(shared / "data" / "s-dpo-lastfm" / "lastfm-val.json", tmp_path / "data", 6)
    found = chain(shared / "models" / "ml1m-qwen3", file, file, tmp_path, prompt, "--domain", "music")
    assert found["n"] == 3 * 4 and ("place_wins" in found) == (prompt == "listwise")


def test_s_dpo_ranks_its_own_candidates(shared, tmp_path):
    """HR@k and NDCG among the file's 20 candidates, and how many greedy answers are valid."""
    file = head(shared / "data" / "s-dpo-lastfm" / "lastfm-val.json", tmp_path / "data", 4)
    about = (
        "--data",
        file,
        "--domain",
        "music",
        "--prompt",
        "direct",
        "--candidates",
        20,
        "--candidate-negatives",
        "file",
    )
    more = ("--generate", 1, "--max-tokens", 16, "--num-negatives", 1, "--limit", 2, "--out", tmp_path / "eval")
    assert run("evaluate", "--model", shared / "models" / "ml1m-qwen3", *about, *more) == 0
    found = metrics(tmp_path / "eval")
    assert {"hr@1", "hr@5", "ndcg@5"} <= set(found) and "generation" in found
    rows = [json.loads(line) for line in (tmp_path / "eval" / "candidates.jsonl").read_text().splitlines()]
    assert [row["candidates"] for row in rows] == [20, 20]  # all of the lists, whatever --num-negatives


# --- the untuned language model, and `baseline` as a command


def example(user, history, positive, negatives):
    return RankingExample(user, "movie", tuple(history), positive, tuple(negatives))


TRAINING = [example(f"u{n}", [f"old {n}"], f"liked {n}", [f"bad {n}", f"worse {n}"]) for n in range(8)]


@pytest.mark.parametrize("form", ["pairwise", "listwise", "direct", "pointwise"])
def test_worked_examples_stand_before_the_prompt(form):
    template = prompts.built_in(form)
    found = in_context(template, TRAINING, 3, seed=0)
    assert found.form == form and found.name.endswith("3-shot") and found.prompt.endswith(template.prompt)
    assert found.prompt.count("Answer: ") == 3
    again, other = in_context(template, TRAINING, 3, seed=0), in_context(template, TRAINING, 3, seed=1)
    assert found.prompt == again.prompt != other.prompt


def test_a_worked_example_gives_the_right_answer():
    pairwise, pointwise = prompts.built_in("pairwise"), prompts.built_in("pointwise")
    for index in range(6):  # in either printed order, the liked title is ranked first
        answer = worked(TRAINING[0], pairwise, index, 0).split("Answer: ")[1]
        assert answer.index("liked 0") < answer.index("bad 0")
    said = [worked(TRAINING[0], pointwise, index, 0) for index in range(2)]
    assert ("liked 0" in said[0] and said[0].endswith("Yes")) or said[0].rstrip(".").endswith("Yes")
    assert "bad 0" in said[1] and said[1].rstrip(".").endswith("No")


def test_braces_in_titles_are_text():
    found = in_context(prompts.built_in("direct"), [example("u", ["{history}"], "{0}", ["}"])], 1, seed=0)
    domain = found.domain("movie", "")
    assert "{history}" in found.message(domain, history=("Heat",)) and "{{" not in found.message(
        domain, history=("Heat",)
    )


def test_too_few_examples_for_the_shots():
    with pytest.raises(UserError, match="--shots: 9, and there are 8 training examples"):
        in_context(prompts.built_in("direct"), TRAINING, 9, seed=0)


@pytest.mark.parametrize("name", ["popularity", "like-ratio", "zero-shot", "in-context", "sasrec"])
def test_baseline_writes_what_evaluate_writes(name, tmp_path, model_directory, data_directory):
    more = ("--model", model_directory, "--prompt", "direct") if name in ("zero-shot", "in-context") else ()
    more += ("--epochs", 1, "--factors", 8) if name == "sasrec" else ()
    out = tmp_path / "out"
    assert run("baseline", name, "--data", data_directory, "--resamples", 100, "--out", out, *more) == 0
    assert {"metrics.json", "scores.jsonl", "manifest.json", "config.yaml"} <= {p.name for p in out.iterdir()}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["baseline"] == name and (manifest.get("fit") == "train") == (not more or name == "sasrec")
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    tested = formats.load_examples(data_directory, "test")
    assert len(rows) == metrics(out)["n"] == sum(len(e.negatives) for e in tested)
    assert run("compare", out, out.parent / "out", "--against", "first-listed", "--resamples", 100) == 0
    assert run("report", out, "--out", tmp_path / "report.html") == 0


def test_text_embeddings_start_from_the_models_titles(tmp_path, model_directory, data_directory):
    out = tmp_path / "out"
    more = ("--text-embeddings", "--model", model_directory, "--epochs", 1, "--factors", 8)
    assert run("baseline", "sasrec", "--data", data_directory, "--resamples", 100, "--out", out, *more) == 0


def test_title_embeddings_are_principal_components_of_hidden_states(model_directory):
    from mlx_dmpo.baselines.titles import hidden_states, title_embeddings
    from mlx_dmpo.config import EvaluateSettings
    from mlx_dmpo.model import loading

    base = loading.load(EvaluateSettings(model=str(model_directory)))
    titles = ["amber", "amber lantern river", "moon", "iron echo"]
    rows = hidden_states(base, titles)
    np.testing.assert_allclose(rows[1], hidden_states(base, titles[1:2])[0], atol=1e-4)  # padding changes nothing
    found = title_embeddings(base, titles, 3)
    centred = rows - rows.mean(axis=0)
    distance = lambda x: np.linalg.norm(x[:, None] - x[None], axis=-1)  # noqa: E731
    # 4 points span 3 dimensions: distances are kept but for one factor
    ratio = distance(found)[np.triu_indices(4, 1)] / distance(centred)[np.triu_indices(4, 1)]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    padded = title_embeddings(base, titles, 6)  # 4 points have 3 components, beside rounding
    assert padded.shape == (4, 6) and np.abs(padded[:, 3:]).max() < 1e-3 * np.abs(padded).max()


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("popularity", {"epochs": 3}),
        ("popularity", {"model": "m"}),
        ("first-listed", {"fit": "all"}),
        ("als", {"dropout": 0.5}),
        ("sasrec", {"model": "m"}),
        ("zero-shot", {"shots": 3}),
        ("in-context", {"fit": "all"}),
        ("zero-shot", {"adapter_path": "runs/sft"}),
    ],
)
def test_a_setting_without_effect_is_refused(name, given):
    with pytest.raises(UserError, match="has no effect on"):
        check_baseline(name, BaselineSettings(**given))


def test_every_baseline_takes_its_defaults():
    for name in BASELINES:
        check_baseline(name, BaselineSettings())
    check_baseline("sasrec", BaselineSettings(model="m", text_embeddings=True))
    with pytest.raises(UserError, match="no such baseline"):
        check_baseline("mystery", BaselineSettings())


def test_one_file_without_training_users(tmp_path, capfd, data_directory):
    file = data_directory / "test.jsonl"
    assert run("baseline", "popularity", "--data", file, "--out", tmp_path / "out") == 2
    assert "has no train split: give the training users (--train-data), or --fit all" in capfd.readouterr().err
    assert (
        run("baseline", "popularity", "--data", file, "--fit", "all", "--resamples", 100, "--out", tmp_path / "out")
        == 0
    )


# --- TALLRec's two stages


def test_instruction_tuning_first_then_the_recommender(tmp_path, shared):
    """`sft` on generic Alpaca rows, the recommender's `sft` from its adapter, `dmpo`, `evaluate`: one chain."""
    rows = [
        {"instruction": f"Say {word}.", "input": "" if n % 2 else "Once only.", "output": word.title()}
        for n, word in enumerate("amber lantern river glass winter garden iron echo".split())
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    train = head(shared / "data" / "tallrec-movie" / "train.json", tmp_path / "data", 40)
    about = ("--model", shared / "models" / "ml1m-qwen3", "--batch-size", 2, "--grad-accumulation-steps", 1)
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("sft", *about, "--data", tmp_path / "alpaca.json", "--iters", 2, "--adapter-path", first) == 0
    stage = ("--prompt", "pointwise", "--data", train, "--max-seq-length", 2048)
    assert run("sft", *about, *stage, "--iters", 2, "--start-adapter", first, "--adapter-path", second) == 0
    assert "prompt" not in json.loads((first / "adapter_config.json").read_text())  # the rows brought their own
    started = json.loads((second / "manifest.json").read_text())
    assert str(first) in json.dumps(started)
    third, more = tmp_path / "third", ("--data", train, "--max-seq-length", 2048, "--iters", 2)
    assert run("dmpo", *about, *more, "--start-adapter", second, "--adapter-path", third) == 0
    limit = ("--limit", 3, "--num-negatives", 2, "--resamples", 100)
    assert run("evaluate", *about[:2], "--data", train, "--adapter-path", third, *limit, "--out", tmp_path / "e") == 0
    assert 0 <= metrics(tmp_path / "e")["auc"]["value"] <= 1
