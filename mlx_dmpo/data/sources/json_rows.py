"""JSON as rows: lines, arrays and the layouts of pandas' to_json."""

from __future__ import annotations

import ast
import contextlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json

from ...errors import UserError
from . import files, json_layouts
from .contract import BadRows
from .files import UTF8, Encoding
from .tables import Batch, number, numeric, plain

# What a column is read as: an id or title, a number, or a time (a number or a date)
TEXT, NUMBER, TIME = "text", "number", "time"
LARGEST = 1 << 31  # bytes of a JSON document, which is read whole; lines are streamed


def json_batches(
    path: Path,
    fields: Mapping[str, str],
    bad: BadRows,
    optional: Iterable[str] = (),
    sample: Mapping[str, Any] | None = None,
    encoding: Encoding = UTF8,
) -> Iterator[Batch]:
    """These fields (name -> TEXT, NUMBER or TIME) of JSON lines.

    A block in which all values have the types of `sample` is read by arrow. Any other is read line by line, so that
    types may change from row to row, and Python literals (Amazon's of 2014) are read too.
    """
    schema = pa.schema([(name, _fast(kind, (sample or {}).get(name))) for name, kind in fields.items()])
    optional = set(optional)
    before = 0
    with files.opened(path) if encoding == UTF8 else files.text(path, encoding) as file:
        for block in files.whole_lines(file):
            table = _json_block(block, schema)
            required = [] if table is None else [c for c in table.column_names if c not in optional]
            if table is None or any(table[c].null_count for c in required):
                numbers, values = _json_rows(path, block, before, fields, bad, optional)
                columns = _arrays(values, fields)
            else:
                numbers, columns = None, [table[c].combine_chunks() for c in fields]

            def where(n: int, numbers: list[int] | None = numbers, block: bytes = block, before: int = before) -> str:
                if numbers is None:  # arrow leaves out blank lines
                    numbers = [before + k for k, line in enumerate(block.split(b"\n"), 1) if line.strip()]
                return f"{path}:{numbers[n]}"

            yield Batch(columns, where)
            before += block.count(b"\n")


def _fast(kind: str, sample: Any) -> pa.DataType:
    """The type that arrow should find in every row."""
    if kind == NUMBER or (kind == TIME and type(sample) in (int, float)):
        return pa.float64()
    return pa.int64() if type(sample) is int and abs(sample) < 1 << 62 else pa.string()


def _arrays(columns: Iterable[list[Any]], fields: Mapping[str, str]) -> list[pa.Array]:
    kinds = [pa.float64() if kind == NUMBER else pa.string() for kind in fields.values()]
    return [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]


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


def read_object(line: bytes) -> Any:
    """A JSON or Python-literal object; raises ValueError."""
    text = line.decode("utf-8-sig").strip().removesuffix(",")
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
    path: Path, block: bytes, before: int, fields: Mapping[str, str], bad: BadRows, optional: set[str]
) -> tuple[list[int], list[list[Any]]]:
    """Line numbers, and the columns, of the rows of a block that can be read."""
    numbers: list[int] = []
    columns: list[list[Any]] = [[] for _ in fields]
    for n, line in enumerate(block.split(b"\n"), before + 1):
        if not line.strip():
            continue
        where = f"{path}:{n}"
        try:
            row = read_object(line)
        except (ValueError, RecursionError) as error:
            bad.add(where, f"not valid JSON ({getattr(error, 'msg', None) or 'not UTF-8 text'})", "fix the syntax")
            continue
        if _take(row, where, fields, columns, bad, optional):
            numbers.append(n)
    return numbers, columns


def flat(row: Any) -> Any:
    """The object with the fields of objects inside it as its own, one level deep: {"movie": {"id": 7}} has the field
    "movie.id". MongoDB's {"$numberInt": "4"} is its value.
    """
    if not isinstance(row, dict) or not any(isinstance(value, dict) for value in row.values()):
        return row
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict) and len(value) == 1 and next(iter(value)).startswith("$"):
            found[name] = next(iter(value.values()))
        elif isinstance(value, dict):
            found |= {f"{name}.{inner}": cell for inner, cell in value.items()}
        else:
            found[name] = value
    return found


