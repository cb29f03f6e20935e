"""Evaluation around the scores: stopping and continuing, candidates, generated answers, and comparison of
directories."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_dmpo.cli.main import main
from mlx_dmpo.config import EvaluateSettings
from mlx_dmpo.data import formats
from mlx_dmpo.errors import UserError
from mlx_dmpo.judge import candidates, compare, evaluate, facts, metrics, progress
from mlx_dmpo.machine import files
from mlx_dmpo.records import RankingExample
from mlx_dmpo.scores import Scores


class Fake:
    """A Scorer that ranks by a value of each title; `items` says whether it has one score per candidate."""

    name = "fake"

    def __init__(self, value, items=True):
        self.value, self.items, self.scored = value, items, []

    def score(self, examples):
        for e in examples:
            self.scored.append(e)
            values = np.array([self.value(e.user, t) for t in (e.positive, *e.negatives)], np.float64)
            yield Scores(e, values[0] - values[1:], np.zeros((len(e.negatives), 2, 2)), values if self.items else None)


def example(user, positive, negatives, history=("h1", "h2")):
    return RankingExample(user, "movie", tuple(history), positive, tuple(negatives))


TITLES = [f"t{i:02}" for i in range(30)]


def examples(n=12, k=3):
    rng = np.random.default_rng(0)
    picked = [[str(t) for t in rng.permutation(TITLES)[: k + 4]] for _ in range(n)]
    return [example(f"u{i}", p[0], p[1 : 1 + k], p[1 + k :]) for i, p in enumerate(picked)]


def rank(user, title):
    return int(title[1:]) if title[0] == "t" else -1.0


SETTINGS = EvaluateSettings(resamples=100, batch_size=1)


# --- stopping and continuing


class Killed(Exception):
    pass


def test_a_killed_evaluation_continues_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCHES", 4)
    data = examples(11)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for directory in (whole, parts):
        directory.mkdir()
    settings = replace(SETTINGS, candidates="5")
    expected = evaluate.measure(Fake(rank), data, settings, whole, {"a": 1})

    def dies(user, title):
        if user == "u6":
            raise Killed
        return rank(user, title)

    with pytest.raises(Killed):
        evaluate.measure(Fake(dies), data, settings, parts, {"a": 1})
    kept = files.read_lines(parts / "scores.jsonl")
    assert [r["user"] for r in kept] == [f"u{i}" for i in range(4) for _ in range(3)]  # one chunk of four
    with open(parts / "scores.jsonl", "a") as file:
        file.write(json.dumps(kept[0]) + '\n{"user": "u4", "posi')  # killed in the middle of a later write
    scorer = Fake(rank)
    assert evaluate.measure(scorer, data, settings, parts, {"a": 1}) == expected
    assert {e.user for e in scorer.scored[: 11 - 4]} == {f"u{i}" for i in range(4, 11)}
    for name in ("scores.jsonl", "candidates.jsonl"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_an_unfinished_evaluation_of_other_settings_is_refused_by_name(tmp_path):
    evaluate.measure(Fake(rank), examples(), SETTINGS, tmp_path, {"adapter": "1", "dtype": "float32"})
    with pytest.raises(UserError, match=r"differs in: dtype: name another --out"):
        evaluate.measure(Fake(rank), examples(), SETTINGS, tmp_path, {"adapter": "1", "dtype": "bfloat16"})
    scorer = Fake(rank)
    over = replace(SETTINGS, overwrite=True)
    evaluate.measure(scorer, examples(), over, tmp_path, {"adapter": "1", "dtype": "bfloat16"})
    assert len(scorer.scored) == 12  # all of them again


def test_the_command_continues_and_its_key_holds_what_changes_a_score(
    model_directory, data_directory, tmp_path, monkeypatch
):
    settings = EvaluateSettings(
        model=str(model_directory), data=str(data_directory), out=str(tmp_path / "e"), resamples=100, batch_size=2
    )
    monkeypatch.setattr(evaluate, "BATCHES", 2)
    real, calls = evaluate.rows_of, []

    def dies(scores):
        calls.append(scores)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(scores)

    monkeypatch.setattr(evaluate, "rows_of", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(settings)
    assert len({r["user"] for r in files.read_lines(tmp_path / "e" / "scores.jsonl")}) == 4
    key = files.read_json(tmp_path / "e" / progress.PROGRESS)
    assert {"examples", "model", "adapter", "dtype", "quantize", "max_seq_length", "versions", "device"} <= set(key)
    for change in ({"max_seq_length": 1000}, {"limit": 3}, {"scoring": "plain"}):
        with pytest.raises(UserError, match="differs in"):
            evaluate.evaluate(replace(settings, **change))
    calls.clear()
    calls.extend([None] * 100)
    result = evaluate.evaluate(settings)
    assert len(calls) == 108  # the last eight of twelve
    assert not (tmp_path / "e" / progress.PROGRESS).exists() and (tmp_path / "e" / "manifest.json").exists()
    monkeypatch.setattr(evaluate, "rows_of", real)
    assert evaluate.evaluate(replace(settings, out=str(tmp_path / "whole"))) == result
    same = [(tmp_path / name / "scores.jsonl").read_bytes() for name in ("e", "whole")]
    assert same[0] == same[1]


# --- candidates


def test_candidates_are_drawn_without_what_the_user_knows_and_again_the_same():
    data, known = examples(), facts.Facts(trained=frozenset(("movie", t) for t in TITLES))
    settings = replace(SETTINGS, candidates="8")
    drawn = candidates.candidate_examples(settings, data, known)
    assert drawn == candidates.candidate_examples(settings, data, known)
    assert drawn != candidates.candidate_examples(replace(settings, seed=1), data, known)
    assert drawn[:5] == candidates.candidate_examples(settings, data[:5], known)
    for e in drawn:
        assert len(set(e.negatives)) == 7 and not {*e.history, e.positive} & set(e.negatives)


def test_all_of_the_catalogue_and_the_files_own(capsys):
    data, known = examples(), facts.Facts(trained=frozenset(("movie", t) for t in TITLES))
    everything = candidates.candidate_examples(replace(SETTINGS, candidates="all"), data, known)
    for e in everything:
        assert {e.positive, *e.negatives, *e.history} == set(TITLES)
    own = candidates.candidate_examples(replace(SETTINGS, candidates="9", candidate_negatives="file"), data, known)
    assert [e.negatives for e in own] == [e.negatives for e in data]
    assert "12 of 12 examples list fewer than 8 titles" in capsys.readouterr().err


def test_popular_titles_are_drawn_more_often():
    data = [example(f"u{i}", "t00", ["t01"], ["t02"]) for i in range(200)]
    counts = {("movie", t): 1 + 50 * (t in ("t10", "t11")) for t in TITLES}
    known = facts.Facts(counts=counts, trained=frozenset(counts))
    settings = replace(SETTINGS, candidates="4")
    share = {}
    for how in ("uniform", "popularity"):
        drawn = candidates.candidate_examples(replace(settings, candidate_negatives=how), data, known)
        share[how] = np.mean(["t10" in e.negatives for e in drawn])
    assert share["uniform"] < 0.25 < 0.7 < share["popularity"]


@pytest.mark.parametrize(
    ("text", "message"), [("1", "at least 2"), ("many", "at least 2"), ("500", "titles can be drawn")]
)
def test_candidates_that_cannot_be(text, message):
    with pytest.raises(UserError, match=message):
        candidates.candidate_examples(replace(SETTINGS, candidates=text), examples(), facts.Facts())


def test_scores_and_pairs_place_a_consistent_ranker_alike(capsys):
    data = [
        replace(e, negatives=tuple(t for t in TITLES if t not in (e.positive, *e.history))[:12]) for e in examples()
    ]
    scored, paired = Fake(rank), Fake(rank, items=False)
    by_scores = candidates.Ranker.of(scored, data)
    by_pairs = candidates.Ranker.of(paired, data)
    assert (by_scores.how, by_pairs.how) == ("scores", "round robin")
    assert "every candidate with every other, 936 pairs" in capsys.readouterr().err  # 12 examples of 13 * 12 / 2
    found = list(by_scores.rows(data))
    assert found == list(by_pairs.rows(data)) == list(candidates.Ranker(paired, "direct").rows(data))
    for e, row in zip(data, found, strict=True):
        assert row["better"] == sum(n > e.positive for n in e.negatives) and row["candidates"] == 13


def test_many_candidates_of_a_pairwise_scorer_are_compared_directly(capsys):
    data = [replace(e, negatives=tuple(t for t in TITLES if t not in (e.positive, *e.history))) for e in examples(3)]
    ranker = candidates.Ranker.of(Fake(rank, items=False), data)
    assert ranker.how == "direct" and "the liked title with every candidate" in capsys.readouterr().err
    assert [r["better"] for r in ranker.rows(data)] == [sum(n > e.positive for n in e.negatives) for e in data]


def test_copeland_counts_wins_of_an_inconsistent_ranker():
    """A cycle a > b > c > a, all above d: three candidates share the first place."""
    beats = {("a", "b"), ("b", "c"), ("c", "a"), ("a", "d"), ("b", "d"), ("c", "d")}

    class Cycle(Fake):
        def score(self, given):
            for e in given:
                margins = [1.0 if (e.positive, n) in beats else -1.0 for n in e.negatives]
                yield Scores(e, np.array(margins))

    (row,) = candidates.Ranker(Cycle(rank), "round robin").rows([example("u", "a", ["b", "c", "d"])])
    assert (row["better"], row["tied"]) == (0, 2)


def test_ranking_metrics_of_the_command(model_directory, data_directory, tmp_path):
    settings = EvaluateSettings(
        model=str(model_directory), data=str(data_directory), out=str(tmp_path / "e"), resamples=100, candidates="4"
    )
    result = evaluate.evaluate(replace(settings, limit=10))
    for name in ("hr@1", "hr@3", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr"):
        assert set(result[name]) == {"value", "low", "high"}
    assert result["hr@5"]["value"] == 1.0  # of four candidates
    assert result["candidates"]["most"] == 4 and result["candidates"]["negatives"] == "uniform"
    rows = files.read_lines(tmp_path / "e" / "candidates.jsonl")
    assert len(rows) == 10 and all(0 <= r["better"] <= 3 for r in rows)


# --- facts beside the data


def test_facts_of_a_prepared_directory(tmp_path):
    train = [example("a", "x", ["y"], ["h1", "x2"]).to_json(), example("b", "x", ["z"], ["h1"]).to_json()]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in train))
    users = [{"user": "u1", "gender": "F", "age_band": "25-34"}, {"user": 2, "gender": "M"}]
    (tmp_path / "users.jsonl").write_text("".join(json.dumps(r) + "\n" for r in users))
    tested = [example("u1", "x", ["new"], ["h1", "h3"])]
    found = facts.load_facts(str(tmp_path), tested)
    row = found.add_to({"user": "u1", "domain": "movie", "positive": "x", "negative": "new"}, tested[0])
    assert row["popularity"] == [2, 0] and row["seen"] == [True, False] and row["history"] == 2
    assert row["groups"] == {"gender": "F", "age_band": "25-34"} and found.groups["2"] == {"gender": "M"}
    assert "train.jsonl" in found.source
    (tmp_path / "items.jsonl").write_text('{"domain": "movie", "title": "x", "ratings": 9}\n')
    found = facts.load_facts(str(tmp_path), tested)
    assert found.popularity("u1", "movie", "x") == 9 and "items.jsonl" in found.source


def test_a_users_own_history_is_no_popularity():
    data = [example("a", "x", ["y"], ["t1"]), example("a", "y", ["x"], ["t1"]), example("b", "x", ["y"], ["t1", "t2"])]
    found = facts.load_facts("a single file", data)
    assert found.popularity("a", "movie", "t1") == 1 and found.popularity("c", "movie", "t1") == 2
    assert found.popularity("b", "movie", "t2") == 0 and "other evaluated users" in found.source


@pytest.mark.parametrize("line", ["[]", '{"gender": "F"}', "{", '{"user": null}'])
def test_a_malformed_users_file(tmp_path, line):
    (tmp_path / "users.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"users\.jsonl"):
        facts.load_facts(str(tmp_path), examples())


RELEASED = [("rec_data_ml_1m_eval_ranking.json", 0.608, 0.484), ("rec_Amazon_Movie_eval_ranking.json", 0.516, 0.480)]


@pytest.mark.parametrize(("name", "popular", "first"), RELEASED)
def test_trivial_rankers_on_the_released_files(shared, name, popular, first):
    file = str(shared / "data" / "dmpo-release" / name)
    data = formats.load_examples(file)
    known = facts.load_facts(file, data)
    rows = []
    for e in data:
        for k, negative in enumerate(e.negatives):
            row = {"user": e.user, "domain": e.domain, "positive": e.positive, "negative": negative, "margin": 0.0}
            rows.append(known.add_to(row, e) | {"source_positive_first": e.positive_first[k]})
    found = {n: metrics.ranking_metrics(compare.trivial(n, rows), resamples=200) for n in compare.TRIVIAL}
    print(
        name, {n: m["pair_accuracy"] for n, m in found.items()}, found["popularity"]["n"], found["popularity"]["users"]
    )
    assert found["popularity"]["pair_accuracy"]["value"] == pytest.approx(popular, abs=5e-4)
    assert found["first-listed"]["pair_accuracy"]["value"] == pytest.approx(first, abs=5e-4)
    assert found["popularity"]["popularity"]["prefers_popular"]["value"] == 1.0


# --- generated answers


def test_greedy_answers_of_the_embedded_model(tmp_path):
    """The random tiny adapter ranks nothing; the share of valid answers is counted on what it really writes."""
    settings = EvaluateSettings(out=str(tmp_path / "e"), limit=12, resamples=100, generate=10, max_tokens=40)
    result = evaluate.evaluate(settings)
    found, rows = result["generation"], files.read_lines(tmp_path / "e" / "answers.jsonl")
    assert found["n"] == len(rows) == 10
    assert found["valid"]["value"] == pytest.approx(np.mean([r["valid"] for r in rows]))
    first = {}
    for row in files.read_lines(tmp_path / "e" / "scores.jsonl"):
        first.setdefault(row["user"], row)
    for r in rows:
        titles = (first[r["user"]]["positive"], first[r["user"]]["negative"])
        answers = [f" <Title:{a}> ,  <Title:{b}> ".split() for a, b in (titles, titles[::-1])]
        assert r["valid"] == (r["finished"] and r["text"].split() in answers)
        if r["valid"]:
            assert r["right"] == (r["text"].split() == answers[0])
        else:
            assert r["right"] is r["agrees"] is None and r["text"][:300] in found["others"]


def test_what_counts_as_a_valid_and_an_agreeing_answer(monkeypatch):
    from types import SimpleNamespace

    from mlx_dmpo.judge import generation
    from mlx_dmpo.model.generate import Answer
    from mlx_dmpo.prompts.template import same_text

    texts = ["A, B", "B,  A ", "A, B", "A, C", "A, B"]
    tokenizer = SimpleNamespace(decode=lambda tokens: texts[tokens[0]])
    template = SimpleNamespace(which=lambda t, known: next((i for i, k in enumerate(known) if same_text(t, k)), None))
    scorer = SimpleNamespace(base=SimpleNamespace(tokenizer=tokenizer), template=template)
    scores = [(-1.0, -2.0), (-1.0, -2.0), (-2.0, -1.0), (-1.0, -2.0), (-1.0, -1.0)]
    todo = [generation.Task(f"u{i}", "movie", (1,), ("A, B", "B, A"), 0, s) for i, s in enumerate(scores)]
    drawn = [[Answer((i,), 0.0, finished=True)] for i in range(5)]
    monkeypatch.setattr(generation, "sample_answers", lambda *_, **__: drawn)
    rows = list(generation.answer_rows(scorer, todo, 10))
    assert [r["valid"] for r in rows] == [True, True, True, False, True]
    assert [r["agrees"] for r in rows] == [True, False, False, None, None]  # the last: a tie, no preference
    assert [r["right"] for r in rows] == [True, False, True, None, True]
    found = generation.generation_metrics(rows, resamples=100, seed=0)
    assert found["valid"] == {"value": 4 / 5} and found["others"] == ["A, C"]
    assert found["agrees"]["value"] == pytest.approx(1 / 3) and found["right"]["value"] == pytest.approx(3 / 4)
    drawn[0] = [Answer((0,), 0.0, finished=False)]  # cut: no answer, whatever it says
    cut = generation.generation_metrics(list(generation.answer_rows(scorer, todo, 10)), resamples=100, seed=0)
    assert cut["cut"] == 1 and cut["valid"]["value"] == pytest.approx(3 / 5)


@pytest.mark.parametrize("form", ["listwise", "direct", "pointwise"])
def test_every_prompt_form_is_ranked_and_answers(form, model_directory, data_directory, tmp_path):
    settings = EvaluateSettings(
        model=str(model_directory), data=str(data_directory), out=str(tmp_path / "e"), resamples=100
    )
    result = evaluate.evaluate(replace(settings, prompt=form, limit=10, candidates="4", generate=3, max_tokens=8))
    assert result["candidates"]["ranked_by"] == "scores" and set(result["mrr"]) == {"value", "low", "high"}
    assert result["generation"]["n"] == 3 and "calibration" in result and "auc_release" not in result


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--candidate-negatives", "popularity"], "--candidate-negatives: has no effect without --candidates"),
        (["--max-tokens", "5"], "--max-tokens: has no effect without --generate"),
        (["--candidates", "0"], "--candidates: '0' is neither"),
    ],
)
def test_flags_without_an_effect(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err


# --- compare


def write_evaluation(directory, margins, users=None, adapter=None, **config):
    directory.mkdir(parents=True)
    rows = [
        {"user": f"u{i if users is None else users[i]}", "domain": "movie", "positive": f"p{i}", "negative": f"n{i}"}
        | {"margin": float(m), "popularity": [i % 7, i % 5], "source_positive_first": i % 2 == 0}
        for i, m in enumerate(margins)
    ]
    files.write_json(directory / "metrics.json", metrics.ranking_metrics(rows, resamples=100))
    files.write_text(directory / "scores.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    files.write_json(
        directory / "manifest.json", {"command": "mlx-dmpo evaluate", "config": config, "adapter": adapter}
    )
    return directory


def margins_of(accuracy, n=200, seed=0):
    return np.where(np.random.default_rng(seed).random(n) < accuracy, 1.0, -1.0)


def test_compare_as_json(tmp_path, capsys):
    a, b = margins_of(0.85), margins_of(0.6, seed=1)
    one, two = write_evaluation(tmp_path / "dmpo" / "eval", a), write_evaluation(tmp_path / "sft" / "eval", b)
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(one), str(two), "--against", "popularity", "--json"])
    assert stop.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"n", "users", "only_in", "differences"} and (found["n"], found["users"]) == (200, 200)
    assert found["only_in"] == {}
    first = found["differences"][0]
    assert list(first) == ["a", "b", "metric", "difference", "low", "high", "p", "p_holm", "mcnemar_p"]
    assert (first["a"], first["b"], first["metric"]) == ("dmpo", "sft", "pair_accuracy")
    assert first["difference"] == pytest.approx((a > 0).mean() - (b > 0).mean())
    assert first["low"] < first["difference"] < first["high"] and first["p"] < 0.01
    assert {(d["a"], d["b"]) for d in found["differences"]} == {
        ("dmpo", "sft"),
        ("dmpo", "popularity"),
        ("sft", "popularity"),
    }
    in_nats = [(d["a"], d["b"]) for d in found["differences"] if d["metric"] == "mean_margin"]
    assert in_nats == [("dmpo", "sft")]  # popularity's margins are counts
    for metric in ("pair_accuracy", "auc"):
        family = [d for d in found["differences"] if d["metric"] == metric]
        assert len(family) == 3 and all(d["p_holm"] >= d["p"] for d in family)


def test_compare_pairs_the_examples_and_says_which_differ(tmp_path):
    a = margins_of(0.7)
    one, two = write_evaluation(tmp_path / "a", a), write_evaluation(tmp_path / "b", a[:150])
    found = compare.compare([one, two], resamples=200)
    assert found["n"] == 150 and list(found["only_in"]) == ["a"] and len(found["only_in"]["a"]) == 50
    assert found["only_in"]["a"][0] == ["u150", "movie", "p150", "n150"]
    accuracy = found["differences"][0]
    assert accuracy["difference"] == 0 and accuracy["p"] == 1 and accuracy["mcnemar_p"] == 1
    other = write_evaluation(tmp_path / "c", a[:10])
    rows = [r | {"positive": "elsewhere"} for r in files.read_lines(other / "scores.jsonl")]
    files.write_text(other / "scores.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(UserError, match="no example in common"):
        compare.compare([one, other])
    with pytest.raises(UserError, match="only one evaluation is given"):
        compare.compare([one, one])


def test_pairing_makes_the_interval_narrower(tmp_path):
    """Two rankers that differ on ten pairs only: unpaired intervals of .7 on 200 pairs are 13 points wide."""
    a = margins_of(0.7)
    b = a.copy()
    b[:10] = -1.0
    found = compare.compare([write_evaluation(tmp_path / "a", a), write_evaluation(tmp_path / "b", b)])["differences"][
        0
    ]
    assert found["high"] - found["low"] < 0.06 and found["low"] > 0


def test_seeds_are_pooled(tmp_path):
    def trained(name, seed, **config):
        run = tmp_path / name
        run.mkdir()
        settings = {"loss": "dmpo", "beta": 0.1, "start_adapter": "", "adapter_path": str(run), **config}
        files.write_json(run / "manifest.json", {"command": "dmpo", "config": {"seed": seed, **settings}})
        accuracy = {0: 0.7, 1: 0.75, 2: 0.8}[seed]
        return write_evaluation(run / "eval", margins_of(accuracy, seed=seed), adapter=str(run), seed=0, split="test")

    seeds = [trained(f"s{seed}", seed) for seed in range(3)]
    other = trained("other", 0, beta=0.2)
    found = compare.compare([*seeds, other], resamples=200)
    accuracies = [files.read_json(d / "metrics.json")["pair_accuracy"]["value"] for d in seeds]
    (name,) = found["pooled"]
    assert name == "s0 (3 seeds)" and found["pooled"][name]["seeds"] == 3
    assert found["pooled"][name]["pair_accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    assert found["pooled"][name]["pair_accuracy"]["spread"] == pytest.approx(np.std(accuracies, ddof=1))
    assert [(d["a"], d["b"]) for d in found["differences"] if d["metric"] == "auc"] == [(name, "other")]
    assert found["differences"][0]["mcnemar_p"] is None
    again = write_evaluation(
        tmp_path / "s0" / "again", margins_of(0.7), adapter=str(tmp_path / "s0"), seed=0, split="test"
    )
    twice = compare.compare([seeds[0], again], resamples=100)  # one run evaluated twice is no second seed
    assert "pooled" not in twice and twice["differences"][0]["difference"] == 0


def test_compare_reports_ranking_metrics(tmp_path):
    directories = []
    for name, better in (("a", 0), ("b", 3)):
        directory = write_evaluation(tmp_path / name, margins_of(0.7, 40))
        rows = [
            {"user": f"u{i}", "domain": "movie", "positive": f"p{i}", "candidates": 20, "better": better, "tied": 0}
            for i in range(40)
        ]
        files.write_text(directory / "candidates.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
        directories.append(directory)
    found = {d["metric"]: d for d in compare.compare(directories, resamples=100)["differences"]}
    assert found["hr@1"]["difference"] == 1 and found["hr@5"]["difference"] == 0
    assert found["mrr"]["difference"] == pytest.approx(0.75) and found["mean_rank"]["difference"] == -3


def test_compare_in_words(tmp_path, capsys):
    one = write_evaluation(tmp_path / "a", margins_of(0.7))
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(one), "--against", "first-listed"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "200 pairs of 200 users" in out and "− first-listed" in out and "McNemar" in out
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(Path(tmp_path))])
    assert stop.value.code == 2 and "no finished evaluation" in capsys.readouterr().err
