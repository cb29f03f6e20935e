"""MovieLens 100K, 1M, 10M, and 20M to 32M."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...config import PrepareSettings
from ...errors import UserError
from .columns import collect, rows_of, titles_of
from .contract import BadRows, Interactions, Ratings
from .files import encoding_of, text_lines
from .folder import listed, named_columns, one, split_lines
from .tables import csv_batches, dialect

NAMES = {"100K": "MovieLens 100K", "1M": "MovieLens 1M or 10M", "20M": "MovieLens 20M to 32M"}
AGES = {1: "under 18", 18: "18-24", 25: "25-34", 35: "35-44", 45: "45-49", 50: "50-55", 56: "56 and over"}  # 1M's codes


def movielens_files(path: Path) -> tuple[str, Path, Path]:
    """("100K" | "1M" | "20M", ratings file, titles file) of a MovieLens folder, by what lies in it.

    Raises UserError.
    """
    files = listed(path, "MovieLens")
    names = {p.name: p for p in files}
    if "u.data" in names:
        return "100K", names["u.data"], one([p for p in files if p.name == "u.item"], path, "titles", "u.item")
    for kind, suffix in (("1M", ".dat"), ("20M", ".csv")):
        ratings = [p for p in files if p.name.startswith("ratings") and p.name.removesuffix(".gz").endswith(suffix)]
        if ratings:
            titles = [p for p in files if p.name.removesuffix(".gz") == "movies" + suffix]
            return (
                kind,
                one(ratings, path, "ratings", f"ratings{suffix}"),
                one(titles, path, "titles", f"movies{suffix}"),
            )
    raise UserError(
        f"{path}: no MovieLens files: it should hold u.data and u.item, ratings.dat and movies.dat, or ratings.csv "
        "and movies.csv"
    )


def movielens_interactions(kind: str, file: Path, bad: BadRows) -> Interactions:
    """The ratings of 100K (tabs), 1M and 10M (::), 20M to 32M (CSV with a header line)."""
    if kind == "20M":
        how, columns = named_columns(
            file, {"user": "userId", "item": "movieId", "rating": "rating", "time": "timestamp"}
        )
        return collect(csv_batches(file, how, columns, bad), bad)
    separator = "\t" if kind == "100K" else "::"
    how = dialect(file)
    if how.separator != separator or how.header or len(how.names) != 4:
        raise UserError(
            f"{file}:1: not user, item, rating and time with {separator!r} between: use the file as it was downloaded"
        )
    return collect(csv_batches(file, how, range(4), bad), bad)


def movielens(path: Path, settings: PrepareSettings, bad: BadRows) -> Ratings:
    """MovieLens 100K, 1M, 10M, 20M to 32M; titles in UTF-8 or, as old dumps have them, in Windows-1252."""
    kind, file, movies = movielens_files(path)
    interactions = movielens_interactions(kind, file, bad)
    encoding = encoding_of(movies, settings.encoding)
    if kind == "20M":
        how, columns = named_columns(movies, {"item": "movieId", "title": "title"}, encoding)
        rows: Iterable[tuple[Any, ...]] = rows_of(csv_batches(movies, how, columns, bad))
    else:
        rows = split_lines(movies, "|" if kind == "100K" else "::", bad, encoding)
    titles = titles_of(rows, interactions.items)
    people = path / ("u.user" if kind == "100K" else "users.dat")
    return Ratings(
        interactions,
        titles,
        [file, movies, *([people] if people.is_file() else [])],
        NAMES[kind],
        "movie",
        scale=(1, 5),
        notes=[encoding.note] if encoding.note else [],
        attributes=_people(people, kind, bad) if people.is_file() else {},
    )


def _people(path: Path, kind: str, bad: BadRows) -> dict[str, dict[str, str]]:
    """user -> gender and age band, of u.user (id|age|gender) or users.dat (id::gender::age code)."""
    found = {}
    for n, line in text_lines(path, encoding_of(path)):
        cells = line.split("|" if kind == "100K" else "::")
        if len(cells) < 3:
            bad.add(f"{path}:{n}", "not a user with gender and age", "use the file as it was downloaded")
            continue
        age, gender = (cells[1], cells[2]) if kind == "100K" else (cells[2], cells[1])
        known = {"gender": gender.strip()} if gender.strip() in ("F", "M") else {}
        if age.strip().isdecimal():
            known["age"] = AGES[max((start for start in AGES if start <= int(age)), default=1)]
        found[cells[0].strip()] = known
    return found
