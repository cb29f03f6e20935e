"""Rows of scores.jsonl -> ranking metrics with intervals. numpy in, numbers out. A row is a pair, and its margin is all
that counts.

Intervals are 95 % percentile bootstraps over users (see bootstrap.py).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import calibration, panels
from .bootstrap import MIN_UNITS, Bootstrap, percentiles

Rows = Sequence[Mapping[str, Any]]

RELEASE_SEED = 42  # of the release's auc.ipynb


def wins(difference: np.ndarray) -> np.ndarray:
    """1 where positive, ½ at a tie, else 0.  (n,) -> (n,)."""
    return (difference > 0) + 0.5 * (difference == 0)


def auc(margin: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Chance that a pair's margin exceeds a mirrored pair's, ties ½: AUC of {m_i} against {-m_j}.

    Each pair is one instance of "liked minus disliked" and one of "disliked minus liked"; the rank statistic of Mann
    and Whitney over all n x n of them.  margin (n,), weights (b, n) -> (b,); without weights (1,).
    """
    weights = np.ones((1, len(margin))) if weights is None else weights
    order = np.argsort(-margin, kind="stable")
    mirrored = -margin[order]  # ascending
    below = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(weights[:, order], axis=1)], axis=1)
    left, right = np.searchsorted(mirrored, margin, "left"), np.searchsorted(mirrored, margin, "right")
    return (weights * (below[:, left] + below[:, right]) / 2).sum(axis=1) / weights.sum(axis=1) ** 2


def roc_auc(label: np.ndarray, score: np.ndarray) -> float | None:
    """Area under the ROC curve, ties ½ (Mann and Whitney).  label (n,) bool, score (n,). None where a class is
    empty."""
    if label.all() or not label.any():
        return None
    unlike = np.sort(score[~label])
    ranks = (np.searchsorted(unlike, score[label], "left") + np.searchsorted(unlike, score[label], "right")) / 2
    return float(ranks.mean() / len(unlike))


def release_auc(rows: Rows, seed: int = 0) -> float | None:
    """The AUC of the DMPO release's auc.ipynb: one prompt a pair, a coin keeps one of its two answers, log-probs
    pooled.

    The coin is Python's generator at seed 42, one throw a pair in the order of the file, as in the notebook. The
    prompt is
    the one that the file printed (`source_positive_first`); where the file fixes none, `seed` draws it. For comparison
    only: pooled raw log-probs rank long titles below short ones. None where the coin leaves one class empty.
    """
    coin = random.Random(RELEASE_SEED)
    drawn = np.random.default_rng([seed, 1]).random(len(rows)) < 0.5
    scores, labels = [], []
    for row, first in zip(rows, drawn, strict=True):
        prompt = row["positive_first" if row.get("source_positive_first", bool(first)) else "positive_second"]
        keep_chosen = coin.random() < 0.5
        scores.append(prompt["chosen_logp" if keep_chosen else "rejected_logp"])
        labels.append(keep_chosen)
    return roc_auc(np.array(labels), np.array(scores))


def place_wins(rows: Rows) -> list[float]:
    """How often the candidate printed in each place of a list has the highest score, over the lists that are so
    long."""
    longest = max(len(row["places"]) for row in rows)
    return [float(np.mean([r["places"][p] for r in rows if len(r["places"]) > p])) for p in range(longest)]


