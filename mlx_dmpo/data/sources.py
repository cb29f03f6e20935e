"""Raw rating files -> interactions and titles, streamed through arrow in blocks; the result is the same for any block size.

A source is a function (path, settings, bad rows) -> Ratings. What a folder or file holds is recognised by names, by its first bytes
and its first line. A row that cannot be read stops the command with its line, unless bad rows are to be skipped; then each is counted.
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import csv
import gzip
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from tqdm import tqdm

from ..config import PrepareSettings, TableSettings
from ..errors import UserError

BLOCK = 16 << 20  # bytes read at once


@dataclass(frozen=True, slots=True, eq=False)
class Interactions:
    """N ratings in the order of the file: user users[user[n]] gave item items[item[n]] the rating[n] at time[n].

    user, item  (N,) int32
    rating      (N,) float64, finite
    time        (N,) float64, finite, in the file's own unit, which only the order of matters; None where there is none
    """

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray | None
    users: list[str]
    items: list[str]


@dataclass(frozen=True, slots=True, eq=False)
class Ratings:
    """What a source yields: interactions, the raw title of each item that has one, and what the reader should be told.

    scale           lowest and highest rating there can be; None: as they occur
    liked_quantile  the source's own rule for liked, where ratings have no midpoint (play counts)
    """

    interactions: Interactions
    titles: dict[str, str]
    files: list[Path]
    name: str
    domain: str
    scale: tuple[float, float] | None = None
    liked_quantile: float | None = None
    order: str = ""
    notes: list[str] = field(default_factory=list)


class BadRows:
    """Rows that cannot be read: the first raises UserError, unless they are to be skipped; then they are counted by reason."""

    def __init__(self, skip: bool):
        self.skip = skip
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, where: str | Callable[[], str], what: str, mend: str, value: str = "") -> None:
        """`where` may be a function, since finding the line of a row can take a pass over the file; `value` is what stands there."""
        if self.skip and what in self.first:
            self.counts[what] += 1
            return
        place = where if isinstance(where, str) else where()
        if not self.skip:
            raise UserError(f"{place}: {what}{value and f' ({value})'}: {mend}, or add --skip-bad-rows")
        self.first[what] = place
        self.counts[what] = 1


@contextlib.contextmanager
def opened(path: Path, bar: bool = True) -> Iterator[Any]:
    """The file's bytes, unzipped where it is a gzip file, with a progress bar over what is read from disk.

    Raises UserError for a file that cannot be read to its end.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            size = path.stat().st_size
            counted: Any  # a file as far as gzip and arrow care
            with tqdm.wrapattr(
                file, "read", total=size, desc=path.name, unit="B", unit_scale=True, disable=None if bar else True
            ) as counted:
                yield gzip.GzipFile(fileobj=counted) if zipped else counted
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: name an existing file") from None
    except EOFError:
        raise UserError(f"{path}: the gzip file is cut short: download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not a sound gzip file ({error}): download it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}): name a readable file") from None


def _start(path: Path, size: int = 1 << 16) -> bytes:
    """The first bytes of a text file. Raises UserError for an empty or a binary one."""
    with opened(path, bar=False) as file:
        start = file.read(size)
    if not start.strip():
        raise UserError(f"{path}: is empty: give at least one row")
    if start[:4] == b"PK\x03\x04":
        raise UserError(f"{path}: is a zip archive: unpack it first")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: is UTF-16 text: save it as UTF-8")
    if b"\0" in start:
        raise UserError(f"{path}: is a binary file: give text, Parquet or JSON lines")
    return start.removeprefix(b"\xef\xbb\xbf")


