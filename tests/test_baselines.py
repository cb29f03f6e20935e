"""Baselines: what they count, that they learn, that no layer is other than its equation, that nothing leaks"""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dmpo.baselines import counts, factors, fit
from mlx_dmpo.baselines.caser import Caser
from mlx_dmpo.baselines.corpus import build_corpus
from mlx_dmpo.baselines.gru4rec import Gru4Rec
from mlx_dmpo.baselines.sasrec import SasRec
from mlx_dmpo.baselines.scorer import FirstListed, ItemScorer
from mlx_dmpo.data import formats
from mlx_dmpo.errors import UserError
from mlx_dmpo.records import Branch, PreferenceGroup, RankingExample

ITEMS = 40
HOW = fit.Training(dim=32, length=12, epochs=30, batch_size=32, learning_rate=3e-3, dropout=0.1, seed=0)
SEQUENTIAL = ["gru4rec", "caser", "sasrec"]


def example(user, history, positive, negatives, first=None):
    return RankingExample(user, "movie", tuple(history), positive, tuple(negatives), first)


def cycle(users, seed, length=10):
    """Users who mostly go from item i to 3 i + 1 (modulo ITEMS), one step in ten to a popular item."""
    rng, rows = np.random.default_rng(seed), []
    for user in range(users):
        item, walk = int(rng.integers(ITEMS)), []
        while len(walk) < length + 1:
            if f"item {item}" not in walk:
                walk.append(f"item {item}")
            item = int(rng.integers(5)) if rng.random() < 0.1 else (3 * item + 1) % ITEMS
            if f"item {item}" in walk:
                item = int(rng.integers(ITEMS))
        rows.append(example(f"{seed}-{user}", walk[:-1], walk[-1], [f"item {(int(rng.integers(ITEMS)))} x"]))
    return rows


@pytest.fixture(scope="module")
def walks():
    train, test = cycle(250, 0), cycle(60, 1)
    return build_corpus(train, test), test


def hit_rate(scorer, examples, k=10):
    """Share of examples whose positive is among the k best of the catalogue without the history."""
    hits = 0
    for e in examples:
        whole = scorer.catalogue(e.history)
        whole[scorer.corpus.items(e.history)] = -np.inf
        hits += int(scorer.corpus.items([e.positive])[0] in np.argsort(-whole, kind="stable")[:k])
    return hits / len(examples)


# --- what is fitted on


def test_corpus_by_hand():
    rows = [example("u", ["a", "b"], "c", ["d"]), example("v", ["b"], "a", ["c", "d"])]
    corpus = build_corpus(rows, [])
    assert corpus.keys == ("a", "b", "c", "d")
    assert [s.tolist() for s in corpus.sequences] == [[0, 1, 2], [1, 0]]
    assert corpus.likes.tolist() == [2, 2, 1, 0] and corpus.dislikes.tolist() == [0, 0, 1, 2]
    assert counts.Popularity(corpus).scores(np.array([])).tolist() == [2, 2, 1, 0]
    np.testing.assert_allclose(counts.LikeRatio(corpus).scores(np.array([])), [3 / 4, 3 / 4, 2 / 4, 1 / 4])


@pytest.mark.parametrize("with_histories", [False, True])
def test_a_planted_test_target_is_not_fitted_on(with_histories):
    """A test user's target, in a training row of the same user too: no count and no item of it is left."""
    target, other = "the target", "the negative"
    test = [example("u", ["a", "b"], target, [other])]
    train = [example("w", ["a"], "b", ["c"]), example("u", ["a", target], "b", [other])]
    corpus = build_corpus(train, test, with_histories=with_histories)
    assert corpus.items([target, other]).tolist() == [-1, -1]
    assert corpus.left_out == 2
    scores = next(ItemScorer("popularity", corpus, counts.Popularity(corpus)).score(test))
    assert scores.margins.tolist() == [0.0]  # both unknown: a tie


def test_histories_of_tested_users_count_with_fit_all_only():
    train, test = [example("w", ["a"], "b", ["c"])], [example("u", ["z"], "a", ["b"])]
    assert build_corpus(train, test).items(["z"]).tolist() == [-1]
    assert build_corpus(train, test, with_histories=True).likes.tolist() == [1, 1, 1, 0]
    with pytest.raises(UserError, match="no interaction to fit on"):
        build_corpus([], test)


def test_titles_written_in_two_ways():
    corpus = build_corpus([example("w", ["Sixth Sense"], "Heat", ["Jaws"])], [], matching="short")
    assert corpus.items(["Sixth Sense, The (1999)", "Heat (1995)", "Up"]).tolist() == [0, 1, -1]


