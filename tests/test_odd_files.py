"""Rating files nobody promised: encodings that are not named, ids written in two ways, columns without names, rows
inside JSON objects, archives. Each is read to the row, or refused in one line that says what to add."""

import io
import json
import tarfile
import zipfile

import invented
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_other_files import HEADER, PLAIN, read
from test_prepare import SMALL, data, prepare, run
from test_sources import rows_of

from mlx_dmpo import config
from mlx_dmpo.data import sources
from mlx_dmpo.data.sources import encodings, zipped
from mlx_dmpo.data.sources.columns import loose, titles_of
from mlx_dmpo.data.sources.files import encoding_of, text_lines
from mlx_dmpo.errors import UserError

# --- encodings

OTHER = {
    "cp1251": ["Зеркало", "Летят журавли", "Баллада о солдате", "Мы из джаза"],
    "koi8-r": ["Зеркало", "Летят журавли", "Баллада о солдате", "Мы из джаза"],
    "cp1250": ["Dłużnicy", "Mała zagłada", "Król życia", "Ślepnąc od świateł"],
    "iso8859-2": ["Dłużnicy", "Mała zagłada", "Król życia", "Ślepnąc od świateł"],
    "cp1253": ["Ευδοκία", "Ο δράκος", "Στέλλα"],
    "shift_jis": ["生きる", "晩春", "風の谷のナウシカ", "ゴジラ"],
    "euc_jp": ["生きる", "晩春", "風の谷のナウシカ", "ゴジラ"],
    "gb18030": ["大红灯笼高高挂", "小城之春", "一一"],
    "big5": ["牯嶺街少年殺人事件", "飲食男女", "海角七號"],
    "euc_kr": ["밀양", "오아시스", "버닝"],
    "cp866": ["Зеркало", "Летят журавли", "Баллада о солдате"],
    "mac-roman": ["Les Misérables", "Señorita", "Köln à l’aube", "Where’s"],
}


@pytest.mark.parametrize("codec", OTHER)
def test_titles_that_read_as_no_language_are_refused_with_the_encoding(codec, tmp_path):
    lines = [f"{n}|{title}|x\n" for n, title in enumerate(OTHER[codec] * 3)]
    path = tmp_path / "u.item"
    path.write_bytes("".join(lines).encode(codec))
    with pytest.raises(UserError) as caught:
        encoding_of(path)
    message = str(caught.value)
    assert f"{path}:" in message and f"{codec} (" in message and "--encoding" in message and "\n" not in message
    first = int(message.split(":")[1])
    assert OTHER[codec][(first - 1) % len(OTHER[codec])][:3] in message, message  # as that encoding reads it
    assert [line for _, line in text_lines(path, encoding_of(path, codec))] == [line.strip() for line in lines]


GENUINE = (
    "Amélie|L’Été meurtrier|Señor Ñandú|Über Straße|Größenwahn|São João|Ações|Smörgåsbord|Møte på fjæra|Ævintýri|Þór|"
    "Ódýssey|Hääyöaie|Võrk|Crème brûlée|Œuvre|naïve|WALL·E|Alien³|8½|Nº 5|M²|Hunter×Hunter|¿Qué?|¡Three Amigos!|£5 note|"
    "€uro|It’s|“Quoted”|Don´t|Žena|Šašek|Queensrÿche|† (Justice)|µTorrent|Spice™|©2004|À bout de souffle|GROßE|où|dû|goût"
).split("|")


def test_windows_1252_is_read_with_a_note(tmp_path):
    assert [t for t in GENUINE if encodings.suspect(t)] == []
    (tmp_path / "m").write_bytes("".join(f"{t}\n" for t in GENUINE).encode("cp1252"))
    encoding = encoding_of(tmp_path / "m")
    assert "is not UTF-8: read as Windows-1252 (first at " in encoding.note
    assert [line for _, line in text_lines(tmp_path / "m", encoding)] == GENUINE


@given(st.text("abcdefghijklmnopqrstuvwxyz ABCDEFG.,'-0123456789’–—…“”€", min_size=1, max_size=30))
def test_ascii_and_typographic_signs_are_always_windows_1252(title):
    assert not encodings.suspect(title)


