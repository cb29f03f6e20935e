"""Letterboxd's export: ratings.csv (half stars) and watched.csv."""

from __future__ import annotations

from pathlib import Path

from ...config import PrepareSettings
from .contract import BadRows, Ratings
from .personal import Entry, Export, find, need, rating_of, ratings_of, read_csv, time_of, titled

FILES = ("ratings.csv", "diary.csv", "watched.csv")


def letterboxd(path: Path, settings: PrepareSettings, bad: BadRows) -> Ratings:
    """PATH is the export as downloaded (a zip archive), unpacked, or one file of it: Date, Name, Year, Letterboxd URI
    and, where films were rated, Rating.

    Films of watched.csv without a rating are seen: they are never negatives.
    """
    main = find(path, FILES, "Letterboxd export")
    need(main, ("Name", "Year", "Letterboxd URI"), "a Letterboxd export", settings.encoding)
    beside = [main.parent / name for name in ("diary.csv", "watched.csv")] if path.is_dir() else []
    export = Export()
    for file in [main, *(p for p in beside if p.is_file() and p != main)]:
        for where, row in read_csv(file, export, settings.encoding):
            # a film that is also in diary.csv counts with the rating of ratings.csv
            rating = rating_of(row.get("rating", ""), where, bad) if file == main else None
            export.entries.append(
                Entry(titled(row["name"], row["year"]), rating, time_of(row.get("watcheddate") or row.get("date", "")))
            )
    return ratings_of(export, "Letterboxd", "movie", (0.5, 5))
