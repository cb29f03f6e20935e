"""The splits' promises over random interaction tables, and the arrays' scorer against a plain one in dictionaries."""

import json
import math
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_dmpo import config
from mlx_dmpo.data import examples as examples_of
from mlx_dmpo.data import splits
from mlx_dmpo.data.sources import Interactions, Ratings
from mlx_dmpo.data.titles import catalogue
from mlx_dmpo.errors import UserError

USERS = [f"u{n}" for n in range(12)]
RAW = {f"i{n}": f"title {n % 11}" for n in range(13)}  # two pairs of items share a title; i13 has none
ITEMS = [*RAW, "i13"]

tables = st.lists(
    st.tuples(st.sampled_from(USERS), st.sampled_from(ITEMS), st.integers(1, 5), st.integers(0, 9)),
    min_size=1,
    max_size=220,
)
rules = st.builds(
    config.PrepareSettings,
    order=st.sampled_from(["time", "file", "random"]),
    max_interactions=st.sampled_from([0, 4, 9, 40]),
    min_liked=st.integers(2, 4),
    min_disliked=st.integers(0, 3),
    num_negatives=st.integers(1, 5),
    negatives=st.sampled_from(["disliked", "uniform", "popularity"]),
    liked_quantile=st.sampled_from([None, 0.5, 0.8]),
    train_users=st.integers(1, 3),
    valid_users=st.integers(0, 3),
    test_users=st.integers(0, 6),
    few_shot=st.integers(0, 4),
    seed=st.integers(0, 3),
)


def ratings_of(rows):
    users, items = list(dict.fromkeys(r[0] for r in rows)), list(dict.fromkeys(r[1] for r in rows))
    i = Interactions(
        np.array([users.index(r[0]) for r in rows], np.int32),
        np.array([items.index(r[1]) for r in rows], np.int32),
        np.array([r[2] for r in rows], float),
        np.array([r[3] for r in rows], float),
        users,
        items,
    )
    return Ratings(i, RAW, [Path("r.csv")], "table", "movie", scale=(1, 5))


def run(rows, s, scores=None, taken=None):
    """(histories, eligible users, examples of each split) as `prepare` makes them."""
    ratings = ratings_of(rows)
    titles = catalogue(ratings.interactions.items, ratings.titles, True, True)
    rule = splits.liked_rule(s, ratings)
    h = splits.histories(ratings, titles, rule, splits.choose_order(s, ratings), s.seed)
    eligible, _ = splits.eligible_users(h, s, len(titles.titles))
    wanted = {"train": s.few_shot or s.train_users, "valid": s.valid_users, "test": s.test_users}
    users = splits.assign([h.users[u] for u in eligible], wanted, s, {} if taken is None else taken)
    rankings = examples_of.Rankings("movie", h, titles.titles, s, scores, splits.popularity(h, len(titles.titles)))
    return h, {h.users[u] for u in eligible}, examples_of.split_examples(rankings, users)[0]


def plainly(rows, s):
    """user -> [(title, liked, time, row)] of all the user's interactions, in order: the rules in dictionaries and
    lists.
    """
    keys = np.random.PCG64(s.seed).random_raw(len(rows))
    titled = [(u, RAW[i], r, t, n) for n, (u, i, r, t) in enumerate(rows) if i in RAW]
    titled.sort(
        key=lambda row: {"time": (row[3], row[4]), "file": row[4], "random": (int(keys[row[4]]), row[4])}[s.order]
    )
    last = {(u, title): (r, t, n) for u, title, r, t, n in titled}
    found = defaultdict(list)
    for u, title, r, t, n in titled:
        if last[u, title] == (r, t, n):
            found[u].append((title, r, t, n))
    for u, row in found.items():
        given = sorted(r for _, r, _, _ in row)
        least = 3 if s.liked_quantile is None else given[max(0, math.ceil(s.liked_quantile * len(given) - 1e-9) - 1)]
        found[u] = [(title, r > least, t, n) for title, r, t, n in row]
    return found


