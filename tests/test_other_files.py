"""Other people's rating files: encodings, quotes, headers, types and dates, each read to the row or refused by name."""

import json
import random
from datetime import UTC, datetime

import invented
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_prepare import SMALL, data, prepare, run
from test_sources import rows_of

from mlx_dmpo import config
from mlx_dmpo.data import sources
from mlx_dmpo.data.sources import dates
from mlx_dmpo.data.sources.files import Encoding, encoding_of, text_lines
from mlx_dmpo.data.sources.tables import dialect, number, rows
from mlx_dmpo.errors import UserError

HEADER = "user,item,rating,time\n"
PLAIN = invented.lines(invented.ROWS, ",", HEADER)


def read(path, content, skip=False, **settings):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    bad = sources.BadRows(skip)
    return sources.table(path, config.TableSettings(**settings), bad)


# --- encodings


@pytest.mark.parametrize(
    ("titles", "codec", "expected"),
    [
        (["Don’t Look – Now…", "Œuvre €5", "Žižek’s Guide"], "cp1252", None),
        (["Amélie", "Señor Ñandú", "Über Straße"], "latin-1", None),
        (["Amélie", "日本", "Œuvre"], "utf-8", None),
    ],
)
def test_titles_of_old_dumps_keep_every_character(titles, codec, expected, tmp_path):
    (tmp_path / "movies.dat").write_bytes("".join(f"{n}::{t}::x\n" for n, t in enumerate(titles)).encode(codec))
    encoding = encoding_of(tmp_path / "movies.dat")
    assert [line.split("::")[1] for _, line in text_lines(tmp_path / "movies.dat", encoding)] == titles
    assert ("Windows-1252" in encoding.note) == (codec != "utf-8")
    assert not encoding.note or f"{tmp_path / 'movies.dat'}:1: " in encoding.note


def test_a_stray_byte_spoils_no_other_line(tmp_path):
    lines = [f"{n}::Amélie {n}::x\n".encode() for n in range(50)]
    lines[33] = b"33::It\x92s stray::x\n"
    (tmp_path / "m.dat").write_bytes(b"".join(lines))
    encoding = encoding_of(tmp_path / "m.dat")
    found = [line.split("::")[1] for _, line in text_lines(tmp_path / "m.dat", encoding)]
    assert found[33] == "It’s stray" and found[:33] == [f"Amélie {n}" for n in range(33)]
    assert (
        "1 line is not UTF-8, the others are" in encoding.note
        and "m.dat:34: " in encoding.note
        and "It’s" in encoding.note
    )


@pytest.mark.parametrize("codec", ["cp1251", "shift_jis", "utf-16", "utf-16-le", "gb18030", "cp1252"])
def test_any_encoding_can_be_named(codec, tmp_path, capsys):
    words = {
        "cp1251": "Идиот",
        "shift_jis": "羅生門",
        "utf-16": "Œuvre",
        "utf-16-le": "Łódź",
        "gb18030": "红高粱",
        "cp1252": "Žižek’s",
    }
    text = "user,title,rating\n" + "".join(f"{u},{words[codec]} {i},{r}\n" for u, i, r, _ in invented.ROWS)
    ratings = read(tmp_path / "r.csv", text.encode(codec), encoding=codec)
    assert set(ratings.interactions.items) == {f"{words[codec]} {i}" for i in invented.ITEMS}
    code, _, err = run(capsys, "prepare", "table", tmp_path / "r.csv", "--out", tmp_path / "o", *SMALL)
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    code, _, err = run(capsys, "prepare", "table", tmp_path / "r.csv", "--out", tmp_path / "o", "--encoding", "klingon")
    assert code == 2 and "--encoding: 'klingon' is unknown" in err


def test_a_table_that_is_not_utf8_says_where_and_what_to_add(tmp_path):
    with pytest.raises(UserError, match=r"r\.csv:182: is not UTF-8 text \(byte 0xE9\).*--encoding cp1252"):
        read(tmp_path / "r.csv", PLAIN.encode() + "1,é,3,4\n".encode("latin-1"))
    titles = "item,title\n" + "".join(f"{i},It’s {i}\n" for i in invented.ITEMS)
    (tmp_path / "items.csv").write_bytes(titles.encode("cp1252"))
    ratings = read(tmp_path / "r.csv", PLAIN, items=str(tmp_path / "items.csv"))
    assert ratings.titles[invented.ITEMS[0]] == f"It’s {invented.ITEMS[0]}"
    assert any("Windows-1252" in note and "items.csv:2" in note for note in ratings.notes)