def _encoding(path: Path) -> str:
    """utf-8-sig where the whole file is UTF-8, else latin-1, in which old dumps are written."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with opened(path, bar=False) as file:
        try:
            while block := file.read(BLOCK):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "latin-1"
    return "utf-8-sig"


def text_lines(path: Path, encoding: str | None = None) -> Iterator[tuple[int, str]]:
    """(number, text) of each line that is not blank."""
    _start(path)
    encoding = encoding or _encoding(path)
    with opened(path) as file:
        try:
            for n, line in enumerate(_decoded(file, encoding), 1):
                if line.strip():
                    yield n, line.rstrip("\r\n")
        except UnicodeDecodeError:
            raise UserError(f"{path}: is not UTF-8 text: save it as UTF-8") from None


def _decoded(file: IO[bytes], encoding: str, errors: str = "strict") -> Iterator[str]:
    """The lines of a file, line ends and all."""
    codec = encoding
    for block in _whole_lines(file):
        for line in block.split(b"\n")[: -1 if block.endswith(b"\n") else None]:
            yield (line + b"\n").decode(codec, errors)
            codec = "utf-8" if encoding == "utf-8-sig" else encoding  # a byte order mark stands at the beginning only


def _whole_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Blocks that end where a line ends."""
    rest = b""
    while chunk := file.read(BLOCK):
        head, newline, tail = chunk.rpartition(b"\n")
        if newline:
            yield rest + head + newline
            rest = tail
        else:
            rest += tail
    if rest:
        yield rest


class _Utf8:
    """A file whose bytes are checked as they are read: arrow tells of text that is not UTF-8 late, without a line, or not at all."""

    closed = False

    def __init__(self, file: IO[bytes], path: Path):
        self.file, self.path, self.line = file, path, 1
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    def read(self, size: int = -1) -> bytes:
        """Raises UserError."""
        data = self.file.read(size)
        try:
            self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = self.line + error.object[: error.start].count(b"\n")
            raise UserError(f"{self.path}:{line}: is not UTF-8 text: save the file as UTF-8") from None
        self.line += data.count(b"\n")
        return data


@dataclass(frozen=True, slots=True)
class Batch:
    """Some consecutive rows: a column for each that was asked for, and where row n of them stands, for messages."""

    columns: list[pa.Array]
    where: Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a text table is written. separator "::" is MovieLens's."""

    separator: str
    names: list[str]  # "1", "2", ... where there is no header line
    header: bool
    escape: bool = False  # a backslash before a quote inside quotes
    encoding: str = "utf-8-sig"

    @property
    def quoted(self) -> bool:
        return self.separator in ",;"