def test_free_text_is_refused():
    group = PreferenceGroup("u", "text", (Branch((), "a"), Branch((), "b")), ((0, 1),), "file:1")
    with pytest.raises(UserError, match="file:1: free text holds no titles"):
        build_corpus([group], [])


# --- scores


def test_scores_by_hand():
    corpus = build_corpus([example("u", ["a", "b"], "c", ["d"]), example("v", ["b"], "a", ["c"])], [])
    scorer = ItemScorer("popularity", corpus, counts.Popularity(corpus))
    scores = next(scorer.score([example("t", ["a"], "b", ["c", "never met"])]))
    assert scores.items.tolist() == [2, 1, -1]  # least of the catalogue is 0, minus 1
    assert scores.margins.tolist() == [1, 3] and scores.logps is None
    assert scorer.note() == "" or "1 of 3" in scorer.note()


def test_first_listed_goes_by_the_file():
    rows = [example("u", ["a"], "b", ["c", "d"], (True, False)), example("v", ["a"], "b", ["c"])]
    assert [s.margins.tolist() for s in FirstListed().score(rows)] == [[1, -1], [0]]


@pytest.mark.parametrize(
    ("kind", "popularity", "first"), [("data_ml_1m", 0.608, 0.484), ("Amazon_Movie", 0.516, 0.480)]
)
def test_counters_on_the_released_files(shared, kind, popularity, first):
    rows = formats.load(shared / "data" / "dmpo-release" / f"rec_{kind}_eval_ranking.json").examples
    corpus = build_corpus([], rows, with_histories=True)

    def accuracy(scorer):
        margins = np.array([s.margins[0] for s in scorer.score(rows)])
        return float(((margins > 0) + 0.5 * (margins == 0)).mean())

    assert accuracy(ItemScorer("popularity", corpus, counts.Popularity(corpus))) == pytest.approx(popularity, abs=5e-4)
    assert accuracy(FirstListed()) == pytest.approx(first, abs=5e-4)


# --- factors, through implicit


@pytest.fixture(scope="module")
def blocks():
    """Two groups of users, each with its own half of the items: likes tell the group."""
    pytest.importorskip("implicit")
    rng, rows = np.random.default_rng(0), []
    for user in range(120):
        half = (user % 2) * 30
        liked = [f"item {half + i}" for i in rng.choice(30, 12, replace=False)]
        rows.append(example(f"u{user}", liked[:-2], liked[-2], ["other"]))
    tests = []
    for user in range(80):
        half = (user % 2) * 30
        liked = [f"item {half + i}" for i in rng.choice(30, 12, replace=False)]
        tests.append(example(f"t{user}", liked[:-1], liked[-1], [f"item {30 - half + int(rng.integers(30))}"]))
    return build_corpus(rows, tests), tests


FACTORS = {
    "als": lambda corpus: factors.Als(corpus, factors=8, epochs=15, seed=0),
    "bpr": lambda corpus: factors.Bpr(corpus, factors=8, epochs=60, seed=0, learning_rate=0.05),
    "item-knn": lambda corpus: factors.ItemKnn(corpus, neighbours=20),
}


@pytest.mark.parametrize("name", FACTORS)
def test_factors_learn_and_repeat_bit_for_bit(blocks, name):
    corpus, tests = blocks
    first, second = (ItemScorer(name, corpus, FACTORS[name](corpus)) for _ in range(2))
    margins = np.array([s.margins[0] for s in first.score(tests)])
    assert (margins > 0).mean() > 0.9
    np.testing.assert_array_equal(margins, [s.margins[0] for s in second.score(tests)])


def test_als_folds_in_by_the_normal_equations(blocks):
    corpus, tests = blocks
    als = factors.Als(corpus, factors=8, epochs=15, seed=0)
    items, history = als._items, corpus.items(tests[0].history)
    liked = items[history]
    # (Y'Y + reg I + sum (40 - 1) y y') u = sum 40 y
    left = items.T @ items + 0.01 * np.eye(8) + 39 * liked.T @ liked
    np.testing.assert_allclose(als.scores(history), items @ np.linalg.solve(left, 40 * liked.sum(axis=0)), atol=2e-3)


def test_item_knn_is_the_sum_of_cosines(blocks):
    corpus, tests = blocks
    matrix = np.zeros((len(corpus.sequences), len(corpus.keys)))
    for row, sequence in zip(matrix, corpus.sequences, strict=True):
        row[sequence] = 1
    length = np.maximum(np.sqrt(matrix.sum(axis=0)), 1e-9)
    cosine = matrix.T @ matrix / np.outer(length, length)
    history = corpus.items(tests[0].history)
    knn = factors.ItemKnn(corpus, neighbours=len(corpus.keys))
    np.testing.assert_allclose(knn.scores(history), cosine[history].sum(axis=0), atol=1e-5)