def test_lines_that_end_in_a_lone_carriage_return(tmp_path):
    assert rows_of(read(tmp_path / "r.csv", PLAIN.replace("\n", "\r"))) == invented.ROWS


# --- quotes, separators, headers


def quoted(separator, style):
    """A table with awkward titles, as pandas (doubled, where needed), R (escaped or doubled, everywhere) and nobody
    quotes.
    """
    titles = ['The "Red" Lamp', f"With {separator} inside", '"Quoted" whole', "plain", "C:\\new"]
    rows = [(f"u{n % 4}", titles[n % 5], 1 + n % 5) for n in range(40)]

    def cell(value):
        text = str(value)
        if style == "pandas":
            return '"' + text.replace('"', '""') + '"' if {'"', separator} & set(text) else text
        if not isinstance(value, str):
            return text
        return (
            '"'
            + (text.replace('"', '""') if style == "doubled" else text.replace("\\", "\\\\").replace('"', '\\"'))
            + '"'
        )

    header = separator.join(cell(n) for n in ("user", "title", "rating"))
    return titles, header + "\n" + "".join(separator.join(map(cell, row)) + "\n" for row in rows)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("style", ["pandas", "doubled", "escaped"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quotes_of_the_format_are_no_part_of_a_title(separator, style, end, tmp_path):
    titles, text = quoted(separator, style)
    ratings = read(tmp_path / "r.txt", text.replace("\n", end))
    assert sorted(ratings.interactions.items) == sorted(titles)
    assert ratings.interactions.users == ["u0", "u1", "u2", "u3"]


@pytest.mark.parametrize("separator", ["\t", "|"])
def test_quotes_of_a_title_stay_where_the_format_has_none(separator, tmp_path):
    titles = ['"Weird Al" Yankovic', 'Sgt. "X" Band', 'A 7" single', 'The "End']
    text = separator.join(("user", "artist", "plays")) + "\n"
    text += "".join(f"u{n % 4}{separator}{titles[n % 4]}{separator}{n}\n" for n in range(16))
    assert sorted(read(tmp_path / "r.tsv", text).interactions.items) == sorted(titles)


def test_rs_row_names_and_pandas_index(tmp_path):
    body = "".join(f'"{n}"\t"{u}"\t"{i}"\t{r}\t{t}\n' for n, (u, i, r, t) in enumerate(invented.ROWS, 1))
    ratings = read(tmp_path / "r.tsv", '"user"\t"item"\t"rating"\t"time"\n' + body)
    assert rows_of(ratings) == invented.ROWS and any("row name" in note for note in ratings.notes)
    body = "".join(f"{n},{u},{i},{r},{t}\n" for n, (u, i, r, t) in enumerate(invented.ROWS))
    assert rows_of(read(tmp_path / "r.csv", ",user,item,rating,time\n" + body)) == invented.ROWS


def test_a_title_full_of_commas_does_not_choose_the_separator(tmp_path):
    text = "user;title;rating\n" + "".join(f"u{n % 3};One, two, three, {n};{1 + n % 5}\n" for n in range(30))
    assert len(read(tmp_path / "r.csv", text).interactions.items) == 30
    text = "".join(f"u{n % 3}|One, two, three, four, {n}|{1 + n % 5}|{n}\n" for n in range(30))
    assert read(tmp_path / "r.txt", text).interactions.items[0] == "One, two, three, four, 0"


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (3, 2, 1, 0), (2, 3, 0, 1)])
@pytest.mark.parametrize("first", ["1,2,3,4", "4,3,2,1", "2,1,4,3", "u1,i1,2,3"])
def test_places_of_columns_are_no_header(order, first, tmp_path):
    """Whatever numbers the first row holds, columns given by place are at that place."""
    drawn = random.Random(1)
    rows = [first.split(",")] + [[str(drawn.randrange(1, 9)) for _ in range(4)] for _ in range(30)]
    text = "".join(",".join(row) + "\n" for row in rows)
    place = {role: order.index(n) for n, role in enumerate(("user", "item", "rating", "time"))}
    if not rows[0][place["rating"]].isdecimal() or not rows[0][place["time"]].isdecimal():
        rows[0][place["rating"]] = rows[0][place["time"]] = "5"
        text = "".join(",".join(row) + "\n" for row in rows)
    columns = {f"{role}_column": str(n + 1) for role, n in place.items()}
    found = rows_of(read(tmp_path / "r.csv", text, **columns))
    wanted = [tuple(row[place[role]] for role in ("user", "item", "rating", "time")) for row in rows]
    assert [(u, i, f"{r:g}", f"{t:g}") for u, i, r, t in found] == wanted


