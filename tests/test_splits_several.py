"""Several examples a user: for random tables no future in a history, no example in two splits, users together."""

from collections import Counter, defaultdict
from dataclasses import replace

import invented
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import SPLITS, prepare, run
from test_splits import plainly, ratings_of, tables

from mlx_dmpo import config
from mlx_dmpo.data import examples, splits
from mlx_dmpo.data.formats import load_examples
from mlx_dmpo.data.titles import catalogue
from mlx_dmpo.errors import UserError

rules = st.builds(
    config.PrepareSettings,
    examples_per_user=st.sampled_from(["all", "3", "5", "100"]),
    split=st.sampled_from(["user", "time"]),
    order=st.sampled_from(["time", "file"]),
    max_interactions=st.sampled_from([0, 4, 9, 40]),
    min_liked=st.integers(2, 4),
    min_disliked=st.integers(0, 3),
    num_negatives=st.integers(1, 5),
    negatives=st.sampled_from(["disliked", "uniform", "popularity"]),
    seed=st.integers(0, 3),
)


def made(rows, s):
    """(examples of each split, eligible users) as `prepare` makes them."""
    ratings = ratings_of(rows)
    titles = catalogue(ratings.interactions.items, ratings.titles, True, True)
    h = splits.histories(ratings, titles, splits.liked_rule(s, ratings), s.order, s.seed)
    s = splits.for_this(s, int((np.diff(h.start) > 0).sum()), False)
    eligible, _ = splits.eligible_users(h, s, len(titles.titles))
    users = [h.users[u] for u in eligible]
    by_split = {"train": users} if s.split == "time" else splits.assign(users, splits.sizes(len(users), s), s, {})
    times = ratings.interactions.time[h.row] if s.order == "time" else None
    popularity = splits.popularity(h, len(titles.titles))
    rankings = examples.Rankings("movie", h, titles.titles, s, None, popularity, {}, times, 1.0)
    return examples.split_examples(rankings, by_split)[0], users


@settings(max_examples=200, deadline=None)
@given(tables, rules)
def test_the_rules_hold_in_every_table(rows, s):
    if all(i == "i13" for _, i, _, _ in rows):
        return
    found, users = made(rows, s)
    plain = plainly(rows, s)
    when = {
        u: {title: n for n, (title, _, _, _) in enumerate(row)} for u, row in plain.items()
    }  # place in the user's order
    users_of = {split: {e.user for e in es} for split, es in found.items()}
    if s.split == "user":  # users together
        assert sum(map(len, users_of.values())) == len(set().union(*users_of.values()))
    assert set().union(*users_of.values()) <= set(users)
    everything = [(split, e) for split in SPLITS for e in found[split]]
    assert (
        max(Counter((e.user, e.positive) for _, e in everything).values(), default=1) == 1
    )  # no example in two splits
    of_user = defaultdict(list)
    for split, e in everything:
        of_user[e.user].append((split, e))
        row, place = plain[e.user], when[e.user][e.positive]
        window = row[max(0, place + 1 - s.max_interactions) if s.max_interactions else 0 : place]
        assert row[place][1] and list(e.history) == [
            title for title, like, _, _ in window if like
        ]  # nothing of the future
        assert len(e.history) >= 1 and sum(like for _, like, _, _ in row[:place]) >= s.min_liked - 1
        assert e.positive not in e.negatives and not set(e.negatives) & set(e.history)
        assert 1 <= len(set(e.negatives)) == len(e.negatives) <= s.num_negatives
        disliked = {title for title, like, _, _ in row if not like}
        if s.negatives == "disliked":
            assert set(e.negatives) <= disliked
        else:
            assert not set(e.negatives) & {title for title, _, _, _ in row}
        before = [title for title, like, _, _ in window if not like and title not in e.negatives]
        assert list(e.disliked or ()) == before
        if s.order == "time":
            assert list(e.times) == [t for _, like, t, _ in window if like]
        assert len(e.ratings) == len(e.history)
    for own in of_user.values():
        order = {split: [when[e.user][e.positive] for part, e in own if part == split] for split in SPLITS}
        assert all(places == sorted(places) for places in order.values())
        assert s.examples_per_user == "all" or len(own) <= int(s.examples_per_user)
        if s.split == "time":
            for early, late in (("train", "valid"), ("valid", "test"), ("train", "test")):
                for place in order[early]:
                    assert all(place < other for other in order[late])
            for early, late in (("train", "valid"), ("valid", "test")):
                if (
                    s.negatives == "disliked" and order[late]
                ):  # nothing that is learnt is from after the next part begins
                    learnt = [when[e.user][n] for part, e in own if part == early for n in e.negatives]
                    assert all(place < min(order[late]) for place in learnt)


