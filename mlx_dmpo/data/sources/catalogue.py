"""A file of further titles, with their popularity: what negatives and rankings may take that the ratings
do not hold.
"""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

from ...errors import UserError
from .contract import BadRows
from .files import Encoding, all_lines, encoding_of, opened, start
from .guesses import GUESSES, guess, looks_like
from .json_rows import NUMBER, TEXT
from .table import open_table
from .tables import number, plain
from .zipped import outside, unpacked

POPULARITY = (
    "ratings numratings ratingcount ratingscount numvotes votes votecount popularity plays playcount count users "
    "members listeners owners liked"
).split()


def read_catalogue(path: Path, encoding: str = "") -> tuple[dict[str, int], str]:
    """(raw title -> popularity, at least 1; a note) of items.jsonl, of a prepared directory's, of any table with
    titles, or of a text file with one title a line.

    Raises UserError.
    """
    if path.is_dir():
        if not (path / "items.jsonl").is_file():
            raise UserError(
                f"--catalogue: {path} holds no items.jsonl: name a prepared directory, or a file with titles"
            )
        path = path / "items.jsonl"
    with unpacked(path) as (inner, archives):
        try:
            return _read(inner, encoding)
        except UserError as error:
            raise UserError(outside(str(error), archives)) from None


def _named_title(cell: str) -> bool:
    return plain(cell.strip().strip('"')) in {plain(name) for name in (*GUESSES["title"], *GUESSES["item"])} - {""}


def _is_list(path: Path, written: Encoding) -> bool:
    """Whether a file holds one title a line: its first line is the name of a column of titles and nothing else, or no
    line of its beginning has a separator, or its name ends in .txt and no cell of the first line is such a name.
    """
    begin = start(path, encoding="" if written.codec == "utf-8" else written.codec).strip()
    if begin[:1] in ("[", "{", "<"):
        return False
    first = begin.split("\n", 1)[0].strip()
    if _named_title(first) or not re.search(r"[,;\t|]|::", begin):
        return True
    return path.suffix.lower() == ".txt" and not any(map(_named_title, re.split(r"[,;\t|]|::", first)))


def _read_list(path: Path, written: Encoding) -> tuple[dict[str, int], str]:
    lines = [line.strip() for line in all_lines(path, written) if line.strip()]
    quoted = sum(line[0] == line[-1] == '"' for line in lines) > len(lines) / 2  # a table of one column
    titles = [next(csv.reader([line]))[0].strip() if quoted and line[0] == '"' else line for line in lines]
    found = dict.fromkeys(titles[_named_title(titles[0]) :], 1)
    if not found:
        raise UserError(f"--catalogue: {path} holds no titles: write one title a line")
    return found, f"{len(found):,} titles of the catalogue {path.name} (one title a line: all count the same)"


def _read(path: Path, encoding: str) -> tuple[dict[str, int], str]:
    with opened(path, bar=False) as file:
        parquet = file.read(4) == b"PAR1"
    written = encoding_of(path, "" if parquet else encoding)
    if not parquet and _is_list(path, written):
        return _read_list(path, written)
    table = open_table(path, [*GUESSES["title"], *GUESSES["item"], *POPULARITY], written)
    title = guess(table.names, "title") or guess(table.names, "item") if table.header else table.names[0]
    if not title:
        what = looks_like(table.names)
        raise UserError(
            f"--catalogue: {path} has no title column (it has "
            f"{', '.join(table.names)}{f'; {what[1]}' if what else ''}): "
            'name one "title"'
        )
    counts = next((c for p in POPULARITY for c in table.names if plain(c) == p and c != title), "")
    bad = BadRows(True)
    columns, kinds = ([title, counts], [TEXT, NUMBER]) if counts else ([title], [TEXT])
    found: dict[str, int] = {}
    for batch in table.batches(columns, kinds, bad, columns):
        values = [column.to_pylist() for column in batch.columns]
        for row in zip(*values, strict=True):
            name = str(row[0] or "").strip()
            weight = number(row[1]) if counts else 1.0
            if name:
                found[name] = found.get(name, 0) + max(1, round(weight) if math.isfinite(weight) else 1)
    if not found:
        raise UserError(f"--catalogue: {path} holds no titles: name a file with a title column")
    how = f'popularity from "{counts}"' if counts else "no popularity column: all count the same"
    left = f"; {bad.counts.total():,} rows cannot be read" if bad.counts else ""
    return found, f'{len(found):,} titles of the catalogue {path.name} ("{title}"; {how}{left})'
