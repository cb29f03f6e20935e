"""Accuracy by popularity, history length, domain, titles seen in training, and attributes of users.

A panel reads fields that evaluate adds to the rows (facts.py): `popularity`, `seen`, `history`, `groups`. Rows without
a field have no such panel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .bootstrap import Bootstrap, Statistic, average_ranks

BINS = 4  # of about equal size, for popularity and history length
UNKNOWN = "unknown"


def quantile_bins(values: np.ndarray, bins: int = BINS) -> list[tuple[str, np.ndarray]]:
    """(name, mask) of at most `bins` bins of about equal size; equal values share a bin.  values (n,) of whole
    numbers."""
    upper = np.unique(np.quantile(values, np.arange(1, bins + 1) / bins, method="inverted_cdf"))
    place = np.searchsorted(upper, values, "left")  # each bin holds its upper edge
    found = []
    for b in np.unique(place):
        mask = place == b
        low, high = values[mask].min(), values[mask].max()
        found.append((f"{low:g}" if low == high else f"{low:g} to {high:g}", mask))
    return found


Named = Sequence[tuple[str, np.ndarray]]


def _table(bootstrap: Bootstrap, right: np.ndarray, bins: Named) -> Callable[[], list[dict[str, Any]]]:
    registered = [(name, mask, bootstrap.mean(right, mask)) for name, mask in bins if mask.any()]
    return lambda: [
        {
            "name": name,
            "n": int(mask.sum()),
            bootstrap.over: bootstrap.count(mask),
            "pair_accuracy": bootstrap.metric(accuracy, mask),
        }
        for name, mask, accuracy in registered
    ]


def popularity(
    bootstrap: Bootstrap, rows: Sequence[Mapping[str, Any]], margin: np.ndarray, right: np.ndarray
) -> Callable[[], dict[str, Any] | None]:
    """Does the scorer follow popularity? None where the rows hold no `popularity`: [of the positive, of the negative].

    by_positive, by_negative  accuracy by how popular the title is
    correlation               Spearman's, of the margin and (popularity of the positive − popularity of the negative)
    prefers_popular           share of pairs of different popularity in which the more popular title is preferred
    popular_is_right          share of those in which it is the liked one: what a popularity ranker would score on them
    popularity_accuracy       accuracy of ranking by popularity on all pairs, a tie ½
    """
    if any("popularity" not in row for row in rows):
        return lambda: None
    counts = np.array([row["popularity"] for row in rows], np.float64)  # (n, 2)
    gap = counts[:, 0] - counts[:, 1]
    differs = gap != 0
    positive, negative = (_table(bootstrap, right, quantile_bins(counts[:, c])) for c in (0, 1))
    correlation = bootstrap.correlation(average_ranks(margin), average_ranks(gap))
    prefers = bootstrap.mean(np.where(gap > 0, right, 1 - right), differs)
    is_right = bootstrap.mean((gap > 0).astype(float), differs)
    ranker = bootstrap.mean((gap > 0) + 0.5 * (gap == 0))
    return lambda: {
        "n": int(differs.sum()),
        "by_positive": positive(),
        "by_negative": negative(),
        "correlation": bootstrap.metric(correlation),
        "prefers_popular": bootstrap.metric(prefers, differs),
        "popular_is_right": bootstrap.metric(is_right, differs),
        "popularity_accuracy": bootstrap.metric(ranker),
    }


def _by_value(values: Sequence[str]) -> Named:
    """A bin for every value, in the order of their names; the unknown last."""
    found = np.array(values)
    return [(name, found == name) for name in sorted(set(values), key=lambda v: (v == UNKNOWN, v))]


def _families(rows: Sequence[Mapping[str, Any]]) -> dict[str, Named]:
    """Family -> its slices. A family of one slice shows nothing and is left out, except the domain."""
    families: dict[str, Named] = {}
    if all("history" in row for row in rows):
        families["history"] = quantile_bins(np.array([row["history"] for row in rows], np.float64))
    if all("seen" in row for row in rows):
        words = {(True, True): "both seen", (False, False): "neither seen"}
        words |= {(True, False): "only the liked seen", (False, True): "only the disliked seen"}
        families["titles in training"] = _by_value([words[tuple(map(bool, row["seen"]))] for row in rows])  # type: ignore[index]
    for attribute in sorted({name for row in rows for name in row.get("groups", {})}):
        families[attribute] = _by_value([row.get("groups", {}).get(attribute, UNKNOWN) for row in rows])
    families = {name: bins for name, bins in families.items() if len(bins) > 1}
    return {"domain": _by_value([row.get("domain", UNKNOWN) for row in rows])} | families


def slices(
    bootstrap: Bootstrap, rows: Sequence[Mapping[str, Any]], right: np.ndarray
) -> Callable[[], dict[str, dict[str, Any]]]:
    """Family -> {"slices": rows with n and accuracy, "largest_gap": the two slices furthest apart}.

    The gap is that of slices with an interval, and its interval is of the difference between these two. It was picked
    as the largest: with many slices, some gap is large by chance. None where fewer than two slices have an interval.
    """
    families = _families(rows)
    tables = {name: _table(bootstrap, right, bins) for name, bins in families.items()}
    means: dict[str, dict[str, Statistic]] = {
        family: {name: bootstrap.mean(right, mask) for name, mask in bins} for family, bins in families.items()
    }

    def gap(family: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        sized = [s for s in found if "low" in s["pair_accuracy"] and s["name"] != UNKNOWN]
        if len(sized) < 2:
            return None
        high, low = (pick(sized, key=lambda s: s["pair_accuracy"]["value"])["name"] for pick in (max, min))
        above, below = means[family][high], means[family][low]
        return {"higher": high, "lower": low, **bootstrap.metric(lambda sums: above(sums) - below(sums))}

    def found() -> dict[str, dict[str, Any]]:
        return {
            family: {"slices": (made := table()), "largest_gap": gap(family, made)} for family, table in tables.items()
        }

    return found
