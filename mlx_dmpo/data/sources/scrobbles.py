"""Last.fm scrobbles: what was played, and when."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from ...config import PrepareSettings
from ...errors import UserError
from .contract import BadRows, Ratings
from .dates import is_date, seconds
from .files import encoding_of
from .personal import Entry, Export, find, ratings_of
from .tables import dialect, plain, rows


def scrobbles(path: Path, settings: PrepareSettings, bad: BadRows) -> Ratings:
    """uts, utc_time, artist, ..., track, ...; or artist, album, track and date without a header line.

    An artist's rating is the number of plays, and its time the first play, so that a history is what was discovered
    before.
    """
    file = find(path, ("scrobbles.csv", "recenttracks.csv", "lastfm.csv"), "export of scrobbles")
    encoding = encoding_of(file, settings.encoding)
    how = dialect(file, encoding=encoding, known=["uts", "utc_time", "artist", "album", "track", "date"])
    names = {plain(name): n for n, name in enumerate(how.names)}
    if how.header:
        artist = names.get("artist", names.get("artistname", -1))
        time = next((names[n] for n in ("uts", "timestamp", "time", "date", "utctime", "playedat") if n in names), -1)
    else:  # artist, album, track, date: the last column is the date
        first = next(iter(rows(file, how)), (1, []))[1]
        artist, time = (0, len(first) - 1) if first and is_date(first[-1]) else (-1, -1)
    if artist < 0 or time < 0:
        raise UserError(
            f"{file}:1: not scrobbles: no artist or time among {', '.join(how.names)}: name a CSV with artist and uts "
            "or date"
        )
    export = Export(files=[file], notes=[*how.notes, *([encoding.note] if encoding.note else [])])
    plays: Counter[str] = Counter()
    begun: dict[str, float] = {}
    for line, cells in rows(file, how):
        if max(artist, time) >= len(cells) or not cells[artist].strip():
            if any(cells):
                bad.add(f"{file}:{line}", "no artist or time", "fix the row")
            continue
        at = seconds(cells[time])
        if math.isnan(at):
            if cells[time].strip():
                bad.add(f"{file}:{line}", "the time cannot be read", "give seconds or a date", repr(cells[time])[:40])
                continue
            at = math.inf  # being played right now
        name = cells[artist].strip()
        plays[name] += 1
        begun[name] = min(at, begun.get(name, math.inf))
    export.entries = [
        Entry(name, float(n), begun[name] if math.isfinite(begun[name]) else math.nan) for name, n in plays.items()
    ]
    return ratings_of(export, "Last.fm scrobbles", "music", None, liked_quantile=0.5)
