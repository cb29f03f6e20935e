"""The rows of a JSON value: arrays, pandas' layouts, rows under a key, and maps of user -> item -> rating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import UserError
from .guesses import GUESSES
from .tables import plain

USER = set(GUESSES["user"])


def rows_of(path: Path, value: Any, known: set[str]) -> tuple[list[Any], bool]:
    """The rows as objects, and whether their fields have names.

    known  names of columns, as `plain` writes them. Raises UserError where more than one key may hold the rows.
    """
    if isinstance(value, list):
        return _of_list(value, known)
    if not isinstance(value, dict):
        return [], True
    inner = list(value.values())
    names, data = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(data, list) and all(isinstance(row, list) for row in data):  # split
        return [dict(zip(map(str, names), row, strict=False)) for row in data], True
    outside = {plain(name) for name in value} & known
    if len(inner) == 1 and not outside - {"ratings"} and isinstance(inner[0], dict):  # {"ratings": {...}}
        return rows_of(path, inner[0], known)
    lists = {name: v for name, v in value.items() if isinstance(v, list)}
    tables = {name: v for name, v in lists.items() if v and all(isinstance(row, dict | list) for row in v)}
    if len(tables) == 1 and len(lists) < 2:  # {"page": 1, "ratings": [...]}
        return _of_list(next(iter(tables.values())), known)
    if len(tables) > 1:
        rated = [name for name in tables if "rating" in plain(name)]
        if len(rated) == 1:
            return _of_list(tables[rated[0]], known)
        if len(tables) == len(inner) and (rows := _by_user(value)):
            return rows, True
        raise UserError(
            f"{path}: holds rows under several keys ({', '.join(list(tables)[:8])}): write the ratings to a file of "
            "their own"
        )
    if inner and len(lists) == len(inner):  # a list for each column
        return [dict(zip(value, row, strict=False)) for row in zip(*inner, strict=False)], True
    if inner and all(isinstance(column, dict) for column in inner):
        within = {plain(name) for name in inner[0]} & known
        if len(within) > len(outside):  # index -> object
            return inner, True
        index = [str(n) for n in range(len(inner[0]))]  # pandas' own labels
        if len(outside) < 2 and list(inner[0]) != index and (rows := _by_user(value)):
            return rows, True
        labels = list(dict.fromkeys(label for column in inner for label in column))
        return [{name: column.get(label) for name, column in value.items()} for label in labels], True
    return [value], True


def _of_list(value: list[Any], known: set[str]) -> tuple[list[Any], bool]:
    if not value or not all(isinstance(row, list) for row in value):
        return value, True
    first = value[0]
    if len({plain(str(cell)) for cell in first} & known) > 1 and all(isinstance(cell, str) for cell in first):
        return [dict(zip(first, row, strict=False)) for row in value[1:]], True  # the first row names the columns
    return [{str(n): cell for n, cell in enumerate(row, 1)} for row in value], False


def _by_user(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of {user: {item: rating}}, {user: {item: {"rating": ...}}} and {user: [{"item": ..., "rating": ...}]};
    none for anything else."""
    rows: list[dict[str, Any]] = []
    for user, theirs in value.items():
        if isinstance(theirs, dict):
            for item, rating in theirs.items():
                if isinstance(rating, bool) or not isinstance(rating, int | float | dict):
                    return []
                rows.append(
                    {"user": user, "item": item, **(rating if isinstance(rating, dict) else {"rating": rating})}
                )
        elif all(isinstance(row, dict) and not USER & set(map(plain, row)) for row in theirs):
            rows += [{"user": user, **row} for row in theirs]
        else:
            return []
    return rows
