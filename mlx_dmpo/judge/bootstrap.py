"""Percentile bootstrap over users in bounded memory.

Every statistic is a function of sums over rows, so a resample needs only the sums of the users it draws: the memory is
users × columns, and never users × resamples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

CHUNK = 2_000_000  # numbers of a resampling matrix at once
MIN_UNITS = 10  # users below which a percentile interval means nothing

Statistic = Callable[[np.ndarray], np.ndarray]  # sums (..., C) -> (...)


def percentiles(draws: np.ndarray) -> dict[str, float]:
    """The 95 % interval of resampled values; a resample in which the statistic is undefined (NaN) is left out."""
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return {}
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def draw_counts(units: int, resamples: int, seed: int, rows: int = 1) -> Iterator[np.ndarray]:
    """How often each unit is drawn, units with replacement: yields (b, units) float64, `resamples` rows in all.

    rows  what a caller allocates per resample, for the size of the chunks; it does not change what is drawn
    """
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // max(units, rows))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        yield np.stack(
            [np.bincount(rng.integers(0, units, units), minlength=units).astype(np.float64) for _ in range(size)]
        )


class Bootstrap:
    """Statistics of n rows that belong to users. Register columns and statistics, call `run`, then read `metric`.

    users  (n,) user of each row. A user's rows are drawn together, as they are not independent. Where all rows are of
           one user, rows are drawn instead, and `over` says "examples".
    """

    def __init__(self, users: Sequence[str], resamples: int, seed: int):
        names = {name: i for i, name in enumerate(dict.fromkeys(users))}
        self.users = len(names)
        self.over = "users" if self.users > 1 else "examples"
        self.index = (
            np.array([names[u] for u in users], np.int64) if self.users > 1 else np.arange(len(users), dtype=np.int64)
        )
        self.units = self.users if self.users > 1 else len(users)
        self.resamples, self.seed = resamples, seed
        self._columns: list[np.ndarray] = []  # (units,) sums
        self.draws = np.zeros((0, 0))

    @property
    def has_interval(self) -> bool:
        return self.units >= MIN_UNITS

    def column(self, values: np.ndarray) -> int:
        """Registers (n,) values; the number of the column of their sum in `sums`."""
        self._columns.append(np.bincount(self.index, weights=values, minlength=self.units))
        return len(self._columns) - 1

    def mean(self, values: np.ndarray, mask: np.ndarray | None = None) -> Statistic:
        """The mean of the rows under `mask`."""
        kept = np.ones(len(values)) if mask is None else mask.astype(np.float64)
        top, bottom = self.column(np.where(kept > 0, values, 0.0)), self.column(kept)
        return lambda sums: _divide(sums[..., top], sums[..., bottom])

    def correlation(self, x: np.ndarray, y: np.ndarray) -> Statistic:
        """Pearson's r. Of ranks (`average_ranks`) it is Spearman's; the ranks of the whole sample stay in resamples."""
        x, y = x - x.mean(), y - y.mean()  # centred: the sums below lose no digits
        n, sx, sy, xx, yy, xy = map(self.column, (np.ones(len(x)), x, y, x * x, y * y, x * y))

        def statistic(sums: np.ndarray) -> np.ndarray:
            count = sums[..., n]
            cov = sums[..., xy] - sums[..., sx] * sums[..., sy] / count
            var = (sums[..., xx] - sums[..., sx] ** 2 / count) * (sums[..., yy] - sums[..., sy] ** 2 / count)
            return _divide(cov, np.sqrt(np.maximum(var, 0)))

        return statistic

    def run(self, per_chunk: Callable[[np.ndarray], None] | None = None) -> None:
        """Draws all resamples. `per_chunk` receives the rows' weights (b, n), for statistics that are not sums."""
        table = np.stack(self._columns, axis=1)
        self.total = table.sum(axis=0)
        if not self.has_interval:
            return
        found = []
        for counts in draw_counts(self.units, self.resamples, self.seed, len(self.index) if per_chunk else 1):
            found.append(counts @ table)
            if per_chunk:
                per_chunk(counts[:, self.index])
        self.draws = np.concatenate(found)

    def count(self, mask: np.ndarray) -> int:
        """Users (or examples, see `over`) that have a row under `mask`."""
        return len(np.unique(self.index[mask]))

    def metric(self, statistic: Statistic, mask: np.ndarray | None = None) -> dict[str, Any]:
        """{"value", "low", "high"}; without an interval where fewer than MIN_UNITS users have a row under `mask`.

        The value is None where it is undefined (no row, no variance).
        """
        value = float(statistic(self.total))
        if not np.isfinite(value):
            return {"value": None}
        few = not self.has_interval or (mask is not None and self.count(mask) < MIN_UNITS)
        return {"value": value, **({} if few else percentiles(statistic(self.draws)))}


def _divide(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, NaN where the bottom is 0."""
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(bottom) == 0, np.nan, np.asarray(top) / bottom)


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; ties share the mean of theirs.  (n,) -> (n,)."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") + 1) / 2