def test_a_title_that_is_a_column_name_makes_no_header(tmp_path):
    rows = [("u1", "Time", 5, 1)] + [(f"u{n}", f"t{n}", 1 + n % 5, n) for n in range(9)]
    assert len(read(tmp_path / "r.csv", invented.lines(rows, ",")).interactions.user) == 10


def test_places_count_in_a_table_with_names_too(tmp_path):
    assert (
        rows_of(read(tmp_path / "r.csv", PLAIN, user_column="1", item_column="ITEM", rating_column="3"))
        == invented.ROWS
    )
    with pytest.raises(UserError, match=r'--user-column: .* has no column "7": it has user, item, rating, time'):
        read(tmp_path / "r.csv", PLAIN, user_column="7")


@pytest.mark.parametrize(
    "header",
    [
        "Benutzer;Artikel;Bewertung;Datum",
        "usuario;película;puntuación;fecha",
        "Utilisateur;Film;Note;Horodatage",
        "用户;电影;评分;时间",
        "пользователь;фильм;оценка;дата",
        "User ID;Item-ID;RATING;Time Stamp",
        "user_id:token;item_id:token;rating:float;timestamp:float",
        "visitorid;itemid;score;when",
        "Profile Name;Movie;Stars;Watched Date",
    ],
)
def test_names_of_columns_in_other_languages_and_spellings(header, tmp_path):
    assert rows_of(read(tmp_path / "r.csv", invented.lines(invented.ROWS, ";", header + "\n"))) == invented.ROWS


@pytest.mark.parametrize(("hint", "separator"), [("sep=;", ";"), ('"sep=,"', ","), ("SEP=\t", "\t"), ("sep=|", "|")])
def test_excels_hint_is_no_header(hint, separator, tmp_path):
    text = hint + "\r\n" + PLAIN.replace(",", separator).replace("\n", "\r\n")
    ratings = read(tmp_path / "r.csv", b"\xef\xbb\xbf" + text.encode())
    assert rows_of(ratings) == invented.ROWS and any("sep=" in note.lower() for note in ratings.notes)
    with pytest.raises(UserError, match=r"r\.csv:5: the rating is not a finite number"):
        read(
            tmp_path / "r.csv",
            text.replace("\r\n".join(text.split("\r\n")[4:5]), separator.join(["1", "2", "x", "4"]), 1),
        )


def test_ids_and_titles_in_one_table(tmp_path):
    """The id is the item; a title may be missing, and such ratings are left out as those of an unknown item are."""
    text = "user_id,movie_id,title,rating\n"
    text += "".join(f'{u},{i},"{invented.TITLES[i] if i != "103" else ""}",{r}\n' for u, i, r, _ in invented.ROWS)
    ratings = read(tmp_path / "r.csv", text)
    assert set(ratings.interactions.items) == set(invented.ITEMS) and "103" not in ratings.titles
    assert {**ratings.titles, "103": invented.TITLES["103"]} == invented.TITLES
    # where the title is the item, a row without one is left out and counted
    text = "user,title,rating\n" + "".join(
        f"{u},{t if n % 9 else ''},{1 + n % 5}\n" for n, (u, t, _, _) in enumerate(invented.ROWS)
    )
    ratings = read(tmp_path / "r.csv", text)
    assert len(ratings.interactions.user) == 160 and '20 rows left out: no title in "title"' in ratings.notes


