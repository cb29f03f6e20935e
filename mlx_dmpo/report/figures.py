"""What the report draws: accuracy, bias, calibration, margins, slices, training curves. Numbers in, SVG text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import svg

WIDE, SMALL = 520, 340  # widths of a chart for a column, and of one of several side by side
POINTS = 150  # of a training curve; more lines of metrics.jsonl are averaged

ORDERS = (
    ("pair_accuracy", "both orders"),
    ("pair_accuracy_positive_first", "liked title printed first"),
    ("pair_accuracy_positive_second", "liked title printed second"),
)

CURVES = (  # key of metrics.jsonl, heading, tick format
    ("loss", "loss", "g"),
    ("margin", "margin, nats", "g"),
    ("pair_accuracy", "pair accuracy", "%"),
    ("learning_rate", "learning rate", "g"),
    ("peak_memory_gb", "peak memory, GB", "g"),
)

Metric = Mapping[str, Any]


def _interval(
    axes: svg.Axes, metric: Metric, y: float, series: int, hollow: bool = False, label: str = ""
) -> list[str]:
    """A value with its interval, on the line y."""
    parts = []
    if "low" in metric:
        css = f"l{series} thick" + (" faint" if hollow else "")
        parts.append(svg.line(axes.x(metric["low"]), y, axes.x(metric["high"]), y, css))
    css = f"l{series} hollow" if hollow else f"f{series}"
    parts.append(svg.dot(axes.x(metric["value"]), y, 3.6 if hollow else 5, css, label))
    return parts


def share_range(metrics: Sequence[Metric], around: float) -> tuple[float, float]:
    """Whole tenths around all values, their intervals and the reference line; a share stays between 0 and 1."""
    values = [m.get(k, m["value"]) for m in metrics for k in ("low", "value", "high")]
    low, high = min([around, *values]), max([around, *values])
    bottom, top = (0.0, 1.0) if around > 0 else (-0.5, 0.5)  # a bias lies between −½ and ½
    return max(bottom, float(np.floor(low * 10 - 0.2) / 10)), min(top, float(np.ceil(high * 10 + 0.2) / 10))


Group = tuple[str, Sequence[tuple[Metric, str]]]


def _rows(
    rows: Sequence[Group],
    reference: float,
    label: str,
    aria: str,
    *,
    width: float = WIDE,
    heading: str = "",
    axis: tuple[float, float] | None = None,
) -> str:
    """Groups of intervals on one axis: a name above each group, chance or zero as a dashed line."""
    step, gap, top = 13, 26, 28 if heading else 8
    height = sum(gap + step * len(found) for _, found in rows)
    x_range = axis or share_range([m for _, found in rows for m, _ in found], reference)
    axes = svg.Axes((14, top, width - 22, top + height + 6), x_range, (0, 1))
    parts = axes.x_axis("%", label)
    if heading:
        parts.append(svg.text(axes.left, 16, _cut(heading, 46), css="strong"))
    parts.append(svg.line(axes.x(reference), axes.top, axes.x(reference), axes.bottom, "zero"))
    y: float = axes.top
    for name, found in rows:
        parts.append(svg.text(axes.left, y + 15, _cut(name, 60), css="soft" if heading else "strong"))
        y += gap
        for series, (metric, what) in enumerate(found):
            hint = f"{name}, {what}: {metric['value']:.3f}"
            parts += _interval(axes, metric, y, series, hollow=series > 0, label=hint)
            y += step
    return svg.chart(width, axes.bottom + 38, parts, aria)


def _cut(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def accuracy(results: Mapping[str, Metric]) -> str:
    """Pair accuracy of each evaluation, debiased and in each printed order."""
    rows = [(name, [(m[key], what) for key, what in ORDERS if key in m]) for name, m in results.items()]
    return _rows(rows, 0.5, "share of pairs ranked right", "pair accuracy of each evaluation, by printed order")


def position_bias(results: Mapping[str, Metric]) -> str | None:
    """How much more often than by chance the first-listed title is preferred."""
    rows = [(n, [(m["position_bias"], "position bias")]) for n, m in results.items() if "position_bias" in m]
    if not rows:
        return None
    return _rows(rows, 0.0, "first-listed preferred, above chance", "position bias of each evaluation")


def popularity(results: Mapping[str, Metric]) -> str | None:
    """Share of pairs in which the more popular title is preferred."""
    found = {n: m["popularity"]["prefers_popular"] for n, m in results.items() if m.get("popularity")}
    rows = [(n, [(m, "prefers the more popular")]) for n, m in found.items() if m["value"] is not None]
    if not rows:
        return None
    return _rows(rows, 0.5, "more popular title preferred", "popularity bias of each evaluation")


def slices(family: str, name: str, found: Sequence[Metric], overall: float, axis: tuple[float, float]) -> str:
    """Accuracy of each slice of one family; dashed: the accuracy on all pairs. `axis` is shared by all evaluations."""
    rows: list[Group] = [(f"{s['name']} (n = {s['n']:,})", [(s["pair_accuracy"], family)]) for s in found]
    how = {"width": SMALL, "heading": f"{family.replace('_', ' ')}: {name}", "axis": axis}
    return _rows(rows, overall, "share of pairs ranked right", (f"accuracy of {name} by {family}"), **how)  # type: ignore[arg-type]


def calibration(name: str, found: Metric) -> str:
    """Confidence σ(|margin|) against how often the preferred title is the liked one; the area of a dot is its pairs."""
    axes = svg.Axes((44, 30, SMALL - 22, 250), (0.5, 1.0), (0.0, 1.0))
    parts = [
        svg.text(axes.left - 36, 16, _cut(name, 42), css="strong"),
        *axes.x_axis("%", "confidence"),
        *axes.y_axis("%"),
    ]
    parts.append(svg.line(axes.x(0.5), axes.y(0.5), axes.x(1), axes.y(1), "zero"))
    most = max((bin["n"] for bin in found["curve"]), default=1)
    for bin in found["curve"]:
        x, accuracy = axes.x(bin["confidence"]), bin["accuracy"]
        if "low" in accuracy:
            parts.append(svg.line(x, axes.y(accuracy["low"]), x, axes.y(accuracy["high"]), "l0 faint thick"))
        hint = f"{bin['n']} pairs: confidence {bin['confidence']:.2f}, right {accuracy['value']:.2f}"
        parts.append(svg.dot(x, axes.y(accuracy["value"]), 2.5 + 6 * (bin["n"] / most) ** 0.5, "f0", hint))
    ece = found["ece"]["value"]
    parts.append(svg.text(axes.right - 4, axes.bottom - 8, f"ECE {ece:.3f}", css="soft", anchor="end"))
    return svg.chart(SMALL, 288, parts, f"calibration of {name}")


def margin_edges(margins: Sequence[np.ndarray], bins: int = 40) -> np.ndarray:
    """Edges of bins that all evaluations share, 0 among them; the outermost 1 % of all margins share the outer bins."""
    every = np.concatenate(margins)
    low, high = (min(0.0, float(np.quantile(every, 0.005))), max(0.0, float(np.quantile(every, 0.995))))
    width = (high - low or 1.0) / (bins - 2)
    return width * np.arange(np.floor(low / width), max(1.0, np.ceil(high / width)) + 1)


def margins(name: str, values: np.ndarray, edges: np.ndarray, tallest: float) -> str:
    """Share of pairs by margin; left of the dashed line: ranked wrong."""
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)
    axes = svg.Axes((44, 30, SMALL - 22, 170), (float(edges[0]), float(edges[-1])), (0.0, tallest * 1.05))
    parts = [svg.text(8, 16, _cut(name, 42), css="strong"), *axes.y_axis("%", 3), *axes.x_axis("g", "margin, nats")]
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        css = "f0" if left >= -1e-9 else "f1"
        top = axes.y(count)
        if count:
            parts.append(svg.rect(axes.x(left) + 0.4, top, axes.x(right) - axes.x(left) - 0.8, axes.bottom - top, css))
    parts.append(svg.line(axes.x(0), axes.top, axes.x(0), axes.bottom, "zero"))
    return svg.chart(SMALL, 206, parts, f"histogram of the margins of {name}")


def tallest_bin(margins: Sequence[np.ndarray], edges: np.ndarray) -> float:
    return max(float(np.histogram(np.clip(m, edges[0], edges[-1]), edges)[0].max() / len(m)) for m in margins)


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means of runs of neighbours."""
    if len(points) <= most:
        return list(points)
    return [tuple(part.mean(axis=0).tolist()) for part in np.array_split(np.array(points, float), most)]


