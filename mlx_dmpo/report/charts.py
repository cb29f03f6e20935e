"""Pictures of results, training and data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..machine import console, files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = {"loss": "loss", "margin": "margin", "pair_accuracy": "pair accuracy"}

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
)  # Okabe and Ito: distinct for colour-blind readers too


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    with files.atomic(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as a box; no news to the user
        figure.savefig(temporary, dpi=130, format="png")


def _plain(text: str) -> str:
    """For matplotlib, to which $ and \\ are mathematics."""
    return console.printable(text).replace("\\", "\\\\").replace("$", r"\$")


def plot_comparison(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Pair accuracy, debiased and in each printed order, with intervals, for each evaluation."""
    figure = _figure(1.8 + 1.6 * max(2, len(results)), 4)
    axes = figure.add_subplot()
    series = (
        ("pair_accuracy", "both orders"),
        ("pair_accuracy_positive_first", "positive first"),
        ("pair_accuracy_positive_second", "positive second"),
    )
    for s, (key, label) in enumerate(series):
        shown = [(i, m[key]) for i, m in enumerate(results.values()) if key in m]  # free text has no printed orders
        values = [m["value"] for _, m in shown]
        low = [m["value"] - m.get("low", m["value"]) for _, m in shown]  # few users have no interval
        high = [m.get("high", m["value"]) - m["value"] for _, m in shown]
        places = [i + 0.27 * (s - 1) for i, _ in shown]
        axes.bar(places, values, 0.25, label=label, color=COLOURS[s], alpha=1.0 if s == 0 else 0.55)
        axes.errorbar(
            places,
            values,
            [[max(0.0, v) for v in low], [max(0.0, v) for v in high]],
            fmt="none",
            ecolor="black",
            capsize=3,
            linewidth=1,
        )
    axes.axhline(0.5, color="grey", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(results)), [_plain(name) for name in results])
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of pairs ranked right")
    axes.set_title("Pairwise accuracy, 95 % intervals over users (dashed: chance)", fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False, fontsize=8)
    _save(figure, path)


def plot_margins(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """How the margins lie: summed over both orders, and in each."""
    figure = _figure(7, 4)
    axes = figure.add_subplot()
    ranked = "positive_first" in rows[0]
    orders = {
        order: [r[order]["chosen_logp"] - r[order]["rejected_logp"] for r in rows]
        for order in (("positive_first", "positive_second") if ranked else ())
    }
    summed = [r["margin"] for r in rows]
    axes.hist(summed, bins=40, color=COLOURS[0], label="summed over both orders" if ranked else "in the given prompt")
    for colour, (order, values) in zip(COLOURS[1:], orders.items(), strict=False):
        axes.hist(values, bins=40, histtype="step", linewidth=1.5, color=colour, label=order.replace("_", " "))
    axes.axvline(0, color="grey", linewidth=1, linestyle="--")
    right, wrong = ("liked ranked first", "disliked ranked first") if ranked else ("chosen", "rejected")
    axes.set_xlabel(f"margin: log p({right}) − log p({wrong}), nats")
    axes.set_ylabel("pairs")
    axes.set_title("Right of the dashed line: ranked right", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def plot_training(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss, margin and pair accuracy over the steps of a run, training and validation (lines of metrics.jsonl)."""
    figure = _figure(11, 3.4)
    for place, (key, label) in enumerate(CURVES.items(), 1):
        axes = figure.add_subplot(1, 3, place)
        for prefix, name, colour, marker in (
            ("", "training", COLOURS[0], ""),
            ("valid_", "validation", COLOURS[1], "o"),
        ):
            points = [(line["step"], line[prefix + key]) for line in lines if prefix + key in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, label=name)
        if key == "pair_accuracy":
            axes.axhline(0.5, color="grey", linewidth=1, linestyle="--")
            axes.set_ylim(0, 1)
        axes.set_xlabel("step")
        axes.set_title(label, fontsize=10)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def plot_preparation(domains: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """One page of a prepared data set.

    For each domain: ratings (values, how many liked, how many disliked: arrays of one length), per_user and
    popularity (arrays of
    counts), history and negatives (a list of lengths for each split).
    """
    import numpy as np

    figure = _figure(11, 6.5)
    ratings, per_user, popularity, history, negatives, users = figure.subplots(2, 3).ravel()
    alone = len(domains) == 1
    for d, (name, charts) in enumerate(domains.items()):
        label, colour = _plain(name), COLOURS[d % len(COLOURS)]
        values, liked, disliked = charts["ratings"]
        if alone and len(values) <= 20:
            ratings.bar(range(len(values)), disliked, color=COLOURS[1], label="disliked")
            ratings.bar(range(len(values)), liked, bottom=disliked, color=COLOURS[0], label="liked")
            ratings.set_xticks(range(len(values)), [f"{v:g}" for v in values])
        else:
            ratings.step(values, np.cumsum(liked + disliked), where="post", color=colour, label=f"{label}, cumulative")
            ratings.set_xscale(
                "log" if ratings.get_xscale() == "log" or (values.min() > 0 and values.max() > 20) else "linear"
            )
        for axis, counts in ((per_user, charts["per_user"]), (popularity, charts["popularity"])):
            counts = np.sort(counts[counts > 0])[::-1]
            rank = np.unique(np.geomspace(1, len(counts), 500).astype(int))
            axis.loglog(rank, counts[rank - 1], color=colour, label=label)
        for s, split in enumerate(charts["history"]):
            how = {
                "color": COLOURS[s] if alone else colour,
                "linestyle": ("-", "--", ":")[s],
                "label": split if alone else f"{label}, {split}",
            }
            for axis, lengths in ((history, charts["history"][split]), (negatives, charts["negatives"][split])):
                if lengths:
                    axis.ecdf(lengths, **how)
            place, size = s + 0.8 * d / len(domains), len(charts["history"][split])
            users.bar(place, size, 0.75 / len(domains), color=colour, label=None if alone or s else label)
            users.text(place, size, f"{size:,}", ha="center", va="bottom", fontsize=8)
        users.set_xticks(range(len(charts["history"])), list(charts["history"]))
    for axis in (history, negatives):
        axis.set_xlim(left=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis, x, y, title in (
        (ratings, "rating", "ratings", "Ratings"),
        (per_user, "users, most active first", "ratings of the user", "Activity"),
        (popularity, "titles, most rated first", "ratings of the title", "Popularity"),
        (history, "liked titles in the history", "share of users with at most so many", "Histories"),
        (negatives, "negatives of the user", "share of users with at most so many", "Negatives"),
        (users, "", "users", "Splits"),
    ):
        axis.set_xlabel(x, fontsize=9)
        axis.set_ylabel(y, fontsize=9)
        axis.set_title(title, fontsize=10)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    _save(figure, path)