@pytest.mark.parametrize("name", ["id", "Nr", "key", "code", "movieId", "ASIN"])
def test_the_items_file_may_name_its_id_otherwise(name, tmp_path, capsys):
    items = invented.lines([(i, '"' + t + '"') for i, t in invented.TITLES.items()], ",", f"{name},Titel\n")
    (tmp_path / "items.csv").write_text(items)
    ratings = read(
        tmp_path / "r.csv", PLAIN.replace("item", "film_no"), items=str(tmp_path / "items.csv"), item_column="film_no"
    )
    assert ratings.titles == invented.TITLES and f"columns of items.csv: item = {name}, title = Titel" in ratings.notes
    (tmp_path / "items.csv").write_text(items.replace(f"{name},Titel", "ref,Titel"))
    files = [
        "prepare",
        "table",
        tmp_path / "r.csv",
        "--items",
        tmp_path / "items.csv",
        "--item-column",
        "film_no",
        *SMALL,
    ]
    code, _, err = run(capsys, *files, "--out", tmp_path / "a")
    assert code == 2 and "which column is the item's id? (it has ref, Titel): name it by --items-id-column" in err
    assert run(capsys, *files, "--items-id-column", "ref", "--out", tmp_path / "a")[0] == 0
    code, _, err = run(capsys, *files, "--items-id-column", "Titel", "--title-column", "ref", "--out", tmp_path / "b")
    assert code == 2 and "--items-id-column and --item-column" in err and '"Titel"' in err and '"film_no"' in err


@pytest.mark.parametrize("side", ["ratings", "items"])
def test_ids_that_pandas_made_floating(side, tmp_path):
    items = invented.lines(
        [(i + ".0" * (side == "items"), '"' + t + '"') for i, t in invented.TITLES.items()], ",", "item,title\n"
    )
    (tmp_path / "items.csv").write_text(items)
    rows = [(u, i + ".0" * (side == "ratings"), r, t) for u, i, r, t in invented.ROWS]
    ratings = read(tmp_path / "r.csv", invented.lines(rows, ",", HEADER), items=str(tmp_path / "items.csv"))
    assert {i.removesuffix(".0"): t for i, t in ratings.titles.items()} == invented.TITLES


# --- JSON


TYPES = {
    "whole, then halves": ("rating", lambda n, v: v if n < 20 else v - 0.5, lambda n, v: v if n < 20 else v - 0.5),
    "halves, then whole": ("rating", lambda n, v: v - 0.5 if n < 20 else v, lambda n, v: v - 0.5 if n < 20 else v),
    "numbers, then text": ("rating", lambda n, v: v if n < 20 else str(v), lambda n, v: v),
    "decimal commas": ("rating", lambda n, v: f"{v},5", lambda n, v: v + 0.5),
    "ids: numbers, then text": (
        "user",
        lambda n, v: int(v) if n < 20 else f"guest-{v}",
        lambda n, v: v if n < 20 else f"guest-{v}",
    ),
    "ids: text, then numbers": (
        "user",
        lambda n, v: f"g{v}" if n < 20 else int(v),
        lambda n, v: f"g{v}" if n < 20 else v,
    ),
    "ids: unsigned": ("user", lambda n, v: 2**64 - int(v), lambda n, v: str(2**64 - int(v))),
    "ids: larger still": ("item", lambda n, v: 10**30 + int(v), lambda n, v: str(10**30 + int(v))),
    "ids: floating": ("item", lambda n, v: float(v), lambda n, v: v),
    "ids: negative": ("item", lambda n, v: -int(v), lambda n, v: "-" + v),
    "ids: small, then unsigned": (
        "user",
        lambda n, v: int(v) if n else 2**63 + 1,
        lambda n, v: v if n else str(2**63 + 1),
    ),
}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("form", ["lines", "array"])
@pytest.mark.parametrize("block", [300, 1 << 24])
def test_types_in_json_may_change_from_row_to_row(name, form, block, tmp_path, monkeypatch):
    monkeypatch.setattr(sources.files, "BLOCK", block)
    column, written, expected = TYPES[name]
    place = {"user": 0, "item": 1, "rating": 2}[column]
    objects, wanted = [], []
    for n, row in enumerate(invented.ROWS):
        values = list(row)
        values[place] = written(n, row[place])
        objects.append(dict(zip(("user", "item", "rating", "time"), values, strict=True)))
        wanted.append((*row[:place], expected(n, row[place]), *row[place + 1 :]))
    text = "".join(json.dumps(o) + "\n" for o in objects) if form == "lines" else json.dumps(objects)
    assert rows_of(read(tmp_path / "r.json", text)) == wanted