def test_a_stray_byte_in_many_plain_lines_stays_one(tmp_path):
    (tmp_path / "m").write_bytes(b"".join(b"%d|plain\n" % n for n in range(500)) + b"500|Na\x8dve\n")
    assert "Windows-1252" in encoding_of(tmp_path / "m").note  # 1 of 501 lines


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_two_bytes_a_character_is_named_and_can_be_read(codec, tmp_path, capsys):
    items = tmp_path / "items.csv"
    text = invented.lines([(i, '"Łódź ' + t + '"') for i, t in invented.TITLES.items()], ",", "item,title\n")
    items.write_bytes(text.encode(codec))
    (tmp_path / "r.csv").write_text(PLAIN)
    command = ["prepare", "table", tmp_path / "r.csv", "--items", items, *SMALL, "--out", tmp_path / "out"]
    code, _, err = run(capsys, *command)
    assert code == 2 and f"items.csv: is {codec[:6].upper()} text: save it as UTF-8, or add --encoding {codec}" in err
    assert run(capsys, *command, "--encoding", codec)[0] == 0  # the ratings are plain ASCII, and stay so
    assert "Łódź" in (tmp_path / "out" / "items.jsonl").read_text()


def test_a_table_names_the_encodings_that_fit(tmp_path):
    text = "user,title,rating\n" + "".join(f"{u},Зеркало {i},{r}\n" for u, i, r, _ in invented.ROWS)
    with pytest.raises(UserError, match=r"r\.csv:2: is not UTF-8 text \(byte 0xC7\).*--encoding cp1251 \('Зеркало"):
        read(tmp_path / "r.csv", text.encode("cp1251"))


def test_an_export_in_another_encoding_takes_the_flag(tmp_path):
    text = "Title,Date\n" + "".join(f"Зеркало {n},0{n}/01/2024\n" for n in range(1, 9))
    (tmp_path / "n.csv").write_bytes(text.encode("utf-16"))
    with pytest.raises(UserError, match=r"is UTF-16 text.*--encoding utf-16"):
        sources.SOURCES["netflix"](tmp_path / "n.csv", config.PrepareSettings(), sources.BadRows(False))
    settings = config.PrepareSettings(encoding="utf-16")
    assert "Зеркало 1" in sources.SOURCES["netflix"](tmp_path / "n.csv", settings, sources.BadRows(False)).titles


# --- ids written in two ways


