"""Dates as people and programs write them, as seconds since 1970. Without a zone they are UTC."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

_MONTHS = {m: n for n, m in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split(), 1)}
_DAY = r"(?P<d>\d{1,2})(?:st|nd|rd|th)?"
_MONTH = r"(?P<name>[A-Za-z]{3,9})\.?"
_YEAR = r"(?P<y>\d{4}|\d{2})"
_WEEKDAY = r"(?:(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*\.?,?\s+)?"
_TIME = (
    r"(?:[T,\s]+(?:at\s+)?(?P<H>\d{1,2}):(?P<M>\d{2})(?::(?P<S>\d{2}(?:[.,]\d+)?))?\s*(?P<half>[ap]\.?m\.?)?"
    r"\s*(?P<zone>Z|UTC|GMT|[+-]\d{2}:?\d{2})?)?"
)
_FORMS = [
    re.compile(form, re.IGNORECASE)
    for form in (
        rf"{_WEEKDAY}(?P<y>\d{{4}})(?P<s>[-/.])(?P<m>\d{{1,2}})(?P=s)(?P<d>\d{{1,2}}){_TIME}",
        rf"{_WEEKDAY}(?P<a>\d{{1,2}})(?P<s>[-/.])(?P<b>\d{{1,2}})(?P=s){_YEAR}{_TIME}",
        rf"{_WEEKDAY}{_DAY}[\s.-]*{_MONTH}[\s,.-]*{_YEAR}{_TIME}",
        rf"{_WEEKDAY}{_MONTH}\s+{_DAY},?\s+(?P<y>\d{{4}}){_TIME}",
        # Twitter: Tue Nov 09 10:00:00 +0000 2004
        rf"{_WEEKDAY}{_MONTH}\s+{_DAY}\s+(?P<H>\d{{2}}):(?P<M>\d{{2}}):(?P<S>\d{{2}})\s+"
        r"(?:(?P<zone>UTC|GMT|[+-]\d{4})\s+)?(?P<y>\d{4})",
        r"(?P<y>\d{4})\s*年\s*(?P<m>\d{1,2})\s*月\s*(?P<d>\d{1,2})\s*日(?:\s*(?P<H>\d{1,2}):(?P<M>\d{2})(?::(?P<S>\d{2}))?)?",
    )
]
_AMBIGUOUS = re.compile(r"\s*(\d{1,2})([-/.])(\d{1,2})\2(?:\d{4}|\d{2})\b")


def seconds(value: Any, day_first: bool = False) -> float:
    """A number as it is, a date as seconds since 1970, NaN for anything else.

    day_first  11/09/2004 is 11 September instead of November 9
    """
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    try:
        return float(value)
    except (TypeError, ValueError):
        pass
    if not isinstance(value, str):
        return math.nan
    text = value.strip()
    try:
        date = datetime.fromisoformat(text.removesuffix(" UTC"))
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except ValueError:
        pass
    for form in _FORMS:
        found = form.fullmatch(text)
        if found:
            try:
                return _of(found.groupdict(), day_first)
            except ValueError:
                return math.nan
    return math.nan


def _of(part: dict[str, str | None], day_first: bool) -> float:
    """The parts of a date as seconds. Raises ValueError for February 30."""
    year = part["y"] or ""
    full = int(year) if len(year) == 4 else int(year) + (2000 if int(year) < 70 else 1900)
    if part.get("a"):
        a, b = int(part["a"] or 0), int(part["b"] or 0)
        month, day = (b, a) if day_first or part.get("s") == "." else (a, b)
    elif part.get("name"):
        month, day = _MONTHS.get((part["name"] or "")[:3].lower(), 0), int(part["d"] or 0)
    else:
        month, day = int(part["m"] or 0), int(part["d"] or 0)
    hour, minute = int(part.get("H") or 0), int(part.get("M") or 0)
    half = (part.get("half") or "").lower()
    if half:
        hour = hour % 12 + (12 if half.startswith("p") else 0)
    second = float((part.get("S") or "0").replace(",", "."))
    zone = UTC
    if re.fullmatch(r"[+-]\d{2}:?\d{2}", part.get("zone") or ""):
        text = (part["zone"] or "").replace(":", "")
        zone = timezone((1 if text[0] == "+" else -1) * timedelta(hours=int(text[1:3]), minutes=int(text[3:])))
    return datetime(full, month, day, hour, minute, tzinfo=zone).timestamp() + second


def is_date(text: str) -> bool:
    """Whether a cell is a date rather than a name."""
    return not math.isnan(seconds(text)) or not math.isnan(seconds(text, day_first=True))


def evidence(text: str) -> bool | None:
    """True: the day comes first (25/12/2004); False: the month does (12/25/2004); None: it cannot be seen."""
    found = _AMBIGUOUS.match(text)
    if not found:
        return None
    if found[2] == ".":
        return True
    return True if int(found[1]) > 12 else False if int(found[3]) > 12 else None


def ambiguous(text: str) -> bool:
    """Whether it is written as 11/09/2004 or 11-09-04."""
    found = _AMBIGUOUS.match(text)
    return bool(found and found[2] != ".")
