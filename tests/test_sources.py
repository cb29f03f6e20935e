"""Every source reads the same invented ratings from its own form, for any block size; real samples where there are
some.
"""

import gzip

import invented
import numpy as np
import pytest

from mlx_dmpo import config
from mlx_dmpo.data import sources
from mlx_dmpo.errors import UserError

each_form = pytest.mark.parametrize("name", invented.FORMS)


def read(name, folder, skip=False):
    source, path, arguments = invented.form(name, folder)
    settings = config.TableSettings(items=arguments[1] if arguments else "")
    bad = sources.BadRows(skip)
    return sources.SOURCES[source](path, settings, bad), bad


def rows_of(ratings):
    i = ratings.interactions
    time = [None] * len(i.user) if i.time is None else i.time.tolist()
    return [(i.users[u], i.items[n], r, t) for u, n, r, t in zip(i.user, i.item, i.rating.tolist(), time, strict=True)]


@each_form
def test_each_form_holds_the_same_ratings(name, tmp_path):
    ratings, _ = read(name, tmp_path)
    factor = 2 if name.startswith("book") else 10 if name.startswith("lastfm") else 1
    timed = not name.startswith(("book", "lastfm"))
    assert rows_of(ratings) == [(u, i, factor * r, t if timed else None) for u, i, r, t in invented.ROWS]
    assert {i: ratings.titles[i] for i in invented.ITEMS} == invented.TITLES


@each_form
@pytest.mark.parametrize("block", [150, 1000])
def test_the_block_size_changes_nothing(name, block, tmp_path, monkeypatch):
    expected, _ = read(name, tmp_path / "a")
    monkeypatch.setattr(sources.files, "BLOCK", block)
    found, _ = read(name, tmp_path / "b")
    assert rows_of(found) == rows_of(expected)
    assert (found.interactions.users, found.interactions.items) == (
        expected.interactions.users,
        expected.interactions.items,
    )
    assert found.titles == expected.titles


BAD = "9,109,nan,5\n9,110,4\n9,111,five,5\n,112,4,5\n9,113,4,yesterday\n9,114,4,5,6\n"


@pytest.mark.parametrize("block", [150, 1 << 24])
def test_bad_rows_are_counted_the_same_for_any_block_size(block, tmp_path, monkeypatch):
    monkeypatch.setattr(sources.files, "BLOCK", block)
    text = (
        invented.lines(invented.ROWS[:90], ",", "user,item,rating,time\n")
        + BAD
        + invented.lines(invented.ROWS[90:], ",")
    )
    invented.write(tmp_path / "r.csv", text)
    bad = sources.BadRows(skip=True)
    ratings = sources.table(tmp_path / "r.csv", config.TableSettings(), bad)
    assert rows_of(ratings) == invented.ROWS
    assert bad.counts == {
        "3 columns instead of 4": 1,
        "5 columns instead of 4": 1,
        "the rating is not a finite number": 2,
        "the user is missing": 1,
        "the time is not a finite number": 1,
    }
    assert bad.first["3 columns instead of 4"].endswith("r.csv:93")
    assert bad.first["the rating is not a finite number"].endswith("r.csv:92")
    assert bad.first["the time is not a finite number"].endswith("r.csv:96")


@pytest.mark.parametrize("block", [150, 1 << 24])
def test_bad_json_lines_are_counted_the_same_for_any_block_size(block, tmp_path, monkeypatch):
    monkeypatch.setattr(sources.files, "BLOCK", block)
    invented.amazon_2023(tmp_path)
    good = (tmp_path / "Lamps.jsonl").read_text().splitlines(keepends=True)
    text = [*good[:90], "{oops\n", "\n", "[1]\n", '{"user_id": "9", "parent_asin": "x", "timestamp": 5}\n', *good[90:]]
    (tmp_path / "Lamps.jsonl").write_text("".join(text))
    bad = sources.BadRows(skip=True)
    assert rows_of(sources.amazon(tmp_path, config.PrepareSettings(), bad)) == invented.ROWS
    assert sorted(bad.counts.values()) == [1, 1, 1]
    assert sorted(where.rsplit(":", 1)[1] for where in bad.first.values()) == ["91", "93", "94"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text.rstrip(b"\n"),
        lambda text: text + b"\n\n",
        lambda text: gzip.compress(text),
        lambda text: text.replace(b",", b";"),
        lambda text: text.replace(b",", b"|"),
        lambda text: text.replace(b",", b"\t"),
        lambda text: text.replace(b",", b"::"),
        lambda text: text.replace(b",", b" , "),
        lambda text: b"".join(b'"' + line.replace(b",", b'","') + b'"\n' for line in text.splitlines()),
    ],
    ids=[
        "BOM",
        "CRLF",
        "no last newline",
        "blank lines",
        "gzip",
        "semicolon",
        "bar",
        "tab",
        "colons",
        "spaces",
        "quotes",
    ],
)
def test_a_table_by_any_other_form_reads_the_same(change, tmp_path):
    (tmp_path / "r.csv").write_bytes(change(invented.lines(invented.ROWS, ",", "user,item,rating,time\n").encode()))
    assert rows_of(sources.table(tmp_path / "r.csv", config.TableSettings(), sources.BadRows(False))) == invented.ROWS


