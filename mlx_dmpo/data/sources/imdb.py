"""IMDb's export of one's ratings."""

from __future__ import annotations

from pathlib import Path

from ...config import PrepareSettings
from .contract import BadRows, Ratings
from .personal import Entry, Export, find, need, rating_of, ratings_of, read_csv, time_of, titled


def imdb(path: Path, settings: PrepareSettings, bad: BadRows) -> Ratings:
    """Const, Your Rating (1 to 10), Date Rated, Title, Title Type, Year, ...

    Episodes of series are left out and counted.
    """
    file = find(path, ("ratings.csv",), "IMDb export")
    need(file, ("Const", "Your Rating", "Title"), "an IMDb ratings export", settings.encoding)
    export = Export()
    episodes = 0
    for where, row in read_csv(file, export, settings.encoding):
        if "episode" in row.get("titletype", "").lower():
            episodes += 1
            continue
        rating = rating_of(row["yourrating"], where, bad)
        export.entries.append(
            Entry(titled(row["title"], row.get("year", "")), rating, time_of(row.get("daterated", "")))
        )
    if episodes:
        export.notes.append(f"{episodes:,} ratings of single episodes left out")
    return ratings_of(export, "IMDb", "movie", (1, 10))
