"""Ranking: Bradley-Terry against choix, planted orders, order independence, budgets, items and pairs, titles, the
command.
"""

import contextlib
import io
import itertools
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from mlx_dmpo import Ranker
from mlx_dmpo.cli.main import main
from mlx_dmpo.core.tree import part
from mlx_dmpo.errors import UserError
from mlx_dmpo.model import score
from mlx_dmpo.model.open import LanguageModelScorer
from mlx_dmpo.records import RankingExample
from mlx_dmpo.scores import Scores
from mlx_dmpo.use import bradley_terry, rank
from mlx_dmpo.use.inputs import read_data
from mlx_dmpo.use.match import Catalogue
from mlx_dmpo.use.scoring import Scoring


class Planted:
    """A scorer with a known strength of every title, noise drawn for each pair, and a liking for the title printed
    first.
    """

    name = "planted"

    def __init__(self, strength, noise=0.0, first=0.0, items=False):
        self.strength, self.noise, self.first, self.with_items, self.pairs = strength, noise, first, items, 0

    def score(self, examples):
        for e in examples:
            margins, logps = [], []
            for negative in e.negatives:
                a, b = sorted((e.positive, negative))
                seed = [*map(ord, a), 0, *map(ord, b)]
                drawn = self.noise * np.random.default_rng(seed).normal() * (1 if a == e.positive else -1)
                margin = self.strength[e.positive] - self.strength[negative] + drawn
                logps.append([[margin + self.first, 0.0], [margin - self.first, 0.0]])
                margins.append(2 * margin)
                self.pairs += 1
            items = np.array([self.strength[t] for t in (e.positive, *e.negatives)]) if self.with_items else None
            yield Scores(e, np.array(margins), np.array(logps).reshape(-1, 2, 2), items)


def planted(n, seed=0, **options):
    rng = np.random.default_rng(seed)
    titles = [f"title {i:03d}" for i in rng.permutation(n)]
    return Planted(dict(zip(titles, 1.5 * rng.normal(size=n), strict=True)), **options)


def ranked(scorer, titles, method="pairs", **options):
    return rank.run(rank.Job(("seen",), titles, method, **options), Scoring(scorer))


# --- Bradley-Terry


def choix_strengths(counts, prior=bradley_terry.PRIOR):
    """choix minimizes  -log likelihood + alpha sum s^2."""
    import choix

    n = len(counts)
    data = [(i, j) for i in range(n) for j in range(n) for _ in range(int(counts[i, j]))]
    found = choix.opt_pairwise(n, data, alpha=prior / 2, method="Newton-CG", tol=1e-10)
    return found - found.mean()


@pytest.mark.parametrize("seed", range(4))
def test_bradley_terry_equals_choix_on_random_data(seed):
    counts = np.random.default_rng(seed).integers(0, 6, (7, 7)).astype(float)
    np.fill_diagonal(counts, 0)
    assert bradley_terry.fit(counts).strength == pytest.approx(choix_strengths(counts), abs=1e-5)


def test_bradley_terry_equals_choix_on_separable_data():
    """Item i beats every later one: without a prior the strengths would be infinite."""
    counts = 3 * np.triu(np.ones((6, 6)), 1)
    found = bradley_terry.fit(counts)
    assert found.strength == pytest.approx(choix_strengths(counts), abs=1e-5)
    assert (np.diff(found.strength) < 0).all() and np.isfinite(found.error).all()


def test_bradley_terry_recovers_what_made_the_probabilities():
    """Soft wins: p = sigmoid(s_i - s_j) for every pair, many observations: the strengths come back."""
    s = np.array([1.2, 0.3, -0.4, -1.1])
    p = 1 / (1 + np.exp(s[None] - s[:, None]))
    np.fill_diagonal(p, 0)
    found = bradley_terry.fit(1000 * p)
    assert found.strength == pytest.approx(s, abs=2e-3)
    # two items, n = 1000 at p = sigmoid(.8): information n p (1 - p) = 213.9; the variance of the difference is its
    # inverse
    two = np.array([[0, 689.97], [310.03, 0]])
    pair = bradley_terry.fit(two, prior=1e-9)
    assert pair.strength[0] - pair.strength[1] == pytest.approx(0.8, abs=1e-3)


