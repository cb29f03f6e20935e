"""Columns without names: which is the rating, the time, the title, read off the values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ...errors import UserError
from .dates import is_date
from .tables import Batch, number, numeric

SAMPLE = 5000  # rows looked at
FEW = 21  # different ratings, at most: 0 to 10 in halves
SINCE, UNTIL = 631_152_000, 2_524_608_000  # 1990 and 2050 in seconds since 1970


def _is_time(values: Sequence[str]) -> bool:
    """Dates, or time stamps in seconds to nanoseconds."""
    if all(is_date(v) and not numeric(v) for v in values):
        return True
    numbers = [number(v) for v in values]
    return any(all(SINCE <= n / unit <= UNTIL for n in numbers) for unit in (1, 1e3, 1e6, 1e9)) and len(set(values)) > 1


def _is_rating(values: Sequence[str]) -> bool:
    """A few numbers, each seen often."""
    numbers = [number(v) for v in values]
    few = len(set(numbers)) <= min(FEW, max(5, len(numbers) // 4))
    return few and all(math.isfinite(n) and -10 <= n <= 100 for n in numbers)


def _is_text(values: Sequence[str]) -> bool:
    """Titles rather than ids: most have a space, or letters beyond ASCII."""
    titles = [v for v in set(values) if " " in v.strip() or not v.isascii()]
    return 2 * len(titles) > len(set(values)) and not any(is_date(v) and not numeric(v) for v in titles)


def places(
    path: Path, names: Sequence[str], sample: Sequence[Sequence[str]], given: Mapping[str, str]
) -> dict[str, str]:
    """role -> column of user, item, rating and time: those that flags gave, the others by their values.

    names   of the columns: "1", "2", ...
    sample  the columns' first values
    The order user, item, rating, time is taken where the values do not speak against it. Raises UserError where the
    values cannot tell user from item.
    """
    values = {n: [v for v in column if v.strip()] for n, column in zip(names, sample, strict=True)}
    found = dict(given)
    free = [n for n in names if n not in found.values()]
    usual = {role: n for role, n in zip(("user", "item", "rating", "time"), names, strict=False)}
    times = [n for n in free if values[n] and _is_time(values[n])]
    ratings = [n for n in free if n not in times and values[n] and _is_rating(values[n])]
    third = usual.get("rating", "")
    plays = third in free and third not in times and not ratings and all(map(numeric, values[third]))
    if "time" not in found and (usual.get("time") in times or len(times) == 1):
        found["time"] = usual["time"] if usual.get("time") in times else times[0]
    by_place = third in ratings and not set(times) - {usual.get("time")}
    if "rating" not in found and (by_place or plays or len(ratings) == 1):
        found["rating"] = third if by_place or plays else ratings[0]
    fourth = usual.get("time", "")
    if "time" not in found and found.get("rating") == third and fourth in free and all(map(numeric, values[fourth])):
        found["time"] = fourth  # a count of its own, such as seconds since a start
    rest = [n for n in names if n not in found.values()]
    titles = [n for n in rest if values[n] and _is_text(values[n])]
    if "item" not in found and len(titles) == 1 and ("user" in found or len(rest) > 1):
        found["item"] = titles[0]
        rest = [n for n in rest if n != titles[0]]
    missing = [role for role in ("user", "item") if role not in found]
    if len(missing) == 1 and rest:
        found[missing[0]] = usual[missing[0]] if usual.get(missing[0]) in rest else rest[0]
    elif missing and {usual.get("user"), usual.get("item")} <= set(rest):
        found |= {role: usual[role] for role in missing}
    elif missing:
        looks = [f"{found[role]} looks like the {role}" for role in ("rating", "time") if role in found]
        raise UserError(
            f"{path}: no header line, and the columns ({', '.join(names)}) are not user, item, rating, time"
            f"{' (' + ', '.join(looks) + ')' if looks else ''}: say which is which, as in "
            f"--user-column {rest[-1] if rest else 1} --item-column {rest[0] if rest else 2}"
            f"{'' if 'rating' in found else ' --rating-column ' + names[-1]}"
        )
    return found


def first_values(batches: Iterable[Batch]) -> list[list[str]]:
    """The first values of each column, as text."""
    for batch in batches:
        if len(batch.columns[0]):
            return [["" if v is None else str(v) for v in column[:SAMPLE].to_pylist()] for column in batch.columns]
    return []