def _numeric(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def dialect(path: Path, *, encoding: str = "utf-8-sig", known: Iterable[str] = ()) -> Dialect:
    """Reads off the first line: separator, and column names where it bears any (`known` ones or none that is a number).

    Raises UserError.
    """
    first = _start(path).decode("latin-1" if encoding == "latin-1" else "utf-8", "replace").splitlines()[0]
    if not first.strip():
        raise UserError(f"{path}:1: the first line is blank: begin with column names or a row")
    separator = max(("\t", ",", ";", "|", "::"), key=first.count)
    if separator not in first:
        raise UserError(f"{path}:1: no separator in {first[:60]!r}: separate columns by comma, tab, semicolon, | or ::")
    cells = first.split("::") if separator == "::" else next(csv.reader([first], delimiter=separator))
    cells = [cell.strip() for cell in cells]
    header = bool({_plain(c) for c in cells} & {_plain(k) for k in known}) or not any(map(_numeric, cells))
    names = cells if header else [str(n) for n in range(1, len(cells) + 1)]
    return Dialect(separator, names, header, encoding=encoding)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _cells(lines: Iterable[str], how: Dialect) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each row, by the standard library: slow, for messages and small files."""
    if how.separator == "::":
        yield from ((n, line.rstrip("\r\n").split("::")) for n, line in enumerate(lines, 1))
        return
    reader = csv.reader(
        lines,
        delimiter=how.separator,
        quoting=csv.QUOTE_MINIMAL if how.quoted else csv.QUOTE_NONE,
        escapechar="\\" if how.escape else None,
    )
    start = 1
    for row in reader:
        yield start, row  # the line on which the row begins
        start = reader.line_num + 1


def _line_of(path: Path, how: Dialect, columns: Sequence[int] | None, values: list[str]) -> str:
    """file:line of the first row with these values in these columns (None: the whole row)."""
    with opened(path, bar=False) as file:
        for n, cells in _cells(_decoded(file, how.encoding, "replace"), how):
            if n == 1 and how.header:
                continue
            chosen = cells if columns is None else [cells[c] for c in columns if c < len(cells)]
            if [c.rstrip("\r\n") for c in chosen] == [v.rstrip("\r\n") for v in values]:
                return f"{path}:{n}"
    return str(path)


def _csv_batches(path: Path, how: Dialect, columns: Sequence[int], bad: BadRows) -> Iterator[Batch]:
    """The columns at these places of a text table, as text."""
    step = len(how.separator)  # arrow takes one character: "::" is ":" with empty columns between
    malformed: list[Any] = []

    def keep(row: Any) -> str:
        malformed.append(row)
        return "skip"

    def tell() -> None:
        while malformed:  # arrow reads ahead and may add to it meanwhile
            row = malformed.pop(0)
            found, wanted = (1 + (n - 1) // step for n in (row.actual_columns, row.expected_columns))
            cells = next(cells for _, cells in _cells(row.text.splitlines(keepends=True), how))
            long = row.text.count("\n")
            over = f" over {long + 1} lines (is a quote not closed?)" if long else ""
            bad.add(
                partial(_line_of, path, how, None, cells), f"{found} columns instead of {wanted}{over}", "mend the row"
            )

    utf8 = how.encoding == "utf-8-sig"
    names = [f"f{c * step}" for c in columns]
    with opened(path) as file:
        try:
            reader = pa.csv.open_csv(
                _Utf8(file, path) if utf8 else file,
                pa.csv.ReadOptions(
                    block_size=BLOCK,
                    autogenerate_column_names=True,
                    skip_rows=int(how.header),
                    encoding="utf8" if utf8 else how.encoding,  # arrow leaves out the mark itself
                ),
                pa.csv.ParseOptions(
                    delimiter=how.separator[0],
                    quote_char='"' if how.quoted else False,
                    escape_char="\\" if how.escape else False,
                    newlines_in_values=how.quoted,
                    invalid_row_handler=keep,
                ),
                pa.csv.ConvertOptions(include_columns=names, column_types=dict.fromkeys(names, pa.string())),
            )
            for batch in reader:
                tell()

                def where(n: int, columns_of_batch: list[pa.Array] = batch.columns) -> str:
                    return _line_of(path, how, columns, [column[n].as_py() for column in columns_of_batch])

                yield Batch(batch.columns, where)
            tell()
        except pa.ArrowInvalid as error:
            raise _arrow_error(path, error) from None
        except KeyError:
            raise UserError(f"{path}: has fewer than {max(columns) + 1} columns: check the separator") from None


def _arrow_error(path: Path, error: Exception) -> UserError:
    text = str(error)
    if "Empty CSV" in text:
        return UserError(f"{path}: holds no rows: give at least one")
    if "UTF8" in text:
        return UserError(f"{path}: is not UTF-8 text: save it as UTF-8")
    if "straddl" in text:
        return UserError(f"{path}: a row is longer than {BLOCK >> 20} MiB: a quote may not be closed")
    return UserError(f"{path}: cannot be read ({text.splitlines()[0]}): mend the file")


def _json_batches(
    path: Path, fields: dict[str, pa.DataType], bad: BadRows, optional: Iterable[str] = ()
) -> Iterator[Batch]:
    """These fields of JSON lines. A block that arrow cannot read goes line by line, also as Python literals (Amazon's of 2014)."""
    schema = pa.schema(list(fields.items()))
    lines_before = 0
    with opened(path) as file:
        for block in _whole_lines(file):
            table = _json_block(block, schema)
            required = [] if table is None else [c for c in table.column_names if c not in optional]
            if table is None or any(table[c].null_count for c in required):
                numbers, rows = _json_rows(path, block, lines_before, fields, bad, set(optional))
                columns = [pa.array(column, kind) for column, kind in zip(rows, fields.values(), strict=True)]
            else:
                numbers, columns = None, [table[c].combine_chunks() for c in fields]

            def where(
                n: int, numbers: list[int] | None = numbers, block: bytes = block, before: int = lines_before
            ) -> str:
                if numbers is None:  # arrow leaves out blank lines
                    numbers = [before + k for k, line in enumerate(block.split(b"\n"), 1) if line.strip()]
                return f"{path}:{numbers[n]}"

            yield Batch(columns, where)
            lines_before += block.count(b"\n")


def _json_block(block: bytes, schema: pa.Schema) -> pa.Table | None:
    block = block.removeprefix(b"\xef\xbb\xbf")
    if not block.strip():
        return schema.empty_table()
    try:
        block.decode()  # arrow does not look
        return pa.json.read_json(
            io.BytesIO(block),
            pa.json.ReadOptions(block_size=max(len(block), 1 << 10)),
            pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except (UnicodeDecodeError, pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _object(line: bytes) -> Any:
    """A JSON or Python-literal object; raises ValueError."""
    text = line.decode("utf-8-sig")
    try:
        return json.loads(text)
    except ValueError:
        if "': " not in text:
            raise
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError("neither JSON nor a Python literal") from None


def _json_rows(
    path: Path, block: bytes, before: int, fields: dict[str, pa.DataType], bad: BadRows, optional: set[str]
) -> tuple[list[int], list[list[Any]]]:
    """Line numbers, and the columns, of the rows of a block that can be read."""
    numbers: list[int] = []
    rows: list[list[Any]] = [[] for _ in fields]
    for n, line in enumerate(block.split(b"\n"), before + 1):
        if not line.strip():
            continue
        where = f"{path}:{n}"
        try:
            row = _object(line)
        except (ValueError, RecursionError) as error:
            bad.add(where, f"not valid JSON ({getattr(error, 'msg', None) or 'not UTF-8 text'})", "mend the syntax")
            continue
        if not isinstance(row, dict):
            bad.add(where, "not a JSON object", "give one object a line")
            continue
        values = [_as(row.get(name), kind) for name, kind in fields.items()]
        missing = [name for name, value in zip(fields, values, strict=True) if value is None and name not in optional]
        if missing:
            bad.add(where, f'no usable "{missing[0]}"', "give it a value")
            continue
        numbers.append(n)
        for column, value in zip(rows, values, strict=True):
            column.append(value)
    return numbers, rows


def _as(value: Any, kind: pa.DataType) -> Any:
    """A JSON value as text or number; None where it is neither."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if pa.types.is_string(kind):
        return str(value).encode("utf-8", "replace").decode()  # a lone surrogate is no text
    if pa.types.is_integer(kind):
        return value if isinstance(value, int) else None
    return float(value) if isinstance(value, int | float) or _numeric(value) else None


def _parquet_batches(path: Path, columns: Sequence[str]) -> Iterator[Batch]:
    try:
        with (
            pa.parquet.ParquetFile(path) as file,
            tqdm(total=file.metadata.num_rows, desc=path.name, unit="row", disable=None) as bar,
        ):
            for batch in file.iter_batches(batch_size=max(1, BLOCK // 64), columns=list(columns)):
                start = int(bar.n)

                def where(n: int, start: int = start) -> str:
                    return f"{path}:row {start + n + 1}"

                yield Batch([batch.column(c) for c in columns], where)
                bar.n += len(batch)
                bar.refresh()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(f"{path}: not a sound Parquet file ({str(error).splitlines()[0]}): write it anew") from None


def _codes(column: pa.Array, index: dict[str, int]) -> np.ndarray:
    """Each value's place in `index`, which grows in the order of first appearance; -1 for an empty value.  (N,) -> (N,) int32"""
    encoded = column.cast(pa.string()).fill_null("").dictionary_encode()
    values = [value.strip() for value in encoded.dictionary.to_pylist()]
    codes = np.array([index.setdefault(v, len(index)) if v else -1 for v in values], np.int32)
    return codes[encoded.indices.to_numpy()] if len(codes) else np.zeros(0, np.int32)


def _numbers(column: pa.Array, one: Callable[[Any], float]) -> np.ndarray:
    """(N,) float64, NaN where there is no finite number; `one` reads a value that arrow does not."""
    try:
        if pa.types.is_temporal(column.type):
            column = column.cast(pa.timestamp("us")).cast(pa.int64())
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        values = np.array([one(value) for value in column.to_pylist()], np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _seconds(value: Any) -> float:
    """A number, or an ISO date as seconds since 1970; without a zone it is UTC."""
    number = _number(value)
    if not math.isnan(number) or not isinstance(value, str):
        return number
    try:
        date = datetime.fromisoformat(value.strip())
    except ValueError:
        return math.nan
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _collect(batches: Iterable[Batch], bad: BadRows) -> Interactions:
    """Columns user, item, rating and perhaps time of all batches. Raises UserError at the first row without them."""
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    parts: list[list[np.ndarray]] = []
    for batch in batches:
        user, item, rating, *time = batch.columns
        part = [
            _codes(user, users),
            _codes(item, items),
            _numbers(rating, _number),
            *(_numbers(t, _seconds) for t in time),
        ]
        good = np.ones(len(part[0]), bool)
        for name, values, column in zip(("user", "item", "rating", "time"), part, batch.columns, strict=False):
            wrong = (values < 0) if values.dtype == np.int32 else np.isnan(values)
            for n in np.flatnonzero(wrong & good):
                what = "is missing" if values.dtype == np.int32 else "is no finite number"
                bad.add(
                    partial(batch.where, int(n)), f"the {name} {what}", "give one", repr(column[int(n)].as_py())[:40]
                )
            good &= ~wrong
        parts.append(part if good.all() else [values[good] for values in part])
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else [np.zeros(0)] * 3
    return Interactions(
        columns[0], columns[1], columns[2], columns[3] if len(columns) > 3 else None, list(users), list(items)
    )


def _titles(rows: Iterable[tuple[Any, Any]], items: Iterable[str]) -> dict[str, str]:
    """The first title of each of the items that has one."""
    wanted = set(items)
    titles: dict[str, str] = {}
    for item, title in rows:
        item = str(item).strip()
        if title and item in wanted and item not in titles:
            titles[item] = str(title)
    return titles


def _rows(batches: Iterable[Batch]) -> Iterator[tuple[Any, ...]]:
    for batch in batches:
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _split_lines(path: Path, separator: str, bad: BadRows) -> Iterator[tuple[str, str]]:
    """The first two cells of each line of a small table without quotes."""
    for n, line in text_lines(path):
        cells = line.split(separator)
        if len(cells) < 2:
            bad.add(f"{path}:{n}", f"no {separator!r} in the line", "separate id and title by it")
        else:
            yield cells[0], cells[1]


def _folder(path: Path, what: str) -> list[Path]:
    if not path.exists():
        raise UserError(f"{path}: no such folder: name the unpacked {what} download")
    if not path.is_dir():
        raise UserError(f"{path}: is no folder: name the folder of the unpacked {what} download")
    return sorted(p for p in path.iterdir() if p.is_file())


def _one(found: Sequence[Path], folder: Path, what: str, names: str) -> Path:
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{folder}: holds no {what}: put {names} there")
    raise UserError(
        f"{folder}: holds several files of {what} ({', '.join(p.name for p in found)}): keep one of them there"
    )


def _stem(path: Path) -> str:
    """The name without .gz and the like: "ratings.csv.gz" -> "ratings"."""
    return path.name.split(".")[0]


def movielens_files(path: Path) -> tuple[str, Path, Path]:
    """("100K" | "1M" | "20M", ratings file, titles file) of a MovieLens folder, by what lies in it. Raises UserError."""
    files = _folder(path, "MovieLens")
    names = {p.name: p for p in files}
    if "u.data" in names:
        return "100K", names["u.data"], _one([p for p in files if p.name == "u.item"], path, "titles", "u.item")
    for kind, suffix in (("1M", ".dat"), ("20M", ".csv")):
        ratings = [p for p in files if p.name.startswith("ratings") and p.name.removesuffix(".gz").endswith(suffix)]
        if ratings:
            titles = [p for p in files if p.name.removesuffix(".gz") == "movies" + suffix]
            return (
                kind,
                _one(ratings, path, "ratings", f"ratings{suffix}"),
                _one(titles, path, "titles", f"movies{suffix}"),
            )
    raise UserError(
        f"{path}: no MovieLens files: it should hold u.data and u.item, ratings.dat and movies.dat, or ratings.csv and movies.csv"
    )


def movielens_interactions(kind: str, file: Path, bad: BadRows) -> Interactions:
    """The ratings of 100K (tabs), 1M and 10M (::), 20M to 32M (CSV with a header line)."""
    if kind == "20M":
        how, columns = _named(file, {"user": "userId", "item": "movieId", "rating": "rating", "time": "timestamp"})
        return _collect(_csv_batches(file, how, columns, bad), bad)
    separator = "\t" if kind == "100K" else "::"
    how = dialect(file)
    if how.separator != separator or how.header or len(how.names) != 4:
        raise UserError(
            f"{file}:1: not user, item, rating and time with {separator!r} between: use the file as it was downloaded"
        )
    return _collect(_csv_batches(file, how, range(4), bad), bad)


def movielens(path: Path, settings: PrepareSettings, bad: BadRows) -> Ratings:
    """MovieLens 100K, 1M, 10M, 20M to 32M; titles in UTF-8 or latin-1."""
    kind, file, movies = movielens_files(path)
    interactions = movielens_interactions(kind, file, bad)
    if kind == "20M":
        how, columns = _named(movies, {"item": "movieId", "title": "title"}, _encoding(movies))
        rows: Iterable[tuple[Any, ...]] = _rows(_csv_batches(movies, how, columns, bad))
    else:
        rows = _split_lines(movies, "|" if kind == "100K" else "::", bad)
    name = {"100K": "MovieLens 100K", "1M": "MovieLens 1M or 10M", "20M": "MovieLens 20M to 32M"}[kind]
    return Ratings(interactions, _titles(rows, interactions.items), [file, movies], name, "movie", scale=(1, 5))


def _named(path: Path, columns: dict[str, str], encoding: str = "utf-8-sig") -> tuple[Dialect, list[int]]:
    """The dialect of a CSV with a header line, and the places of these columns in it. Raises UserError."""
    how = dialect(path, encoding=encoding, known=columns.values())
    places = {_plain(name): n for n, name in reversed(list(enumerate(how.names)))}
    for name in columns.values():
        if not how.header or _plain(name) not in places:
            raise UserError(
                f'{path}:1: no column "{name}" (found: {", ".join(how.names)}): use the file as it was downloaded'
            )
    return how, [places[_plain(name)] for name in columns.values()]


CATEGORIES = {
    "video_games": "game",
    "movies_and_tv": "movie",
    "books": "book",
    "digital_music": "music",
    "cds_and_vinyl": "music",
}


def amazon(path: Path, settings: PrepareSettings, bad: BadRows) -> Ratings:
    """Amazon reviews and metadata: 2014 and 2018 (reviewerID, asin, overall, unixReviewTime), 2023 (user_id, parent_asin, rating, timestamp)."""
    if path.is_dir() or not path.exists():
        files = [p for p in _folder(path, "Amazon") if re.search(r"\.jsonl?(\.gz)?$", p.name)]
        reviews = _one(
            [p for p in files if not p.name.startswith("meta")],
            path,
            "reviews",
            "CATEGORY_5.json.gz or CATEGORY.jsonl.gz",
        )
    else:
        reviews = path
    category = re.sub(r"_\d+$", "", _stem(reviews).removeprefix("reviews_"))
    beside = [p for p in _folder(reviews.parent, "Amazon") if p.name.startswith("meta")]
    metadata = _one(
        [p for p in beside if _stem(p) == f"meta_{category}"],
        reviews.parent,
        f"titles of {category}",
        f"meta_{category}.json.gz",
    )
    first = _start(reviews).partition(b"\n")[0]
    if b"user_id" in first:
        name, item, columns = "Amazon reviews 2023", "parent_asin", ("user_id", "parent_asin", "rating", "timestamp")
    elif b"reviewerID" in first:
        name, item, columns = "Amazon reviews 2014 or 2018", "asin", ("reviewerID", "asin", "overall", "unixReviewTime")
    else:
        raise UserError(
            f"{reviews}:1: not an Amazon review (no reviewerID, no user_id): use the file as it was downloaded"
        )
    kinds = (pa.string(), pa.string(), pa.float64(), pa.float64())
    interactions = _collect(_json_batches(reviews, dict(zip(columns, kinds, strict=True)), bad), bad)
    fields = {item: pa.string(), "title": pa.string()}
    titles = _titles(_rows(_json_batches(metadata, fields, bad, optional=["title"])), interactions.items)
    scraped = [
        i for i, title in titles.items() if "getTime" in title
    ]  # page source instead of a title, as the data's authors warn
    for i in scraped:
        del titles[i]
    notes = [f"{len(scraped)} titles are page source (getTime): taken as missing"] if scraped else []
    domain = CATEGORIES.get(category.lower(), "product")
    return Ratings(interactions, titles, [reviews, metadata], f"{name}, {category}", domain, scale=(1, 5), notes=notes)


def bookcrossing(path: Path, settings: PrepareSettings, bad: BadRows) -> Ratings:
    """Book-Crossing: the dump of 2004 (semicolons, latin-1, backslash escapes) or a comma-separated copy; 0 means "not rated"."""
    files = [p for p in _folder(path, "Book-Crossing") if p.name.lower().removesuffix(".gz").endswith(".csv")]
    rated = [p for p in files if "rating" in p.name.lower()]
    file = _one(rated, path, "ratings", "BX-Book-Ratings.csv")
    books = _one([p for p in files if p not in rated and "book" in p.name.lower()], path, "titles", "BX-Books.csv")
    how, columns = _named(file, {"user": "User-ID", "item": "ISBN", "rating": "Book-Rating"}, _encoding(file))
    interactions = _collect(_csv_batches(file, how, columns, bad), bad)
    how, columns = _named(books, {"item": "ISBN", "title": "Book-Title"}, _encoding(books))
    rows = _rows(_csv_batches(books, replace(how, escape=how.separator == ";"), columns, bad))
    titles = {item: title.replace('\\"', '"') for item, title in _titles(rows, interactions.items).items()}
    given = interactions.rating > 0
    notes = [f"{int((~given).sum()):,} ratings of 0 left out: the book was not rated"]
    return Ratings(
        _where_true(interactions, given), titles, [file, books], "Book-Crossing", "book", scale=(1, 10), notes=notes
    )


def _where_true(interactions: Interactions, keep: np.ndarray) -> Interactions:
    i = interactions
    return Interactions(
        i.user[keep], i.item[keep], i.rating[keep], None if i.time is None else i.time[keep], i.users, i.items
    )


def lastfm(path: Path, settings: PrepareSettings, bad: BadRows) -> Ratings:
    """Last.fm of HetRec 2011: user, artist, plays, with or without a header line. Sorted by plays: its order says nothing of time."""
    files = {p.name: p for p in _folder(path, "Last.fm")}
    file, artists = (
        _one([p for n, p in files.items() if n.removesuffix(".gz") == name], path, what, name)
        for name, what in (("user_artists.dat", "play counts"), ("artists.dat", "artists"))
    )
    how = dialect(file)
    if how.separator != "\t" or len(how.names) != 3:
        raise UserError(f"{file}:1: not userID, artistID and weight between tabs: use the file as it was downloaded")
    interactions = _collect(_csv_batches(file, how, range(3), bad), bad)
    titles = _titles(_split_lines(artists, "\t", bad), interactions.items)
    return Ratings(
        interactions, titles, [file, artists], "Last.fm (HetRec 2011)", "music", liked_quantile=0.5, order="random"
    )


# names without punctuation and case, most telling first
GUESSES = {
    "user": "user userid uid username reviewerid customerid memberid readerid listenerid viewerid".split(),
    "item": "item itemid iid movieid parentasin asin isbn bookid productid gameid songid trackid artistid businessid".split(),
    "rating": "rating bookrating overall score stars rate weight plays playcount count".split(),
    "time": "timestamp time unixreviewtime datetime date ts unixtime createdat".split(),
    "title": "title itemtitle movietitle booktitle producttitle gametitle itemname productname name".split(),
}


@dataclass(frozen=True, slots=True)
class Table:
    """A file of rows with named columns: CSV and its kin, Parquet, or JSON lines."""

    path: Path
    names: list[str]
    batches: Callable[[list[str], BadRows], Iterator[Batch]]
    header: bool = True


def open_table(path: Path, known: Iterable[str] = ()) -> Table:
    """Raises UserError for what is none of these."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder: name a file of it")
    with opened(path, bar=False) as file:
        magic = file.read(4)
    if magic == b"PAR1":
        try:
            names = list(pa.parquet.read_schema(path).names)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: not a sound Parquet file ({str(error).splitlines()[0]}): write it anew") from None
        return Table(path, names, lambda columns, bad: _parquet_batches(path, columns))
    start = _start(path)
    if start.lstrip()[:1] == b"[":
        raise UserError(f"{path}: is one JSON array: give JSON lines, an object a line")
    if start.lstrip()[:1] == b"{":
        return _json_table(path)
    how = dialect(path, known=known)

    def batches(columns: list[str], bad: BadRows) -> Iterator[Batch]:
        return _csv_batches(path, how, [how.names.index(c) for c in columns], bad)

    return Table(path, how.names, batches, how.header)


def _json_table(path: Path) -> Table:
    """The first object that can be read says which fields there are, and which ids are whole numbers."""
    for _, line in text_lines(path, "utf-8-sig"):
        with contextlib.suppress(ValueError):
            row = _object(line.encode())
            if isinstance(row, dict) and row:
                break
    else:
        raise UserError(f"{path}: no line is a JSON object: give one object a line")
    kinds = {
        name: pa.int64() if type(value) is int else pa.float64() if type(value) is float else pa.string()
        for name, value in row.items()
    }
    return Table(path, list(row), lambda columns, bad: _json_batches(path, {c: kinds[c] for c in columns}, bad))


def _choose(table: Table, roles: dict[str, str], optional: Iterable[str] = ()) -> dict[str, str]:
    """role -> column: the one given, else the first guess that the table has, else its place where there is no header line."""
    chosen: dict[str, str] = {}
    plain = {_plain(name): name for name in reversed(table.names)}
    places = dict(zip(roles, table.names, strict=False)) if not table.header else {}
    for role, given in roles.items():
        if given and given not in table.names:
            raise UserError(f'--{role}-column: {table.path} has no column "{given}": it has {", ".join(table.names)}')
        column = given or next((plain[g] for g in GUESSES[role] if g in plain), places.get(role, ""))
        if column and column not in chosen.values():
            chosen[role] = column
        elif role not in optional:
            raise UserError(
                f"{table.path}: which column is the {role}? (it has {', '.join(table.names)}): name it by --{role}-column"
            )
    return chosen


def table(path: Path, settings: PrepareSettings, bad: BadRows) -> Ratings:
    """Any table of user, item, rating and perhaps time; titles from --items, or else from a title column or the items themselves."""
    s = settings if isinstance(settings, TableSettings) else TableSettings()
    named = {"user": s.user_column, "item": s.item_column, "rating": s.rating_column, "time": s.time_column}
    source = open_table(path, [g for role in named for g in GUESSES[role]] + list(filter(None, named.values())))
    chosen = _choose(source, named, optional=["item", "time"])
    if not s.items and not s.item_column:  # the model sees titles only: a title column is the better item
        titled = _choose(source, {"title": s.title_column}, optional=["title"]) if source.header else {}
        chosen["item"] = titled.get("title", chosen.get("item", ""))
    if not chosen.get("item"):
        raise UserError(
            f"{path}: which column is the item? (it has {', '.join(source.names)}): name it by --item-column"
        )
    roles = [role for role in named if role in chosen]
    interactions = _collect(source.batches([chosen[role] for role in roles], bad), bad)
    notes = [f"columns of {path.name}: " + ", ".join(f"{role} = {chosen[role]}" for role in roles)]
    if not s.items:
        notes.append(f'no --items: the column "{chosen["item"]}" is the title')
        return Ratings(interactions, {i: i for i in interactions.items}, [path], "table", "product", notes=notes)
    listed = open_table(
        Path(s.items), [*GUESSES["item"], *GUESSES["title"], *filter(None, (s.item_column, s.title_column))]
    )
    item_column = s.item_column or (chosen["item"] if chosen["item"] in listed.names else "")
    columns = _choose(listed, {"item": item_column, "title": s.title_column})
    titles = _titles(_rows(listed.batches([columns["item"], columns["title"]], bad)), interactions.items)
    notes.append(f"columns of {listed.path.name}: item = {columns['item']}, title = {columns['title']}")
    return Ratings(interactions, titles, [path, listed.path], "table", "product", notes=notes)


SOURCES: dict[str, Callable[[Path, PrepareSettings, BadRows], Ratings]] = {
    "movielens": movielens,
    "amazon": amazon,
    "bookcrossing": bookcrossing,
    "lastfm": lastfm,
    "table": table,
}