def test_a_title_may_be_a_number_or_missing(tmp_path):
    titles = [{"item": i, "title": 1984 + n if n % 2 else f"T{n}"} for n, i in enumerate(invented.ITEMS)]
    titles[4]["title"] = None
    del titles[5]["title"]
    (tmp_path / "i.jsonl").write_text(invented.json_lines(titles))
    ratings = read(tmp_path / "r.csv", PLAIN, items=str(tmp_path / "i.jsonl"))
    assert len(ratings.titles) == 22 and ratings.titles[invented.ITEMS[1]] == "1985"


def layouts():
    names = ("user", "item", "rating", "time")
    records = [dict(zip(names, row, strict=True)) for row in invented.ROWS]
    columns = {name: {str(n): record[name] for n, record in enumerate(records)} for name in names}
    return {
        "records": records,
        "columns": columns,
        "index": {str(n): record for n, record in enumerate(records)},
        "split": {"columns": list(names), "index": list(range(len(records))), "data": [list(r) for r in invented.ROWS]},
        "table": {"schema": {"fields": []}, "data": [{"index": n, **r} for n, r in enumerate(records)]},
        "values": [list(row) for row in invented.ROWS],
        "list": {name: [record[name] for record in records] for name in names},
        "wrapped": {"ratings": records},
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("indent", [None, 2])
def test_every_layout_of_to_json(layout, indent, tmp_path):
    assert rows_of(read(tmp_path / "r.json", json.dumps(layouts()[layout], indent=indent))) == invented.ROWS


def test_a_json_document_that_is_broken_says_where(tmp_path):
    with pytest.raises(UserError, match=r"r\.json:3: not valid JSON"):
        read(tmp_path / "r.json", '[\n{"user": 1, "item": 2, "rating": 3},\n{"user": }\n]')
    with pytest.raises(UserError, match=r"r\.json:object 2: no usable \"rating\""):
        read(tmp_path / "r.json", '[{"user": 1, "item": 2, "rating": 3}, {"user": 1, "item": 2, "rating": null}]')


# --- dates


@pytest.mark.parametrize(
    ("text", "day_first", "expected"),
    [
        ("2004-11-09", False, (2004, 11, 9)),
        ("2004-11-09T10:30:00Z", False, (2004, 11, 9, 10, 30)),
        ("2004-11-09 10:30:00.123456789", False, (2004, 11, 9, 10, 30, 0, 123456)),
        ("2004-11-09 12:30:00+02:00", False, (2004, 11, 9, 10, 30)),
        ("2004-11-09 10:30:00 UTC", False, (2004, 11, 9, 10, 30)),
        ("2004/11/09 10:30", False, (2004, 11, 9, 10, 30)),
        ("2004.11.9", False, (2004, 11, 9)),
        ("11/09/2004", False, (2004, 11, 9)),
        ("09/11/2004", True, (2004, 11, 9)),
        ("9.11.2004", False, (2004, 11, 9)),
        ("9-11-04", True, (2004, 11, 9)),
        ("11/9/04, 1:05 PM", False, (2004, 11, 9, 13, 5)),
        ("Nov 9, 2004", False, (2004, 11, 9)),
        ("November 9th, 2004 at 10:30 am", False, (2004, 11, 9, 10, 30)),
        ("9 Nov 2004, 10:30", False, (2004, 11, 9, 10, 30)),
        ("Tue, 09 Nov 2004 10:30:00 GMT", False, (2004, 11, 9, 10, 30)),
        ("Tue Nov 09 10:30:00 +0000 2004", False, (2004, 11, 9, 10, 30)),
        ("09-Nov-04", False, (2004, 11, 9)),
        ("2004年11月9日", False, (2004, 11, 9)),
    ],
)
def test_dates_as_people_write_them(text, day_first, expected):
    assert dates.seconds(text, day_first) == datetime(*expected, tzinfo=UTC).timestamp()
    assert dates.is_date(text)


@pytest.mark.parametrize("text", ["noon", "", "30/30/2004", "2004-13-45", "Amber 9", "11/09", "Feb 30, 2004", "nan x"])
def test_what_is_no_date(text):
    assert np.isnan(dates.seconds(text)) and not dates.is_date(text)


@given(
    st.datetimes(datetime(1970, 1, 2), datetime(2060, 1, 1)),
    st.sampled_from(["%Y/%m/%d %H:%M:%S", "%d.%m.%Y %H:%M:%S", "%d %b %Y, %H:%M:%S"]),
)
def test_any_date_comes_back(when, form):
    assert dates.seconds(when.strftime(form)) == int(when.replace(tzinfo=UTC).timestamp())


def dated(rows, form):
    return [(u, i, r, datetime.fromtimestamp(1e9 + 86_400 * t, UTC).strftime(form)) for u, i, r, t in rows]


SOON = [(u, i, r, t - 1_000_000) for u, i, r, t in invented.ROWS]  # over forty days


@pytest.mark.parametrize("form", ["%m/%d/%Y", "%d/%m/%Y", "%d-%m-%y", "%m-%d-%Y %H:%M"])
def test_dates_begin_as_other_rows_show(form, tmp_path):
    ratings = read(tmp_path / "r.csv", invented.lines(dated(SOON, form), ",", HEADER))
    days = (ratings.interactions.time - ratings.interactions.time.min()) / 86_400
    assert days.tolist() == [t - min(r[3] for r in SOON) for _, _, _, t in SOON]
    first = "day" if form.startswith("%d") else "month"
    assert any(f"begin with the {first}, as other rows show" in note for note in ratings.notes)


def test_dates_that_show_nothing_are_pointed_out_and_can_be_set(tmp_path):
    rows = [(u, i, r, f"{1 + n % 12:02}/{1 + n // 20:02}/2004") for n, (u, i, r, _) in enumerate(invented.ROWS)]
    text = invented.lines(rows, ",", HEADER)
    ratings = read(tmp_path / "r.csv", text)
    assert any("month first; no row shows which" in n and "--date-order day-first" in n for n in ratings.notes)
    other = read(tmp_path / "r.csv", text, date_order="day-first")
    assert ratings.interactions.time[1] - ratings.interactions.time[0] == 31 * 86_400
    assert other.interactions.time[1] - other.interactions.time[0] == 86_400
    with pytest.raises(UserError, match="begin with the day in some rows and with the month in others"):
        read(tmp_path / "r.csv", text + "1,2,3,25/12/2004\n1,2,3,12/25/2004\n")


def test_a_time_that_is_not_needed_is_not_read(tmp_path, capsys):
    text = invented.lines([(u, i, r, "some day") for u, i, r, _ in invented.ROWS], ",", HEADER)
    for order in ("file", "random"):
        assert read(tmp_path / "r.csv", text, order=order).interactions.time is None
        with pytest.raises(UserError, match=f"--time-column: --order {order} needs no time"):
            read(tmp_path / "r.csv", text, order=order, time_column="time")
    with pytest.raises(UserError, match=r"r\.csv:2: the time is not a finite number.*--order file"):
        read(tmp_path / "r.csv", text)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "Europe/Berlin"])
