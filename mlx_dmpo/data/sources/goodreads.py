"""Goodreads' library export."""

from __future__ import annotations

from pathlib import Path

from ...config import PrepareSettings
from .contract import BadRows, Ratings
from .personal import Entry, Export, find, need, rating_of, ratings_of, read_csv, time_of


def goodreads(path: Path, settings: PrepareSettings, bad: BadRows) -> Ratings:
    """Book Id, Title, Author, ..., My Rating (1 to 5, 0 is not rated), Date Read, Date Added, ..., Exclusive Shelf.

    Books to read are left out; books read without a rating are seen.
    """
    file = find(path, ("goodreads_library_export.csv",), "Goodreads export")
    need(file, ("Book Id", "Title", "My Rating"), "a Goodreads library export", settings.encoding)
    export = Export()
    wanted = 0
    for where, row in read_csv(file, export, settings.encoding):
        rating = rating_of(row["myrating"], where, bad, lambda r: r == 0)
        if rating is None and row.get("exclusiveshelf") == "to-read":
            wanted += 1
            continue
        time = time_of(row.get("dateread") or row.get("dateadded", ""))
        export.entries.append(Entry(row["title"], rating, time))
    if wanted:
        export.notes.append(f"{wanted:,} books to read left out")
    return ratings_of(export, "Goodreads", "book", (1, 5))