def test_standard_errors_are_those_of_the_inverse_information():
    """Two items, w comparisons at p = 1/2, prior t: H = [[w/4 + t, -w/4], [-w/4, w/4 + t]]; inv(H)_00 = (w/4 + t) / (t
    (w/2 + t)).
    """
    w, t = 20.0, 0.1
    found = bradley_terry.fit(np.array([[0, w / 2], [w / 2, 0]]), prior=t)
    assert found.error == pytest.approx(math.sqrt((w / 4 + t) / (t * (w / 2 + t))), rel=1e-9)


def test_bradley_terry_refuses_what_is_no_table_of_counts():
    for bad in (np.array([[0, -1.0], [1, 0]]), np.array([[0, np.nan], [1, 0]]), np.zeros((2, 3))):
        with pytest.raises(ValueError, match="square table"):
            bradley_terry.fit(bad)


def test_copeland_and_cyclic_triples():
    """a > b > c > a is one cycle; d loses to all; e ties with all."""
    counts = np.zeros((5, 5))
    for i, j in [(0, 1), (1, 2), (2, 0), (0, 3), (1, 3), (2, 3)]:
        counts[i, j] = 1
    counts[4, :4] = counts[:4, 4] = 0.5
    assert bradley_terry.cyclic_triples(counts) == 1
    assert bradley_terry.copeland(counts).tolist() == [1, 1, 1, -3, 0]


def test_win_probability_by_hand():
    """Strengths log 3, 0, 0: P(first above another) = 3/4; of the others (1/4 + 1/2) / 2 = .375."""
    found = bradley_terry.win_probability(np.array([math.log(3), 0, 0]))
    assert found == pytest.approx([0.75, 0.375, 0.375])


# --- orders


def test_pairs_recover_a_planted_order():
    scorer = planted(15)
    found = ranked(scorer, list(scorer.strength))
    assert found.titles == sorted(scorer.strength, key=lambda t: -scorer.strength[t])
    assert (found.pairs_scored, found.possible, found.cyclic_triples, scorer.pairs) == (105, 105, 0, 105)
    assert [r.rank for r in found.ranking] == list(range(1, 16))
    assert [r.copeland for r in found.ranking] == list(range(14, -15, -2))
    assert all(r.low < r.score < r.high for r in found.ranking)


def test_pairs_recover_a_planted_order_from_noise():
    scorer = planted(20, seed=3, noise=0.7)
    found = ranked(scorer, list(scorer.strength))
    tau = kendalltau([scorer.strength[t] for t in found.titles], range(20, 0, -1)).statistic
    assert tau > 0.8 and found.cyclic_triples > 0


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_reaches_the_order_of_all_pairs(seed):
    """N = 50: 183 of 1,225 pairs, under 15 %."""
    scorer = planted(50, seed=seed, noise=0.3)
    every = ranked(scorer, list(scorer.strength), budget=1225)
    few = ranked(scorer, list(scorer.strength), budget=183)
    assert few.pairs_scored / every.pairs_scored <= 0.15
    tau = kendalltau([every.titles.index(t) for t in few.titles], range(50)).statistic
    print(f"seed {seed}: {few.pairs_scored} of {every.pairs_scored} pairs, Kendall tau {tau:.3f}")
    assert tau >= 0.9


def test_a_budget_may_begin_with_the_items_scores():
    scorer = planted(40, noise=0.3, items=True)
    scoring = Scoring(scorer)
    found = rank.run(rank.Job(("seen",), list(scorer.strength), "pairs", budget=60, begin_with_items=True), scoring)
    assert (found.pairs_scored, scoring.cost.items, scoring.cost.pairs) == (60, 40, 60)
    best = sorted(scorer.strength, key=lambda t: -scorer.strength[t])
    assert kendalltau([best.index(t) for t in found.titles], range(40)).statistic > 0.7