def auc_of(scores, liked, held_out):
    """Mean chance, over users, that a held-out liked item is above an item not liked."""
    found = []
    for user, items in enumerate(held_out):
        others = np.setdiff1d(np.arange(scores.shape[1]), np.concatenate([liked[user], items]))
        found.append((scores[user, items][:, None] > scores[user, others][None]).mean())
    return float(np.mean(found))


def test_bpr_folds_in_as_well_as_implicits_own_user_factors(blocks):
    """AUC on held-out items: user factors that implicit trained beside ours, made from the history alone."""
    corpus, _ = blocks
    bpr = factors.Bpr(corpus, factors=8, epochs=60, seed=0, learning_rate=0.05)
    own = factors._module("implicit.cpu.bpr").BayesianPersonalizedRanking
    with factors._one_thread():
        model = own(8, learning_rate=0.05, iterations=60, num_threads=1, random_state=0)
        model.fit(factors._matrix(corpus), show_progress=False)
    held_out = [
        np.setdiff1d(corpus.items([f"item {(u % 2) * 30 + i}" for i in range(30)]), s)
        for u, s in enumerate(corpus.sequences)
    ]
    trained = np.asarray(model.user_factors) @ np.asarray(model.item_factors).T
    folded = np.stack([bpr.scores(sequence) for sequence in corpus.sequences])
    theirs, ours = (auc_of(scores, corpus.sequences, held_out) for scores in (trained, folded))
    assert theirs > 0.9 and abs(ours - theirs) < 0.03


# --- sequential models


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_sequential_model_learns_the_order(walks, name):
    corpus, test = walks
    popularity = hit_rate(ItemScorer("popularity", corpus, counts.Popularity(corpus)), test)
    model = fit.Sequential(name, corpus, HOW)
    assert hit_rate(ItemScorer(name, corpus, model), test) > popularity + 0.3
    assert model.losses[-1] < 0.7 * model.losses[0]


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_no_future_item_changes_an_earlier_place(name):
    mx.random.seed(0)
    model = fit.build(name, ITEMS, HOW).eval()
    real = mx.ones((1, 8))
    before = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    after = mx.array([[3, 1, 4, 1, 5, 7, 8, 0]])
    one, two = np.array(model(before, real)), np.array(model(after, real))
    np.testing.assert_array_equal(one[:, :5], two[:, :5])
    assert (np.abs(one[:, 5:] - two[:, 5:]).max(axis=-1) > 1e-4).all()  # and the later ones do change


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_padding_changes_nothing(name):
    model = fit.build(name, ITEMS, HOW).eval()
    alone = np.array(model(mx.array([[3, 1, 4]]), mx.ones((1, 3))))
    padded = np.array(model(mx.array([[3, 1, 4, ITEMS, ITEMS]]), mx.array([[1.0, 1, 1, 0, 0]])))
    np.testing.assert_allclose(padded[:, :3], alone, atol=1e-6)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_seed_repeats_bit_for_bit(walks, name):
    corpus, _ = walks
    how = fit.Training(dim=16, length=8, epochs=2, batch_size=64, learning_rate=1e-2, dropout=0.2, seed=3)
    first, second = (dict(tree_flatten(fit.Sequential(name, corpus, how).model.parameters())) for _ in range(2))
    for key in first:
        np.testing.assert_array_equal(np.array(first[key]), np.array(second[key]), err_msg=key)


def test_windows_by_hand():
    corpus = build_corpus([example("u", list("abcdef"), "g", ["z"]), example("v", ["a"], "b", ["z"])], [])
    # 7 items, 3 looked at: the parts' targets are e f g, then b c d; a is nobody's target
    assert [part.tolist() for part in fit.windows(corpus, 3)] == [[3, 4, 5, 6], [0, 1, 2, 3], [0, 1]]
    how = fit.Training(dim=4, length=3, epochs=1, batch_size=9, learning_rate=1, dropout=0, seed=0)
    sequences, targets, real = next(fit.batches([np.array([5, 3, 8])], how, 9, 0))
    assert sequences.tolist() == [[5, 3, 9]] and targets.tolist() == [[3, 8, 9]] and real.tolist() == [[1, 1, 0]]


# --- every layer against numpy


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def arrays(module):
    return {key: np.array(value, np.float64) for key, value in tree_flatten(module.parameters())}


