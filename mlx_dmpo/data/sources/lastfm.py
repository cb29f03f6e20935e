"""Last.fm of HetRec 2011: play counts of artists."""

from __future__ import annotations

from pathlib import Path

from ...config import PrepareSettings
from ...errors import UserError
from .columns import collect, titles_of
from .contract import BadRows, Ratings
from .files import encoding_of
from .folder import listed, one, split_lines
from .tables import csv_batches, dialect


def lastfm(path: Path, settings: PrepareSettings, bad: BadRows) -> Ratings:
    """User, artist, plays, with or without a header line.

    The file is sorted by plays: its order says nothing of time.
    """
    found = {p.name: p for p in listed(path, "Last.fm")}
    file, artists = (
        one([p for n, p in found.items() if n.removesuffix(".gz") == name], path, what, name)
        for name, what in (("user_artists.dat", "play counts"), ("artists.dat", "artists"))
    )
    how = dialect(file)
    if how.separator != "\t" or len(how.names) != 3:
        raise UserError(f"{file}:1: not userID, artistID and weight between tabs: use the file as it was downloaded")
    interactions = collect(csv_batches(file, how, range(3), bad), bad)
    encoding = encoding_of(artists, settings.encoding)
    titles = titles_of(split_lines(artists, "\t", bad, encoding), interactions.items)
    return Ratings(
        interactions,
        titles,
        [file, artists],
        "Last.fm (HetRec 2011)",
        "music",
        liked_quantile=0.5,
        order="random",
        notes=[encoding.note] if encoding.note else [],
    )
