"""Ranking: Bradley-Terry against choix, planted orders, order independence, budgets, items and pairs, titles, the command."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from mlx_dmpo.errors import UserError
from mlx_dmpo.scores import Scores
from mlx_dmpo.use import bradley_terry, rank
from mlx_dmpo.use.match import Catalogue
from mlx_dmpo.use.scoring import Scoring


class Planted:
    """A scorer with a known strength of every title, noise drawn for each pair, and a liking for the title printed first."""

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
    """choix minimises  -log likelihood + alpha sum s^2."""
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
    # two items, n = 1000 at p = sigmoid(.8): information n p (1 - p) = 213.9; the variance of the difference is its inverse
    two = np.array([[0, 689.97], [310.03, 0]])
    pair = bradley_terry.fit(two, prior=1e-9)
    assert pair.strength[0] - pair.strength[1] == pytest.approx(0.8, abs=1e-3)


def test_standard_errors_are_those_of_the_inverse_information():
    """Two items, w comparisons at p = 1/2, prior t: H = [[w/4 + t, -w/4], [-w/4, w/4 + t]]; inv(H)_00 = (w/4 + t) / (t (w/2 + t))."""
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
    assert notes.pop() == 'note: "the sixth sens" is taken for "The Sixth Sense (1999)"'
    assert catalogue.match("Vertigo", notes.append) == "Vertigo"
    assert notes.pop() == 'note: "Vertigo" is not in the catalogue: it is used as typed'
    assert catalogue.match("a", notes.append) == "a" and "not in the catalogue" in notes.pop()
    assert Catalogue().match("Anything", notes.append) == "Anything" and notes == []


def test_search_puts_titles_that_begin_so_first():
    catalogue = Catalogue(("Reheated", "Heat (1995)", "Dead Heat", "Vertigo"))
    assert catalogue.search("heat", 10)[0] == "Heat (1995)"
    assert set(catalogue.search("heat", 10)) >= {"Heat (1995)", "Dead Heat"}
    assert catalogue.search("", 2) == ["Reheated", "Heat (1995)"]
    assert catalogue.search("zzzz", 10) == []
