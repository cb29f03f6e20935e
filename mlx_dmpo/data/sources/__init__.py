"""Rating files as they are downloaded -> interactions and titles, one module a data set.

A source is a function (path, settings, bad rows) -> Ratings. Files are read in blocks; the result is the same for any
block size. A row that cannot be read stops the command with its line, unless bad rows are to be skipped; then each is
counted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...config import PrepareSettings
from .amazon import amazon
from .bookcrossing import bookcrossing
from .contract import BadRows, Interactions, Ratings
from .goodreads import goodreads
from .imdb import imdb
from .lastfm import lastfm
from .letterboxd import letterboxd
from .movielens import movielens, movielens_files, movielens_interactions
from .myanimelist import myanimelist
from .netflix import netflix
from .scrobbles import scrobbles
from .table import table
from .trakt import trakt
from .zipped import reading_archives

SOURCES: dict[str, Callable[[Path, PrepareSettings, BadRows], Ratings]] = {
    "movielens": movielens,
    "amazon": amazon,
    "bookcrossing": bookcrossing,
    "lastfm": lastfm,
    "table": table,
    "letterboxd": letterboxd,
    "imdb": imdb,
    "goodreads": goodreads,
    "myanimelist": myanimelist,
    "trakt": trakt,
    "netflix": netflix,
    "scrobbles": scrobbles,
}
SOURCES = {name: reading_archives(name, source) for name, source in SOURCES.items()}
PERSONAL = ("letterboxd", "imdb", "goodreads", "myanimelist", "trakt", "netflix", "scrobbles")

__all__ = [
    "PERSONAL",
    "SOURCES",
    "BadRows",
    "Interactions",
    "Ratings",
    "amazon",
    "bookcrossing",
    "lastfm",
    "movielens",
    "movielens_files",
    "movielens_interactions",
    "table",
]