def curves(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """A chart for each of CURVES that any run has; all runs in each. Thin: training; with dots: validation."""
    charts = []
    for key, heading, form in CURVES:
        lines: list[tuple[int, str, list[tuple[float, float]]]] = []
        for series, found in enumerate(runs.values()):
            for prefix in ("", "valid_"):
                points = thinned([(row["step"], row[prefix + key]) for row in found if prefix + key in row])
                if points:
                    lines.append((series % svg.SERIES, prefix, points))
        if not lines:
            continue
        values = [y for _, _, points in lines for _, y in points]
        y_range = (0.0, 1.0) if key == "pair_accuracy" else svg.spread(values)
        x_range = (0.0, max(x for _, _, points in lines for x, _ in points) or 1.0)
        axes = svg.Axes((54, 30, SMALL - 22, 180), x_range, y_range)
        parts = [svg.text(8, 16, heading, css="strong"), *axes.x_axis("g", "step", 4), *axes.y_axis(form)]
        if key in ("pair_accuracy", "margin") and y_range[0] < (half := 0.5 * (key == "pair_accuracy")) < y_range[1]:
            parts.append(svg.line(axes.left, axes.y(half), axes.right, axes.y(half), "zero"))
        for series, prefix, points in lines:
            placed = [(axes.x(x), axes.y(y)) for x, y in points]
            parts.append(svg.polyline(placed, f"l{series} thick" if prefix else f"l{series} faint"))
            if (prefix or len(placed) == 1) and len(placed) <= 40:
                parts += [svg.dot(x, y, 3, f"f{series}") for x, y in placed]
        charts.append(svg.chart(SMALL, 218, parts, f"{heading} over the steps of each run"))
    return charts