def test_gru4rec_is_its_equations():
    model = Gru4Rec(ITEMS, 6, dropout=0.0)
    w, sequence = arrays(model), [3, 1, 4, 1]
    h, expected = np.zeros(6), []
    for item in sequence:
        x = w["gru.Wx"] @ w["embedding.weight"][item] + w["gru.b"]
        of_h = w["gru.Wh"] @ h
        r, z = sigmoid(x[:6] + of_h[:6]), sigmoid(x[6:12] + of_h[6:12])
        n = np.tanh(x[12:] + r * (of_h[12:] + w["gru.bhn"]))
        h = (1 - z) * n + z * h
        expected.append(w["out.weight"] @ h + w["out.bias"])
    np.testing.assert_allclose(np.array(model(mx.array([sequence]), mx.ones((1, 4))))[0], expected, atol=1e-5)


def test_caser_is_its_equations():
    model = Caser(ITEMS, 6, dropout=0.0, window=3, horizontal=2, vertical=2)
    w, sequence = arrays(model), [3, 1, 4, 1]
    expected = []
    for at in range(4):
        picture = np.zeros((3, 6))
        seen = sequence[max(0, at - 2) : at + 1]
        picture[3 - len(seen) :] = w["embedding.weight"][seen]
        parts = []
        for height in (1, 2, 3):
            kernel, bias = w[f"rows.{height - 1}.weight"], w[f"rows.{height - 1}.bias"]  # (filters, height, D)
            places = [(kernel * picture[i : i + height]).sum(axis=(1, 2)) + bias for i in range(3 - height + 1)]
            parts.append(np.maximum(places, 0).max(axis=0))
        parts.append((w["columns.weight"] @ picture).T.ravel())  # filters of one weight a place, for each of D columns
        expected.append(np.maximum(w["out.weight"] @ np.concatenate(parts) + w["out.bias"], 0))
    np.testing.assert_allclose(np.array(model(mx.array([sequence]), mx.ones((1, 4))))[0], expected, atol=1e-5)


def layer_norm(x, weight, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def test_sasrec_is_its_equations():
    model = SasRec(ITEMS, 8, dropout=0.0, length=6, blocks=2, heads=2)
    w, sequence = arrays(model), [3, 1, 4, 1]
    h = w["embedding.weight"][sequence] * np.sqrt(8) + w["positions.weight"][:4]
    for b in range(2):
        part = lambda name, b=b: w[f"blocks.{b}.{name}"]  # noqa: E731
        queries = layer_norm(h, part("attention_norm.weight"), part("attention_norm.bias"))
        q, k, v = queries @ part("query.weight").T, h @ part("key.weight").T, h @ part("value.weight").T
        attended = np.zeros_like(h)
        for head in (slice(0, 4), slice(4, 8)):
            for i in range(4):
                score = np.exp(k[: i + 1, head] @ q[i, head] / 2)  # sqrt(4) = 2
                attended[i, head] = score / score.sum() @ v[: i + 1, head]
        h = queries + attended
        normed = layer_norm(h, part("network_norm.weight"), part("network_norm.bias"))
        inner = np.maximum(normed @ part("first.weight").T + part("first.bias"), 0)
        h = normed + inner @ part("second.weight").T + part("second.bias")
    expected = layer_norm(h, w["norm.weight"], w["norm.bias"])
    np.testing.assert_allclose(np.array(model(mx.array([sequence]), mx.ones((1, 4))))[0], expected, atol=1e-4)


def test_dros_by_hand():
    # s = 1 0 2, target 0, p = .5 .25 .25: errors (1-1)² = 0, 0, 4; log(.5 e^0 + .25 e^0 + .25 e^4) = 2.6673
    found = fit.dros(mx.array([1.0, 0.0, 2.0]), mx.array(0), mx.array([0.5, 0.25, 0.25]))
    assert float(found) == pytest.approx(np.log(0.75 + 0.25 * np.exp(4)), rel=1e-5)


def test_dros_pulls_scores_towards_zero_and_one(walks):
    corpus, test = walks
    how = fit.Training(**{**HOW.__dict__, "epochs": 15})
    plain, robust = (fit.Sequential("sasrec", corpus, fit.Training(**{**how.__dict__, "dros": d})) for d in (0.0, 0.5))
    spread = [np.abs(m.scores(corpus.items(test[0].history))).max() for m in (plain, robust)]
    assert spread[1] < spread[0]
    popularity = hit_rate(ItemScorer("popularity", corpus, counts.Popularity(corpus)), test)
    assert hit_rate(ItemScorer("dros-sasrec", corpus, robust), test) > popularity + 0.2


def test_embeddings_that_are_given_are_where_training_starts(walks):
    corpus, _ = walks
    given = np.random.default_rng(0).normal(0, 0.1, (len(corpus.keys), 32))
    how = fit.Training(**{**HOW.__dict__, "epochs": 0})
    found = np.array(fit.Sequential("sasrec", corpus, how, given).model.embedding.weight)
    np.testing.assert_allclose(found[:-1], given, atol=1e-6)