def test_the_default_budget():
    assert rank.default_budget(20) == 190 and rank.default_budget(50) == 283
    assert rank.default_budget(1) == 0
    scorer = planted(30)
    assert ranked(scorer, list(scorer.strength)).pairs_scored == rank.default_budget(30) == 148


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(23)), st.sampled_from([("pairs", 0), ("pairs", 40), ("items", 0)]))
def test_the_order_of_the_candidates_does_not_matter(order, how):
    method, budget = how
    scorer = planted(23, noise=1.0, items=True)
    titles = sorted(scorer.strength)
    a = ranked(scorer, titles, method, budget=budget)
    b = ranked(scorer, [titles[i] for i in order], method, budget=budget)
    assert a.ranking == b.ranking


@pytest.mark.parametrize(("n", "budget"), [(6, 0), (30, 50)])
def test_always_first_is_a_tie(n, budget):
    """A scorer that prefers whatever is printed first says nothing about the items."""
    scorer = Planted({f"t{i}": 0.0 for i in range(n)}, first=7.0)
    found = ranked(scorer, list(scorer.strength), budget=budget)
    assert {r.rank for r in found.ranking} == {1}
    assert {r.win_probability for r in found.ranking} == {0.5} and {r.copeland for r in found.ranking} == {0}


def test_an_order_bias_changes_nothing():
    fair, biased = planted(8), planted(8, first=5.0)
    assert ranked(fair, list(fair.strength)).ranking == ranked(biased, list(fair.strength)).ranking


def test_items_and_what_they_lack():
    scorer = planted(9, items=True)
    found = ranked(scorer, list(scorer.strength), "items")
    assert found.titles == sorted(scorer.strength, key=lambda t: -scorer.strength[t])
    row = found.to_json()["ranking"][0]
    assert list(row) == ["rank", "title", "score"]
    assert list(ranked(scorer, list(scorer.strength)).to_json()) == [
        "method",
        "prompt",
        "ranking",
        "pairs_scored",
        "tokens",
        "seconds",
    ]
    with pytest.raises(UserError, match="compares pairs"):
        ranked(planted(9), list(scorer.strength), "items")


def test_one_and_two_candidates():
    scorer = planted(2, items=True)
    a, b = sorted(scorer.strength, key=lambda t: -scorer.strength[t])
    assert ranked(scorer, [b], "items").titles == ranked(scorer, [b]).titles == [b]
    assert ranked(scorer, [b]).ranking[0].win_probability is None
    assert ranked(scorer, [b, a]).titles == ranked(scorer, [b, a], "items").titles == [a, b]


@pytest.mark.parametrize(
    ("candidates", "options", "said"),
    [
        ([], {}, "there are none"),
        (["a", "a"], {}, '"a" is listed twice'),
        (["a", " "], {}, "a title is empty"),
        (["a", "b"], {"method": "items", "budget": 3}, "--budget: counts pairs"),
        (["a", "b"], {"method": "best"}, "not a choice"),
    ],
)
def test_candidates_that_cannot_be_ranked(candidates, options, said):
    with pytest.raises(UserError, match=said):
        ranked(Planted({"a": 0.0, "b": 1.0}), candidates, **options)


def test_an_empty_history_is_an_error():
    with pytest.raises(UserError, match="history: it is empty"):
        rank.Job((), ["a", "b"], "pairs")


def test_the_best_order_so_far_after_an_interrupt():
    """Ctrl-C in the second round of pairs: the first round's results make an order."""
    scorer = planted(18)

    class Interrupting(Planted):
        def score(self, examples):
            if self.pairs >= rank.ROUND:
                raise KeyboardInterrupt
            yield from super().score(examples)

    job = rank.Job(("seen",), list(scorer.strength), "pairs")
    with pytest.raises(KeyboardInterrupt):
        rank.run(job, Scoring(Interrupting(scorer.strength)))
    found = job.ranking()
    assert (found.pairs_scored, found.possible, found.finished) == (rank.ROUND, 153, False)
    assert len(found.titles) == 18