@pytest.mark.parametrize(
    "written", ["{:08}", "{}.0", " {} ", "{}.00", '="{}"', "'{}", "000{}"], ids=lambda w: w.replace(" ", "_")
)
@pytest.mark.parametrize("side", ["items", "ratings"])
def test_an_id_written_otherwise_is_the_same_item(written, side, tmp_path):
    def as_(where, item):
        return written.format(int(item)) if where == side else item

    rows = [{"user": u, "item": as_("ratings", i), "rating": r} for u, i, r, _ in invented.ROWS]
    items = [{"id": as_("items", i), "title": t} for i, t in invented.TITLES.items()]
    (tmp_path / "i.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    found = read(tmp_path / "r.jsonl", "".join(json.dumps(r) + "\n" for r in rows), items=str(tmp_path / "i.jsonl"))
    assert {loose(i): t for i, t in found.titles.items()} == invented.TITLES
    told = any("24 ids are written otherwise in i.jsonl, such as" in note for note in found.notes)
    assert told == (written != " {} ")


def test_an_id_that_is_like_two_others_is_nobodys():
    notes = []
    found = titles_of([("07", "B"), ("007", "C"), ("9", "D"), ("AB", "E"), ("09", "F")], ["7", "9", "ab"], notes, "i")
    assert found == {"9": "D", "ab": "E"}  # 9 as it is comes before 09
    assert notes == [
        "1 ids are written otherwise in i, such as 'AB' for 'ab': taken as one",
        "1 ids have no title: more than one id of i is like it, such as '07' and '007' for '7': write the ids alike in both files",
    ]
    assert titles_of([("7", "B")], ["07", "007"]) == {}


@given(st.text(max_size=12))
def test_loose_ids_are_stable(text):
    assert loose(loose(text)) == loose(loose(loose(text)))


def test_ratings_without_a_title_are_counted_with_an_example(tmp_path, capsys):
    (tmp_path / "r.csv").write_text(PLAIN)
    items = [(i, '"' + t + '"') for i, t in invented.TITLES.items() if i not in ("101", "102")]
    (tmp_path / "i.csv").write_text(invented.lines(items, ",", "item,title\n"))
    out = prepare(capsys, "table", tmp_path / "r.csv", "--items", tmp_path / "i.csv", *SMALL, "--min-liked", "3", "--min-disliked", "3", "--out", tmp_path / "out")  # fmt: skip
    left = sum(i in ("101", "102") for _, i, _, _ in invented.ROWS)
    assert f"{left} ratings left out: no title for 2 items, such as " in out


# --- columns without names

STAMPED = [(f"90{u:0>2}", i, r, 1_100_000_000 + 1000 * t) for u, i, r, t in invented.ROWS]
TITLED = [(u, invented.TITLES[i].replace(",", ""), r, t) for u, i, r, t in STAMPED]


def bare(rows, order):
    return "".join(",".join(str(row["uirt".index(c)]) for c in order) + "\n" for row in rows)


@pytest.mark.parametrize("order", ["uirt", "uitr", "uir"])
def test_bare_columns_in_the_usual_places(order, tmp_path):
    ratings = read(tmp_path / "r.csv", bare(STAMPED, order))
    assert rows_of(ratings) == [row if "t" in order else (*row[:3], None) for row in STAMPED]
    assert any("no header line, by their values: user = 1, item = 2" in note for note in ratings.notes)


@pytest.mark.parametrize("order", ["iurt", "tiur", "riut", "urit", "iur", "tuir", "rtiu"])
def test_bare_columns_with_titles_in_any_order(order, tmp_path):
    ratings = read(tmp_path / "r.csv", bare(TITLED, order))
    assert rows_of(ratings) == [row if "t" in order else (*row[:3], None) for row in TITLED]


@pytest.mark.parametrize("order", ["tiur", "urit", "tuir", "ritu", "riu"])
def test_bare_columns_that_cannot_be_told_are_asked_about(order, tmp_path, capsys):
    (tmp_path / "r.csv").write_text(bare(STAMPED, order))
    code, _, err = run(capsys, "prepare", "table", tmp_path / "r.csv", *SMALL, "--out", tmp_path / "out")
    assert code == 2 and "no header line, and the columns (1, 2, 3" in err and "--user-column" in err
    assert f"{order.index('r') + 1} looks like the rating" in err
    settings = {"user_column": str(order.index("u") + 1), "item_column": str(order.index("i") + 1)}
    found = read(tmp_path / "r.csv", bare(STAMPED, order), **settings)  # the others by their values
    assert rows_of(found) == [row if "t" in order else (*row[:3], None) for row in STAMPED]


@pytest.mark.parametrize("order", ["tiur", "rtiu", "urit"])
def test_users_that_look_like_ratings_are_no_ratings(order, tmp_path):
    rows = [(str(int(u) - 9000), *rest) for u, *rest in TITLED]  # 1 to 12
    with pytest.raises(UserError, match=r"which column is the rating|say which is which.*--rating-column"):
        read(tmp_path / "r.csv", bare(rows, order))


def test_a_bare_time_is_no_rating(tmp_path):
    with pytest.raises(UserError, match="which column is the rating"):
        read(tmp_path / "r.csv", bare(STAMPED, "uit"))


@pytest.mark.parametrize("items", ["it", "ti", "iyt"])
def test_a_bare_items_file_says_which_column_is_the_item(items, tmp_path):
    lines = [{"i": i, "t": f'"{t}"', "y": "1995"} for i, t in invented.TITLES.items()]
    (tmp_path / "i.csv").write_text("".join(",".join(row[c] for c in items) + "\n" for row in lines))
    for order in ("uir", "iur"):
        ratings = read(tmp_path / "r.csv", bare(STAMPED, order), items=str(tmp_path / "i.csv"))
        assert rows_of(ratings) == [(*row[:3], None) for row in STAMPED]
        assert ratings.titles == invented.TITLES
        assert any("holds the ids of i.csv" in note for note in ratings.notes) == (order == "iur")


# --- rows inside JSON

FLOATS = [(u, i, float(r), float(t)) for u, i, r, t in invented.ROWS]
OBJECTS = [{"user": u, "item": i, "rating": r, "time": t} for u, i, r, t in invented.ROWS]


def maps():
    of = {row["user"]: {} for row in OBJECTS}
    full = {row["user"]: {} for row in OBJECTS}
    lists = {row["user"]: [] for row in OBJECTS}
    for row in OBJECTS:
        of[row["user"]][row["item"]] = row["rating"]
        full[row["user"]][row["item"]] = {"rating": row["rating"], "time": row["time"]}
        lists[row["user"]].append({k: row[k] for k in ("item", "rating", "time")})
    return of, full, lists


WRAPPED = {
    "data": {"data": OBJECTS},
    "a key and facts": {"page": 1, "total": 180, "results": OBJECTS},
    "a key in a key": {"ratings": {"items": OBJECTS}},
    "user: item: rating": maps()[0],
    "under a key": {"ratings": maps()[0]},
    "user: item: object": maps()[1],
    "user: objects": maps()[2],
    "ratings beside movies": {"ratings": OBJECTS, "movies": [{"id": 1, "title": "x"}]},
    "arrays with names": [["user", "item", "rating", "time"], *([*row.values()] for row in OBJECTS)],
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("indent", [None, 1])
def test_rows_under_keys(name, indent, tmp_path):
    found = read(tmp_path / "r.json", json.dumps(WRAPPED[name], indent=indent))
    timed = "item: rating" not in name and name != "under a key"
    assert sorted(rows_of(found), key=str) == sorted(((*row[:3], row[3] if timed else None) for row in FLOATS), key=str)


LINES = {
    "objects in cells": [{"user": {"id": r["user"]}, "movie": {"id": r["item"]}, "rating": r["rating"], "time": r["time"]} for r in OBJECTS],
    "MongoDB": [{"user": r["user"], "item": r["item"], "rating": {"$numberInt": str(r["rating"])}, "time": r["time"]} for r in OBJECTS],
    "arrays": [[r["user"], r["item"], r["rating"], r["time"]] for r in OBJECTS],
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("lines", [True, False])
def test_objects_and_arrays_in_rows(name, lines, tmp_path):
    rows = LINES[name]
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    assert rows_of(read(tmp_path / "r.jsonl", text)) == invented.ROWS


def test_json_that_cannot_be_read_names_the_key(tmp_path):
    with pytest.raises(UserError, match=r"rows under several keys \(seen, liked\)"):
        read(tmp_path / "r.json", json.dumps({"seen": OBJECTS, "liked": OBJECTS}))
    rows = [{"user": 1, "item": [1, 2], "rating": 4}, {"user": 1, "item": 2, "rating": 4}]
    with pytest.raises(UserError, match=r'r\.jsonl:1: no usable "item", which is a list: give it one value'):
        read(tmp_path / "r.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


# --- archives


def pack(path, members):
    """A zip or tar archive of name -> bytes."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in members.items():
                file.writestr(name, content)
        return path
    with tarfile.open(path, "w:" + {".gz": "gz", ".tgz": "gz", ".xz": "xz", ".tar": ""}[path.suffix]) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def under(folder, place=""):
    return {place + p.name: p.read_bytes() for p in folder.iterdir()}


ARCHIVES = ["d.zip", "d.tar.gz", "d.tgz", "d.tar", "d.tar.xz"]


DOWNLOADS = ["movielens_20m", "movielens_100k", "bookcrossing_copy", "amazon_2023"]


@pytest.mark.parametrize(("form", "archive"), list(zip(DOWNLOADS, ARCHIVES, strict=False)))
def test_a_download_in_its_archive_gives_the_same_data(form, archive, tmp_path, capsys):
    source, path, arguments = invented.form(form, tmp_path / "raw")
    members = under(tmp_path / "raw", "ml-latest-small/") | {"__MACOSX/._ratings.csv": b"x", "README.txt": b"read me"}
    packed = pack(tmp_path / archive, members)
    small = [*SMALL, "--min-liked", "4", "--min-disliked", "4"]
    prepare(capsys, source, path, *arguments, *small, "--out", tmp_path / "a")
    prepare(capsys, source, packed, *arguments, *small, "--out", tmp_path / "b")
    assert data(tmp_path / "a") == data(tmp_path / "b")
    assert {p.name for p in tmp_path.iterdir()} == {"raw", archive, "a", "b"}
    inputs = json.loads((tmp_path / "b" / "manifest.json").read_text())["inputs"]
    assert [name.split("/")[1] for name in inputs] == [archive]


@pytest.mark.parametrize("archive", ARCHIVES)
def test_the_one_table_of_an_archive_is_read(archive, tmp_path):
    packed = pack(tmp_path / archive, {"archive/anime ratings.csv": PLAIN.encode(), "README.md": b"x", "a.png": b"x"})
    table = sources.SOURCES["table"](packed, config.TableSettings(), sources.BadRows(False))
    assert rows_of(table) == invented.ROWS and table.files == [packed]


def test_of_several_tables_one_is_named(tmp_path, capsys):
    members = {"x/ratings.csv": PLAIN.encode(), "x/films.csv": invented.lines([(i, f'"{t}"') for i, t in invented.TITLES.items()], ",", "item,title\n").encode()}  # fmt: skip
    packed = pack(tmp_path / "kaggle.zip", members)
    code, _, err = run(capsys, "prepare", "table", packed, *SMALL, "--out", tmp_path / "out")
    assert (
        code == 2
        and f"holds several tables (x/films.csv, x/ratings.csv): name one, as in {packed}/x/ratings.csv" in err
    )
    settings = config.TableSettings(items=f"{packed}/x/films.csv")
    found = sources.SOURCES["table"](packed / "x/ratings.csv", settings, sources.BadRows(False))
    assert rows_of(found) == invented.ROWS and found.titles == invented.TITLES and found.files == [packed]
    code, _, err = run(capsys, "prepare", "table", packed / "y.csv", *SMALL, "--out", tmp_path / "out")
    assert code == 2 and "kaggle.zip: holds no y.csv: it has x/films.csv, x/ratings.csv" in err


@pytest.mark.parametrize("archive", ["d.zip", "d.tar.gz"])
def test_archives_that_lead_outside_or_unpack_too_far(archive, tmp_path, monkeypatch):
    hostile = {"../evil.csv": b"x,y\n", "/tmp/evil.csv": b"x,y\n", "C:\\evil.csv": b"x", "..\\evil.csv": b"x", "ok.csv": PLAIN.encode()}  # fmt: skip
    packed = pack(tmp_path / archive, hostile)
    table = sources.SOURCES["table"](packed, config.TableSettings(), sources.BadRows(False))
    assert rows_of(table) == invented.ROWS
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [archive]
    monkeypatch.setattr(zipped, "LIMIT", 1 << 20)
    pack(packed, {"big.csv": b"1" * (3 << 20)})
    with pytest.raises(UserError, match=r"big\.csv: is larger than 1 MB: unpack it"):
        sources.SOURCES["table"](packed, config.TableSettings(), sources.BadRows(False))
    pack(packed, {"a.png": b"x"})
    with pytest.raises(UserError, match=r"holds no table: it has a\.png"):
        sources.SOURCES["table"](packed, config.TableSettings(), sources.BadRows(False))


def test_a_row_of_an_archive_is_named_by_it(tmp_path):
    packed = pack(tmp_path / "d.zip", {"r.csv": (HEADER + "1,2,good,4\n").encode()})
    with pytest.raises(UserError, match=r"d\.zip/r\.csv:2: the rating is not a finite number \('good'\)"):
        sources.SOURCES["table"](packed, config.TableSettings(), sources.BadRows(False))


# --- cells and lines of many kinds

ODD = {
    "rows end in a comma, the header does not": ("user,item,rating,time\n", "{u},{i},{r},{t},\n", None),
    "rows and header end in a comma": ("user,item,rating,time,\n", "{u},{i},{r},{t},\n", None),
    "JSON lines with commas between": ("", '{{"user": "{u}", "item": "{i}", "rating": {r}, "time": {t}}},\n', None),
    "two bars": ("user||item||rating||time\n", "{u}||{i}||{r}||{t}\n", None),
    "thousands": ("user,item,plays,time\n", '{u},{i},"1,{r}00",{t}\n', r"r\.csv:2: .*'1,200'\): write 1200, without the comma"),
    "a column name twice": ("user,item,rating,rating\n", "{u},{i},{r},{t}\n", 'the header names "rating" twice'),
    "an SQL dump": ("", "INSERT INTO r VALUES ({u},{i},{r},{t});\n", "is an SQL dump: export its table as CSV"),
    "stars": ("user,item,rating,time\n", "{u},{i},{r}/5,{t}\n", r"r\.csv:2: the rating is not a finite number \('2/5'\)"),
    "blanks between": ("user item rating time\n", "{u} {i} {r} {t}\n", "no separator in 'user item rating time'"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_lines_are_read_to_the_row_or_named(name, tmp_path):
    header, line, message = ODD[name]
    text = header + "".join(line.format(u=u, i=i, r=r, t=t) for u, i, r, t in invented.ROWS)
    if message is None:
        assert rows_of(read(tmp_path / "r.csv", text)) == invented.ROWS
        return
    with pytest.raises(UserError, match=message):
        read(tmp_path / "r.csv", text)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_true_and_false_are_ratings(form, tmp_path):
    if form == "csv":
        text = "user,item,liked\n" + "".join(f"{u},{i},{r > 3}\n" for u, i, r, _ in invented.ROWS)
    else:
        text = "".join(json.dumps({"user": u, "item": i, "liked": r > 3}) + "\n" for u, i, r, _ in invented.ROWS)
    assert read(tmp_path / "r", text).interactions.rating.tolist() == [float(r > 3) for _, _, r, _ in invented.ROWS]


def test_titles_encoded_twice_are_pointed_out(tmp_path, capsys):
    text = "user,title,rating\n" + "".join(
        f"{u},{'Amélie'.encode().decode('cp1252')} {i},{r}\n" for u, i, r, _ in invented.ROWS
    )
    (tmp_path / "r.csv").write_text(text)
    small = [*SMALL, "--min-liked", "4", "--min-disliked", "4"]
    out = prepare(capsys, "table", tmp_path / "r.csv", *small, "--out", tmp_path / "out")
    assert "24 titles are UTF-8 that was read as Windows-1252 and saved again, such as AmÃ©lie 1" in out


# --- a prepared directory brings the wording of its domains

WORDS = {"topic": "anime", "items": "anime", "consumed": "watched", "consuming": "watching"}


def test_the_wording_of_a_directory_is_beneath_the_settings_and_the_adapter(tmp_path):
    from mlx_dmpo.data.wording import with_own_domains

    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "manifest.json").write_text(json.dumps({"config": {"domains": {"anime": WORDS}}}))
    plain = config.SftSettings(data=str(tmp_path / "d"))
    assert with_own_domains(plain).domains == {"anime": WORDS}
    other = WORDS | {"topic": "cartoons"}
    given = config.SftSettings(data=str(tmp_path / "d"), domains={"anime": other})
    assert with_own_domains(given).domains == {"anime": other}  # what is given wins
    (tmp_path / "a").mkdir()
    stored = {"prompt": {"domains": {"anime": other}}}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(stored))
    assert with_own_domains(plain, str(tmp_path / "a")).domains == {}  # the adapter's own is used
    assert with_own_domains(config.SftSettings(data=str(tmp_path / "a"))).domains == {}
    assert with_own_domains(config.SftSettings()).domains == {}


def test_training_on_a_converted_directory_needs_no_config(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"user": f"u{n}", "domain": "anime", "history": [f"A{n}", "B"], "positive": f"C{n}", "negatives": [f"D{n}"]}
        for n in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "".join(f"    {name}: {word}\n" for name, word in WORDS.items())
    (tmp_path / "anime.yaml").write_text("domains:\n  anime:\n" + words)
    flags = ["--valid", "0.2", "--test", "0.2", "--out", "d"]
    assert run(capsys, "prepare", "convert", "rows.jsonl", "-c", "anime.yaml", *flags)[0] == 0
    code, out, err = run(capsys, "sft", "--data", "d", "--iters", "1", "--adapter-path", "s")
    assert code == 0, err
    then = out.strip().splitlines()[-1]
    assert then.startswith("next: mlx-dmpo dmpo") and " -c s/" in then
    code, out, err = run(capsys, *then.removeprefix("next: mlx-dmpo ").split(), "--iters", "1")
    assert code == 0, err
    code, _, err = run(capsys, *out.strip().splitlines()[-1].removeprefix("next: mlx-dmpo ").split())
    assert code == 0, err
    assert run(capsys, "evaluate", "--data", "d", "--out", "e")[0] == 0  # the base model, without any adapter