def printed_orders(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The prompts whose log-probs a row holds: two printed orders, one ("given"), or none (a scorer without
    log-probs)."""
    return tuple(name for name in ("positive_first", "positive_second", "given") if name in row)


def _margins(rows: Rows, orders: Sequence[str]) -> tuple[np.ndarray, list[np.ndarray]]:
    """(n,) margins, and their parts in each printed order. Raises ValueError for NaN and Inf."""
    parts = [
        np.array([row[order]["chosen_logp"] - row[order]["rejected_logp"] for row in rows], np.float64)
        for order in orders
    ]
    margin = np.array([row["margin"] for row in rows], np.float64)
    for row, value in zip(rows, sum(parts, margin), strict=True):
        if not np.isfinite(value):
            raise ValueError(f"user {row['user']}: a log-prob is not finite")
    return margin, parts


def interval_note(bootstrap: Bootstrap) -> dict[str, Any]:
    """What the intervals were drawn over, in one object that a reader of metrics.json meets first."""
    if bootstrap.users == 1:
        note = "one user: the intervals are over its pairs and do not cover other users"
    elif not bootstrap.has_interval:
        note = f"{bootstrap.users} users, fewer than {MIN_UNITS}: no intervals"
    else:
        note = ""
    over = bootstrap.over if bootstrap.has_interval else None
    if bootstrap.users == 1 and not bootstrap.has_interval:
        note = f"one user with fewer than {MIN_UNITS} pairs: no intervals"
    return {"over": over, "resamples": bootstrap.resamples, **({"note": note} if note else {})}


def ranking_metrics(rows: Rows, *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Metrics of an evaluation, each as {"value", "low", "high"}; n pairs of `users` users, k the most negatives of
    an example.

    pair_accuracy                   share of pairs whose margin, summed over both printed orders, is positive; a tie
                                    is ½
    pair_accuracy_positive_first    the same in the prompts that print the positive first
    pair_accuracy_positive_second   the same in those that print it second
    auc                             of the summed margins (see `auc`)
    auc_release                     the release's own statistic (see `release_auc`), without an interval
    position_bias                   share of prompts in which the first-listed wins, minus ½ (minus 1 / candidates in
                                    a list)
    place_wins                      of prompts that print a list: share of prompts which each place wins
    mean_margin                     mean of the summed margins, nats
    calibration                     of σ(margin) (see calibration.py)
    popularity, slices              accuracy by popularity, history length, domain, ... (see panels.py)

    Rows without two printed orders have no numbers about orders. Fewer than 10 users have no intervals;
    the pairs of a single user are resampled instead of users ("intervals" says so).
    Raises ValueError for no rows, or a margin that is not finite.
    """
    if not rows:
        raise ValueError("no rows to measure")
    orders = printed_orders(rows[0])
    margin, parts = _margins(rows, orders)
    ranked = orders == ("positive_first", "positive_second")
    bootstrap = Bootstrap([row["user"] for row in rows], resamples, seed)
    right = wins(margin)
    means = {"pair_accuracy": right}
    if ranked:
        first, second = map(wins, parts)
        means |= {"pair_accuracy_positive_first": first, "pair_accuracy_positive_second": second}
        # the first-listed wins where the positive does if it is listed first, and where it does not if listed second
        means["position_bias"] = (first + 1 - second) / 2 - 0.5
    if "places" in rows[0]:  # prompts that print a list: how often its first place wins, above the share by chance
        means["position_bias"] = np.array([row["places"][0] - 1 / len(row["places"]) for row in rows])
    means["mean_margin"] = margin
    statistics = {name: bootstrap.mean(values) for name, values in means.items()}
    calibrated = calibration.calibration(bootstrap, margin, right)
    popular = panels.popularity(bootstrap, rows, margin, right)
    sliced = panels.slices(bootstrap, rows, right)
    drawn: list[np.ndarray] = []
    bootstrap.run(lambda weights: drawn.append(auc(margin, weights)))

    negatives: dict[tuple[str, str], int] = {}
    for row in rows:
        key = (row["user"], row["positive"])
        negatives[key] = negatives.get(key, 0) + 1
    found = {name: bootstrap.metric(statistic) for name, statistic in statistics.items()}
    return {
        "n": len(rows),
        "k": max(negatives.values()),
        "users": bootstrap.users,
        "ties": int((margin == 0).sum()),
        **{name: found[name] for name in found if name.startswith("pair_accuracy")},
        "auc": {"value": float(auc(margin)[0]), **(percentiles(np.concatenate(drawn)) if drawn else {})},
        **({"auc_release": {"value": release_auc(rows, seed)}} if ranked else {}),
        **({"position_bias": found["position_bias"]} if "position_bias" in found else {}),
        **({"place_wins": place_wins(rows)} if "places" in rows[0] else {}),
        "mean_margin": found["mean_margin"],
        "intervals": interval_note(bootstrap),
        "calibration": calibrated(),
        "popularity": popular(),
        "slices": sliced(),
    }
