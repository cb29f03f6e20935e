"""One person's own exports: recognized, read to the row, split by time, and what can go wrong with them."""

import json
import re
import shlex
from pathlib import Path

import exports
import pytest
from test_prepare import SPLITS, prepare, run

from mlx_dmpo import config
from mlx_dmpo.data import sources
from mlx_dmpo.data.formats import load_examples
from mlx_dmpo.data.sources.catalogue import read_catalogue
from mlx_dmpo.data.sources.netflix import series
from mlx_dmpo.errors import UserError
from mlx_dmpo.use.inputs import read_data, read_request

DOCS = Path(__file__).resolve().parents[1] / "docs"
each_export = pytest.mark.parametrize("name", exports.ALL)


def read(name, path):
    return sources.SOURCES[name](path, config.PrepareSettings(), sources.BadRows(False))


@pytest.mark.parametrize(
    ("name", "ratings", "seen", "first", "rating"),
    [
        ("letterboxd", 400, 20, "{0} (1950)", lambda s: s),
        ("imdb", 60, 0, "{0} (1950)", lambda s: int(2 * s)),
        ("goodreads", 54, 3, "", lambda s: round(s + 0.1)),
        ("myanimelist", 55, 3, "", lambda s: int(2 * s)),
        ("trakt", 60, 5, "{0} (1950)", lambda s: int(2 * s)),
        ("netflix", 42, 0, "{0}", lambda s: 1),
        ("scrobbles", 40, 0, "", None),
    ],
)
def test_each_export_is_read_to_the_row(name, ratings, seen, first, rating, tmp_path):
    found = read(name, exports.ALL[name](tmp_path / "raw"))
    i = found.interactions
    assert (len(i.user), len(i.items), sum(map(len, found.seen.values()))) == (ratings, ratings, seen)
    assert i.users == ["me"] and found.personal
    films = exports.films(420)
    given = dict(zip((i.items[n] for n in i.item), i.rating.tolist(), strict=True))
    if first:
        assert given[first.format(films[0][0])] == rating(films[0][2])
        year = " (1951)" if "(" in first else ""
        times = dict(zip((i.items[n] for n in i.item), i.time.tolist(), strict=True))
        assert times[films[1][0] + year] // 86400 == (films[1][3] - exports.date(1970, 1, 1)).days
    elif rating:  # the first one has no rating there
        assert films[0][0] not in given and given[films[1][0]] == rating(films[1][2])


def test_scrobbles_count_plays_and_begin_with_the_first(tmp_path):
    text = "uts,utc_time,artist,artist_mbid,album,album_mbid,track,track_mbid\n"
    text += '"50","x","B","","","","t",""\n"20","x","A","","","","t",""\n"40","x","B","","","","u",""\n"","","C","","","","t",""\n'
    (tmp_path / "s.csv").write_text(text)
    i = read("scrobbles", tmp_path / "s.csv").interactions
    assert dict(zip(i.items, i.rating.tolist(), strict=True)) == {"B": 2, "A": 1, "C": 1}
    assert i.time.tolist() == [40, 20, 19]  # C is playing now and has no time
    bare = "A,LP,Song,14 Nov 2023 22:13\nB,LP,Song,15 Nov 2023 22:13\nA,LP,Song,16 Nov 2023 22:13\n"
    (tmp_path / "bare.csv").write_text(bare)
    i = read("scrobbles", tmp_path / "bare.csv").interactions
    assert i.items == ["A", "B"] and i.rating.tolist() == [2, 1] and i.time[1] - i.time[0] == 86400


@pytest.mark.parametrize(
    ("title", "of"),
    [
        ("Dark Water: Season 1: Episode 2", "Dark Water"),
        ("Dunkle Wasser: Staffel 2: Folge 3", "Dunkle Wasser"),
        ("The Long Night: Limited Series: Dawn", "The Long Night"),
        ("Spider Tale: Into the Web", "Spider Tale: Into the Web"),
        ("Wizard School: Part 1", "Wizard School: Part 1"),
        ("Amber", "Amber"),
    ],
)
def test_an_episode_counts_as_its_series(title, of):
    assert series(title) == of