def test_a_bare_table_with_a_bom(tmp_path):
    (tmp_path / "r.csv").write_bytes(b"\xef\xbb\xbf" + invented.lines(invented.ROWS, ",").encode())
    assert rows_of(sources.table(tmp_path / "r.csv", config.TableSettings(), sources.BadRows(False))) == invented.ROWS


def test_dates_and_quoted_newlines(tmp_path):
    text = (
        'user,title,rating,date\n1,"Lantern\nNine",4,2020-01-02\n1,"a, '
        'b",3,2020-01-01T00:00:01+00:00\n1,c,3,2019-12-31 23:59:59.5\n'
    )
    invented.write(tmp_path / "r.csv", text)
    ratings = sources.table(tmp_path / "r.csv", config.TableSettings(), sources.BadRows(False))
    assert ratings.interactions.items == ["Lantern\nNine", "a, b", "c"]
    assert np.diff(ratings.interactions.time).tolist() == [-86399, -1.5]


def test_guessed_columns_are_told_and_can_be_named(tmp_path):
    invented.write(tmp_path / "r.csv", invented.lines(invented.ROWS, ",", "who,item,stars,when\n"))
    with pytest.raises(UserError, match=r"which column is the user\? .*who, item, stars, when.*--user-column"):
        sources.table(tmp_path / "r.csv", config.TableSettings(), sources.BadRows(False))
    ratings = sources.table(
        tmp_path / "r.csv", config.TableSettings(user_column="who", time_column="when"), sources.BadRows(False)
    )
    assert rows_of(ratings) == invented.ROWS
    assert ratings.notes[0] == "columns of r.csv: user = who, item = item, rating = stars, time = when"


def test_the_book_dumps_escapes(tmp_path):
    """Quotes behind backslashes in the dump; a title that ends in one swallows its separator, which is a bad row, not a
    wrong title.
    """
    invented.bookcrossing_dump(tmp_path)
    books = (
        '"ISBN";"Book-Title";"Book-Author"\n"100";"The \\"Red\\"; Lamp";"x"\n"101";"Ending '
        'in\\";x"\n"102";"Amber";"y"\n'
    )
    invented.write(tmp_path / "BX-Books.csv", books, "latin-1")
    with pytest.raises(UserError, match=r"BX-Books\.csv:3: 2 columns instead of 3: fix the row"):
        sources.bookcrossing(tmp_path, config.PrepareSettings(), sources.BadRows(False))
    bad = sources.BadRows(True)
    ratings = sources.bookcrossing(tmp_path, config.PrepareSettings(), bad)
    assert ratings.titles == {"100": 'The "Red"; Lamp', "102": "Amber"} and bad.counts.total() == 1
    assert ratings.notes == ["1 ratings of 0 left out: the book was not rated"]


def test_a_table_keeps_its_backslashes(tmp_path):
    invented.write(tmp_path / "r.csv", 'user;title;rating\n1;"C:\\";4\n1;b;3\n')
    assert sources.table(tmp_path / "r.csv", config.TableSettings(), sources.BadRows(False)).interactions.items == [
        "C:\\",
        "b",
    ]


def test_page_source_is_no_title(tmp_path):
    invented.amazon_2018(tmp_path)
    meta = [
        {"asin": i, "title": "var x = (new Date()).getTime()" if i == "100" else t} for i, t in invented.TITLES.items()
    ]
    invented.write(tmp_path / "meta_Lamps.json.gz", invented.json_lines(meta))
    ratings = sources.amazon(tmp_path, config.PrepareSettings(), sources.BadRows(False))
    assert "100" not in ratings.titles and len(ratings.titles) == 23
    assert ratings.notes == ["1 titles are page source (getTime): taken as missing"]


@pytest.mark.parametrize(
    ("source", "folder", "rows", "users", "items", "title"),
    [
        (
            "movielens",
            "ml-100k",
            100_000,
            943,
            1682,
            ("113", "Horseman on the Roof, The (Hussard sur le toit, Le) (1995)"),
        ),
        ("movielens", "ml-1m-label-coded", 1_000_209, 6040, 3706, ("1", "Toy Story (1995)")),
        ("lastfm", "lastfm-hetrec2011", 92_834, 1892, 17_632, ("1", "MALICE MIZER")),
        ("amazon", "amazon-gift-cards-2018", 2972, 458, 148, ("B004LLIKVU", None)),
    ],
)
def test_real_samples(source, folder, rows, users, items, title, shared):
    bad = sources.BadRows(False)
    ratings = sources.SOURCES[source](shared / "data" / folder, config.PrepareSettings(), bad)
    i = ratings.interactions
    assert (len(i.user), len(i.users), len(i.items)) == (rows, users, items)
    assert title[1] in (None, ratings.titles[title[0]])
    assert set(ratings.titles) == set(i.items)
