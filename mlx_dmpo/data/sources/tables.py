"""Text tables: separator, header line and quotes are recognized, then arrow reads them in blocks."""

from __future__ import annotations

import csv
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from ...errors import UserError
from . import files
from .contract import BadRows
from .dates import is_date
from .files import UTF8, Encoding

THOUSANDS = re.compile(r"\s*[-+]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?\s*")  # 1,200: 1200, or 1.2 with three decimals
SAMPLED = 200_000  # lines with quotes that decide what quotes mean


@dataclass(frozen=True, slots=True)
class Batch:
    """Some consecutive rows: a column for each that was requested, and where row n of them is, for messages."""

    columns: list[pa.Array]
    where: Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a text table is written. separator "::" is MovieLens's.

    names   of the columns; "1", "2", ... where there is no header line
    skip    lines before the header or the first row (Excel's "sep=;")
    quoted  cells may stand in quotes
    escape  a quote inside quotes has a backslash before it (R, Book-Crossing), instead of being doubled
    notes   what was decided and is worth saying
    """

    separator: str
    names: list[str]
    header: bool
    skip: int = 0
    quoted: bool = True
    escape: bool = False
    encoding: Encoding = UTF8
    notes: tuple[str, ...] = field(default=())


def numeric(text: str) -> bool:
    """Whether a cell is a finite number, also with a decimal comma."""
    return math.isfinite(number(text))


def number(value: Any) -> float:
    """A number, also one with a decimal comma ("4,5"), or true or false (1, 0); NaN for anything else, and for 1,200,
    which may be 1200.
    """
    try:
        return float(value)
    except (TypeError, ValueError):
        if isinstance(value, str) and value.strip().lower() in ("true", "false"):
            return float(value.strip().lower() == "true")
        if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d+,\d+\s*", value) and not THOUSANDS.fullmatch(value):
            return float(value.replace(",", "."))
        return math.nan


def plain(name: str) -> str:
    """A column name without case, accents, punctuation and RecBole's type: "User-ID" and "user_id:token" are
    "userid".
    """
    name = re.sub(r":(token|float)(_seq)?$", "", name.strip())
    name = unicodedata.normalize("NFKD", name.casefold())
    return "".join(c for c in name if c.isalnum())


def dialect(path: Path, *, encoding: Encoding = UTF8, known: Iterable[str] = ()) -> Dialect:
    """Recognizes how a table is written from its first 64 KiB and its quotes.

    The first line is a header where two of its cells are `known` names, or none is a number or a date. Raises
    UserError.
    """
    lines = files.start(path, encoding=encoding.codec if encoding.codec != "utf-8" else "").splitlines()
    sep = re.fullmatch(r'"?sep=(.)"?[\s,;]*', lines[0], re.IGNORECASE)  # Excel's hint; not data
    skip = int(sep is not None and len(lines) > 1)
    first, *rest = lines[skip:]
    if not first.strip():
        raise UserError(f"{path}:{skip + 1}: the first line is blank: begin with column names or a row")
    separator = sep[1] if sep and skip else _separator(first, rest[:20])
    if separator not in first:
        raise UserError(f"{path}:1: no separator in {first[:60]!r}: separate columns by comma, tab, semicolon, | or ::")
    cells = [cell.strip() for cell in _split(first, separator)]
    hits = {plain(c) for c in cells} & ({plain(k) for k in known} - {""})
    header = len(hits) > 1 or not any(numeric(c) or is_date(c) for c in cells)
    notes = [f"{path.name} begins with Excel's {lines[0].strip()!r}: taken as the separator"] if skip else []
    quoted, escape = (False, False) if separator == "::" else _quotes(path, separator, encoding)
    if quoted and separator not in ",;":
        notes.append(f"{path.name}: quotes around cells are taken as part of the format, not of the text")
    if (
        header
        and separator != "::"
        and _one_more(cells, rest[:-1][:20], separator, quoted or separator in ",;", escape)
    ):
        how = Dialect(separator, [], False, quoted=quoted or separator in ",;", escape=escape)
        if all(not row[-1].strip() for _, row in _cells((line + "\n" for line in rest[:-1][:20] if line.strip()), how)):
            cells = [*cells, ""]  # rows end in a separator
        else:
            cells = ["row", *cells]  # R writes row names, but no name above them
            notes.append(f"{path.name}: rows have one cell more than the header: the first is taken as a row name")
    names = cells if header else [str(n) for n in range(1, len(cells) + 1)]
    return Dialect(separator, names, header, skip, quoted or separator in ",;", escape, encoding, tuple(notes))


def _split(line: str, separator: str) -> list[str]:
    return line.split("::") if separator == "::" else next(csv.reader([line], delimiter=separator), [""])


def _separator(first: str, rest: Sequence[str]) -> str:
    """The separator that gives these lines the same number of cells, of which most columns are numbers, then most
    cells.

    Where none does, it is the most frequent in the first line.
    """
    lines = [line for line in (first, *rest) if line.strip()]

    def fit(separator: str) -> tuple[int, int]:
        cells = [_split(line, separator) for line in lines]
        if len({len(row) for row in cells}) > 1 or len(cells[0]) < 2:
            return 0, 0
        columns = list(zip(*cells[len(cells) > 1 :], strict=True))
        return 1 + sum(all(numeric(c) for c in column) for column in columns), len(columns)

    best = max(("\t", "::", ";", ",", "|"), key=fit)
    return best if fit(best)[0] else max(("\t", ",", ";", "|", "::"), key=first.count)


def _one_more(header: Sequence[str], lines: Sequence[str], separator: str, quoted: bool, escape: bool) -> bool:
    """Whether every row has a cell more than the header."""
    how = Dialect(separator, [], False, quoted=quoted, escape=escape)
    counts = [len(row) for _, row in _cells((line + "\n" for line in lines if line.strip()), how)]
    return len(counts) > 1 and all(n == len(header) + 1 for n in counts) and "" not in header


def _quotes(path: Path, separator: str, encoding: Encoding) -> tuple[bool, bool]:
    """Whether quotes belong to the format, and whether a backslash escapes one: what most lines with quotes
    agree with.
    """
    s = re.escape(separator)
    pattern = r"\s*(?:{0}|[^\"{1}]*)\s*(?:{1}\s*(?:{0}|[^\"{1}]*)\s*)*"
    doubled = re.compile(pattern.format(r'"(?:[^"]|"")*"', s))
    escaped = re.compile(pattern.format(r'"(?:[^"\\]|\\.)*"', s), re.DOTALL)
    found = sound = with_backslash = 0
    cell: list[str] = []  # the lines of a row, where a quote is open at a line's end
    with files.text(path, encoding, bar=False) as file:
        for block in files.whole_lines(file):
            if b'"' not in block and not cell:
                continue
            for raw in block.split(b"\n"):
                if b'"' not in raw and not cell:
                    continue
                cell.append(raw.decode().rstrip("\r"))
                row = "\n".join(cell)
                if row.count('"') % 2 and '\\"' not in row and len(cell) < 20:
                    continue
                cell = []
                found += 1
                sound += doubled.fullmatch(row) is not None
                with_backslash += escaped.fullmatch(row) is not None
            if found > SAMPLED:
                break
    escape = with_backslash > sound
    return found > 0 and 2 * max(sound, with_backslash) >= found, escape


def rows(path: Path, how: Dialect) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each row after the header, by the standard library: slow, for messages and small
    files.
    """
    lines = files.all_lines(path, how.encoding)
    for number, row in _cells(lines, how):
        if number > how.skip + how.header:
            yield number, row


def _cells(lines: Iterable[str], how: Dialect) -> Iterator[tuple[int, list[str]]]:
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
    try:
        for row in reader:
            yield start, row  # the line on which the row begins
            start = reader.line_num + 1
    except csv.Error as error:  # a cell beyond 128 KiB
        raise UserError(f"line {start}: cannot be read ({error}): is a quote not closed?") from None


def _line_of(path: Path, how: Dialect, columns: Sequence[int] | None, values: list[str]) -> str:
    """file:line of the first row with these values in these columns (None: the whole row)."""
    for n, cells in rows(path, how):
        chosen = cells if columns is None else [cells[c] for c in columns if c < len(cells)]
        if [c.rstrip("\r\n") for c in chosen] == [v.rstrip("\r\n") for v in values]:
            return f"{path}:{n}"
    return str(path)


def csv_batches(path: Path, how: Dialect, columns: Sequence[int], bad: BadRows, bar: bool = True) -> Iterator[Batch]:
    """The columns at these places of a text table, as text."""
    step = len(how.separator)  # arrow takes one character: "::" is ":" with empty columns between
    malformed: list[Any] = []

    def keep(row: Any) -> str:
        malformed.append(row)
        return "skip"

    def report() -> None:
        while malformed:  # arrow reads blocks in advance and may add to it meanwhile
            row = malformed.pop(0)
            found, wanted = (1 + (n - 1) // step for n in (row.actual_columns, row.expected_columns))
            cells = next(cells for _, cells in _cells(row.text.splitlines(keepends=True), how))
            long = row.text.count("\n")
            over = f" over {long + 1} lines (is a quote not closed?)" if long else ""
            bad.add(
                partial(_line_of, path, how, None, cells), f"{found} columns instead of {wanted}{over}", "fix the row"
            )

    names = [f"f{c * step}" for c in columns]
    with files.text(path, how.encoding, bar) as file:
        try:
            reader = pa.csv.open_csv(
                file,
                pa.csv.ReadOptions(
                    block_size=files.BLOCK, autogenerate_column_names=True, skip_rows=how.skip + how.header
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
                report()

                def where(n: int, columns_of_batch: list[pa.Array] = batch.columns) -> str:
                    return _line_of(path, how, columns, [column[n].as_py() for column in columns_of_batch])

                yield Batch(batch.columns, where)
            report()
        except pa.ArrowInvalid as error:
            raise _arrow_error(path, error) from None
        except KeyError:
            raise UserError(f"{path}: has fewer than {max(columns) + 1} columns: check the separator") from None


def _arrow_error(path: Path, error: Exception) -> UserError:
    text = str(error)
    if "Empty CSV" in text:
        return UserError(f"{path}: holds no rows: give at least one")
    if "straddl" in text:
        return UserError(f"{path}: a row is longer than {files.BLOCK >> 20} MiB: is a quote not closed?")
    return UserError(f"{path}: cannot be read ({text.splitlines()[0]}): fix the file")