def test_netflix_by_profile_without_trailers(tmp_path):
    header = (
        "Profile Name,Start Time,Duration,Attributes,Title,Supplemental Video Type,Device Type,Bookmark,Latest "
        "Bookmark,Country"
    )
    rows = [
        "Ann,2024-05-01 19:00:00,00:50:00,,Amber,,TV,x,x,AU",
        "Ann,2024-05-02 19:00:00,00:50:00,,Amber,,TV,x,x,AU",
        "Ben,2024-05-02 18:00:00,00:01:30,,River,TRAILER,TV,x,x,AU",
        "Ben,2024-05-03 18:00:00,00:01:30,,Lantern: Season 2: One,,TV,x,x,AU",
    ]
    (tmp_path / "ViewingActivity.csv").write_text("\n".join([header, *rows]))
    found = read("netflix", tmp_path)
    i = found.interactions
    assert [(i.users[u], i.items[n]) for u, n in zip(i.user, i.item, strict=True)] == [
        ("Ann", "Amber"),
        ("Ben", "Lantern"),
    ]
    assert i.time[1] - i.time[0] == 86400 - 3600 and "1 trailers left out" in found.notes


@pytest.mark.parametrize(("dates", "days"), [(["25/12/2020", "11/09/2020"], -105), (["12/25/20", "11/9/20"], -46)])
def test_netflix_dates_as_other_rows_show(dates, days, tmp_path):
    exports.write_csv(tmp_path / "NetflixViewingHistory.csv", ["Title", "Date"], [("A", dates[0]), ("B", dates[1])])
    i = read("netflix", tmp_path).interactions
    assert (i.time[1] - i.time[0]) / 86400 == days


@each_export
def test_the_export_of_another_service_is_refused_by_name(name, tmp_path):
    other = "imdb" if name == "letterboxd" else "letterboxd"
    path = exports.ALL[other](tmp_path / "raw")
    path = path / "ratings.csv" if path.is_dir() else path
    with pytest.raises(UserError) as stop:
        read(name, path)
    message = str(stop.value)
    assert str(path) in message and len(message.splitlines()) == 1, message


@pytest.mark.parametrize("name", ["letterboxd", "imdb", "goodreads", "scrobbles", "netflix"])
def test_a_table_says_which_export_it_looks_like(name, tmp_path, capsys):
    path = exports.ALL[name](tmp_path / "raw")
    path = path / "ratings.csv" if path.is_dir() else path
    code, _, err = run(capsys, "prepare", "table", path, "--out", tmp_path / "out")
    assert code == 2 and f"`mlx-dmpo prepare {name} PATH`" in err and "--user-column" in err


def test_a_hostile_list_is_refused(tmp_path):
    bomb = '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><myanimelist>&b;</myanimelist>'
    (tmp_path / "a.xml").write_text(bomb)
    with pytest.raises(UserError, match="entities"):
        read("myanimelist", tmp_path / "a.xml")
    (tmp_path / "a.xml").write_text("<myanimelist><anime></myanimelist>")
    with pytest.raises(UserError, match=r"a\.xml:1: not valid XML"):
        read("myanimelist", tmp_path / "a.xml")


# --- 400 ratings of one person


def date_of(title):
    """The day on which the generated person rated a film."""
    return {f"{name} ({year})": day for name, year, _, day in exports.films(420)}[title]