def test_time_stamps_of_any_unit_in_parquet(unit, zone, tmp_path):
    user, item, rating, time = zip(*invented.ROWS, strict=True)
    factor = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}[unit]
    odd = [t * factor + (1 if unit == "ns" else 0) for t in time]  # nanoseconds that are no whole microseconds
    stamps = pa.array(odd, pa.timestamp(unit, zone))
    pa.parquet.write_table(
        pa.table({"user": user, "item": item, "rating": rating, "time": stamps}), tmp_path / "r.parquet"
    )
    found = sources.table(tmp_path / "r.parquet", config.TableSettings(), sources.BadRows(False))
    assert found.interactions.time.tolist() == list(time)


@pytest.mark.parametrize("factor", [1, 10**3, 10**6, 10**9])
def test_times_are_written_in_seconds_whatever_their_unit(factor, tmp_path, capsys):
    rows = [(u, i, r, (1_000_000_000 + 86_400 * t) * factor) for u, i, r, t in SOON]
    (tmp_path / "r.csv").write_text(invented.lines(rows, ",", HEADER))
    prepare(capsys, "table", tmp_path / "r.csv", "--out", tmp_path / "out", *SMALL)
    example = json.loads((tmp_path / "out" / "train.jsonl").read_text().splitlines()[0])
    assert all(1e9 <= t < 1.01e9 for t in example["times"]) and example["times"] == sorted(example["times"])


