"""Answers drawn from the policy, and margins for hard negatives."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from test_bad_input import run
from test_other_formats import write

from mlx_dmpo.config import EvaluateSettings, SampleSettings
from mlx_dmpo.errors import UserError
from mlx_dmpo.judge.evaluate import evaluate
from mlx_dmpo.model import generate, loading
from mlx_dmpo.prompts import pairwise
from mlx_dmpo.tools import sample

TEXT = [
    {"prompt": "Name a river.", "chosen": "Amber.", "rejected": "No."},
    {"prompt": "A garden?", "chosen": "Winter.", "rejected": "No."},
]


@pytest.fixture
def settings(model_directory, data_directory, tmp_path):
    return SampleSettings(
        model=str(model_directory),
        data=str(data_directory),
        out=str(tmp_path / "s.jsonl"),
        n=3,
        max_tokens=12,
        limit=4,
        batch_size=3,
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def plain_logp(base, prompt, tokens):
    """Sum of log-probs of `tokens` after `prompt`, by one forward pass of the whole sequence."""
    logits = base.model(mx.array([*prompt, *tokens])[None])[0].astype(mx.float32)
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return sum(float(logps[len(prompt) + i - 1, token]) for i, token in enumerate(tokens))


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_log_probs_are_those_of_the_whole_sequence(settings, temperature):
    """One prompt cache for n answers, several prompts of different length at once = each sequence alone."""
    base = loading.load(settings)
    base.model.eval()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 255, length).tolist() for length in (2, 9, 31)]
    end = base.tokenizer.eos_token_ids
    drawn = generate.sample_answers(
        base, prompts, 4, temperature=temperature, top_p=0.9, top_k=30, max_tokens=20, seed=1
    )
    assert [len(answers) for answers in drawn] == [4, 4, 4]
    for prompt, answers in zip(prompts, drawn, strict=True):
        for a in answers:
            assert a.finished == (len(a.tokens) < 20) and not set(a.tokens) & set(end)
            endings = [[e] for e in end] if a.finished else [[]]
            assert min(abs(plain_logp(base, prompt, [*a.tokens, *e]) - a.logp) for e in endings) < 2e-3
        assert (len({a.tokens for a in answers}) == 1) == (temperature == 0)
    if temperature == 0:  # the likeliest token each time
        tokens = list(prompts[1])
        for token in drawn[1][0].tokens:
            assert token == int(mx.argmax(base.model(mx.array(tokens)[None])[0, -1]))
            tokens.append(token)


def test_top_k_of_one_is_greedy(settings):
    base = loading.load(settings)
    how = dict(top_p=1.0, max_tokens=8)
    one = generate.sample_answers(base, [[5, 6, 7]], 2, temperature=2.0, top_k=1, seed=3, **how)
    assert {a.tokens for a in one[0]} == {
        generate.sample_answers(base, [[5, 6, 7]], 1, temperature=0.0, top_k=0, seed=0, **how)[0][0].tokens
    }


def test_an_answer_that_ends_is_finished(settings, monkeypatch):
    base = loading.load(settings)
    greedy = generate.sample_answers(base, [[5, 6, 7]], 1, temperature=0.0, top_p=1.0, top_k=0, max_tokens=6, seed=0)[
        0
    ][0]
    stop = greedy.tokens[3]
    first = greedy.tokens.index(stop)
    monkeypatch.setattr(base.tokenizer, "_eos_token_ids", {stop})
    ended = generate.sample_answers(base, [[5, 6, 7]], 1, temperature=0.0, top_p=1.0, top_k=0, max_tokens=6, seed=0)[0][
        0
    ]
    assert ended.finished and ended.tokens == greedy.tokens[:first]
    assert ended.logp == pytest.approx(plain_logp(base, [5, 6, 7], greedy.tokens[: first + 1]), abs=1e-3)


def test_a_model_that_cannot_be_batched_is_one_line(settings, monkeypatch):
    from mlx_lm.models import cache

    class Alone(cache.KVCache):
        merge = property(lambda self: (_ for _ in ()).throw(AttributeError))

    monkeypatch.setattr(cache, "make_prompt_cache", lambda model, size=None: [Alone() for _ in model.layers])
    with pytest.raises(UserError, match="does not yet support batching"):
        generate.sample_answers(
            loading.load(settings), [[5, 6]], 2, temperature=1.0, top_p=1.0, top_k=0, max_tokens=2, seed=0
        )


def test_repeatable_by_seed_and_shaped_as_promised(settings, tmp_path):
    path, output = sample.sample(settings)
    first = path.read_bytes()
    found = lines(path)
    examples = [json.loads(line) for line in (Path(settings.data) / "test.jsonl").read_text().splitlines()[:4]]
    assert [(r["user"], r["positive"], r["negative"]) for r in found] == [
        (e["user"], e["positive"], n) for e in examples for n in e["negatives"]
    ]
    for r in found:
        assert (
            set(r) == {"user", "domain", "positive", "negative", "positive_first", "prompt", "answers"}
            and len(r["answers"]) == 3
        )
        shown = [r["positive"], r["negative"]] if r["positive_first"] else [r["negative"], r["positive"]]
        assert r["prompt"][0]["content"].endswith(f"the two movies  <Title:{shown[0]}>  and  <Title:{shown[1]}> .")
        assert all(set(a) == {"text", "logp", "finished", "ordering", "right"} and a["logp"] < 0 for a in r["answers"])
    assert f"{3 * len(found)} answers to {len(found)} prompts" in output
    again, _ = sample.sample(replace(settings, out=str(tmp_path / "again.jsonl")))
    other, _ = sample.sample(replace(settings, out=str(tmp_path / "other.jsonl"), seed=1))
    assert again.read_bytes() == first != other.read_bytes()


def test_ordering():
    orders = [["A", "B"], ["B", "A"]]
    task = sample.Task({}, [], [pairwise.ranking_answer(*o) for o in orders], orders, orders[0])
    read = lambda text: task.read(text, True, pairwise.PAIRWISE)  # noqa: E731
    assert read(" <Title:A> ,  <Title:B> ") == {"ordering": ["A", "B"], "right": True}
    assert read("<Title:B> ,  <Title:A>\n") == {"ordering": ["B", "A"], "right": False}
    for other in ("<Title:A>", " <Title:A> ,  <Title:C> ", "A, B", "", " <Title:A> ,  <Title:A> "):
        assert read(other) == {"ordering": None, "right": None}


def test_answers_that_rank_are_parsed(settings, monkeypatch):
    """A policy that answers as it was trained to: stands in for one by its tokens."""
    real = generate.sample_answers

    def trained(base, prompts, n, **how):
        drawn = real(base, prompts, n, **how)
        for prompt, answers in zip(prompts, drawn, strict=True):
            text = base.tokenizer.decode(prompt)
            pair = text[text.rindex("the two movies ") + len("the two movies ") : text.rindex(".<|im_end|>")].replace(
                " and ", ", "
            )
            answers[0] = generate.Answer(tuple(base.tokenizer.encode(pair, add_special_tokens=False)), -1.0, True)
        return drawn

    monkeypatch.setattr(generate, "sample_answers", trained)
    path, output = sample.sample(settings)
    found = lines(path)
    for r in found:
        first = r["answers"][0]
        assert first["ordering"] == (
            [r["positive"], r["negative"]] if r["positive_first"] else [r["negative"], r["positive"]]
        )
        assert first["right"] == r["positive_first"]
    share = sum(r["positive_first"] for r in found) / len(found)
    assert f"{len(found)} are orderings of the two titles, {share:.3f} of these rank the positive first" in output


def test_scores_are_the_margins_of_evaluate(settings, tmp_path):
    path, output = sample.sample(replace(settings, score=True, limit=0))
    found = lines(path)
    evaluate(EvaluateSettings(model=settings.model, data=settings.data, out=str(tmp_path / "eval"), resamples=100))
    scores = lines(tmp_path / "eval" / "scores.jsonl")
    assert [set(r) for r in found] == [{"user", "domain", "positive", "negative", "margin"}] * len(scores)
    assert [(r["user"], r["negative"]) for r in found] == [(r["user"], r["negative"]) for r in scores]
    assert [r["margin"] for r in found] == pytest.approx([r["margin"] for r in scores], abs=1e-3)
    assert f"{len(scores)} margins" in output


def test_free_text_is_answered_too(settings, tmp_path):
    path, _ = sample.sample(replace(settings, data=str(write(tmp_path / "d.jsonl", TEXT))))
    found = lines(path)
    assert [r["prompt"] for r in found] == [[{"role": "user", "content": t["prompt"]}] for t in TEXT]
    assert all(
        set(r) == {"user", "domain", "prompt", "answers"} and set(r["answers"][0]) == {"text", "logp", "finished"}
        for r in found
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--n", "0"], "--n"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--top-k", "-1"], "--top-k"),
        (["--score", "--n", "3"], "--n: has no effect"),
        (["--scoring", "plain"], "--scoring"),
        (["--out", "{tmp}/there.jsonl"], "--overwrite"),
        (["--data", "{tmp}/text.jsonl", "--score"], "no candidate negatives"),
        (["--adapter-path", "{tmp}/none"], "none"),
        (["--out", "{tmp}/there.jsonl/below"], "cannot be written"),
    ],
)
def test_what_a_user_can_get_wrong(flags, expected, model_directory, data_directory, tmp_path, capsys):
    (tmp_path / "there.jsonl").write_text("kept")
    write(tmp_path / "text.jsonl", TEXT)
    given = [f.format(tmp=tmp_path) for f in flags]
    more = ["--data", data_directory] if "--data" not in flags else []
    more += ["--out", tmp_path / "out.jsonl"] if "--out" not in flags else []
    quick = ["--limit", 1, "--max-tokens", 2] if "below" in flags[-1] else ["--limit", 1]
    code, _, err = run(capsys, "sample", "--model", model_directory, *more, *quick, *given)
    line = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(line) == 1 and expected in line[0] and "Traceback" not in err, err
    assert not (tmp_path / "out.jsonl").exists() and (tmp_path / "there.jsonl").read_text() == "kept"
