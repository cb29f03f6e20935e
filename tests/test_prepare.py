"""`mlx-dmpo prepare` from the command line: what it writes, what it refuses, and that nothing half-made looks whole."""

import gzip
import json
import random
import shutil
import signal
import subprocess
import sys

import invented
import pyarrow as pa
import pyarrow.parquet
import pytest

from mlx_dmpo import config
from mlx_dmpo.cli.main import main
from mlx_dmpo.data import release, sources
from mlx_dmpo.data.formats import load_examples
from mlx_dmpo.machine import files, run_directory
from mlx_dmpo.report import charts

SMALL = ["--train-users", "3", "--valid-users", "3", "--test-users", "6"]
SPLITS = ("train", "valid", "test")


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    reported = capsys.readouterr()
    return stop.value.code, reported.out, reported.err


def prepare(capsys, *arguments):
    code, out, err = run(capsys, "prepare", *arguments)
    assert code == 0, err
    return out


def data(directory):
    return {
        name: (directory / name).read_bytes() for name in ("train.jsonl", "valid.jsonl", "test.jsonl", "items.jsonl")
    }


# --- what it writes


@pytest.mark.parametrize("name", invented.FORMS)
def test_each_form_end_to_end(name, tmp_path, capsys, pictures):
    source, path, arguments = invented.form(name, tmp_path / "raw")
    liked = {"bookcrossing": ["--liked-above", "6"], "lastfm": ["--liked-above", "30"]}.get(source, [])
    out = prepare(capsys, source, path, *arguments, *liked, "--out", tmp_path / "out", *SMALL)
    examples = {split: load_examples(tmp_path / "out", split) for split in SPLITS}
    assert [len(examples[split]) for split in SPLITS] == [3, 3, 6]
    assert "12 users" in out and "rule: liked:" in out and "done:" in out
    titles = {json.loads(line)["title"] for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()}
    assert titles == {f"The {t.replace(', The', '')}" for t in invented.TITLES.values()}
    example = examples["test"][0]
    assert (len(example.history), len(example.negatives)) == (7, 5)
    assert {example.positive, *example.history, *example.negatives} <= titles
    assert (tmp_path / "out" / "summary.png").read_bytes()[:4] == b"\x89PNG"
    manifest = files.read_json(tmp_path / "out" / "manifest.json")
    (domain,) = manifest["domains"].values()
    assert domain["counts"]["examples"] == {"train": 3, "valid": 3, "test": 6} and len(domain["rules"]) == 7
    assert set(manifest["inputs"].values()) == {files.sha256(p) for p in (tmp_path / "raw").iterdir()}