def test_several_jobs_in_one_step_get_what_each_gets_alone():
    scorer = planted(12, noise=1.0)
    lists = [sorted(scorer.strength)[:7], sorted(scorer.strength)[4:]]
    jobs = [rank.Job((f"seen {i}",), titles, "pairs") for i, titles in enumerate(lists)]
    scoring = Scoring(scorer)
    while rank.step(jobs, scoring):
        pass
    for job, titles in zip(jobs, lists, strict=True):
        assert job.ranking().ranking == ranked(scorer, titles).ranking


def test_a_repeated_history_is_not_scored_again():
    scorer = planted(8)
    scoring = Scoring(scorer)
    titles = sorted(scorer.strength)
    rank.run(rank.Job(("a",), titles[:6], "pairs"), scoring)
    assert scorer.pairs == 15
    rank.run(rank.Job(("a",), titles[:7], "pairs"), scoring)
    assert scorer.pairs == 15 + 6 and scoring.cost.kept == 15
    rank.run(rank.Job(("b",), titles[:6], "pairs"), scoring)
    assert scorer.pairs == 15 + 6 + 15


def test_a_pair_and_its_reverse_are_one_comparison():
    scorer = planted(2)
    a, b = sorted(scorer.strength)
    scoring = Scoring(scorer)
    margins, orders = scoring.margins([(("h",), a, b), (("h",), b, a)])
    assert margins[0] == -margins[1] and orders.tolist() == [2, 2] and scorer.pairs == 1


# --- titles as people type them


def test_titles_are_matched_to_the_catalogue():
    catalogue = Catalogue(("The Sixth Sense (1999)", "Heat (1995)", "Heat 2 (2027)", "Amélie (2001)"))
    notes = []
    assert catalogue.match("Heat (1995)", notes.append) == "Heat (1995)" and notes == []
    assert catalogue.match("Sixth Sense, The (1999)", notes.append) == "The Sixth Sense (1999)" and notes == []
    assert catalogue.match("the sixth sense (1999)", notes.append) == "The Sixth Sense (1999)" and notes == []
    assert catalogue.match("the sixth sens", notes.append) == "The Sixth Sense (1999)"
    assert notes.pop() == 'note: "the sixth sens" is read as "The Sixth Sense (1999)"'
    assert catalogue.match("Vertigo", notes.append) == "Vertigo"
    assert notes.pop() == 'note: "Vertigo" is not in the catalogue: it is used as typed'
    assert catalogue.match("a", notes.append) == "a" and "not in the catalogue" in notes.pop()
    assert catalogue.match("heat 3", notes.append) == "heat 3" and "not in the catalogue" in notes.pop()
    assert catalogue.match("heaat 2", notes.append) == "Heat 2 (2027)" and notes.pop()
    assert catalogue.match("Heat (1996)", notes.append) == "Heat (1996)" and "not in the catalogue" in notes.pop()
    assert Catalogue().match("Anything", notes.append) == "Anything" and notes == []


def test_search_puts_titles_that_begin_so_first():
    catalogue = Catalogue(("Reheated", "Heat (1995)", "Dead Heat", "Vertigo"))
    assert catalogue.search("heat", 10)[0] == "Heat (1995)"
    assert set(catalogue.search("heat", 10)) >= {"Heat (1995)", "Dead Heat"}
    assert catalogue.search("", 2) == ["Reheated", "Heat (1995)"]
    assert catalogue.search("zzzz", 10) == []


# --- a model


LIKED = ("river", "glass garden", "winter")


