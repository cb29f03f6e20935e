"""Raw ratings given where training rows are expected: what they look like, and the `prepare` command that
reads them.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

USERS = re.compile(
    r"(user|reviewer|customer|member|profile|account)(s|name|[-_ ]?id)?|uid|reviewerid|user_id:token", re.I
)


ITEMS = re.compile(
    r"(movie|film|item|book|song|track|artist|game|anime|product|parent_asin|title|name|isbn|asin|app|show)"
    r"(s|[-_ ]?id|[-_ ]?name)?|iid|mid|item_id:token",
    re.I,
)


RATINGS = re.compile(
    r"(my |your |book[- _])?(rating|score|stars|overall|like|weight|plays?|hours|play_?count|listens)(s|:float)?", re.I
)


# Exports of one person's ratings: columns that name them
PERSONAL = (
    ({"letterboxd uri", "rating"}, "letterboxd", "a Letterboxd export"),
    ({"const", "your rating"}, "imdb", "an IMDb export"),
    ({"book id", "my rating"}, "goodreads", "a Goodreads export"),
)


FILES = (
    (("u.data",), "movielens", "MovieLens"),
    (("ratings.dat", "movies.dat"), "movielens", "MovieLens"),
    (("ratings.csv", "movies.csv"), "movielens", "MovieLens"),
    (("user_artists.dat",), "lastfm", "Last.fm (HetRec 2011)"),
    (("BX-Book-Ratings.csv",), "bookcrossing", "Book-Crossing"),
    (("Ratings.csv", "Books.csv"), "bookcrossing", "Book-Crossing"),
)


def _advice(path: Path, source: str, what: str) -> str:
    out = shlex.quote(f"data/{path.name.split('.')[0] or source}")
    return (
        f"holds ratings ({what}), not training rows: make them first with "
        f"`mlx-dmpo prepare {source} {shlex.quote(str(path))} --out {out}`, then give --data {out}"
    )


def ratings_beside(directory: Path) -> str:
    """What a directory without training files holds instead, as the second half of a message; "" where it is
    not known.
    """
    names = {p.name for p in directory.iterdir()}
    bare = {name.removesuffix(".gz") for name in names}
    for wanted, source, what in FILES:
        if set(wanted) <= bare:
            return _advice(directory, source, f"it looks like {what}")
    if any(re.fullmatch(r"(reviews_)?\w+(_5)?\.jsonl?\.gz|meta_\w+\.jsonl?(\.gz)?", name) for name in names):
        return _advice(directory, "amazon", "it looks like Amazon reviews")
    return ""


def ratings(path: Path, columns: Sequence[str]) -> str:
    """The second half of a message where the columns are those of ratings; "" where they are not."""
    plain = {str(name).strip().casefold() for name in columns}
    for wanted, source, what in PERSONAL:
        if wanted <= plain:
            return _advice(path, source, f"it looks like {what}")
    if {"asin", "reviewerid"} <= plain or {"parent_asin", "user_id"} <= plain:
        return _advice(path, "amazon", "it looks like Amazon reviews")
    user, item, rating = (
        next((name for name in columns if kind.fullmatch(str(name).strip())), None) for kind in (USERS, ITEMS, RATINGS)
    )
    if user is None or item is None or rating is None:
        return ""
    return _advice(path, "table", f"columns {user}, {item}, {rating}")


def _first_line(text: str) -> str:
    """Of lines that end as those of any system."""
    return (text.lstrip().splitlines() or [""])[0]


def separator(text: str) -> str:
    """What separates the columns of the first line of a table; "" where nothing does."""
    first = _first_line(text)
    found = {by: len(next(csv.reader([first], delimiter=by), [])) for by in "\t,;|"}
    best = max(found, key=lambda by: found[by])
    return best if found[best] > 1 else ""


def ratings_in(path: Path, start: str) -> str:
    """`ratings` for the first lines of a text file; also for ratings without a header line, as in MovieLens'
    own files.
    """
    first = _first_line(start).strip()
    if first.startswith("{"):
        row: Any = None
        try:
            row = json.loads(first)
        except (ValueError, RecursionError):
            return ""
        return ratings(path, list(row)) if isinstance(row, dict) else ""
    if re.fullmatch(r"\w+::\w+::\d(\.\d+)?::\d+|\d+\t\d+\t\d(\.\d+)?\t\d{6,}", first):
        folder = path.parent if path.name in ("u.data", "ratings.dat") else path
        known = folder != path
        return _advice(folder, "movielens" if known else "table", "user, item, rating, time in each line")
    by = separator(start)
    return ratings(path, next(csv.reader([first], delimiter=by))) if by else ""