@settings(max_examples=60, deadline=None)
@given(tables, rules)
def test_more_examples_leave_users_and_splits_as_they_are(rows, s):
    """`all` gives each user of N examples at least these positives' users, in the same split; the last liked item is
    always one.
    """
    if all(i == "i13" for _, i, _, _ in rows):
        return
    s = replace(s, split="user", negatives="disliked")
    few, many = made(rows, replace(s, examples_per_user="3"))[0], made(rows, replace(s, examples_per_user="all"))[0]
    for split in SPLITS:
        assert {e.user for e in few[split]} == {e.user for e in many[split]}
        assert set(few[split]) <= set(many[split])
        last = {e.user: e.positive for e in many[split]}
        assert {e.user: e.positive for e in few[split]} == last


ROWS = [("u0", f"i{n}", 5 if n % 2 else 1, 10 * n) for n in range(11)]


def test_the_nearest_in_time_by_hand():
    """Likes at 10, 30, 50, 70, 90, dislikes at 0, 20, ..., 100: the two nearest of each positive, equals by
    the draw.
    """
    s = config.PrepareSettings(examples_per_user="all", split="time", order="time", min_liked=2, num_negatives=2)
    found, _ = made(ROWS, s)
    assert [[e.positive for e in found[split]] for split in SPLITS] == [
        ["title 3", "title 5"],
        ["title 7"],
        ["title 9"],
    ]
    assert [set(e.negatives) for e in found["train"]] == [{"title 2", "title 4"}, {"title 4", "title 6"}]
    assert set(found["valid"][0].negatives) == {"title 6", "title 8"}
    assert set(found["test"][0].negatives) == {"title 8", "title 10"}
    assert [e.history for e in found["train"]] == [("title 1",), ("title 1", "title 3")]


@pytest.mark.parametrize(
    ("eligible", "given", "wanted"),
    [
        (848, {}, (593, 85, 170)),
        (20_000, {}, (18_900, 100, 1000)),
        (10, {}, (7, 1, 2)),
        (3, {}, (1, 1, 1)),
        (2, {}, (1, 0, 1)),
        (848, {"recipe": "paper"}, (100, 100, 1000)),
        (848, {"train_users": 50}, (50, 85, 170)),
        (848, {"valid_users": 0, "test_users": 48}, (800, 0, 48)),
        (848, {"few_shot": 16}, (16, 85, 170)),
        (848, {"recipe": "paper", "test_users": 9}, (100, 100, 9)),
    ],
)
def test_splits_scale_with_who_is_eligible(eligible, given, wanted):
    found = splits.sizes(eligible, config.PrepareSettings(**given))
    assert tuple(found[split] for split in SPLITS) == wanted
    only = splits.sizes(eligible, config.PrepareSettings(**given), trains=False)
    assert only["train"] == only["valid"] == 0


def test_a_person_of_a_table_is_split_by_time_and_people_by_user(tmp_path, capsys):
    (tmp_path / "one.csv").write_text(
        invented.lines([("u", *row[1:]) for row in ROWS], ",", "user,title,rating,time\n")
    )
    out = prepare(
        capsys, "table", tmp_path / "one.csv", "--out", tmp_path / "one", "--min-liked", "2", "--min-disliked", "2"
    )
    assert [len(load_examples(tmp_path / "one", split)) for split in SPLITS] == [2, 1, 1]
    assert "each user's examples in order of time" in out
    invented.movielens_1m(tmp_path / "raw")
    several = ["movielens", tmp_path / "raw", "--examples-per-user"]
    out = prepare(capsys, *several, "3", "--out", tmp_path / "three")
    found = {split: load_examples(tmp_path / "three", split) for split in SPLITS}
    assert [len(found[split]) for split in SPLITS] == [27, 3, 6]
    assert all(set(Counter(e.user for e in es).values()) == {3} for es in found.values())
    assert "training sees 27 examples (135 pairs) an epoch" in out and "train     9 users, 27 examples" in out
    prepare(capsys, *several, "all", "--split", "time", "--out", tmp_path / "time")
    found = {split: load_examples(tmp_path / "time", split) for split in SPLITS}
    assert len({e.user for es in found.values() for e in es}) == 12


# --- advice


def test_the_advice_is_computed_and_works(tmp_path, capsys):
    """Each change that the error names makes as many users eligible as it says."""
    invented.movielens_100k(tmp_path / "raw")
    given = ["prepare", "movielens", tmp_path / "raw", "--liked-above", "4.5", "--min-liked", "8"]
    code, _, err = run(capsys, *given, "--out", tmp_path / "out")
    assert code == 2 and "ratings are liked" in err and "one change at a time makes eligible: " in err, err
    changes = err.split("makes eligible: ")[1].strip().split("; ")
    assert len(changes) >= 2
    for n, change in enumerate(changes):
        flag, made_eligible = change.split(": ")
        name, value = flag.split()
        here = [a for a in given if name != "--liked-quantile" or a not in ("--liked-above", "4.5")]
        if name in here:
            here[here.index(name) + 1] = value
        else:
            here += [name, value]
        code, out, _ = run(capsys, *here, "--out", tmp_path / f"o{n}")
        number, users = (int(x) for x in made_eligible.split(" of "))
        assert users == 12 and (code == 0) == (number >= 2)
        if code == 0:
            assert f"{number} users are eligible" in out or f"{number} user is eligible" in out