# --- what is no table


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (
            b"PK\x03\x04" + b"\0" * 30 + b"[Content_Types].xml" + b"\0" * 40,
            "a spreadsheet (.xlsx): open it and save it as CSV",
        ),
        (
            b"PK\x03\x04" + b"\0" * 26 + b"mimetypeapplication/vnd.oasis.opendocument.spreadsheet",
            "a spreadsheet (.ods)",
        ),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 99, "a spreadsheet (.xls)"),
        (b"PK\x03\x04" + b"\0" * 26 + b"ratings.csv", "a zip archive: unpack it first"),
        (b"SQLite format 3\0" + b"\0" * 99, "an SQLite database"),
        (b"BZh91AY" + b"\1" * 50, "a bzip2 file"),
        (b"ARROW1\0\0" + b"\0" * 50, "a Feather"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page"),
        (b"<myanimelist></myanimelist>", "is XML: `mlx-dmpo prepare myanimelist`"),
    ],
)
def test_what_is_no_table_is_called_by_its_name(content, what, tmp_path):
    with pytest.raises(UserError) as stop:
        read(tmp_path / "r.csv", content)
    assert what in str(stop.value) and len(str(stop.value).splitlines()) == 1


# --- numbers


@pytest.mark.parametrize(
    ("text", "value"), [("4,5", 4.5), (" 4.5 ", 4.5), ("-1", -1), ("1,234,5", None), ("4;5", None), ("five", None)]
)
def test_numbers_with_a_decimal_comma(text, value):
    assert number(text) == value if value is not None else np.isnan(number(text))


def test_european_ratings_by_semicolon(tmp_path):
    rows = [(u, i, f"{r},5", t) for u, i, r, t in invented.ROWS]
    ratings = read(tmp_path / "r.csv", invented.lines(rows, ";", HEADER.replace(",", ";")))
    assert ratings.interactions.rating.tolist() == [r + 0.5 for _, _, r, _ in invented.ROWS]


def test_every_way_of_writing_a_table_gives_the_same_data(tmp_path, capsys):
    """The whole command over forms that hold the same: comma, Excel's hint, cp1252, quoted tabs, JSON arrays."""
    plain = PLAIN.replace("item", "title")
    forms = {
        "a.csv": (plain.encode(), []),
        "b.csv": (b"sep=;\r\n" + plain.replace(",", ";").replace("\n", "\r\n").encode(), []),
        "c.tsv": (
            "".join("\t".join(f'"{c}"' for c in line.split(",")) + "\n" for line in plain.splitlines()).encode(),
            [],
        ),
        "d.csv": (plain.encode("utf-16"), ["--encoding", "utf-16"]),
        "e.json": (
            json.dumps(
                [dict(zip(("user", "title", "rating", "time"), r, strict=True)) for r in invented.ROWS]
            ).encode(),
            [],
        ),
    }
    found = set()
    for name, (content, flags) in forms.items():
        (tmp_path / name).write_bytes(content)
        prepare(capsys, "table", tmp_path / name, *flags, "--out", tmp_path / f"{name}-out", *SMALL)
        found.add(tuple(data(tmp_path / f"{name}-out").values()))
    assert len(found) == 1


def test_rows_are_numbered_from_the_first_line(tmp_path):
    (tmp_path / "r.csv").write_text('sep=,\na,b\n1,"x\ny"\n2,z\n')
    assert list(rows(tmp_path / "r.csv", dialect(tmp_path / "r.csv"))) == [(3, ["1", "x\ny"]), (5, ["2", "z"])]
    assert dialect(tmp_path / "r.csv").encoding == Encoding()