def _take(
    row: Any, where: str, fields: Mapping[str, str], columns: list[list[Any]], bad: BadRows, optional: set[str]
) -> bool:
    """Adds the row's values to the columns, or reports the row; whether it was added."""
    if not isinstance(row, dict):
        bad.add(where, "not a JSON object", "give one object a line")
        return False
    if any(name not in row or isinstance(row[name], dict) for name in fields):
        row = flat(row)
    values = [convert(row.get(name), kind) for name, kind in fields.items()]
    missing = [name for name, value in zip(fields, values, strict=True) if value is None and name not in optional]
    if missing:
        value = row.get(missing[0])
        names = ((dict, "an object"), (list, "a list"))
        kind = next((f", which is {name}" for of, name in names if isinstance(value, of)), "")
        bad.add(where, f'no usable "{missing[0]}"{kind}', "give it one value" if kind else "give it a value")
        return False
    for column, value in zip(columns, values, strict=True):
        column.append(value)
    return True


def convert(value: Any, kind: str) -> Any:
    """A JSON value as text or number; None where it is neither. An id of 7.0 is 7."""
    if not isinstance(value, str | int | float) or (isinstance(value, bool) and kind != NUMBER):
        return None
    if kind == NUMBER:
        try:
            return number(value) if numeric(str(value)) else float(value)
        except (ValueError, OverflowError):
            return None
    if isinstance(value, float) and value.is_integer() and kind == TEXT:
        value = int(value)
    return str(value).encode("utf-8", "replace").decode()  # a lone surrogate is not text


def first_object(path: Path, encoding: Encoding = UTF8) -> dict[str, Any] | None:
    """The first line that is a JSON object with fields, None where no line is."""
    for _, line in files.text_lines(path, encoding):
        with contextlib.suppress(ValueError, RecursionError):
            row = read_object(line.encode())
            if isinstance(row, dict) and row:
                return flat(row)
    return None


def is_document(path: Path, encoding: Encoding = UTF8) -> bool:
    """Whether the file is one JSON value over many lines, or a line of columns, rather than JSON lines."""
    text = files.start(path, encoding="" if encoding == UTF8 else encoding.codec).lstrip()
    if text[:1] == "[":
        return True
    if text[:1] != "{":
        return False
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        row = read_object(lines[0].encode())
    except (ValueError, RecursionError):
        # an object that is spread over lines; a broken first line of JSON lines is followed by another object
        return len(lines) == 1 or not any(line.startswith("{") for line in lines[1:])
    return isinstance(row, dict) and len(lines) == 1 and any(isinstance(v, dict | list) for v in row.values())


def document(path: Path, known: Iterable[str] = (), encoding: Encoding = UTF8) -> tuple[list[str], list[Any], bool]:
    """(column names, objects, whether names are real) of a JSON array, of lines of arrays, of any layout of pandas'
    to_json, or of rows under a key.

    Raises UserError.
    """
    with files.text(path, encoding) as file:
        raw = file.read(LARGEST)
        if file.read(1):
            raise UserError(f"{path}: is one JSON document of more than 2 GiB: give JSON lines, an object a line")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        value = None
        if getattr(error, "msg", "") == "Extra data":  # a value on each line
            with contextlib.suppress(ValueError, RecursionError):
                value = [json.loads(line) for line in raw.split(b"\n") if line.strip()]
        if value is None:
            line = getattr(error, "lineno", 1)
            raise UserError(
                f"{path}:{line}: not valid JSON ({getattr(error, 'msg', None) or 'nested too deeply'}): fix the "
                "syntax, or give JSON lines, an object a line"
            ) from None
    rows, named = json_layouts.rows_of(path, value, {plain(k) for k in known})
    rows = [flat(row) for row in rows]
    if not rows:
        raise UserError(f"{path}: holds no rows: give JSON lines or an array of objects")
    names = list(dict.fromkeys(name for row in rows[:1000] if isinstance(row, dict) for name in row))
    return names, rows, named


def document_batches(
    path: Path, objects: list[Any], fields: Mapping[str, str], bad: BadRows, optional: Iterable[str] = ()
) -> Iterator[Batch]:
    """These fields of the objects of a JSON document."""
    columns: list[list[Any]] = [[] for _ in fields]
    numbers = []
    for n, row in enumerate(objects, 1):
        if _take(row, f"{path}:object {n}", fields, columns, bad, set(optional)):
            numbers.append(n)
    yield Batch(_arrays(columns, fields), lambda n: f"{path}:object {numbers[n]}")