@settings(max_examples=150, deadline=None)
@example(
    [("u0", "i0", 4, 0), ("u0", "i2", 4, 0), ("u1", "i1", 4, 0)],
    config.PrepareSettings(
        order="time", min_liked=2, min_disliked=1, num_negatives=1, negatives="uniform", train_users=1
    ),
)  # nothing is disliked in the whole table
@given(tables, rules)
def test_the_rules_hold_in_every_table(rows, s):
    if all(i == "i13" for _, i, _, _ in rows):
        return
    _, eligible, examples = run(rows, s)
    plain = plainly(rows, s)
    users = {split: {e.user for e in found} for split, found in examples.items()}
    assert (
        not users["train"] & users["valid"]
        and not users["train"] & users["test"]
        and not users["valid"] & users["test"]
    )
    drawn = s.negatives != "disliked"
    # drawn negatives need no disliked item where the table has none: as many as `min_disliked` asks for otherwise
    least = 0 if all(like for row in plain.values() for _, like, _, _ in row) else s.min_disliked
    least = least if drawn else max(s.min_disliked, 1)

    expected = set()
    for u, row in plain.items():
        window = row[-s.max_interactions :] if s.max_interactions else row
        liked = sum(like for _, like, _, _ in window)
        enough = liked >= s.min_liked and len(window) - liked >= least
        if enough and not (drawn and len(row) >= len({RAW[i] for _, i, _, _ in rows if i in RAW})):
            expected.add(u)
    assert eligible == expected

    for e in (e for found in examples.values() for e in found):
        row = plain[e.user]
        window = row[-s.max_interactions :] if s.max_interactions else row
        liked = [(title, t, n) for title, like, t, n in window if like]
        disliked = {title for title, like, _, _ in window if not like}
        assert e.positive == liked[-1][0] and list(e.history) == [title for title, _, _ in liked[:-1]]
        assert e.positive not in e.history and len(set(e.history)) == len(e.history) >= 1
        assert e.positive not in e.negatives and not set(e.negatives) & set(e.history)
        assert len(set(e.negatives)) == len(e.negatives) >= 1
        if s.order == "time":
            assert all((t, n) < liked[-1][1:] for _, t, n in liked[:-1])  # no future
        if drawn:
            unseen = {RAW[i] for _, i, _, _ in rows if i in RAW} - {title for title, _, _, _ in row}
            assert set(e.negatives) <= unseen and len(e.negatives) == min(s.num_negatives, len(unseen))
        else:
            assert set(e.negatives) <= disliked and len(e.negatives) == min(s.num_negatives, len(disliked))


@settings(max_examples=60, deadline=None)
@given(tables, rules)
def test_few_shot_sets_are_nested_and_the_rest_stays(rows, s):
    s = replace(s, min_liked=2, min_disliked=0, train_users=5, valid_users=2, test_users=3)
    if all(i == "i13" for _, i, _, _ in rows):
        return
    one, three, all_ = (run(rows, replace(s, few_shot=n))[2] for n in (1, 3, 0))
    assert one["train"] == all_["train"][:1] and three["train"] == all_["train"][:3]
    assert one["valid"] == three["valid"] == all_["valid"] and one["test"] == three["test"] == all_["test"]


def test_few_shot_may_ask_for_more_than_the_training_users():
    users = [f"u{n}" for n in range(1000)]
    found = {
        n: splits.assign(users, {"train": n, "valid": 100, "test": 300}, config.PrepareSettings(), {})
        for n in (16, 64, 256)
    }
    assert [len(found[n]["train"]) for n in (16, 64, 256)] == [16, 64, 256]
    assert found[16]["train"] == found[64]["train"][:16] and found[64]["train"] == found[256]["train"][:64]
    assert found[16]["valid"] == found[256]["valid"] and found[16]["test"] == found[256]["test"]


@settings(max_examples=60, deadline=None)
@given(tables, rules, st.randoms(use_true_random=False))
def test_the_order_of_rows_decides_nothing_but_ties(rows, s, shuffler):
    """With times that all differ, a file in another order gives the same examples of the same users."""
    s = replace(s, order="time")
    rows = [(u, i, r, n) for n, (u, i, r, _) in enumerate(rows)]
    if all(i == "i13" for _, i, _, _ in rows):
        return
    shuffled = shuffler.sample(rows, len(rows))
    ours, theirs = run(rows, s)[2], run(shuffled, s)[2]
    if s.negatives == "disliked":  # drawn ones hang on the catalogue's order, which is the file's
        assert ours == theirs
    else:
        assert [(e.user, e.history, e.positive) for e in ours["train"]] == [
            (e.user, e.history, e.positive) for e in theirs["train"]
        ]


@settings(max_examples=60, deadline=None)
@given(tables, tables, rules)
def test_people_keep_their_split_across_domains(first, second, s):
    s = replace(s, min_liked=2, min_disliked=0)
    if any(all(i == "i13" for _, i, _, _ in rows) for rows in (first, second)):
        return
    taken = {}
    found = [run(rows, s, taken=taken)[2] for rows in (first, second)]
    split_of = defaultdict(set)
    for examples in found:
        for split, of_split in examples.items():
            for e in of_split:
                split_of[e.user].add(split)
    assert all(len(which) == 1 for which in split_of.values())


ROWS = [(u, f"i{n}", 5 if n % 2 else 1, n) for u in USERS for n in range(11)]
SETTINGS = config.PrepareSettings(train_users=3, valid_users=2, test_users=7, num_negatives=3)


