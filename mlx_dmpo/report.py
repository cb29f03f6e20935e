"""Numbers -> tables, pictures and one HTML file. Reads run and evaluation directories; never loads a model.

Titles, users and paths are untrusted text: escaped in HTML, stripped of control characters in pictures and terminals.
"""

from __future__ import annotations

import base64
import html
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import rundir
from .errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito: told apart by everyone

# (metric, heading, format): the columns of a results table
COLUMNS = (
    ("pair_accuracy", "pair accuracy", ".3f"),
    ("pair_accuracy_positive_first", "positive first", ".3f"),
    ("pair_accuracy_positive_second", "positive second", ".3f"),
    ("auc", "AUC", ".3f"),
    ("auc_release", "AUC (release)", ".3f"),
    ("position_bias", "position bias", "+.3f"),
    ("mean_margin", "margin, nats", "+.2f"),
)


def told(metric: Mapping[str, Any], form: str) -> str:
    """A value with its interval: "0.712 [0.684, 0.741]"; "-" where there is none."""
    if metric.get("value") is None:
        return "-"
    interval = f" [{metric['low']:{form}}, {metric['high']:{form}}]" if "low" in metric else ""
    return f"{metric['value']:{form}}{interval}"


def result_rows(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A head, then one row an evaluation: how many pairs and users, every metric with its interval."""
    head = ["", "pairs", "users", *(heading for _, heading, _ in COLUMNS), "ties"]
    rows = [
        [rundir.printable(name), str(m["n"]), str(m["users"]), *(told(m.get(key, {}), form) for key, _, form in COLUMNS), str(m["ties"])]
        for name, m in results.items()
    ]
    return [head, *rows]


def results_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for the terminal: one metric a line, one evaluation a column; 95 % intervals over users in brackets."""
    columns = result_rows(results)
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in zip(*columns, strict=True)]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


# --- reading, with every value that a table or a picture uses checked


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15  # neither NaN nor infinite


def _metric(value: Any, interval: bool = False) -> bool:
    return (
        isinstance(value, dict)
        and (_number(value.get("value")) or (value.get("value") is None and not interval))
        and (("low" not in value and not interval) or (_number(value.get("low")) and _number(value.get("high"))))
    )


def _evaluation(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(_number(value.get(name)) for name in ("n", "users", "ties"))
        and "pair_accuracy" in value  # of the others free text leaves some out
        and all(_metric(value[name], interval=name.startswith("pair_accuracy")) for name, _, _ in COLUMNS if name in value)
    )


def _score(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), str) for name in ("user", "positive", "negative"))
        and _number(value.get("margin"))
        and all(
            isinstance(order, dict) and _number(order.get("chosen_logp")) and _number(order.get("rejected_logp"))
            for order in ([value["given"]] if "given" in value else [value.get("positive_first"), value.get("positive_second")])
        )
    )


def _training(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _number(value.get("step"))
        and all(_number(v) for k, v in value.items() if k.removeprefix("valid_") in CURVES)
    )


def _manifest(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("command"), str) and isinstance(value.get("config"), dict)


def _read(path: Path, fits: Callable[[Any], bool]) -> Any:
    """A JSON file that `fits`, or JSON lines each of which does. Raises UserError for another."""
    if path.suffix == ".json":
        value = rundir.read_json(path)
        if not fits(value):
            raise UserError(f"{path}: holds other values than this program writes: write the directory anew")
        return value
    values = rundir.read_lines(path)
    for n, value in enumerate(values, 1):
        if not fits(value):
            raise UserError(f"{path}: row {n} holds other values than this program writes: write the directory anew")
    if not values:
        raise UserError(f"{path}: is empty: write the directory anew")
    return values


