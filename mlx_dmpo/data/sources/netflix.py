"""Netflix's viewing history: what was watched, without ratings."""

from __future__ import annotations

import math
import re
from pathlib import Path

from ...config import PrepareSettings
from .contract import BadRows, Ratings
from .dates import ambiguous, evidence, seconds
from .personal import ME, Entry, Export, find, header_of, need, ratings_of, read_csv

# "Show: Season 2: Episode", also as other languages have it
SEASON = re.compile(
    r":\s*(?:(?:season|series|part|volume|book|chapter|staffel|teil|saison|partie|temporada|parte|stagione|seizoen|sezon)"
    r"\s+\w+|limited series|miniseries|mini-serie|serie limitada)\b",
    re.IGNORECASE,
)


def netflix(path: Path, settings: PrepareSettings, bad: BadRows) -> Ratings:
    """NetflixViewingHistory.csv (Title, Date) or ViewingActivity.csv (Profile Name, Start Time, ..., Title, ...).

    Episodes of a series count as the series, trailers not at all; a title's last viewing is its time.
    """
    file = find(path, ("viewingactivity.csv", "netflixviewinghistory.csv"), "Netflix export")
    full = "starttime" in header_of(file, settings.encoding)
    names = ("Profile Name", "Title") if full else ("Title", "Date")
    need(file, names, "a Netflix viewing history", settings.encoding)
    export = Export()
    found: dict[tuple[str, str], str] = {}
    trailers = 0
    rows = list(read_csv(file, export, settings.encoding))
    dates = [row["date"] for _, row in rows if not full]
    shown = {e for d in dates if (e := evidence(d)) is not None}
    day_first = settings.date_order == "day-first" if settings.date_order else shown == {True}
    if not shown and not settings.date_order and any(map(ambiguous, dates)):
        export.notes.append("dates are read with the month first; --date-order day-first reads the day first")
    last: dict[tuple[str, str], float] = {}
    for where, row in rows:
        if full and row.get("supplementalvideotype"):
            trailers += 1
            continue
        time = seconds(row["starttime"] if full else row["date"], day_first)
        if math.isnan(time):
            bad.add(
                where, "the date cannot be read", "write it as YYYY-MM-DD, or add --date-order", row.get("date", "")
            )
            continue
        key = (row.get("profilename") or ME, series(row["title"]))
        found[key] = where
        last[key] = max(time, last.get(key, -math.inf))
    if trailers:
        export.notes.append(f"{trailers:,} trailers left out")
    export.entries = [Entry(title, None, last[user, title], user) for user, title in found]
    return ratings_of(export, "Netflix", "movie", None)


def series(title: str) -> str:
    """A film's title, or the series that an episode belongs to: "Dark: Season 1: Secrets" -> "Dark"."""
    season = SEASON.search(title)
    if season and (season.end() < len(title) or "season" in season[0].lower()):
        return title[: season.start()].strip()
    return title.strip()