def test_play_counts_are_led_to_the_quantile(tmp_path, capsys):
    rows = [(u, f"Band {i}", int(r) ** 6 + n % 97) for n, (u, i, r, _) in enumerate(invented.ROWS)]
    rows[0] = (*rows[0][:2], 10**7)
    (tmp_path / "p.csv").write_text(invented.lines(rows, ",", "user,artist,plays\n"))
    code, _, err = run(capsys, "prepare", "table", tmp_path / "p.csv", "--out", tmp_path / "out")
    assert code == 2 and "--liked-quantile 0.5: 12 of 12" in err and "1 of 180 ratings are liked, 179 disliked" in err
    out = prepare(capsys, "table", tmp_path / "p.csv", "--liked-quantile", "0.5", "--out", tmp_path / "out")
    assert "12 users are eligible" in out


@pytest.mark.parametrize("value", [0, -1])
def test_a_value_that_means_not_rated(value, tmp_path, capsys):
    extra = [(u, f"n{n}", value, 5) for n, (u, _, _, _) in enumerate(invented.ROWS)]
    text = invented.lines([*invented.ROWS, *extra], ",", "user,item,rating,time\n")
    (tmp_path / "r.csv").write_text(text)
    (tmp_path / "s.csv").write_text(invented.lines(invented.ROWS, ",", "user,item,rating,time\n"))
    out = prepare(capsys, "table", tmp_path / "r.csv", "--out", tmp_path / "a")
    assert f"50% of the ratings are {value}, the lowest value: if it means not rated, add --unrated {value}" in out
    out = prepare(capsys, "table", tmp_path / "r.csv", "--unrated", value, "--out", tmp_path / "b")
    assert f"180 ratings of {value} left out: not rated (--unrated)" in out and "lowest value" not in out
    prepare(capsys, "table", tmp_path / "s.csv", "--out", tmp_path / "c")
    for split in SPLITS:
        assert (tmp_path / "b" / f"{split}.jsonl").read_bytes() == (tmp_path / "c" / f"{split}.jsonl").read_bytes()


def test_every_row_a_like(tmp_path, capsys):
    rows = [(u, i, 1) for u, i, _, _ in invented.ROWS]
    (tmp_path / "r.csv").write_text(invented.lines(rows, ",", "user,item,rating\n"))
    (tmp_path / "n.csv").write_text(invented.lines([row[:2] for row in rows], ",", "user,item\n"))
    for name in ("r.csv", "n.csv"):
        code, _, err = run(capsys, "prepare", "table", tmp_path / name, "--out", tmp_path / "out")
        assert code == 2 and "--negatives popularity" in err
        out = prepare(capsys, "table", tmp_path / name, "--negatives", "popularity", "--out", tmp_path / f"{name}-out")
        assert "liked: every row" in out and "12 users are eligible" in out


def test_who_the_users_are_lies_beside_the_items(shared, tmp_path, capsys):
    import json

    invented.movielens_1m(tmp_path / "raw")
    people = [(u, "FM"[n % 2], [1, 18, 25, 56][n % 4], 7, "x") for n, u in enumerate(invented.USERS)]
    (tmp_path / "raw" / "users.dat").write_text(invented.lines(people, "::"))
    prepare(capsys, "movielens", tmp_path / "raw", "--out", tmp_path / "out")
    users = [json.loads(line) for line in (tmp_path / "out" / "users.jsonl").read_text().splitlines()]
    ages = {1: "under 18", 18: "18-24", 25: "25-34", 56: "56 and over"}
    assert {u["user"]: (u["gender"], u["age"]) for u in users} == {u: (g, ages[a]) for u, g, a, _, _ in people}
    from mlx_dmpo.data import sources

    found = sources.movielens(shared / "data" / "ml-100k", config.PrepareSettings(), sources.BadRows(False)).attributes
    assert len(found) == 943 and found["1"] == {"gender": "M", "age": "18-24"} and found["2"]["age"] == "50-55"
    prepare(capsys, "movielens", tmp_path / "raw", "--out", tmp_path / "out", "--overwrite", "--seed", "2")
    (tmp_path / "raw" / "users.dat").unlink()
    prepare(capsys, "movielens", tmp_path / "raw", "--out", tmp_path / "out", "--overwrite")
    assert not (tmp_path / "out" / "users.jsonl").exists()


def test_a_single_persons_flags_are_refused_before_anything_is_written():
    s = config.PrepareSettings(examples_per_user="0")
    with pytest.raises(UserError, match="--examples-per-user"):
        splits.for_this(s, 5, False)
    assert splits.for_this(config.PrepareSettings(), 1, False).split == "time"
    assert splits.for_this(config.PrepareSettings(), 2, True).examples_per_user == "all"
