"""Columns of text and numbers -> Interactions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .contract import BadRows, Interactions
from .dates import seconds
from .tables import THOUSANDS, Batch, number


def codes_of(column: pa.Array, index: dict[str, int]) -> np.ndarray:
    """Each value's place in `index`, which grows in the order of first appearance; -1 for an empty value.

    (N,) -> (N,) int32
    """
    encoded = as_text(column).fill_null("").dictionary_encode()
    values = [value.strip() for value in encoded.dictionary.to_pylist()]
    codes = np.array([index.setdefault(v, len(index)) if v else -1 for v in values], np.int32)
    return codes[encoded.indices.to_numpy()] if len(codes) else np.zeros(0, np.int32)


def as_text(column: pa.Array) -> pa.Array:
    """Ids and titles as text; whole numbers without a point, as in a column of ids that pandas made floating because of
    a gap.
    """
    if pa.types.is_floating(column.type):
        try:
            return column.cast(pa.int64()).cast(pa.string())
        except pa.ArrowInvalid:
            pass
    return column.cast(pa.string())


def numbers_of(column: pa.Array, one: Callable[[Any], float]) -> np.ndarray:
    """(N,) float64, NaN where there is not a finite number; `one` reads a value that arrow does not."""
    try:
        second = 1.0
        if pa.types.is_temporal(column.type):  # seconds since 1970
            column, second = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64()), 1e6
        values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False) / second
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        values = np.array([one(value) for value in column.to_pylist()], np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def collect(
    batches: Iterable[Batch],
    bad: BadRows,
    *,
    rating: bool = True,
    time: bool = True,
    day_first: bool = False,
    untitled: list[int] | None = None,
    titles: dict[str, str] | None = None,
) -> Interactions:
    """Columns user, item, then rating and time where they are said to be there, then the title where `titles` takes it.

    untitled  counts rows without an item instead of reporting them: the item is a title, and a title may be missing
    titles    item -> its first title, filled here
    Raises UserError at the first row without a user, item, rating or time.
    """
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    parts: list[list[np.ndarray]] = []
    for batch in batches:
        columns = list(batch.columns)
        title = columns.pop() if titles is not None else None
        part = [codes_of(columns[0], users), codes_of(columns[1], items)]
        names = ["user", "item"]
        if rating:
            part.append(numbers_of(columns[2], number))
            names.append("rating")
        if len(columns) > len(part) and time:
            part.append(numbers_of(columns[len(part)], partial(seconds, day_first=day_first)))
            names.append("time")
        good = np.ones(len(part[0]), bool)
        if untitled is not None:
            good = part[1] >= 0
            untitled.append(int((~good).sum()))
        _report(names, part, batch, good, bad)
        if title is not None and titles is not None:
            _first_titles(title, part[1], list(items), titles)
        if not rating:
            part.insert(2, np.ones(len(part[0])))
        parts.append(part if good.all() else [values[good] for values in part])
    columns_ = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else [np.zeros(0)] * 3
    return Interactions(
        columns_[0], columns_[1], columns_[2], columns_[3] if len(columns_) > 3 else None, list(users), list(items)
    )


def _report(names: list[str], part: list[np.ndarray], batch: Batch, good: np.ndarray, bad: BadRows) -> None:
    """Reports what is missing, column by column, and takes these rows out of `good`."""
    for n, (name, values) in enumerate(zip(names, part, strict=True)):
        wrong = (values < 0) if values.dtype == np.int32 else np.isnan(values)
        for row in np.flatnonzero(wrong & good):
            fix = "give one"
            if name == "time":
                fix = "give a number or a date such as 2004-11-09, or add --order file, which needs no time"
            what = "is missing" if values.dtype == np.int32 else "is not a finite number"
            cell = batch.columns[n][int(row)].as_py()
            if isinstance(cell, str) and THOUSANDS.fullmatch(cell):
                fix = f"write {cell.strip().replace(',', '')}, without the comma"
            value = repr(cell)[:40]
            bad.add(partial(batch.where, int(row)), f"the {name} {what}", fix, value)
        good &= ~wrong


def _first_titles(column: pa.Array, codes: np.ndarray, items: list[str], titles: dict[str, str]) -> None:
    """Adds the titles of items that have none yet."""
    texts = pc.utf8_trim_whitespace(as_text(column).fill_null(""))
    titled = np.flatnonzero(pc.not_equal(texts, "").to_numpy(zero_copy_only=False) & (codes >= 0))
    found, first = np.unique(codes[titled], return_index=True)
    for code, row in zip(found.tolist(), titled[first].tolist(), strict=True):
        titles.setdefault(items[code], texts[row].as_py())


def loose(item: str) -> str:
    """An id without what programs change in one: case, spaces, leading zeros, the ".0" that pandas adds, and Excel's
    ="..." and '...: "00024", "24.0" and ' 24 ' are "24".
    """
    item = re.sub(r'^="?|"$|^\'', "", item.strip()).strip().casefold()
    item = re.sub(r"(?<=\d)\.0+$", "", item) if re.fullmatch(r"\d+\.0+", item) else item
    return re.sub(r"^0+(?=[0-9a-z])", "", item)


def titles_of(
    rows: Iterable[tuple[Any, Any]], items: Iterable[str], notes: list[str] | None = None, where: str = "titles"
) -> dict[str, str]:
    """The first title of each of the items that has one. Where an id as it is matches nothing, it is matched as `loose`
    has it, if that stands for one id on either side; `notes` gets how many, with an example.
    """
    wanted = set(items)
    alike: dict[str, str] = {}  # loose id -> the item, "" where it is several
    for item in wanted:
        alike[loose(item)] = "" if loose(item) in alike else item
    titles: dict[str, str] = {}
    other: dict[str, dict[str, str]] = {}  # item -> ids that are the item's loosely -> their titles
    for found, title in rows:
        item = str(found).strip()
        if title and item in wanted:
            titles.setdefault(item, str(title))
        elif title and (item := alike.get(loose(item), "")) and item not in titles:
            other.setdefault(item, {}).setdefault(str(found).strip(), str(title))
    missing = {item: ids for item, ids in other.items() if item not in titles}
    one = {item: next(iter(ids.items())) for item, ids in missing.items() if len(ids) == 1}
    titles |= {item: title for item, (_, title) in one.items()}
    if notes is not None and one:
        item, (found, _) = next(iter(one.items()))
        notes.append(f"{len(one):,} ids are written otherwise in {where}, such as {found!r} for {item!r}: taken as one")
    if notes is not None and len(missing) > len(one):
        item, ids = next((i, list(ids)) for i, ids in missing.items() if len(ids) > 1)
        notes.append(
            f"{len(missing) - len(one):,} ids have no title: more than one id of {where} is like it, such as "
            f"{ids[0]!r} and {ids[1]!r} for {item!r}: write the ids alike in both files"
        )
    return titles


def rows_of(batches: Iterable[Batch]) -> Iterator[tuple[Any, ...]]:
    """Batches as tuples."""
    for batch in batches:
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
