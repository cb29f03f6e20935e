"""A file's bytes -> rows: JSON lines, a JSON array, objects one after another, a table that pandas wrote, CSV, Parquet.

A row is (source, value): the source is `file:line` (JSON lines, CSV) or `file:row N`, for messages; the value of a row
that cannot be parsed is the UserError that says so.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import guess

Rows = Iterator[tuple[str, Any]]


def parse(path: Path, content: bytes) -> Rows:
    """Raises UserError where a file as a whole cannot be read, or holds ratings rather than training rows."""
    if content.startswith(b"PAR1"):
        return _parquet_rows(path)
    if content.startswith(b"\x1f\x8b"):
        start = b""
        with contextlib.suppress(zlib.error):
            start = zlib.decompressobj(31).decompress(content, 1 << 16)
        if suggestion := guess.ratings_in(path, start.decode("utf-8", "replace")):
            raise UserError(f"{path}: {suggestion}")
    if content.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise UserError(f"{path}: is compressed: unpack it first")
    if content.startswith(b"PK\x03\x04"):
        if b"xl/workbook" in content or b"[Content_Types].xml" in content[:4096]:
            raise UserError(f"{path}: is a spreadsheet: save it as CSV (UTF-8)")
        raise UserError(f"{path}: is a zip archive: unpack it first")
    if content.startswith(b"\xd0\xcf\x11\xe0"):
        raise UserError(f"{path}: is a spreadsheet: save it as CSV (UTF-8)")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: is UTF-16 text: save it as UTF-8")
    text = _decode(path, content)
    if not text.strip():
        raise UserError(f"{path}: is empty: give at least one row")
    text = re.sub(
        r"\Asep=[^\w\s]?\t?\r?\n", "\n", text, flags=re.I
    )  # Excel's line about the separator; lines keep their numbers
    if suggestion := guess.ratings_in(path, text[: 1 << 16]):
        raise UserError(f"{path}: {suggestion}")
    rows = _json_rows(path, text) if _is_json(text) else _csv_rows(path, text)
    return map(_without_surrogates, rows) if "\\ud" in text.lower() else rows


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        where = f"{path}:{line}" if b"\n" in content else str(path)
        raise UserError(
            f"{where}: is not UTF-8 text (byte 0x{content[error.start]:02x}): save the file as UTF-8"
        ) from None


def _is_json(text: str) -> bool:
    """Anything but a table: text that begins like JSON, or in which nothing separates columns."""
    return text.lstrip()[0] in '{["' or not guess.separator(text)


def _objects(text: str) -> list[Any] | None:
    """JSON values one after another, white space or commas between; None where that is not what the text is."""
    decoder, at = json.JSONDecoder(), 0
    found: list[Any] = []
    try:
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if at == len(text):
                return found
            value, at = decoder.raw_decode(text, at)
            found.append(value)
    except (ValueError, RecursionError):
        return None


def _numbered(path: Path, values: list[Any]) -> Rows:
    if not values:
        raise UserError(f"{path}: is empty: give at least one row")
    yield from ((f"{path}:row {n}", value) for n, value in enumerate(values, 1))


def _json_rows(path: Path, text: str) -> Rows:
    if text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            if getattr(error, "msg", "") != "Extra data":  # else lines, the first of which is a list
                raise _no_json(f"{path}:{getattr(error, 'lineno', 1)}", error) from None
        else:
            yield from _numbered(path, whole)
            return
    lines: list[tuple[str, Any]] = []
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                lines.append((f"{path}:{n}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                lines.append((f"{path}:{n}", _no_json(f"{path}:{n}", error)))
    values = None
    if any(isinstance(value, UserError) for _, value in lines):
        values = _objects(text)
    table = _table(values[0] if values else lines[0][1]) if len(values or lines) == 1 else None
    yield from lines if values is None and table is None else _numbered(path, table or values or [])


_COLUMNS = frozenset(
    "prompt chosen rejected completion instruction input output messages conversations question response answer "
    "user history positive negatives trueSelection itemList".split()
)


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and len(_COLUMNS & set(value)) > 1


def _table(value: Any) -> list[Any] | None:
    """The rows of a table that is one JSON object, as pandas' `to_json` writes it by each `orient`; None for anything
    else.

    columns  {"prompt": {"0": "a", "1": "b"}, "chosen": {"0": ...}}     (also with lists, as `to_dict("list")`)
    index    {"0": {"prompt": "a", "chosen": ...}, "1": {...}}
    split    {"columns": ["prompt", ...], "data": [["a", ...], ...]}
    table    {"schema": ..., "data": [{"prompt": "a", ...}, ...]}       (also any one list of rows: {"train": [...]})
    """
    if not isinstance(value, dict) or not value:
        return None
    names, data = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(data, list) and set(value) <= {"columns", "index", "data"}:
        fits = all(isinstance(row, list) and len(row) == len(names) for row in data)
        return [dict(zip(map(str, names), row, strict=True)) for row in data] if fits else None
    lists = [v for v in value.values() if isinstance(v, list)]
    if len(lists) == 1 and (set(value) <= {"schema", "data"} or len(value) == 1):
        return lists[0] if lists[0] and all(_is_row(row) for row in lists[0]) else None
    columns = list(value.values())
    if all(isinstance(column, dict) and column for column in columns):
        if all(_is_row(column) for column in columns):
            return columns
        keys = list(columns[0])
        if all(list(column) == keys for column in columns) and all(key.isdigit() for key in keys):
            return [{name: column[key] for name, column in value.items()} for key in keys]
    texts = all(isinstance(c, list) and all(isinstance(cell, str) for cell in c) for c in columns)
    if texts and len(set(map(len, columns))) == 1 and len(_COLUMNS & set(value)) > 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return None


def _no_json(where: str, error: Exception) -> UserError:
    return UserError(f"{where}: not valid JSON ({getattr(error, 'msg', error)}): correct the syntax")


def _csv_rows(path: Path, text: str) -> Rows:
    """Rows by the names of the header line; quoted cells may hold separators and line breaks."""
    by = guess.separator(text) or ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=by, strict=True)
    names: list[str] = []
    rows, start = 0, 1
    try:
        for cells in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if not any(cells):
                continue
            if not names:
                names = [name.strip() for name in cells]
                twice = next((name for name in names if names.count(name) > 1), None)
                if twice is not None:
                    raise UserError(f'{where}: the header names "{twice}" twice: give each column its own name')
                continue
            rows += 1
            if len(cells) != len(names):
                what = f"{len(cells)} cells, and the header has {len(names)}"
                yield where, UserError(f"{where}: {what}: put cells that hold {by!r} or a line break in quotes")
            else:
                yield where, {name: cell for name, cell in zip(names, cells, strict=True) if cell}
        if not rows:
            raise UserError(f"{path}: has a header and no rows: give at least one row")
    except csv.Error as error:
        raise UserError(f"{path}:{start}: not valid CSV ({error}): correct the quotes") from None


def _without_surrogates(row: tuple[str, Any]) -> tuple[str, Any]:
    """JSON can write half of a surrogate pair, which is not text: nothing can encode it."""
    source, value = row
    try:
        if not isinstance(value, UserError):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return source, UserError(
            f"{source}: holds half of a surrogate pair (\\ud800 to \\udfff): write the whole character"
        )
    return row


def _parquet_rows(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if not file.metadata.num_rows:
                raise UserError(f"{path}: is empty: give at least one row")
            if suggestion := guess.ratings(path, [str(name) for name in file.schema_arrow.names]):
                raise UserError(f"{path}: {suggestion}")
            n = 0
            for batch in file.iter_batches():
                for value in batch.to_pylist():
                    n += 1
                    yield f"{path}:row {n}", value
    except (OSError, ValueError, NotImplementedError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: is not a readable Parquet file ({first_line(error)}): write it again") from None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