def test_all_timed_forms_give_the_same_examples(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(charts, "plot_preparation", lambda charts, path: None)  # drawn elsewhere
    found = set()
    for name in invented.FORMS:
        if not name.startswith(("book", "lastfm")):
            source, path, arguments = invented.form(name, tmp_path / name)
            prepare(capsys, source, path, *arguments, "--domains", "movie", "--out", tmp_path / f"{name}-out", *SMALL)
            found.add(tuple(data(tmp_path / f"{name}-out").values()))
    assert len(found) == 1


@pytest.mark.parametrize("block", [200, 5000])
def test_the_block_size_changes_no_byte(block, tmp_path, capsys, monkeypatch):
    invented.movielens_20m(tmp_path / "raw")
    prepare(capsys, "movielens", tmp_path / "raw", "--out", tmp_path / "a", *SMALL)
    monkeypatch.setattr(sources.files, "BLOCK", block)
    prepare(capsys, "movielens", tmp_path / "raw", "--out", tmp_path / "b", *SMALL)
    assert data(tmp_path / "a") == data(tmp_path / "b")


def test_flags_and_yaml_are_one(tmp_path, capsys):
    invented.movielens_100k(tmp_path / "raw")
    (tmp_path / "c.yaml").write_text(
        "train_users: 3\nvalid_users: 3\ntest_users: 6\ntitle_years: false\nnum_negatives: 2\norder: file\n"
    )
    prepare(capsys, "movielens", tmp_path / "raw", "-c", tmp_path / "c.yaml", "--out", tmp_path / "a")
    flags = ["--no-title-years", "--num-negatives", "2", "--order", "file"]
    prepare(capsys, "movielens", tmp_path / "raw", *flags, *SMALL, "--out", tmp_path / "b")
    assert data(tmp_path / "a") == data(tmp_path / "b")
    example = load_examples(tmp_path / "a", "train")[0]
    assert "(" not in example.positive and len(example.negatives) == 2


def test_two_domains_in_one_directory(tmp_path, capsys):
    invented.movielens_1m(tmp_path / "old")
    invented.lastfm(tmp_path / "songs")
    two = [
        "movielens",
        tmp_path / "old",
        f"lastfm:{tmp_path / 'songs'}",
        "--domains",
        "movie,music",
        "--min-liked",
        "2",
    ]
    prepare(capsys, *two, "--train-domains", "movie", "--test-domains", "music", "--out", tmp_path / "out", *SMALL)
    found = {split: load_examples(tmp_path / "out", split) for split in SPLITS}
    assert {split: {e.domain for e in of_split} for split, of_split in found.items()} == {
        "train": {"movie"},
        "valid": {"movie"},
        "test": {"music"},
    }
    people = [{e.user for e in of_split} for of_split in found.values()]
    assert [len(p) for p in people] == [3, 3, 6] and len(set.union(*people)) == 12

    prepare(capsys, *two, "--out", tmp_path / "both", "--train-users", "2", "--valid-users", "2", "--test-users", "2")
    found = {split: load_examples(tmp_path / "both", split) for split in SPLITS}
    assert all(sorted(e.domain for e in of_split) == ["movie"] * 2 + ["music"] * 2 for of_split in found.values())
    domains = files.read_json(tmp_path / "both" / "manifest.json")["domains"]
    assert list(domains) == ["movie", "music"]


def test_two_amazon_categories_in_one_folder(tmp_path, capsys):
    invented.amazon_2018(tmp_path)
    for old, new in (("Lamps_5", "Video_Games_5"), ("meta_Lamps", "meta_Video_Games")):
        shutil.copy(tmp_path / f"{old}.json.gz", tmp_path / f"{new}.json.gz")
    two = [tmp_path / "Lamps_5.json.gz", tmp_path / "Video_Games_5.json.gz"]
    counts = ["--train-users", "2", "--valid-users", "2", "--test-users", "3"]
    prepare(capsys, "amazon", *two, *counts, "--out", tmp_path / "out")
    assert {e.domain for e in load_examples(tmp_path / "out", "test")} == {"product", "game"}
    code, _, err = run(capsys, "prepare", "amazon", tmp_path, "--out", tmp_path / "other")
    assert code == 2 and "several files of reviews (Lamps_5.json.gz, Video_Games_5.json.gz)" in err


def test_hard_negatives_from_an_evaluations_scores(tmp_path, capsys):
    invented.movielens_100k(tmp_path / "raw")
    prepare(capsys, "movielens", tmp_path / "raw", "--num-negatives", "0", "--out", tmp_path / "all", *SMALL)
    examples = load_examples(tmp_path / "all", "train")
    draw = random.Random(0)
    lines, hardest = [], {}
    for e in examples:
        margins = {n: draw.uniform(-5, 5) for n in e.negatives}
        hardest[e.user] = sorted(margins, key=margins.get)[:2]
        lines += [
            {"user": e.user, "domain": "movie", "positive": e.positive, "negative": n, "margin": m}
            for n, m in margins.items()
        ]
    (tmp_path / "scores.jsonl").write_text(invented.json_lines(lines))
    scored = ["--num-negatives", "2", "--negatives", f"scores:{tmp_path / 'scores.jsonl'}"]
    out = prepare(capsys, "movielens", tmp_path / "raw", *scored, "--out", tmp_path / "hard", *SMALL)
    assert {e.user: list(e.negatives) for e in load_examples(tmp_path / "hard", "train")} == hardest
    assert "negatives by margin: 3 of 3 train users, 0 of 3 valid users, 0 of 6 test users" in out
    assert str(tmp_path / "scores.jsonl") in files.read_json(tmp_path / "hard" / "manifest.json")["inputs"]


def test_merged_titles_are_told_and_listed(tmp_path, capsys):
    invented.movielens_100k(tmp_path / "raw")
    text = (
        (tmp_path / "raw" / "u.item").read_text("latin-1").replace("River 1, The (1961)", "The &nbsp;Lantern 0 (1960)")
    )
    (tmp_path / "raw" / "u.item").write_text(text, "latin-1")
    out = prepare(capsys, "movielens", tmp_path / "raw", "--out", tmp_path / "out", *SMALL)
    assert "count as one (all in items.jsonl): 1: The Lantern 0 (1960) (" in out
    items = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert [sorted(item["ids"]) for item in items if len(item["ids"]) > 1] == [["100", "101"]]


def test_ml_100k(shared, tmp_path, capsys):
    out = prepare(capsys, "movielens", shared / "data" / "ml-100k", "--recipe", "paper", "--out", tmp_path / "out")
    assert "100,000 ratings of 1,664 titles by 943 users; 55% liked" in out
    assert "848 users are eligible; not: 32 fewer than 5 liked, 63 fewer than 5 disliked" in out
    assert [len(load_examples(tmp_path / "out", split)) for split in SPLITS] == [100, 100, 648]
    # by default splits scale with the 848: a tenth validates, a fifth tests, the others train
    out = prepare(capsys, "movielens", shared / "data" / "ml-100k", "--out", tmp_path / "all")
    assert [len(load_examples(tmp_path / "all", split)) for split in SPLITS] == [593, 85, 170]
    assert "training sees 593 examples (2,965 pairs) an epoch" in out


# --- the release's recipe


def test_the_seven_released_files_byte_for_byte(shared, tmp_path, capsys):
    prepare(
        capsys,
        "movielens",
        shared / "data" / "ml-1m-label-coded",
        "--recipe",
        "dmpo-release",
        "--out",
        tmp_path / "out",
    )
    names = [
        release.NAME.format(kind)
        for kind in ("sft_ranking", "eval_ranking", *(f"dpo_ranking_{k}" for k in range(1, 6)))
    ]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.json") if p.name != "manifest.json") == sorted(names)
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (shared / "data" / "dmpo-release" / name).read_bytes(), name


def ten_users(folder):
    """Users 10, 9, ...

    1 in the file, each with a line for items 1 to 50: 43 to 50 liked except 46; of the first 40 only odd ones.
    """
    rated = [(u, i, 5 if (i > 42 and i != 46) or i % 2 else 3, 0) for u in range(10, 0, -1) for i in range(1, 51)]
    invented.write(folder / "ratings.dat", invented.lines(rated, "::"))
    movies = [(i, f"Caf\u00e9 {i}, The (19{i:02})", "Drama") for i in range(1, 51)]
    invented.write(folder / "movies.dat", invented.lines(movies, "::"), "latin-1")


def test_the_recipes_machinery_on_ten_users(tmp_path):
    ten_users(tmp_path)
    interactions = sources.movielens_interactions("1M", tmp_path / "ratings.dat", sources.BadRows(False))
    titles = {str(i): f"Caf\ufffd {i}, The (19{i:02})" for i in range(1, 51)}
    files = {name: json.loads(text) for name, text in release.released_files(interactions, titles, 6, 4).items()}
    assert len(files) == 7
    assert [len(files[release.NAME.format(f"dpo_ranking_{k}")]) for k in range(1, 6)] == [6, 12, 18, 24, 30]
    sft, evaluation = files[release.NAME.format("sft_ranking")], files[release.NAME.format("eval_ranking")]
    # the last 42 lines are items 9 to 50: liked 9, 11, ... 43, 44, 45, 47, ...; disliked 10, 12, ...
    history = "".join(f" <Title:Caf\ufffd {i}> " for i in [*range(11, 43, 2), 43, 44, 45, 47, 48, 49, 50])
    assert f"they have watched: {history}. Rank" in sft[0]["instruction"]
    assert sft[0]["output"] == " <Title:Caf\ufffd 9> ,  <Title:Caf\ufffd 10> "
    # random.Random(1234).random() is 0.966, then 0.441: the negative first, then the positive
    assert sft[0]["instruction"].endswith("the two movies  <Title:Caf\ufffd 10>  and  <Title:Caf\ufffd 9> .")
    assert sft[1]["instruction"].endswith("the two movies  <Title:Caf\ufffd 9>  and  <Title:Caf\ufffd 10> .")
    # the last 40 lines are items 11 to 50; titles are whole
    assert evaluation[0]["output"] == " <Title:Caf\ufffd 11, The (1911)> ,  <Title:Caf\ufffd 12, The (1912)> "
    assert files[release.NAME.format("dpo_ranking_2")][1]["output"] == [
        " <Title:Caf\ufffd 9> ,  <Title:Caf\ufffd 12> ",
        " <Title:Caf\ufffd 12> ,  <Title:Caf\ufffd 9> ",
    ]
    assert [len(sft), len(evaluation)] == [6, 4]


# --- what it refuses: name -> (form, change of the files, arguments, what the one line must say)


def edit(file, old, new, count=1):
    def change(folder):
        path = folder / file
        raw = path.read_bytes()
        text = gzip.decompress(raw) if file.endswith(".gz") else raw
        assert old.encode() in text
        text = text.replace(old.encode(), new.encode(), count)
        path.write_bytes(gzip.compress(text) if file.endswith(".gz") else text)

    return change


def put(file, content):
    return lambda folder: (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def cell_of(file, line, cell, value, separator=","):
    """Puts `value` into a cell of a line (counted from 1)."""

    def change(folder):
        lines = (folder / file).read_text().splitlines()
        cells = lines[line - 1].split(separator)
        cells[cell] = value
        lines[line - 1] = separator.join(cells)
        (folder / file).write_text("\n".join(lines) + "\n")

    return change


def truncated(file):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-40])


