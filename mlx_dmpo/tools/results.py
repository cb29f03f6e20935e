"""The finished cells of a comparison -> one table per data set: JSON, Markdown, and a page"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..judge.compare import compare
from ..machine import console, files
from ..report.read import read_evaluation
from ..report.tables import format_metric
from .reproduce import Cell, Comparison, read_notes

METRICS = (  # key in metrics.json, heading, format
    ("pair_accuracy", "pair accuracy", ".3f"),
    ("pair_accuracy_positive_first", "positive first", ".3f"),
    ("pair_accuracy_positive_second", "positive second", ".3f"),
    ("position_bias", "position bias", "+.3f"),
    ("auc", "AUC", ".3f"),
    *((f"hr@{k}", f"HR@{k}", ".3f") for k in (1, 3, 5, 10)),
    *((f"ndcg@{k}", f"NDCG@{k}", ".3f") for k in (5, 10)),
)
FACTS = ("system", "model", "prompt", "k", "few_shot", "seed", "fit")
RESAMPLES = 2000


def row_of(cell: Cell) -> dict[str, Any]:
    """What a finished cell measured, and what it took."""
    evaluation = cell.steps[-1].directory
    metrics, manifest = read_evaluation(evaluation)
    noted = read_notes(cell)
    return {
        "cell": str(cell.path),
        "data": cell.data,
        "system": cell.system,
        "model": cell.model or None,
        "prompt": cell.prompt or None,
        "k": cell.k or None,
        "few_shot": cell.few_shot or None,
        "seed": cell.seed,
        "fit": manifest.get("fit"),
        "pairs": metrics["n"],
        "users": metrics["users"],
        **{key: metrics[key] for key, _, _ in METRICS if key in metrics},
        "minutes": round(sum(part["seconds"] for part in noted.values()) / 60, 1) if noted else None,
        "peak_gb": round(max(part["peak_bytes"] for part in noted.values()) / 1e9, 2) if noted else None,
        "commands": [" ".join(["mlx-dmpo", *step.arguments]) for step in cell.steps],
    }


def opponent(cell: Cell, all_cells: Sequence[Cell], against: str) -> Cell | None:
    """The finished cell of the system `against` that a cell is compared with: of the same data, model, prompt, users,
    k and seed as far as both have them."""

    def agrees(name: str, other: Cell) -> bool:
        one, two = getattr(cell, name), getattr(other, name)
        return one == two or one in ("", None) or two in ("", None)

    for other in all_cells if cell.system != against else ():
        shared = ("data", "model", "prompt", "few_shot", "k", "seed")
        if other.system == against and other.done and all(agrees(name, other) for name in shared):
            return other
    return None


@cache
def _compared(*evaluations: Path) -> dict[str, Any]:
    """Of finished cells, which change no more: the tables are written again after every cell."""
    return compare(evaluations, resamples=RESAMPLES)


def difference(cell: Cell, other: Cell) -> dict[str, Any]:
    """Pair accuracy of the cell minus that of the other on the same pairs, with a paired interval over users."""
    found = _compared(cell.steps[-1].directory, other.steps[-1].directory)
    row = next(d for d in found["differences"] if d["metric"] == "pair_accuracy")
    kept = {key: row[key] for key in ("difference", "low", "high", "p")}
    return {"against": str(other.path), "pairs": found["n"], **kept}


def over_seeds(all_cells: Sequence[Cell], data: str, against: str) -> list[dict[str, Any]]:
    """Systems that ran with several seeds, minus `against`: each pair's values averaged over the seeds, then paired.

    Left out: one without an opponent of each seed, and one whose runs differ in more than the seed.
    """
    alike: dict[tuple[Any, ...], list[tuple[Cell, Cell]]] = {}
    for cell in all_cells:
        if cell.data == data and cell.done and (other := opponent(cell, all_cells, against)):
            alike.setdefault(tuple(getattr(cell, name) for name in FACTS[:5]), []).append((cell, other))
    rows = []
    for facts, both in alike.items():
        seeds = {cell.seed for cell, _ in both if cell.seed is not None}
        if len(seeds) < 2 or len({other.seed for _, other in both}) < len(seeds):
            continue
        found = _compared(*(cell.steps[-1].directory for side in zip(*both, strict=True) for cell in side))
        minus = {
            row["metric"]: {key: row[key] for key in ("difference", "low", "high", "p")} for row in found["differences"]
        }
        if len(minus) == len(found["differences"]):  # two sides, so one difference of each metric
            spread = next(iter(found["pooled"].values()))
            named = dict(zip(FACTS[:5], facts, strict=True))
            rows.append({**named, "seeds": sorted(seeds), "over_seeds": spread, "minus": minus})
    return rows


def seed_rows(rows: Sequence[Mapping[str, Any]], against: str) -> list[list[str]]:
    """A head and a line for each system of `over_seeds`."""
    facts = [name for name in FACTS[:5] if any(row[name] not in (None, "", 0) for row in rows)]
    named = [
        m
        for m in (("pair_accuracy", "pair accuracy"), ("auc", "AUC"), ("mean_margin", "margin, nats"))
        if any(m[0] in r["minus"] for r in rows)
    ]
    lines = [
        [
            *(name.replace("_", " ") for name in facts),
            "seeds",
            "pair accuracy, mean",
            *(f"{heading}, minus {against}" for _, heading in named),
            "p",
        ]
    ]
    for row in rows:
        line = [console.printable(str(row[name] or "")) for name in facts]
        line += [str(len(row["seeds"])), f"{row['over_seeds']['pair_accuracy']['mean']:.3f}"]
        for metric, _ in named:
            d = row["minus"].get(metric)
            line.append(
                format_metric({"value": d["difference"], "low": d["low"], "high": d["high"]}, "+.3f") if d else "-"
            )
        p = row["minus"]["pair_accuracy"]["p"]
        lines.append([*line, "-" if p is None else f"{p:.3f}"])
    return lines


def collect(plan: Comparison, all_cells: Sequence[Cell]) -> dict[str, list[dict[str, Any]]]:
    """Data set -> rows, of the finished cells in their order."""
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in plan.data}
    for cell in all_cells:
        if cell.done:
            row = row_of(cell)
            other = opponent(cell, all_cells, plan.against) if plan.against else None
            if other:
                row["paired"] = difference(cell, other)
            tables[cell.data].append(row)
    return tables


def text_rows(rows: Sequence[Mapping[str, Any]], against: str) -> list[list[str]]:
    """A head and a line for each row; columns that no row fills are left out."""
    facts = [name for name in FACTS if any(row.get(name) not in (None, "") for row in rows)]
    measured = [m for m in METRICS if any(m[0] in row for row in rows)]
    head = [*(name.replace("_", " ") for name in facts), "users", *(heading for _, heading, _ in measured)]
    paired = any("paired" in row for row in rows)
    head += [*([f"minus {against}, paired", "p"] if paired else []), "minutes", "peak GB"]
    lines = [head]
    for row in rows:
        line = ["" if row.get(name) is None else console.printable(str(row[name])) for name in facts]
        line += [str(row["users"]), *(format_metric(row.get(key, {}), form) for key, _, form in measured)]
        if paired:
            d = row.get("paired")
            interval = {} if not d or d["low"] is None else {"low": d["low"], "high": d["high"]}
            line.append(format_metric({"value": d["difference"], **interval}, "+.3f") if d else "-")
            line.append("-" if not d or d["p"] is None else f"{d['p']:.3f}")
        line += ["-" if row[name] is None else f"{row[name]:g}" for name in ("minutes", "peak_gb")]
        lines.append(line)
    return lines


def missing(all_cells: Sequence[Cell], data: str) -> list[Cell]:
    return [cell for cell in all_cells if cell.data == data and not cell.done]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|")


def _table(given: Sequence[Sequence[str]]) -> str:
    head, *lines = [[_escaped(cell) for cell in line] for line in given]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *lines])


def markdown(
    plan: Comparison,
    data: str,
    rows: Sequence[Mapping[str, Any]],
    pooled: Sequence[Mapping[str, Any]],
    left: Sequence[Cell],
) -> str:
    """A table, the systems over their seeds, what is missing, and the command of each cell."""
    parts = [f"# {plan.name}: {data}\n"]
    if rows:
        parts += [_table(text_rows(rows, plan.against)), "In brackets: 95 % intervals, bootstrap over users.\n"]
    if pooled:
        parts += [
            "Over the seeds, each pair's values averaged before they are paired:\n",
            _table(seed_rows(pooled, plan.against)),
        ]
    if left:
        names = "\n".join(f"- {cell.path}" for cell in left)
        parts.append(f"Not run yet ({len(left)} of {len(left) + len(rows)} cells):\n\n{names}\n")
    commands = "\n".join(command for row in rows for command in row["commands"])
    if commands:
        parts.append(f"## Commands\n\n```\n{commands}\n```\n")
    return "\n".join(parts)


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }
.wide { overflow-x: auto }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 } th, td { border-color: #444 } }
"""