def read_evaluation(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """metrics.json and manifest.json of a finished evaluation. Raises UserError for any other directory."""
    if not rundir.is_complete(directory) or not (directory / "metrics.json").is_file():
        raise UserError(f"{directory}: holds no finished evaluation: name a directory that evaluate wrote")
    return _read(directory / "metrics.json", _evaluation), _read(directory / rundir.MANIFEST, _manifest)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    with rundir.atomic(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as a box; no news to the user
        figure.savefig(temporary, dpi=130, format="png")


def _plain(text: str) -> str:
    """For matplotlib, to which $ and \\ are mathematics."""
    return rundir.printable(text).replace("\\", "\\\\").replace("$", r"\$")


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
        low = [m["value"] - m["low"] for _, m in shown]
        high = [m["high"] - m["value"] for _, m in shown]
        places = [i + 0.27 * (s - 1) for i, _ in shown]
        axes.bar(places, values, 0.25, label=label, color=COLOURS[s], alpha=1.0 if s == 0 else 0.55)
        axes.errorbar(
            places, values, [[max(0.0, v) for v in low], [max(0.0, v) for v in high]], fmt="none", ecolor="black", capsize=3, linewidth=1
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
    ranked = "given" not in rows[0]
    orders = {
        order: [r[order]["chosen_logp"] - r[order]["rejected_logp"] for r in rows]
        for order in (("positive_first", "positive_second") if ranked else ())
    }
    summed = [r["margin"] for r in rows]
    axes.hist(summed, bins=40, color=COLOURS[0], label="summed over both orders" if ranked else "in the given prompt")
    for colour, (order, values) in zip(COLOURS[1:], orders.items(), strict=False):
        axes.hist(values, bins=40, histtype="step", linewidth=1.5, color=colour, label=order.replace("_", " "))
    axes.axvline(0, color="grey", linewidth=1, linestyle="--")
    axes.set_xlabel(
        f"margin: log p({'liked ranked first' if ranked else 'chosen'}) − log p({'disliked ranked first' if ranked else 'rejected'}), nats"
    )
    axes.set_ylabel("pairs")
    axes.set_title("Right of the dashed line: ranked right", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


CURVES = {"loss": "loss", "margin": "margin", "pair_accuracy": "pair accuracy"}


def plot_training(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss, margin and pair accuracy over the steps of a run, training and validation (lines of metrics.jsonl)."""
    figure = _figure(11, 3.4)
    for place, (key, label) in enumerate(CURVES.items(), 1):
        axes = figure.add_subplot(1, 3, place)
        for prefix, name, colour, marker in (("", "training", COLOURS[0], ""), ("valid_", "validation", COLOURS[1], "o")):
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

    For each domain: ratings (values, how many liked, how many disliked: arrays of one length), per_user and popularity (arrays of
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
            ratings.step(values, np.cumsum(liked + disliked), where="post", color=colour, label=f"{label}, cumulated")
            ratings.set_xscale("log" if ratings.get_xscale() == "log" or (values.min() > 0 and values.max() > 20) else "linear")
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


# --- one HTML file

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:14px}th,td{border:1px solid #ccc;padding:.3rem .6rem;text-align:left}
th{background:#f3f3f3}img{max-width:100%}code{background:#f3f3f3;padding:0 .2rem}.scroll{overflow-x:auto}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}th,code{background:#2a2a2a}th,td{border-color:#444}img{background:#fff}}"""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a browser's own guard, should an escape be missed

HARDEST = 10  # pairs shown that the model ranks most wrongly


def _table(rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(rundir.printable(c))}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f'<div class="scroll"><table>{line(rows[0], "th")}{body}</table></div>'


def _picture(draw: Any, alt: str, *arguments: Any) -> str:
    """An image inside the page; `draw(*arguments, path)` makes it."""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "picture.png"
        draw(*arguments, path)
        data = base64.b64encode(io.BytesIO(path.read_bytes()).getvalue()).decode()
    return f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></p>'


def _settings_table(config: Mapping[str, Any]) -> str:
    return _table([["setting", "value"], *([str(k), str(v)] for k, v in config.items() if v not in ("", None, {}, []))])


def _names(directories: Sequence[Path]) -> dict[Path, str]:
    """Each directory's name without what all have in common: runs/demo/sft/eval and runs/demo/dmpo/eval -> sft, dmpo."""
    parts = {d: list(d.absolute().parts) for d in directories}
    if len(parts) > 1:
        while len({p[0] for p in parts.values()}) == 1 and min(map(len, parts.values())) > 1:
            parts = {d: p[1:] for d, p in parts.items()}
    else:
        parts = {d: p[-2:] for d, p in parts.items()}
    names = {d: "/".join(p[:-1] if p[-1] == "eval" and len(p) > 1 else p) for d, p in parts.items()}
    return names if len(set(names.values())) == len(names) else {d: str(d) for d in directories}


def write_report(directories: Sequence[Path], out: Path) -> None:
    """One HTML file of evaluation and training directories, pictures included. Raises UserError for any other directory."""
    evaluations = [d for d in dict.fromkeys(directories) if (d / "metrics.json").is_file()]
    runs = [d for d in dict.fromkeys(directories) if d not in evaluations]
    for directory in (*evaluations, *runs):
        if not rundir.is_complete(directory) or (directory in runs and not (directory / "metrics.jsonl").is_file()):
            raise UserError(f"{directory}: holds no finished run or evaluation: name a directory that sft, dmpo or evaluate wrote")
    parts = ["<h1>mlx-dmpo report</h1>"]
    if evaluations:
        names = _names(evaluations)
        results = {names[d]: read_evaluation(d)[0] for d in evaluations}
        parts += [
            "<h2>Evaluation</h2>",
            "<p>95 % bootstrap intervals over users. Pair accuracy is order-debiased: margins summed over both printed orders.</p>",
        ]
        parts += [_table(result_rows(results)), _picture(plot_comparison, "pair accuracy of each evaluation", results)]
        for directory in evaluations:
            rows = _read(directory / "scores.jsonl", _score)
            if len({"given" in row for row in rows}) > 1:
                raise UserError(f"{directory / 'scores.jsonl'}: mixes free text and ranking pairs: write the directory anew")
            parts += [f"<h3>{html.escape(rundir.printable(names[directory]))}</h3>", _picture(plot_margins, "histogram of margins", rows)]
            worst = sorted(rows, key=lambda r: r["margin"])[:HARDEST]
            parts.append(f"<details><summary>the {len(worst)} pairs of least margin</summary>")
            parts.append(
                _table(
                    [
                        ["user", "liked", "disliked", "margin, nats"],
                        *([r["user"], r["positive"], r["negative"], f"{r['margin']:+.2f}"] for r in worst),
                    ]
                )
            )
            parts.append("</details>")
    if runs:
        names = _names(runs)
        parts.append("<h2>Training</h2>")
        for directory in runs:
            manifest = _read(directory / rundir.MANIFEST, _manifest)
            parts += [
                f"<h3>{html.escape(rundir.printable(names[directory]))}</h3>",
                f"<p><code>{html.escape(rundir.printable(manifest['command']))}</code></p>",
            ]
            parts.append(
                _picture(plot_training, "loss, margin and pair accuracy over the steps", _read(directory / "metrics.jsonl", _training))
            )
            facts = {k: manifest.get(k) for k in ("device", "seconds", "steps", "best_step", "peak_memory_gb", "finished")}
            parts += [f"<details><summary>settings</summary>{_settings_table({**facts, **manifest['config']})}</details>"]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>mlx-dmpo report</title><style>{STYLE}</style>{"".join(parts)}</html>\n'
    with rundir.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    rundir.write_text(out, page)
