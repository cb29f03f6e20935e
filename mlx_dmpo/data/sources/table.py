"""Any table of user, item, rating and perhaps time: CSV and its kin, Parquet, JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from ...config import PrepareSettings, TableSettings
from ...errors import UserError
from ...machine.progress import Progress
from . import dates, files
from .columns import collect, loose, rows_of, titles_of
from .contract import BadRows, Ratings
from .files import UTF8, Encoding
from .guesses import GUESSES, ITEM_IDS, guess, looks_like, pick
from .json_rows import NUMBER, TEXT, TIME, document, document_batches, first_object, is_document, json_batches
from .places import SAMPLE, first_values, places
from .tables import Batch, csv_batches, dialect, numeric, plain


@dataclass(frozen=True, slots=True)
class Table:
    """A file of rows with named columns.

    batches  (columns, their kinds, bad rows, columns that may be missing) -> the columns in blocks
    """

    path: Path
    names: list[str]
    batches: Callable[[list[str], list[str], BadRows, list[str]], Iterator[Batch]]
    header: bool = True
    what: str = ""  # a form that its messages name
    notes: tuple[str, ...] = ()


def open_table(path: Path, known: Iterable[str] = (), encoding: Encoding = UTF8) -> Table:
    """Recognizes the form of a file. Raises UserError for what is not a table."""
    known = [name for name in known if not name.isdecimal()]
    if path.is_dir():
        raise UserError(f"{path}: is a folder: name a file of it")
    with files.opened(path, bar=False) as file:
        magic = file.read(4)
    if magic == b"PAR1":
        return _parquet_table(path)
    begin = files.start(path, encoding="" if encoding == UTF8 else encoding.codec).lstrip()
    if begin[:1] == "<":
        raise UserError(
            f"{path}: is XML: `mlx-dmpo prepare myanimelist` reads that of MyAnimeList; else save it as CSV"
        )
    if re.match(r"(insert into|create table|drop table|begin transaction|pragma|lock tables|/\*!|-- )", begin, re.I):
        raise UserError(f"{path}: is an SQL dump: export its table as CSV")
    if begin[:1] in ("[", "{"):
        return _document_table(path, known, encoding) if is_document(path, encoding) else _json_table(path, encoding)
    how = dialect(path, known=known, encoding=encoding)

    def batches(columns: list[str], kinds: list[str], bad: BadRows, optional: list[str]) -> Iterator[Batch]:
        return csv_batches(path, how, [how.names.index(c) for c in columns], bad)

    return Table(path, how.names, batches, how.header, notes=how.notes)


def _parquet_table(path: Path) -> Table:
    try:
        names = list(pa.parquet.read_schema(path).names)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a valid Parquet file ({str(error).splitlines()[0]}): write it again") from None
    return Table(path, names, lambda columns, kinds, bad, optional: parquet_batches(path, columns))


def parquet_batches(path: Path, columns: Sequence[str]) -> Iterator[Batch]:
    """These columns of a Parquet file."""
    try:
        with (
            pa.parquet.ParquetFile(path) as file,
            Progress(file.metadata.num_rows, path.name, "row") as bar,
        ):
            for batch in file.iter_batches(batch_size=max(1, files.BLOCK // 64), columns=list(columns)):
                begin = bar.done

                def where(n: int, begin: int = begin) -> str:
                    return f"{path}:row {begin + n + 1}"

                yield Batch([batch.column(c) for c in columns], where)
                bar.update(len(batch))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(f"{path}: not a valid Parquet file ({str(error).splitlines()[0]}): write it again") from None


def _json_table(path: Path, encoding: Encoding) -> Table:
    sample = first_object(path, encoding)
    if sample is None:
        raise UserError(f"{path}: no line is a JSON object: give one object a line")

    def batches(columns: list[str], kinds: list[str], bad: BadRows, optional: list[str]) -> Iterator[Batch]:
        return json_batches(path, dict(zip(columns, kinds, strict=True)), bad, optional, sample, encoding)

    return Table(path, list(sample), batches)


def _document_table(path: Path, known: list[str], encoding: Encoding) -> Table:
    names, objects, named = document(path, known, encoding)

    def batches(columns: list[str], kinds: list[str], bad: BadRows, optional: list[str]) -> Iterator[Batch]:
        return document_batches(path, objects, dict(zip(columns, kinds, strict=True)), bad, optional)

    return Table(path, names, batches, named, "a JSON document, read as if it were JSON lines")


def _columns(source: Table, s: TableSettings, drawn: bool) -> dict[str, str]:
    """role -> column: the one given, else the first guess that the table has, else its place where there is no header
    line.

    Raises UserError, naming the flag, for a role that is needed and not found.
    """
    given = {"user": s.user_column, "item": s.item_column, "rating": s.rating_column, "time": s.time_column}
    chosen = {
        role: pick(source.names, name, f"--{role}-column", source.path, source.header)
        for role, name in given.items()
        if name
    }
    if source.header and not s.items:
        title = (
            pick(source.names, s.title_column, "--title-column", source.path, True)
            if s.title_column
            else guess(source.names, "title", chosen.values())
        )
        if title:
            chosen["title"] = title
    if not source.header:
        chosen = places(source.path, source.names, _sample(source), chosen)
    for role in given:
        if role not in chosen and source.header and (column := guess(source.names, role, chosen.values())):
            chosen[role] = column
    if "item" not in chosen and "title" in chosen:
        chosen["item"] = chosen.pop("title")  # the model sees titles only: a title can be the item
    for role in ("user", "item", "rating"):
        if role not in chosen and not (role == "rating" and drawn):
            raise _missing(role, source)
    for name in chosen.values():
        if source.names.count(name) > 1:
            raise UserError(f'{source.path}:1: the header names "{name}" twice: give each column its own name')
    return chosen


def _sample(source: Table) -> list[list[str]]:
    """The first values of each column."""
    kinds = [TEXT] * len(source.names)
    return first_values(source.batches(source.names, kinds, BadRows(True), source.names)) or [[]] * len(kinds)


def _missing(role: str, source: Table) -> UserError:
    export = looks_like(source.names)
    if export:
        fix = (
            f"this looks like {export[1]}: `mlx-dmpo prepare {export[0]} PATH` reads it; or name it by --{role}-column"
        )
    else:
        fix = f"name it by --{role}-column"
    if role == "rating":
        fix += ", or, where every row is a like, add --negatives popularity --min-disliked 0"
    what = f"{source.what}; " if source.what else ""
    return UserError(f"{source.path}: which column is the {role}? ({what}it has {', '.join(source.names)}): {fix}")


def table(path: Path, settings: PrepareSettings, bad: BadRows) -> Ratings:
    """Titles come from --items, else from a title column beside the item, else the items are titles themselves."""
    s = settings if isinstance(settings, TableSettings) else TableSettings()
    encoding = files.encoding_of(path, s.encoding) if s.encoding and path.is_file() and _is_text(path) else UTF8
    given = [s.user_column, s.item_column, s.rating_column, s.time_column, s.title_column]
    known = [g for names in GUESSES.values() for g in names] + list(filter(None, given))
    source = open_table(path, known, encoding)
    drawn = s.negatives in ("uniform", "popularity")
    chosen = _columns(source, s, drawn)
    notes = list(source.notes)
    listed = _items_table(Path(s.items), s, chosen["item"], source, chosen, notes) if s.items else None
    if s.order in ("file", "random") and "time" in chosen:
        column = chosen.pop("time")
        if s.time_column:
            raise UserError(f"--time-column: --order {s.order} needs no time: leave one of them out ({column})")
    roles = [role for role in ("user", "item", "rating", "time", "title") if role in chosen]
    kinds = {"rating": NUMBER, "time": TIME}
    day_first, dated = _day_first(source, chosen.get("time", ""), s)
    notes += dated
    no_item: list[int] | None = [] if _is_title(chosen["item"]) and not s.items else None
    titles: dict[str, str] | None = {} if "title" in chosen else None
    may_miss = [chosen["title"]] if titles is not None else [chosen["item"]] if no_item is not None else []
    batches = source.batches([chosen[r] for r in roles], [kinds.get(r, TEXT) for r in roles], bad, may_miss)
    interactions = collect(
        batches,
        bad,
        rating="rating" in chosen,
        time="time" in chosen,
        day_first=day_first,
        untitled=no_item,
        titles=titles,
    )
    by_value = "" if source.header else "no header line, by their values: "
    notes.append(f"columns of {path.name}: {by_value}" + ", ".join(f"{role} = {chosen[role]}" for role in roles))
    if no_item and sum(no_item):
        notes.append(f'{sum(no_item):,} rows left out: no title in "{chosen["item"]}"')
    export = looks_like(source.names)
    if export and export[0] not in ("movielens", "bookcrossing", "amazon"):
        notes.append(f"{path.name} looks like {export[1]}: `mlx-dmpo prepare {export[0]} {path}` knows it")
    found = [path]
    if listed:
        titles = _titles(listed, chosen["item"], interactions.items, bad, notes)
        found.append(Path(s.items))
    elif titles is None:
        notes.append(f'no --items: the column "{chosen["item"]}" is the title')
        titles = {i: i for i in interactions.items}
    return Ratings(interactions, titles, found, "table", "product", notes=notes)


def _is_title(column: str) -> bool:
    return plain(column) in GUESSES["title"]


def _day_first(source: Table, column: str, s: TableSettings) -> tuple[bool, list[str]]:
    """Whether dates such as 11/09/2004 begin with the day, and what was decided. Reads on until a date shows it."""
    if not column:
        return False, []
    if s.date_order:
        return s.date_order == "day-first", []
    looked = example = ""
    found: set[bool] = set()
    for batch in source.batches([column], [TIME], BadRows(True), [column]):
        values = batch.columns[0]
        if not pa.types.is_string(values.type) and not pa.types.is_large_string(values.type):
            return False, []
        for value in values.unique().to_pylist():
            looked = looked or (value or "").strip()
            if value and dates.ambiguous(value):
                example = example or value
                if (shown := dates.evidence(value)) is not None:
                    found.add(shown)
        if found or (looked and not example):
            break
    if len(found) > 1:
        raise UserError(
            f'{source.path}: dates in "{column}" begin with the day in some rows and with the month in others: '
            "write them as YYYY-MM-DD, or add --order file"
        )
    if not example:
        return False, []
    if found:
        day_first = found.pop()
        return day_first, [
            f"dates such as {example} begin with the {'day' if day_first else 'month'}, as other rows show"
        ]
    return False, [
        (
            f"dates such as {example} are read with the month first; no row shows which (--date-order day-first is the "
            "other)"
        )
    ]


@dataclass(frozen=True, slots=True)
class _Items:
    """The items file, and its columns of ids and of titles."""

    table: Table
    column: str
    title: str


def _items_table(
    path: Path, s: TableSettings, item: str, source: Table, chosen: dict[str, str], notes: list[str]
) -> _Items:
    """The items file with its columns. Without header lines its ids say which column of the ratings is the item: where
    they are those of the user's, `chosen` is changed.

    Raises UserError where a column cannot be found.
    """
    encoding = files.encoding_of(path, s.encoding) if _is_text(path) else UTF8
    given = [s.items_id_column, s.item_column, s.title_column]
    listed = open_table(path, [*ITEM_IDS, *GUESSES["title"], *filter(None, given)], encoding)
    if s.items_id_column:
        column = pick(listed.names, s.items_id_column, "--items-id-column", path, listed.header)
    elif listed.header:
        same = [name for name in listed.names if name == item]
        column = same[0] if same else guess(listed.names, "item id", [s.title_column])
    else:
        column = ""
    title = s.title_column and pick(listed.names, s.title_column, "--title-column", path, listed.header)
    title = title or (guess(listed.names, "title", [column]) if listed.header else "")
    if not listed.header or (not source.header and column):
        found = dict(zip(listed.names, _sample(listed), strict=True))
        ratings = dict(zip(source.names, _sample(source), strict=True))
        ids = {name: set(map(loose, values)) for name, values in found.items()}

        def share(of: str, name: str) -> float:
            values = set(map(loose, ratings.get(of, ())))
            return len(values & ids[name]) / max(1, len(values))

        other = chosen["user"]
        may_swap = not (source.header or s.user_column or s.item_column)
        free = [name for name in listed.names if name != title] or listed.names
        column = column or max(free, key=lambda name: (share(item, name), may_swap and share(other, name)))
        ids[column] |= set() if len(found[column]) < SAMPLE else set(map(loose, _all(listed, column)))
        if may_swap and share(item, column) < 0.5 < share(other, column):
            chosen |= {"user": item, "item": other}
            notes.append(f"column {other} of {source.path.name} holds the ids of {path.name}: it is the item")
        texts = [name for name in listed.names if name != column and not all(map(numeric, found[name]))]
        title = title or (texts or [n for n in listed.names if n != column] or [""])[0]
    for role, name, flag in (("item's id", column, "--items-id-column"), ("title", title, "--title-column")):
        if not name:
            raise UserError(
                f"{path}: which column is the {role}? (it has {', '.join(listed.names)}): name it by {flag}"
            )
    if column == title:
        raise UserError(
            f'{path}: "{column}" cannot be both id and title: name the others by --items-id-column and --title-column'
        )
    notes += [*listed.notes, *([encoding.note] if encoding.note else [])]
    return _Items(listed, column, title)


def _all(table: Table, column: str) -> Iterator[str]:
    for (value,) in rows_of(table.batches([column], [TEXT], BadRows(True), [column])):
        yield str(value)


def _titles(items: _Items, item: str, wanted: list[str], bad: BadRows, notes: list[str]) -> dict[str, str]:
    """item -> title of the items file. Raises UserError where no id is one of the ratings'."""
    path, column, title = items.table.path, items.column, items.title
    rows = rows_of(items.table.batches([column, title], [TEXT, TEXT], bad, [title]))
    titles = titles_of(rows, wanted, notes, path.name)
    notes.append(f"columns of {path.name}: item = {column}, title = {title}")
    if not titles:
        raise UserError(
            f'{path}: no title for any item: no id in its column "{column}" is one of the ratings\' column "{item}" '
            f"(such as {wanted[0] if wanted else '-'}): name the right ones by --items-id-column and --item-column"
        )
    return titles


def _is_text(path: Path) -> bool:
    with files.opened(path, bar=False) as file:
        return bool(file.read(4) != b"PAR1")
