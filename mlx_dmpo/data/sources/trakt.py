"""Trakt's JSON export."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ...config import PrepareSettings
from ...errors import UserError
from .contract import BadRows, Ratings
from .dates import seconds
from .json_rows import NUMBER, convert, document
from .personal import Entry, Export, ratings_of, titled


def trakt(path: Path, settings: PrepareSettings, bad: BadRows) -> Ratings:
    """Objects of rated_at, rating (1 to 10), type and a movie or show with title and year; those of watched lists are
    seen.

    PATH is the unpacked export or one file of it. Ratings of seasons and episodes are left out and counted.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder: name the unpacked Trakt export")
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*.json") if _kept(p))
    if not found:
        raise UserError(
            f"{path}: holds no ratings*.json, watched*.json or history*.json: name the unpacked Trakt export"
        )
    export, parts = Export(), 0
    for file in found:
        export.files.append(file)
        for n, row in enumerate(document(file)[1], 1):
            entry = _entry(row)
            if entry is None:
                bad.add(f"{file}:object {n}", "not a movie or show of Trakt", "name the file as it was exported")
            elif entry.title:
                export.entries.append(entry)
            else:
                parts += 1
    if parts:
        export.notes.append(f"{parts:,} seasons and episodes left out")
    return ratings_of(export, "Trakt", "movie", (1, 10))


def _kept(path: Path) -> bool:
    return path.name.lower().startswith(("ratings", "watched", "history"))


def _entry(row: Any) -> Entry | None:
    """A movie or show, one without title for a season or an episode, None for anything else."""
    if not isinstance(row, dict):
        return None
    about = "movie" if any(name.startswith("movie.") for name in row) else "show"
    kind = row.get("type") or about
    if kind in ("season", "episode") and "rating" in row:
        return Entry("", None)
    title, year = row.get(f"{about}.title"), row.get(f"{about}.year")
    if not isinstance(title, str):
        return None
    time = next((row[k] for k in ("rated_at", "watched_at", "last_watched_at") if isinstance(row.get(k), str)), "")
    return Entry(
        titled(title, str(year or "")), convert(row.get("rating"), NUMBER), seconds(time) if time else math.nan
    )