def flipped(file):
    def change(folder):
        raw = bytearray((folder / file).read_bytes())
        raw[len(raw) // 2 : len(raw) // 2 + 20] = bytes(20)
        (folder / file).write_bytes(bytes(raw))

    return change


def removed(file):
    return lambda folder: (folder / file).unlink()


def copied(file, name):
    return lambda folder: shutil.copy(folder / file, folder / name)


def nothing(folder):
    pass


WRONG = {
    "gzip cut short": ("movielens_1m_gz", truncated("ratings.dat.gz"), [], ["ratings.dat.gz", "cut short"]),
    "gzip damaged": ("movielens_1m_gz", flipped("ratings.dat.gz"), [], ["ratings.dat.gz", "gzip"]),
    "titles cut short": ("amazon_2018", truncated("meta_Lamps.json.gz"), [], ["meta_Lamps.json.gz", "cut short"]),
    "wrong separator": ("movielens_100k", put("u.data", "1,2,3,4\n"), [], ["u.data:1", "'\\t'"]),
    "a header where there is none": (
        "movielens_1m",
        put("ratings.dat", "user::movie::rating::time\n"),
        [],
        ["ratings.dat:1"],
    ),
    "no separator": ("table_csv", put("ratings.csv", "rating\n5\n"), [], ["ratings.csv:1", "no separator"]),
    "no titles file": ("movielens_100k", removed("u.item"), [], ["holds no titles", "u.item"]),
    "no ratings file": ("movielens_100k", removed("u.data"), [], ["no MovieLens files", "ratings.csv"]),
    "two ratings files": ("movielens_1m", copied("ratings.dat", "ratings2.dat"), [], ["several", "ratings2.dat"]),
    "no items in common": ("movielens_100k", put("u.item", "x|Amber|\n"), [], ["u.item", "no title for any item"]),
    "titles of nothing": ("movielens_100k", put("u.item", "100| \x07 |\n"), [], ["u.item", "no title for any item"]),
    "a titles line without ::": (
        "movielens_1m",
        put("movies.dat", "100::Amber::x\n101 River\n"),
        [],
        ["movies.dat:2", "'::'"],
    ),
    "rating NaN": ("movielens_100k", cell_of("u.data", 7, 2, "nan", "\t"), [], ["u.data:7", "rating", "'nan'"]),
    "rating infinite": ("movielens_20m", cell_of("ratings.csv", 9, 2, "inf"), [], ["ratings.csv:9", "'inf'"]),
    "rating empty": ("movielens_20m", cell_of("ratings.csv", 9, 2, ""), [], ["ratings.csv:9", "rating"]),
    "rating in words": ("bookcrossing_copy", cell_of("Ratings.csv", 3, 2, "good"), [], ["Ratings.csv:3", "'good'"]),
    "user empty": ("table_csv", cell_of("ratings.csv", 4, 0, ""), [], ["ratings.csv:4", "the user is missing"]),
    "item empty": ("table_csv", cell_of("ratings.csv", 4, 1, " "), [], ["ratings.csv:4", "the item is missing"]),
    "time in words": ("table_csv", cell_of("ratings.csv", 4, 3, "noon"), [], ["ratings.csv:4", "'noon'"]),
    "too few columns": (
        "movielens_20m",
        edit("ratings.csv", "\n1,", "\n7\n1,"),
        [],
        ["ratings.csv:", "1 columns instead of 4"],
    ),
    "too many columns": (
        "movielens_1m",
        cell_of("ratings.dat", 5, 3, "9::9", "::"),
        [],
        ["ratings.dat:5", "5 columns instead of 4"],
    ),
    "empty file": ("movielens_20m", put("ratings.csv", ""), [], ["ratings.csv", "empty"]),
    "header only": (
        "movielens_20m",
        put("ratings.csv", "userId,movieId,rating,timestamp\n"),
        [],
        ["ratings.csv", "no rows"],
    ),
    "blank first line": ("table_csv", put("ratings.csv", "\n1,2,3\n"), [], ["ratings.csv:1", "blank"]),
    "binary file": ("movielens_100k", put("u.data", bytes(range(256)) * 9), [], ["u.data", "binary"]),
    "binary later on": (
        "table_csv",
        put("ratings.csv", b"user,item,rating\n" + b"1,2,3\n" * 20000 + b"\xff\xfe\n"),
        [],
        ["ratings.csv"],
    ),
    "zip archive": ("table_csv", put("ratings.csv", b"PK\x03\x04" + bytes(60)), [], ["ratings.csv", "zip", "unpack"]),
    "UTF-16": (
        "table_csv",
        put("ratings.csv", "user,item,rating\n1,2,3\n".encode("utf-16")),
        [],
        ["ratings.csv", "UTF-16"],
    ),
    "latin-1 table": (
        "table_csv",
        put("ratings.csv", "user,item,rating\né,2,3\n".encode("latin-1")),
        [],
        ["ratings.csv", "UTF-8"],
    ),
    "open quote": (
        "table_csv",
        put("ratings.csv", 'user,item,rating\n1,2,3\n1,"2,3\n' + "1,2,3\n" * 9),
        [],
        ["ratings.csv:3", "2 columns instead of 3 over 10 lines", "quote"],
    ),
    "JSON broken": ("amazon_2018", edit("Lamps_5.json.gz", '"overall"', "overall"), [], ["Lamps_5.json.gz:1", "JSON"]),
    "JSON without the rating": (
        "amazon_2023",
        edit("Lamps.jsonl", '{"rating"', '{"x"'),
        [],
        ["Lamps.jsonl:1", '"rating"'],
    ),
    "JSON rating a list": (
        "amazon_2023",
        edit("Lamps.jsonl", '"rating": ', '"rating": [1], "x": '),
        [],
        ["Lamps.jsonl:1", '"rating"'],
    ),
    "JSON rating NaN": (
        "amazon_2023",
        edit("Lamps.jsonl", '"rating": ', '"rating": NaN, "x": '),
        [],
        ["Lamps.jsonl:1", "rating"],
    ),
    "JSON that is not UTF-8": (
        "amazon_2023",
        lambda folder: (folder / "Lamps.jsonl").write_bytes(
            (folder / "Lamps.jsonl").read_bytes().replace(b'"user_id": "', b'"user_id": "\xff', 1)
        ),
        [],
        ["Lamps.jsonl:1", "UTF-8"],
    ),
    "JSON line no object": ("amazon_2023", edit("Lamps.jsonl", "\n", "\n[1]\n"), [], ["Lamps.jsonl:2", "object"]),
    "one JSON array": ("table_csv", put("ratings.csv", '[{"user": 1}]'), [], ["ratings.csv", "JSON lines"]),
    "no review": ("amazon_2018", put("Lamps_5.json.gz", '{"asin": "x"}\n'), [], ["Lamps_5.json.gz:1", "review"]),
    "no metadata": ("amazon_2018", removed("meta_Lamps.json.gz"), [], ["meta_Lamps.json.gz"]),
    "metadata of another category": (
        "amazon_2018",
        lambda folder: (folder / "meta_Lamps.json.gz").rename(folder / "meta_Games.json.gz"),
        [],
        ["meta_Lamps.json.gz"],
    ),
    "lastfm with two columns": ("lastfm", put("user_artists.dat", "1\t2\n"), [], ["user_artists.dat:1", "weight"]),
    "books without ISBN": ("bookcrossing_copy", edit("Books.csv", "ISBN", "Number"), [], ["Books.csv:1", '"ISBN"']),
    "no book was rated": (
        "bookcrossing_copy",
        put("Ratings.csv", "User-ID,ISBN,Book-Rating\n1,100,0\n"),
        [],
        ["Ratings.csv", "no row"],
    ),
    "no user column": ("table_csv", edit("ratings.csv", "user_id", "x"), [], ["ratings.csv", "--user-column"]),
    "no such column": (
        "table_csv",
        nothing,
        ["--rating-column", "liking"],
        ["--rating-column", '"liking"', "timestamp"],
    ),
    "no title column": ("table_csv", edit("items.csv", "title", "x"), [], ["items.csv", "--title-column"]),
    "no items file": ("table_csv", removed("items.csv"), [], ["items.csv", "no such file"]),
    "a folder for a table": (
        "table_csv",
        lambda folder: (removed("ratings.csv")(folder), (folder / "ratings.csv").mkdir()),
        [],
        ["folder"],
    ),
    "every rating the same": (
        "table_csv",
        put("ratings.csv", "user,item_id,rating\n1,100,1\n1,101,1\n"),
        [],
        ["every rating is 1"],
    ),
    "Parquet cut short": ("table_parquet", truncated("ratings.parquet"), [], ["ratings.parquet", "Parquet"]),
    "nobody is eligible": (
        "movielens_100k",
        nothing,
        ["--min-liked", "9"],
        ["0 of 12", "12 fewer than 9 liked", "--min-liked"],
    ),
    "too few are eligible": (
        "movielens_100k",
        nothing,
        ["--train-users", "12"],
        ["no user left for valid", "12 of 12", "--train-users"],
    ),
    "time where there is none": ("bookcrossing_dump", nothing, ["--order", "time"], ["--order", "no timestamps"]),
    "two rules for liked": (
        "movielens_100k",
        nothing,
        ["--liked-above", "3", "--liked-quantile", "0.5"],
        ["--liked-quantile"],
    ),
    "unknown negatives": ("movielens_100k", nothing, ["--negatives", "hard"], ["--negatives", "'hard'"]),
    "all of the drawn": (
        "movielens_100k",
        nothing,
        ["--negatives", "uniform", "--num-negatives", "0"],
        ["--num-negatives"],
    ),
    "window too small": ("movielens_100k", nothing, ["--max-interactions", "9"], ["--max-interactions"]),
    "few-shot of none": ("movielens_100k", nothing, ["--train-users", "0", "--few-shot", "16"], ["--few-shot"]),
    "one name too many": ("movielens_100k", nothing, ["--domains", "movie,game"], ["--domains", "2 names for 1 paths"]),
    "unknown domain": ("movielens_100k", nothing, ["--train-domains", "movie,games"], ['"games"', "movie"]),
    "scores of others": (
        "movielens_100k",
        put("s.jsonl", '{"user": "x", "positive": "a", "negative": "b", "margin": 1}\n'),
        ["--negatives", "scores:{raw}/s.jsonl"],
        ["s.jsonl", "no pair"],
    ),
    "scores NaN": (
        "movielens_100k",
        put("s.jsonl", '{"user": "x", "positive": "a", "negative": "b", "margin": NaN}\n'),
        ["--negatives", "scores:{raw}/s.jsonl"],
        ["s.jsonl:1", '"margin"'],
    ),
    "scores twice": (
        "movielens_100k",
        put("s.jsonl", '{"user": "x", "positive": "a", "negative": "b", "margin": 1}\n' * 2),
        ["--negatives", "scores:{raw}/s.jsonl"],
        ["s.jsonl:2", "twice"],
    ),
    "scores broken": (
        "movielens_100k",
        put("s.jsonl", "{oops\n"),
        ["--negatives", "scores:{raw}/s.jsonl"],
        ["s.jsonl:1", "JSON"],
    ),
    "scores missing": ("movielens_100k", nothing, ["--negatives", "scores:{raw}/s.jsonl"], ["s.jsonl", "no such file"]),
    "recipe with another rule": (
        "movielens_1m",
        nothing,
        ["--recipe", "dmpo-release", "--order", "file"],
        ["recipe", "fixes every rule"],
    ),
    "recipe of another size": ("movielens_100k", nothing, ["--recipe", "dmpo-release", "--unset"], ["MovieLens-1M"]),
    "recipe of a part": (
        "movielens_1m",
        nothing,
        ["--recipe", "dmpo-release", "--unset"],
        ["no more than 100 eligible users"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line(name, tmp_path, capsys):
    form, change, given, expected = WRONG[name]
    source, path, arguments = invented.form(form, tmp_path / "raw")
    change(tmp_path / "raw")
    given = [a.format(raw=tmp_path / "raw") for a in given]
    sizes = [] if "--unset" in given else SMALL
    given = [a for a in given if a != "--unset"]
    code, _, err = run(capsys, "prepare", source, path, *arguments, *sizes, *given, "--out", tmp_path / "out")
    line = [line for line in err.splitlines() if line.startswith(("error: ", "fault: "))]
    assert code == 2 and len(line) == 1 and "Traceback" not in err, err
    assert all(part in line[0] for part in expected), line
    assert not (tmp_path / "out").exists()


# --- what it continues with, and prints: name -> (form, change, arguments, what the summary says)
PRINTED = {
    "a byte order mark": (
        "movielens_20m",
        lambda f: put("ratings.csv", b"\xef\xbb\xbf" + (f / "ratings.csv").read_bytes())(f),
        [],
        "",
    ),
    "CRLF": ("movielens_1m", lambda f: edit("ratings.dat", "\n", "\r\n", -1)(f), [], ""),
    "CRLF and titles": ("movielens_100k", lambda f: edit("u.item", "\n", "\r\n", -1)(f), [], ""),
    "an item without title": (
        "movielens_100k",
        edit("u.item", "100|", "999|"),
        [],
        "ratings left out: no title for 1 items",
    ),
    "a rating twice": (
        "movielens_100k",
        lambda f: edit("u.data", "", (f / "u.data").read_text(), 1)(f),
        [],
        "180 ratings left out",
    ),
    "bad rows that may be skipped": (
        "movielens_100k",
        edit("u.data", "", "1\t2\tnan\t4\n"),
        ["--skip-bad-rows"],
        "1 rows left out: the rating is not a finite number (first: ",
    ),
    "terminal escapes": ("movielens_100k", edit("u.item", "Lantern 0", "\x1b[31m<Lantern>"), [], ""),
}


@pytest.mark.parametrize("name", PRINTED)
def test_what_can_be_mended_is_told(name, tmp_path, capsys):
    form, change, given, expected = PRINTED[name]
    source, path, arguments = invented.form(form, tmp_path / "raw")
    change(tmp_path / "raw")
    out = prepare(
        capsys,
        source,
        path,
        *arguments,
        *SMALL,
        "--min-liked",
        "4",
        "--min-disliked",
        "4",
        *given,
        "--out",
        tmp_path / "out",
    )
    assert expected in out and "\x1b" not in out
    text = "".join((tmp_path / "out" / f"{split}.jsonl").read_text() for split in SPLITS)
    assert len(text.splitlines()) == 12 and "\\u001b" not in text and "\x1b" not in text
    if not expected and "escapes" not in name:  # the same as from the undamaged files
        invented.form(form, tmp_path / "sound")
        prepare(
            capsys,
            source,
            tmp_path / "sound",
            *SMALL,
            "--min-liked",
            "4",
            "--min-disliked",
            "4",
            "--out",
            tmp_path / "again",
        )
        assert data(tmp_path / "out") == data(tmp_path / "again")


def test_output_that_cannot_be(tmp_path, capsys):
    invented.movielens_100k(tmp_path / "raw")
    given = ["prepare", "movielens", tmp_path / "raw", *SMALL]
    assert run(capsys, *given)[0] == 2
    (tmp_path / "file").write_text("mine")
    code, _, err = run(capsys, *given, "--out", tmp_path / "file")
    assert code == 2 and "cannot be written" in err and (tmp_path / "file").read_text() == "mine"
    prepare(capsys, *given[1:], "--out", tmp_path / "out")
    before = data(tmp_path / "out")
    code, _, err = run(capsys, *given, "--seed", "1", "--out", tmp_path / "out")
    assert code == 2 and "--overwrite" in err and data(tmp_path / "out") == before
    # a mistake loses nothing of what --overwrite would replace
    code, _, err = run(capsys, *given, "--min-liked", "12", "--out", tmp_path / "out", "--overwrite")
    assert code == 2 and data(tmp_path / "out") == before and run_directory.is_complete(tmp_path / "out")
    prepare(capsys, *given[1:], "--seed", "1", "--out", tmp_path / "out", "--overwrite", "--valid-users", "0")
    assert not (tmp_path / "out" / "valid.jsonl").exists()


KILLED = """
import os, signal, sys
from mlx_dmpo.machine import files
from mlx_dmpo.cli.main import main
from mlx_dmpo.data.sources import columns

def at(module, name, calls):
    function = getattr(module, name)
    def counted(*arguments):
        nonlocal calls
        calls -= 1
        if calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    setattr(module, name, counted)

where, calls = sys.argv.pop(1).split(":")
at({"files": files, "columns": columns}[where.split(".")[0]], where.split(".")[1], int(calls))
main()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize(
    "place",
    [
        *("columns.codes_of:1", "files.atomic:0", "files.atomic:5"),
        *(pytest.param(f"files.atomic:{n}", marks=pytest.mark.slow) for n in (1, 2, 3, 4, 6)),
        pytest.param("columns.numbers_of:1", marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_it_looks_unfinished(place, tmp_path, capsys):
    """While reading, and before each write: config, train, valid, test, items, picture, manifest.

    Then the command again does it all.
    """
    invented.movielens_100k(tmp_path / "raw")
    arguments = ["prepare", "movielens", str(tmp_path / "raw"), *SMALL, "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, place, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not run_directory.is_complete(tmp_path / "out")
    assert (tmp_path / "out").exists() == place.startswith("files")
    prepare(capsys, *arguments[1:])
    assert run_directory.is_complete(tmp_path / "out")
    prepare(capsys, *arguments[1:-1], tmp_path / "other")
    assert data(tmp_path / "out") == data(tmp_path / "other")


def test_help_teaches(capsys):
    code, out, _ = run(capsys, "prepare", "--help")
    assert code == 0 and all(name in out for name in sources.SOURCES)
    for name in sources.SOURCES:
        code, out, _ = run(capsys, "prepare", name, "--help-all")
        assert code == 0 and "--few-shot" in out and ("--user-column" in out) == (name == "table")


def test_every_source_has_its_command():
    from mlx_dmpo.cli.data import prepare as group

    assert set(sources.SOURCES) <= set(group.commands)
    assert config.PrepareSettings().negatives == "disliked"


def test_a_parquet_file_of_dictionaries_and_nulls(tmp_path, capsys):
    user, item, rating, _ = zip(*invented.ROWS, strict=True)
    table = pa.table({"user": pa.array(user).dictionary_encode(), "item": item, "rating": [None, *rating[1:]]})
    pa.parquet.write_table(table, tmp_path / "r.parquet")
    code, _, err = run(capsys, "prepare", "table", tmp_path / "r.parquet", "--out", tmp_path / "out", *SMALL)
    assert code == 2 and "r.parquet:row 1" in err
    out = prepare(
        capsys,
        "table",
        tmp_path / "r.parquet",
        "--out",
        tmp_path / "out",
        *SMALL,
        "--skip-bad-rows",
        "--min-liked",
        "4",
    )
    assert "179 ratings of 24 titles" in out
