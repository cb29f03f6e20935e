"""What every source yields: interactions, titles, and what the reader should know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError


@dataclass(frozen=True, slots=True, eq=False)
class Interactions:
    """N ratings in the order of the file: user users[user[n]] gave item items[item[n]] the rating[n] at time[n].

    user, item  (N,) int32
    rating      (N,) float64, finite
    time        (N,) float64, finite, in the file's own unit (only its order is used); None where there is none
    """

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray | None
    users: list[str]
    items: list[str]

    def where(self, keep: np.ndarray) -> Interactions:
        """The interactions of a mask (N,) bool."""
        time = None if self.time is None else self.time[keep]
        return Interactions(self.user[keep], self.item[keep], self.rating[keep], time, self.users, self.items)


@dataclass(frozen=True, slots=True, eq=False)
class Ratings:
    """What a source yields: interactions, the raw title of each item that has one, and notes for the summary.

    scale           lowest and highest rating there can be; None: as they occur
    liked_quantile  the source's own rule for liked, where ratings have no midpoint (play counts)
    order           the source's own order, where time says nothing; "" for time or file
    attributes      user -> what is known about the person, such as gender and age band
    seen            user -> raw titles that the user met but did not rate
    personal        one person's own export
    """

    interactions: Interactions
    titles: dict[str, str]
    files: list[Path]
    name: str
    domain: str
    scale: tuple[float, float] | None = None
    liked_quantile: float | None = None
    order: str = ""
    notes: list[str] = field(default_factory=list)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seen: Mapping[str, Sequence[str]] = field(default_factory=dict)
    personal: bool = False


class BadRows:
    """Rows that cannot be read: the first raises UserError, unless they are to be skipped; then they are counted by
    reason.
    """

    def __init__(self, skip: bool):
        self.skip = skip
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, where: str | Callable[[], str], what: str, fix: str, value: str = "") -> None:
        """`where` may be a function, since finding the line of a row can take a pass over the file; `value` is the
        cell.
        """
        if self.skip and what in self.first:
            self.counts[what] += 1
            return
        place = where if isinstance(where, str) else where()
        if not self.skip:
            raise UserError(f"{place}: {what}{value and f' ({value})'}: {fix}, or add --skip-bad-rows")
        self.first[what] = place
        self.counts[what] = 1