def invented(n):
    """n distinct titles of 1 to 4 words: many begin alike, and some begin others."""
    words = tiny.WORDS
    made = [" ".join(parts) for size in (1, 2, 3) for parts in itertools.product(words, repeat=size)]
    return made[:: max(1, len(made) // n)][:n]


def alone(ranker, titles):
    """Each candidate's score by the plain scorer, one prompt at a time."""
    plain = Ranker.load(ranker.settings.model, prompt=ranker.settings.prompt, scoring="plain").scoring.model
    return {t: plain.score_items(LIKED, [t], "movie")[0] for t in titles}


@pytest.mark.parametrize("prompt", ["direct", "pointwise"])
def test_items_equal_the_plain_scorer_for_every_candidate(model_directory, prompt):
    """Shared beginnings, and titles that begin others."""
    titles = ["amber", "amber lantern", "amber lantern river", "lantern", "salt", *invented(40)]
    titles = list(dict.fromkeys(titles))
    ranker = Ranker.load(model_directory, prompt=prompt)
    found = ranker.rank(LIKED, titles)
    expected = alone(ranker, titles)
    assert {r.title: r.score for r in found.ranking} == pytest.approx(expected, abs=5e-4)
    assert found.titles == sorted(titles, key=lambda t: -expected[t]) or min(np.diff(sorted(expected.values()))) < 1e-3
    assert found.tokens > 0 and found.method == "items"


@pytest.mark.parametrize("n", [1, 120, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_whole_catalogue_in_chunks_and_not(model_directory, monkeypatch, n):
    titles = invented(n)
    assert len(titles) == n
    ranker = Ranker.load(model_directory, prompt="direct")
    whole = {r.title: r.score for r in ranker.rank(LIKED, titles).ranking}
    assert whole == pytest.approx(alone(ranker, titles), abs=5e-4)
    sizes = []
    monkeypatch.setattr(score, "part", lambda group, rows: sizes.append(len(rows)) or part(group, rows))
    monkeypatch.setattr(LanguageModelScorer, "tokens_at_once", lambda self, groups, batch_size: 200)
    parts = Ranker.load(model_directory, prompt="direct")
    assert {r.title: r.score for r in parts.rank(LIKED, titles).ranking} == pytest.approx(whole, abs=5e-4)
    assert sum(sizes) == (n if n > 1 else 0) and (n == 1 or len(sizes) > 1)


def test_two_thousand_titles_are_all_scored(model_directory):
    """The rest of the 2,000 is left to the slow test; here a spread of 25 against the plain scorer."""
    titles = invented(2000)
    ranker = Ranker.load(model_directory, prompt="direct")
    found = ranker.rank(LIKED, titles)
    assert sorted(found.titles) == sorted(titles)
    scores = {r.title: r.score for r in found.ranking}
    some = titles[::80]
    assert {t: scores[t] for t in some} == pytest.approx(alone(ranker, some), abs=5e-4)


def test_pairs_equal_the_plain_scorer(model_directory):
    """One prefix tree of all pairs against each pair alone."""
    titles = ["amber", "amber lantern", "salt", "iron glass", "tower"]
    ranker, plain = Ranker.load(model_directory), Ranker.load(model_directory, scoring="plain")
    pairs = list(itertools.combinations(titles, 2))
    expected = []
    for a, b in pairs:
        (scores,) = plain.scoring.model.score([RankingExample("", "movie", LIKED, a, (b,))])
        expected.append(scores.margins[0])
    assert ranker.score(LIKED, pairs) == pytest.approx(expected, abs=1e-3)
    assert ranker.score(LIKED, [(b, a) for a, b in pairs]) == pytest.approx([-m for m in expected], abs=1e-3)
    assert ranker.scoring.cost.pairs == 10 and ranker.scoring.cost.tokens > 0


def test_a_long_history_loses_its_oldest_items_as_everywhere(model_directory):
    """What does not fit is left out pair by pair, as in evaluation."""
    history = tuple(f"river glass {i}" for i in range(60))
    ranker = Ranker.load(model_directory, max_seq_length=400)
    (scores,) = ranker.scoring.model.score([RankingExample("", "movie", history, "amber", ("iron",))])
    assert ranker.score(history, [("amber", "iron")]) == pytest.approx(scores.margins, abs=1e-3)


@pytest.mark.parametrize("options", [{}, {"budget": 9}, {"prompt": "direct"}, {"prompt": "listwise"}])
def test_the_order_of_the_candidates_does_not_matter_to_a_model(model_directory, options):
    titles = ["amber", "amber lantern", "salt", "iron", "tower", "moon", "copper"]
    a, b = (Ranker.load(model_directory, **options).rank(LIKED, order) for order in (titles, titles[::-1]))
    assert a.ranking == b.ranking


def test_pairs_that_start_from_items(model_directory):
    titles = invented(12)
    ranker = Ranker.load(model_directory, budget=14, start="items")
    found = ranker.rank(LIKED, titles)
    assert found.pairs_scored == 14 and ranker.scoring.cost.items == 12 and sorted(found.titles) == sorted(titles)


# --- the command


def command(*arguments, stdin=""):
    """(exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.raises(SystemExit) as stop,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("sys.stdin", io.StringIO(stdin))
        main(["rank", *map(str, arguments)])
    return stop.value.code, out.getvalue(), err.getvalue()


@pytest.fixture
def base(model_directory, data_directory):
    return ["--model", model_directory, "--data", data_directory]


def test_json_has_the_fields_that_others_script_against(base, model_directory, tmp_path):
    out = tmp_path / "order.json"
    arguments = [*base, "--history", "river", "--history", "glass", "--candidates", "amber", "--candidates", "iron"]
    code, printed, _ = command(*arguments, "--candidates", "salt", "--json", "--top", "2", "--out", out)
    found = json.loads(printed)
    assert code == 0 and json.loads(out.read_text()) == found
    assert list(found) == ["method", "prompt", "ranking", "pairs_scored", "tokens", "seconds"]
    assert [list(row) for row in found["ranking"]] == [["rank", "title", "score", "win_probability", "low", "high"]] * 2
    own = Ranker.load(model_directory).rank(["river", "glass"], ["amber", "iron", "salt"])
    assert [row["title"] for row in found["ranking"]] == own.titles[:2]
    assert (found["method"], found["prompt"], found["pairs_scored"]) == ("pairs", "pairwise", 3)
    code, printed, _ = command(*arguments, "--json", "--prompt", "direct")
    found = json.loads(printed)
    assert [list(row) for row in found["ranking"]] == [["rank", "title", "score"]] * 2 and found["method"] == "items"


def test_the_three_ways_to_give_a_history(base, data_directory, tmp_path):
    history = read_data(str(data_directory)).history("test-1")
    listed = tmp_path / "liked.txt"
    listed.write_text("\n".join(history) + "\n\n")
    rest = ["--candidates", "amber", "--candidates", "iron", "--json"]
    by_user = json.loads(command(*base, "--user", "test-1", *rest)[1])["ranking"]
    by_file = json.loads(command(*base, "--history", listed, *rest)[1])["ranking"]
    stdin = json.dumps({"history": list(history), "candidates": ["amber", "iron"]})
    by_stdin = json.loads(command(*base, "--json", stdin=stdin)[1])["ranking"]
    assert by_user == by_file == by_stdin


def test_the_catalogue_without_the_history_is_the_default(base, data_directory, tmp_path):
    data = read_data(str(data_directory))
    code, printed, _ = command(*base, "--user", "test-1", "--json", "--prompt", "direct")
    titles = {row["title"] for row in json.loads(printed)["ranking"]}
    assert titles == set(data.catalogue.titles) - set(data.history("test-1"))
    copy = tmp_path / "with-items"
    shutil.copytree(data_directory, copy)
    rows = [{"domain": d, "title": t} for d, t in (("movie", "amber"), ("movie", "new one"), ("book", "a book"))]
    (copy / "items.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    arguments = ["--model", base[1], "--data", copy, "--user", "test-1", "--json", "--prompt", "direct"]
    code, _, err = command(*arguments)
    assert code == 2 and "several domains" in err
    code, printed, err = command(*arguments, "--domain", "movie")
    assert code == 0, err
    seen = read_data(str(data_directory)).history("test-1")
    assert {row["title"] for row in json.loads(printed)["ranking"]} == {"amber", "new one"} - set(seen)
    code, printed, _ = command(*arguments, "--domain", "movie", "--candidates", copy / "items.jsonl")
    assert {row["title"] for row in json.loads(printed)["ranking"]} == {"amber", "new one", "a book"}


def test_notes_about_typed_titles_and_a_table(base):
    code, printed, err = command(*base, "--history", "rivr", "--candidates", "AMBER", "--candidates", "Vertigo (1958)")
    assert code == 0 and 'note: "rivr" is read as "river"' in err
    assert '"Vertigo (1958)" is not in the catalogue' in err
    lines = printed.splitlines()
    assert lines[0].split()[:3] == ["rank", "title", "score"] and "Copeland" in lines[0]
    assert {line.split("  ")[1].strip() for line in lines[1:3]} <= {"amber", "Vertigo (1958)", ""} or "amber" in printed
    assert "1 of 1 pairs in both printed orders, 0 cyclic triples" in printed


def test_a_terminal_gets_no_control_characters(base):
    code, printed, err = command(
        *base, "--history", "river", "--candidates", "amber", "--candidates", "x\x1b[31m\u202ey"
    )
    assert code == 0 and not {"\x1b", "\u202e"} & set(printed + err)


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        ([], "", "no history: give --history"),
        (["--history", "river", "--user", "test-1"], "", "the history is given twice"),
        (["--user", "nobody"], "", "--user: nobody is not in"),
        (["--history", "missing/list.txt"], "", "no such file"),
        (["--history", ""], "", "a title is empty"),
        (["--history", "river", "--candidates", "amber", "--candidates", "AMBER"], "", "listed twice"),
        ([], "{", "standard input: not JSON"),
        ([], '{"history": "river"}', '"history" is not a list'),
        ([], '{"liked": ["river"]}', "standard input: another shape"),
        (["--candidates", "amber"], '{"history": ["river"], "candidates": ["iron"]}', "keep one of them"),
        (["--history", "river", "--method", "items"], "", "prompt pairwise only compares pairs"),
        (["--history", "river", "--prompt", "direct", "--method", "pairs"], "", "does not compare pairs"),
        (["--history", "river", "--prompt", "direct", "--budget", "5"], "", "--budget: counts pairs"),
        (["--history", "river", "--prompt", "direct", "--start", "items"], "", "--start: says how"),
        (["--history", "river", "--orders", "2"], "", "--orders"),
        (["--history", "river", "--candidates", "amber", "--start", "items"], "", "--start: every pair"),
        (["--history", "river", "--num-negatives", "2"], "", "num-negatives"),
        (["--history", "river", "--adapter-path", "runs/none"], "", "runs/none"),
    ],
)
def test_mistakes_are_one_line(base, arguments, stdin, said):
    code, _, err = command(*base, *arguments, stdin=stdin)
    error = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(error) == 1 and said in error[0]


def test_a_setting_without_effect_in_a_config_file_is_refused(base, tmp_path):
    (tmp_path / "c.yaml").write_text("num_negatives: 2\n")
    code, _, err = command(*base, "-c", tmp_path / "c.yaml", "--history", "river")
    assert code == 2 and "num_negatives: rank, explain and serve use no negatives" in err


def test_ctrl_c_prints_the_best_order_so_far(base):
    """A real SIGINT to a real process, after some pairs and before all of them."""
    script = """
import sys, os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts with it ignored
from mlx_dmpo.use import rank
add = rank.PairRanking.add
def and_interrupt(self, probabilities):
    add(self, probabilities)
    if self.done >= 128: os.kill(os.getpid(), signal.SIGINT)
rank.PairRanking.add = and_interrupt
from mlx_dmpo.cli.main import main
main(sys.argv[1:])
"""
    candidates = [part for i in range(18) for part in ("--candidates", f"river {i}")]
    arguments = ["rank", *map(str, base), "--history", "glass", *candidates, "--json"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 130, done.stderr
    found = json.loads(done.stdout)
    assert found["pairs_scored"] == 128 and len(found["ranking"]) == 18
    assert "interrupted after 128 pairs" in done.stderr
