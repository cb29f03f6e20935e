"""Book-Crossing: the dump of 2004 or a comma-separated copy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...config import PrepareSettings
from .columns import collect, rows_of, titles_of
from .contract import BadRows, Ratings
from .files import encoding_of
from .folder import listed, named_columns, one
from .tables import csv_batches


def bookcrossing(path: Path, settings: PrepareSettings, bad: BadRows) -> Ratings:
    """The dump has semicolons, Windows-1252 and backslash escapes; a rating of 0 means "not rated"."""
    found = [p for p in listed(path, "Book-Crossing") if p.name.lower().removesuffix(".gz").endswith(".csv")]
    rated = [p for p in found if "rating" in p.name.lower()]
    file = one(rated, path, "ratings", "BX-Book-Ratings.csv")
    books = one([p for p in found if p not in rated and "book" in p.name.lower()], path, "titles", "BX-Books.csv")
    encoding = encoding_of(file, settings.encoding)
    how, columns = named_columns(file, {"user": "User-ID", "item": "ISBN", "rating": "Book-Rating"}, encoding)
    interactions = collect(csv_batches(file, how, columns, bad), bad)
    of_books = encoding_of(books, settings.encoding)
    how, columns = named_columns(books, {"item": "ISBN", "title": "Book-Title"}, of_books)
    rows = rows_of(csv_batches(books, replace(how, escape=how.separator == ";"), columns, bad))
    titles = {item: title.replace('\\"', '"') for item, title in titles_of(rows, interactions.items).items()}
    given = interactions.rating > 0
    notes = [f"{int((~given).sum()):,} ratings of 0 left out: the book was not rated"]
    notes += [e.note for e in (encoding, of_books) if e.note]
    return Ratings(
        interactions.where(given), titles, [file, books], "Book-Crossing", "book", scale=(1, 10), notes=notes
    )