@pytest.mark.slow
def test_a_letterboxd_export_of_400_ratings(tmp_path, capsys):
    exports.letterboxd(tmp_path / "raw")
    out = prepare(capsys, "letterboxd", tmp_path / "raw", "--out", tmp_path / "out")
    found = {split: load_examples(tmp_path / "out", split) for split in SPLITS}
    assert [len(found[split]) for split in SPLITS] == [100, 14, 29]
    assert "1 user is eligible" in out and "training sees 100 examples (500 pairs) an epoch" in out
    assert {e.user for es in found.values() for e in es} == {"me"}
    positives = {split: [date_of(e.positive) for e in es] for split, es in found.items()}
    for split in SPLITS:
        assert positives[split] == sorted(positives[split])
        for e in found[split]:
            days = [date_of(t) for t in e.history]
            assert days == sorted(days) and days[-1] < date_of(e.positive)  # no future in a history
            assert len(e.ratings) == len(e.times) == len(e.history) and min(e.ratings) > 3
            assert [t // 86400 for t in e.times] == [(d - exports.date(1970, 1, 1)).days for d in days]
            assert not {*e.disliked} & {*e.negatives}
    assert positives["train"][-1] < positives["valid"][0] and positives["valid"][-1] < positives["test"][0]
    for split, later in (("train", "valid"), ("valid", "test")):
        assert all(date_of(n) < positives[later][0] for e in found[split] for n in e.negatives)
    # negatives are the nearest in time among the disliked
    disliked = [f"{n} ({y})" for n, y, s, _ in exports.films(420)[:400] if s <= 3]
    for e in found["test"]:
        gaps = {t: abs((date_of(t) - date_of(e.positive)).days) for t in disliked}
        assert max(gaps[n] for n in e.negatives) <= sorted(gaps.values())[4]
    (user,) = [json.loads(line) for line in (tmp_path / "out" / "users.jsonl").read_text().splitlines()]
    assert len(user["seen"]) == 420 and user["liked"][-1] == found["test"][-1].positive


def test_a_ranking_leaves_out_all_that_was_seen(tmp_path, capsys):
    exports.letterboxd(tmp_path / "raw")
    films = exports.catalogue(tmp_path / "films.csv")
    more = ["--catalogue", films, "--out", tmp_path / "out"]
    prepare(capsys, "letterboxd", tmp_path / "raw", *more)
    data = read_data(str(tmp_path / "out"))
    request = read_request(data, (), "me", ())
    assert sorted(request.candidates) == sorted(f"Public Film {n} (19{n % 100:02})" for n in range(300))
    (user,) = [json.loads(line) for line in (tmp_path / "out" / "users.jsonl").read_text().splitlines()]
    longest = max(len(e.history) for split in SPLITS for e in load_examples(tmp_path / "out", split))
    assert request.history == tuple(user["liked"][-longest:])  # up to the last, and no longer than training saw
    named = read_request(data, (), "me", (user["liked"][0],))
    assert named.candidates == (user["liked"][0],)  # what is named is ranked, seen or not


def test_a_catalogue_without_unseen_titles_says_what_to_add(tmp_path, capsys):
    exports.letterboxd(tmp_path / "raw")
    prepare(capsys, "letterboxd", tmp_path / "raw", "--out", tmp_path / "out")
    with pytest.raises(UserError, match=r"me has seen every title .* prepare with --catalogue FILE"):
        read_request(read_data(str(tmp_path / "out")), (), "me", ())


@pytest.mark.parametrize("row", ['{"liked": [], "seen": []}', '{"user": "me", "liked": 3, "seen": []}', "[]"])
def test_a_broken_users_file_is_an_error_with_its_line(row, tmp_path, capsys):
    exports.letterboxd(tmp_path / "raw")
    prepare(capsys, "letterboxd", tmp_path / "raw", "--out", tmp_path / "out")
    (tmp_path / "out" / "users.jsonl").write_text(row + "\n")
    with pytest.raises(UserError, match=r"users\.jsonl:1: "):
        read_data(str(tmp_path / "out"))


def test_the_next_line_of_prepare_can_be_pasted(tmp_path, capsys):
    exports.letterboxd(tmp_path / "raw")
    out = prepare(capsys, "letterboxd", tmp_path / "raw", "--out", tmp_path / "two words")
    words = shlex.split(out.splitlines()[-1].removeprefix("next: mlx-dmpo sft "))
    assert "--model" not in words and words[words.index("--data") + 1] == str(tmp_path / "two words")
    assert "commands without --model use the embedded toy model" in out


def test_films_seen_but_not_rated_are_never_negatives(tmp_path, capsys):
    exports.letterboxd(tmp_path / "raw", unrated=20)
    seen = [f"{name} ({year})" for name, year, _, _ in exports.films(420)[400:]]
    further = ["Unseen One (1990)", "Unseen Two (1991)", "Unseen Three (1992)"]
    exports.write_csv(
        tmp_path / "c.csv", ["Movie Title", "Votes"], [(t, 10_000) for t in seen] + [(t, 5) for t in further]
    )
    drawn = ["--negatives", "popularity", "--num-negatives", "3", "--catalogue", tmp_path / "c.csv"]
    out = prepare(capsys, "letterboxd", tmp_path / "raw", *drawn, "--out", tmp_path / "out")
    assert '23 titles of the catalogue c.csv ("Movie Title"; popularity from "Votes")' in out
    for split in SPLITS:
        for e in load_examples(tmp_path / "out", split):
            assert set(e.negatives) == set(further)
    items = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert {i["title"]: i["ratings"] for i in items if i["title"].startswith("Unseen")} == dict.fromkeys(further, 5)
    # items.jsonl of that directory is a catalogue too
    prepare(capsys, "netflix", exports.netflix(tmp_path / "n"), *drawn[:-1], tmp_path / "out", "--out", tmp_path / "o2")
    assert len(load_examples(tmp_path / "o2", "train")) == 26


COMMAS = ["Good, the Bad and the Ugly, The (1966)", "I, Tonya (2017)", 'The "Burbs" (1989)', "M (1931)"]


@pytest.mark.parametrize(
    "name, lines",
    [
        ("films.txt", COMMAS),
        ("films.txt", ["", "  Title ", *COMMAS]),
        ("films.csv", ["Title", *('"' + t.replace('"', '""') + '"' for t in COMMAS)]),
        ("films.csv", ["title", *COMMAS]),
        ("films", [t.replace(",", "") for t in COMMAS]),
        ("films.txt", ["Title|Votes", *(f"{t}|7" for t in COMMAS)]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_catalogue_of_one_title_a_line(name, lines, end, tmp_path):
    (tmp_path / name).write_bytes(end.join(lines).encode())
    found, note = read_catalogue(tmp_path / name)
    wanted = [t.replace(",", "") for t in COMMAS] if name == "films" else COMMAS
    assert list(found) == wanted and set(found.values()) == ({7} if "Votes" in lines[0] else {1})
    assert ("one title a line" in note) == ("Votes" not in lines[0])


@pytest.mark.parametrize("text", ["", "\n \n", "Title\n"])
def test_a_catalogue_without_titles_is_refused(text, tmp_path):
    (tmp_path / "films.txt").write_text(text)
    with pytest.raises(UserError, match=r"films\.txt.*: "):
        read_catalogue(tmp_path / "films.txt")


def test_likes_alone_say_what_to_add(tmp_path, capsys):
    path = exports.netflix(tmp_path / "raw")
    code, _, err = run(capsys, "prepare", "netflix", path, "--out", tmp_path / "out")
    assert code == 2 and "--negatives popularity --catalogue FILE" in err
    code, _, err = run(capsys, "prepare", "netflix", path, "--negatives", "popularity", "--out", tmp_path / "out")
    assert code == 2 and "1 every title met" in err and "--catalogue FILE" in err


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--train-users", "5"], "--train-users: a single person's examples are split by time"),
        (["--examples-per-user", "2"], "--examples-per-user: 2 is too few"),
        (["--examples-per-user", "some"], "--examples-per-user: 'some'"),
        (["--order", "random"], "--order: random order has no earlier and later"),
        (["--recipe", "paper", "--split", "time"], "--split: recipe paper"),
        (["--liked-above", "5"], "--liked-above 4.5: 1 of 1"),
        (["--catalogue", "{raw}/profile.csv"], "--catalogue"),
    ],
)
def test_flags_that_do_not_fit_one_person(flags, what, tmp_path, capsys):
    exports.letterboxd(tmp_path / "raw")
    flags = [f.format(raw=tmp_path / "raw") for f in flags]
    code, _, err = run(capsys, "prepare", "letterboxd", tmp_path / "raw", *flags, "--out", tmp_path / "out")
    assert code == 2 and what in err and not (tmp_path / "out").exists()


def test_the_walk_through_works_as_printed(tmp_path, capsys, monkeypatch):
    """Every `prepare` and `check` command of docs/personal.md, pasted."""
    monkeypatch.chdir(tmp_path)
    exports.letterboxd(tmp_path / "letterboxd-me")
    import invented

    invented.movielens_20m(tmp_path / "ml-latest-small")
    text = (DOCS / "personal.md").read_text(encoding="utf-8")
    commands = [
        shlex.split(c, comments=True) for c in re.findall(r"^\$ mlx-dmpo ((?:prepare|check) .+)$", text, re.MULTILINE)
    ]
    known = [c for c in commands if c[1] != "netflix"]
    assert len(known) >= 3
    for command in known:
        code, out, err = run(capsys, *command)
        assert code == 0, (command, out, err)


@pytest.mark.parametrize("with_years", ["catalogue", "ratings", "both", "neither"])
def test_a_year_never_tells_liked_titles_from_negatives(with_years, tmp_path, capsys):
    """Where one side alone has years, they are dropped from both, and a title of both sides is one title."""
    dated = [f"Film {n} ({1950 + n})" for n in range(60)]
    plain = [f"Film {n}" for n in range(60)]
    mine, theirs = (dated if with_years in (side, "both") else plain for side in ("ratings", "catalogue"))
    ratings = "".join(f"{title},2024-0{1 + n % 9}-1{n % 9}\n" for n, title in enumerate(mine[:30]))
    (tmp_path / "NetflixViewingHistory.csv").write_text(f"Title,Date\n{ratings}")
    (tmp_path / "films.csv").write_text("title,votes\n" + "".join(f"{t},5\n" for t in theirs))
    out = prepare(
        capsys, "netflix", tmp_path / "NetflixViewingHistory.csv", "--negatives", "popularity",
        "--catalogue", tmp_path / "films.csv", "--out", tmp_path / "out",
    )  # fmt: skip
    assert ("they are dropped from both" in out) == (with_years in ("catalogue", "ratings"))
    expected = dated if with_years == "both" else plain
    rows = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    seen, drawn = set(expected[:30]), set(expected[30:])
    assert rows and all({*row["history"], row["positive"]} <= seen and set(row["negatives"]) <= drawn for row in rows)
    assert len((tmp_path / "out" / "items.jsonl").read_text().splitlines()) == 60