def _html_table(given: Sequence[Sequence[str]]) -> str:
    head, *lines = given
    cells = "".join(f"<th scope='col'>{html.escape(c)}</th>" for c in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in lines)
    return f"<div class='wide'><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


def page(
    plan: Comparison,
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    pooled: Mapping[str, Sequence[Mapping[str, Any]]],
    all_cells: Sequence[Cell],
) -> str:
    """All tables as one HTML file without scripts or outside parts. Every text is escaped."""
    body = [f"<h1>{html.escape(plan.name)}</h1>"]
    for data, rows in tables.items():
        body.append(f"<h2>{html.escape(data)}</h2>")
        if rows:
            body.append(_html_table(text_rows(rows, plan.against)))
        if pooled[data]:
            body.append("<p>Over the seeds, each pair's values averaged before they are paired:</p>")
            body.append(_html_table(seed_rows(pooled[data], plan.against)))
        left = missing(all_cells, data)
        body.append(f"<p>{len(rows)} cells done, {len(left)} not run yet. In brackets: 95 % intervals over users.</p>")
    title = html.escape(plan.name)
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def write_tables(plan: Comparison, all_cells: Sequence[Cell], out: Path) -> list[Path]:
    """OUT/{NAME-DATA.json, NAME-DATA.md, NAME.html}; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    tables = collect(plan, all_cells)
    pooled = {data: over_seeds(all_cells, data, plan.against) if plan.against else [] for data in tables}
    written = []
    for data, rows in tables.items():
        left = missing(all_cells, data)
        path = out / f"{plan.name}-{data}.json"
        found = {"name": plan.name, "data": data, "rows": rows, "over_seeds": pooled[data]}
        files.write_json(path, {**found, "missing": [str(c.path) for c in left]})
        files.write_text(path.with_suffix(".md"), markdown(plan, data, rows, pooled[data], left))
        written += [path, path.with_suffix(".md")]
    files.write_text(out / f"{plan.name}.html", page(plan, tables, pooled, all_cells))
    return [*written, out / f"{plan.name}.html"]
