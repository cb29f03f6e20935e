"""What the readers of one person's own exports share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...errors import UserError
from . import files
from .contract import BadRows, Interactions, Ratings
from .dates import seconds
from .files import encoding_of
from .tables import dialect, number, plain, rows

ME = "me"  # the user of an export that names nobody


@dataclass(frozen=True, slots=True)
class Entry:
    """One title of an export. rating None: seen, not rated. time NaN: unknown."""

    title: str
    rating: float | None
    time: float = math.nan
    user: str = ME


@dataclass(slots=True)
class Export:
    """What was found so far: entries in the order of the files, the files, and notes."""

    entries: list[Entry] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find(path: Path, names: Sequence[str], what: str) -> Path:
    """PATH itself where it is a file, else the first of these names in the folder, whatever its case.

    Raises UserError.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder: name the unpacked {what}")
    if path.is_file():
        return path
    there = {p.name.lower().removesuffix(".gz"): p for p in path.iterdir() if p.is_file()}
    found = next((there[name] for name in names if name in there), None)
    if found is None:
        raise UserError(f"{path}: holds no {' or '.join(names)}: name the folder of the unpacked {what}")
    return found


def read_csv(path: Path, export: Export, encoding: str = "") -> Iterator[tuple[str, dict[str, str]]]:
    """(file:line, {plain column name: cell}) of each row of a CSV with a header line. Raises UserError."""
    chosen = encoding_of(path, encoding)
    how = dialect(path, encoding=chosen)
    export.files.append(path)
    export.notes += [*how.notes, *([chosen.note] if chosen.note else [])]
    if not how.header:
        raise UserError(f"{path}:1: no column names: use the file as it was exported")
    names = [plain(name) for name in how.names]
    for line, cells in rows(path, how):
        if any(cell.strip() for cell in cells):
            padded = [*cells, *[""] * (len(names) - len(cells))]
            yield f"{path}:{line}", dict(zip(names, (cell.strip() for cell in padded), strict=False))


def header_of(path: Path, encoding: str = "") -> set[str]:
    """The plain column names of a CSV, nothing for what is not a CSV with a header."""
    chosen = encoding_of(path, encoding)
    try:
        how = dialect(path, encoding=chosen)
    except UserError:
        return set()
    return {plain(name) for name in how.names} if how.header else set()


def need(path: Path, columns: Iterable[str], what: str, encoding: str = "") -> None:
    """Raises UserError where the header lacks a column that this export has, and where its encoding is not clear."""
    found = header_of(path, encoding)
    for column in columns:
        if plain(column) not in found:
            have = ", ".join(sorted(found)) or "no column names"
            raise UserError(
                f'{path}:1: not {what}: no column "{column}" (found: {have}): name the file as it was exported, '
                "or use `mlx-dmpo prepare table`"
            )


def rating_of(text: str, where: str, bad: BadRows, unrated: Callable[[float], bool] = lambda r: False) -> float | None:
    """A rating; None for an empty or an unrated one. A cell that is not a number is reported as a bad row."""
    if not text:
        return None
    value = number(text)
    if not math.isfinite(value):
        bad.add(where, "the rating is not a finite number", "give a number", repr(text)[:40])
        return None
    return None if unrated(value) else value


def time_of(text: str, day_first: bool = False) -> float:
    """Seconds since 1970; NaN for an empty cell and for 0000-00-00."""
    return math.nan if not text or text.startswith("0000") else seconds(text, day_first)


def titled(title: str, year: str) -> str:
    """A title with its year: "Alien (1979)"."""
    year = year.strip().removesuffix(".0")
    return f"{title} ({year})" if year.isdecimal() and len(year) == 4 and not title.endswith(f"({year})") else title


def ratings_of(
    export: Export, name: str, domain: str, scale: tuple[float, float] | None, liked_quantile: float | None = None
) -> Ratings:
    """The export's rated entries as interactions, the others as seen.

    Where nothing is rated, every entry is a like of rating 1.
    """
    rated = [e for e in export.entries if e.title and e.rating is not None]
    notes = list(export.notes)
    if not rated and export.entries:
        rated = [Entry(e.title, 1.0, e.time, e.user) for e in export.entries if e.title]
        notes.append("no ratings: every title counts as liked")
        scale = None
    if not rated:
        raise UserError(f"{export.files[0]}: holds no titles: name the file as it was exported")
    users = list(dict.fromkeys(e.user for e in rated))
    items = list(dict.fromkeys(e.title for e in rated))
    user_of, item_of = {u: n for n, u in enumerate(users)}, {t: n for n, t in enumerate(items)}
    time = np.array([e.time for e in rated])
    unknown = int(np.isnan(time).sum())
    if unknown == len(time):
        dated = None
        notes.append("no dates: the order of the file counts")
    else:
        dated = np.where(np.isnan(time), np.nanmin(time) - 1, time)
        if unknown:
            notes.append(f"{unknown:,} ratings have no date: they count as the oldest")
    interactions = Interactions(
        np.array([user_of[e.user] for e in rated], np.int32),
        np.array([item_of[e.title] for e in rated], np.int32),
        np.array([e.rating for e in rated], np.float64),
        dated,
        users,
        items,
    )
    known = {(e.user, e.title) for e in rated}
    seen: dict[str, list[str]] = {}
    for e in export.entries:
        if e.title and (e.user, e.title) not in known:
            known.add((e.user, e.title))
            seen.setdefault(e.user, []).append(e.title)
    unrated = sum(map(len, seen.values()))
    if unrated:
        notes.append(f"{unrated:,} titles seen but not rated: neither liked nor disliked, and never a negative")
    return Ratings(
        interactions,
        {i: i for i in items},
        export.files,
        name,
        domain,
        scale=scale,
        liked_quantile=liked_quantile,
        notes=notes,
        seen=seen,
        personal=True,
    )


def read_text(path: Path, encoding: str = "") -> str:
    """The whole text of a small file. Raises UserError."""
    chosen = encoding_of(path, encoding)
    files.start(path, encoding="" if chosen == files.UTF8 else chosen.codec)
    with files.text(path, chosen) as file:
        return file.read().decode()