def test_users_and_negatives_are_those_of_every_machine():
    """Pinned: another Python, numpy or processor must draw the same."""
    _, _, examples = run(ROWS, SETTINGS)
    assert [e.user for e in examples["train"]] == PINNED["train"]
    assert [e.user for e in examples["valid"]] == PINNED["valid"]
    assert examples["train"][0].negatives == PINNED["negatives"]
    _, _, examples = run(ROWS, replace(SETTINGS, order="random"))
    assert examples["train"][0].history == PINNED["random history"]
    assert splits.unit(0, "user", "u1") == PINNED["unit"]


PINNED = {
    "train": ["u5", "u0", "u6"],
    "valid": ["u7", "u9"],
    "negatives": ("title 4", "title 0", "title 10"),
    "random history": ("title 7", "title 3", "title 9", "title 5"),
    "unit": 0.5873780115955356,
}


def test_another_seed_draws_others():
    assert run(ROWS, SETTINGS)[2] != run(ROWS, replace(SETTINGS, seed=1))[2]


def test_popularity_draws_the_popular_and_uniform_all_alike():
    weights = np.array([0, 1, 1, 8])
    drawn = Counter(examples_of.draw_without_replacement(weights, 1, n)[0] for n in range(2000))
    assert drawn[0] == 0 and 0.77 < drawn[3] / 2000 < 0.83
    drawn = Counter(examples_of.draw_without_replacement(np.minimum(weights, 1), 1, n)[0] for n in range(2000))
    assert all(0.3 < drawn[n] / 2000 < 0.37 for n in (1, 2, 3))
    assert sorted(examples_of.draw_without_replacement(weights, 9, 0)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("scale", "given", "output"),
    [
        ((1, 5), {}, "ratings > 3 of 5"),
        ((0.5, 5), {}, "ratings > 3 of 5"),
        ((1, 10), {}, "ratings > 5.5, the midpoint of 1 to 10"),
        ((0, 1), {}, "ratings > 0.5, the midpoint of 0 to 1"),
        (None, {}, "ratings > 3 of 5"),
        ((1, 5), {"liked_above": 3.5}, "ratings > 3.5 (--liked-above)"),
        ((1, 5), {"liked_quantile": 0.5}, "above the 0.5 quantile of the user's own ratings"),
    ],
)
def test_what_liked_means_is_printed(scale, given, output):
    rule = splits.liked_rule(config.PrepareSettings(**given), replace(ratings_of(ROWS), scale=scale))
    assert rule.words == f"liked: {output}"


def test_quantile_by_hand():
    """Of 1 2 3 4 the median (inverted_cdf) is 2: 3 and 4 are liked.

    Of 7 7 9 it is 7. A lone rating is never above itself.
    """
    user, rating, start = (
        np.array([0, 0, 0, 0, 1, 1, 1, 2]),
        np.array([4.0, 1, 3, 2, 7, 9, 7, 5]),
        np.array([0, 4, 7, 8]),
    )
    liked = splits.is_liked(splits.LikedRule(None, 0.5, ""), user, rating, start)
    assert liked.tolist() == [True, False, True, False, False, True, False, False]


def test_scores_choose_the_hardest(tmp_path):
    """The lowest margins come first; what has none comes after, as it was drawn; a user without scores keeps
    the draw.
    """
    _, _, before = run(ROWS, replace(SETTINGS, num_negatives=0))
    a, b = before["train"][0], before["train"][1]
    margins = {a.negatives[4]: -2.0, a.negatives[1]: 0.5}
    lines = [
        {"user": a.user, "domain": "movie", "positive": a.positive, "negative": n, "margin": m}
        for n, m in margins.items()
    ]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = examples_of.read_scores(tmp_path / "scores.jsonl")
    _, _, after = run(ROWS, replace(SETTINGS, negatives=f"scores:{tmp_path / 'scores.jsonl'}"), scores)
    assert after["train"][0].negatives == (a.negatives[4], a.negatives[1], a.negatives[0])
    assert after["train"][1].negatives == b.negatives[:3]


def test_time_must_exist_to_be_the_order():
    ratings = ratings_of(ROWS)
    i = ratings.interactions
    timeless = replace(ratings, interactions=Interactions(i.user, i.item, i.rating, None, i.users, i.items))
    assert splits.choose_order(config.PrepareSettings(), ratings) == "time"
    assert splits.choose_order(config.PrepareSettings(), timeless) == "file"
    assert splits.choose_order(config.PrepareSettings(), replace(timeless, order="random")) == "random"
    with pytest.raises(UserError, match=r"--order: r\.csv has no timestamps"):
        splits.choose_order(config.PrepareSettings(order="time"), timeless)
