"""Rows of scores.jsonl -> ranking metrics with intervals. numpy in, numbers out; a pair is a row, a margin is all it shows.

Intervals are 95 % percentile bootstraps over users: a user's rows are drawn together, as they are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

CHUNK = 2_000_000  # numbers of a resampling matrix at once


def wins(difference: np.ndarray) -> np.ndarray:
    """1 where positive, ½ at a tie, else 0.  (n,) -> (n,)."""
    return (difference > 0) + 0.5 * (difference == 0)


def _resample(users: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """How often each user is drawn.  users (n,) indices 0..U-1 -> yields (b, U) float counts, `resamples` rows in all."""
    rng = np.random.default_rng(seed)
    count = int(users.max()) + 1
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples)


def auc(margin: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Chance that a pair's margin exceeds a mirrored pair's, ties ½: AUC of {m_i} against {-m_j}.

    Each pair is one instance of "liked minus disliked" and one of "disliked minus liked"; the rank statistic of Mann and
    Whitney over all n x n of them.  margin (n,), weights (b, n) -> (b,); without weights (1,).
    """
    weights = np.ones((1, len(margin))) if weights is None else weights
    order = np.argsort(-margin, kind="stable")
    mirrored = -margin[order]  # ascending
    below = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(weights[:, order], axis=1)], axis=1)
    left, right = np.searchsorted(mirrored, margin, "left"), np.searchsorted(mirrored, margin, "right")
    return (weights * (below[:, left] + below[:, right]) / 2).sum(axis=1) / weights.sum(axis=1) ** 2


def release_auc(rows: Sequence[Mapping[str, Any]], seed: int) -> float | None:
    """The DMPO release's AUC: one prompt a pair, a coin keeps one of its two answers, raw summed log-probs pooled over users.

    The prompt is the one that the file printed (`source_positive_first`), or else one drawn. Kept for comparison only:
    pooled raw log-probs rank long titles below short ones. None where the coin leaves one class empty.
    """
    coins = np.random.default_rng([seed, 1]).random((len(rows), 2)) < 0.5
    scores, labels = [], []
    for row, (first, keep_chosen) in zip(rows, coins, strict=True):
        prompt = row["positive_first" if row.get("source_positive_first", bool(first)) else "positive_second"]
        scores.append(prompt["chosen_logp" if keep_chosen else "rejected_logp"])
        labels.append(bool(keep_chosen))
    score, label = np.array(scores), np.array(labels)
    if label.all() or not label.any():
        return None
    unlike = np.sort(score[~label])
    ranks = (np.searchsorted(unlike, score[label], "left") + np.searchsorted(unlike, score[label], "right")) / 2
    return float(ranks.mean() / len(unlike))


def place_wins(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """How often the candidate printed in each place of a list has the highest score, over the lists that are so long."""
    longest = max(len(row["places"]) for row in rows)
    return [float(np.mean([r["places"][p] for r in rows if len(r["places"]) > p])) for p in range(longest)]


def ranking_metrics(rows: Sequence[Mapping[str, Any]], *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Metrics of an evaluation, each as {"value", "low", "high"}; n pairs of `users` users, k the most negatives of an example.

    pair_accuracy                   share of pairs whose margin, summed over both printed orders, is positive; a tie is ½
    pair_accuracy_positive_first    the same in the prompts that print the positive first
    pair_accuracy_positive_second   the same in those that print it second
    auc                             of the summed margins (see `auc`)
    auc_release                     the release's own statistic (see `release_auc`), without an interval
    position_bias                   share of prompts in which the first-listed wins, minus ½ (minus 1 / candidates in a list)
    place_wins                      of prompts that print a list: share of prompts which each place wins
    mean_margin                     mean of the summed margins, nats

    Rows with "given" in place of the two orders (free text, and titles scored one by one) have no printed order: the numbers that speak of one are left out.

    Raises ValueError for no rows, or a margin that is not finite.
    """
    if not rows:
        raise ValueError("no rows to measure")
    names = {name: i for i, name in enumerate(dict.fromkeys(row["user"] for row in rows))}
    users = np.array([names[row["user"]] for row in rows])
    orders = ("positive_first", "positive_second") if "given" not in rows[0] else ("given",)
    differences = [
        np.array([row[order]["chosen_logp"] - row[order]["rejected_logp"] for row in rows], np.float64)
        for order in orders
    ]
    margin = np.array([row["margin"] for row in rows], np.float64)
    for row, value in zip(rows, sum(differences, margin), strict=True):
        if not np.isfinite(value):
            raise ValueError(f"user {row['user']}: a log-prob is not finite")
    means = {"pair_accuracy": wins(margin), "mean_margin": margin}
    if len(orders) == 2:
        first, second = map(wins, differences)
        means |= {
            "pair_accuracy_positive_first": first,
            "pair_accuracy_positive_second": second,
            # the first-listed wins where the positive does if it is listed first, and where it does not if listed second
            "position_bias": (first + 1 - second) / 2 - 0.5,
        }
    if "places" in rows[0]:  # prompts that print a list: how often its first place wins, above the share by chance
        means["position_bias"] = np.array([row["places"][0] - 1 / len(row["places"]) for row in rows])
    statistics: dict[str, list[np.ndarray]] = {name: [] for name in [*means, "auc"]}
    counts = _resample(users, resamples, seed)
    step = max(1, CHUNK // len(rows))
    for start in range(0, resamples, step):
        weights = counts[start : start + step][:, users].astype(np.float64)
        total = weights.sum(axis=1)
        for name, values in means.items():
            statistics[name].append(weights @ values / total)
        statistics["auc"].append(auc(margin, weights))

    def told(name: str, value: float) -> dict[str, float]:
        low, high = np.percentile(np.concatenate(statistics[name]), [2.5, 97.5])
        return {"value": value, "low": float(low), "high": float(high)}

    negatives: dict[tuple[str, str], int] = {}
    for row in rows:
        key = (row["user"], row["positive"])
        negatives[key] = negatives.get(key, 0) + 1
    ranked = len(orders) == 2
    return {
        "n": len(rows),
        "k": max(negatives.values()),
        "users": len(names),
        "ties": int((margin == 0).sum()),
        **{name: told(name, float(means[name].mean())) for name in means if name.startswith("pair_accuracy")},
        "auc": told("auc", float(auc(margin)[0])),
        **({"auc_release": {"value": release_auc(rows, seed)}} if ranked else {}),
        **(
            {"position_bias": told("position_bias", float(means["position_bias"].mean()))}
            if "position_bias" in means
            else {}
        ),
        **({"place_wins": place_wins(rows)} if "places" in rows[0] else {}),
        "mean_margin": told("mean_margin", float(margin.mean())),
    }
