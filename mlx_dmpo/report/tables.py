"""Result tables for the terminal and the page."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..machine import console

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

RANKING = (  # of `evaluate --candidates`
    *((f"hr@{k}", f"HR@{k}", ".3f") for k in (1, 3, 5, 10)),
    *((f"ndcg@{k}", f"NDCG@{k}", ".3f") for k in (5, 10)),
    ("mrr", "MRR", ".3f"),
    ("mean_rank", "mean rank", ".1f"),
)


def format_metric(metric: Mapping[str, Any], form: str) -> str:
    """A value with its interval: "0.712 [0.684, 0.741]"; "-" where there is none."""
    if metric.get("value") is None:
        return "-"
    interval = f" [{metric['low']:{form}}, {metric['high']:{form}}]" if "low" in metric else ""
    return f"{metric['value']:{form}}{interval}"


def result_rows(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A head, then one row an evaluation: how many pairs and users, every metric with its interval."""
    head = ["", "pairs", "users", *(heading for _, heading, _ in COLUMNS), "ties"]
    rows = [
        [
            console.printable(name),
            str(m["n"]),
            str(m["users"]),
            *(format_metric(m.get(key, {}), form) for key, _, form in COLUMNS),
            str(m["ties"]),
        ]
        for name, m in results.items()
    ]
    return [head, *rows]


def results_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for the terminal: one metric a line, one evaluation a column; 95 % intervals over users in brackets.

    Ranking metrics and shares of generated answers follow where an evaluation has them.
    """
    lines: list[Sequence[str]] = list(zip(*result_rows(results), strict=True))
    for key, heading, form in RANKING:
        if any(key in m for m in results.values()):
            lines.append([heading, *(format_metric(m.get(key, {}), form) for m in results.values())])
    for key, heading in (("valid", "valid answers"), ("agrees", "answers agree")):
        if any(m.get("generation") for m in results.values()):
            lines.append(
                [heading, *(format_metric(m.get("generation", {}).get(key, {}), ".3f") for m in results.values())]
            )
    return aligned(lines)


def p_value(p: float | None) -> str:
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def difference_rows(differences: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A head, then one row a difference of `compare`."""
    head = ["metric", "comparison", "difference", "p", "p (Holm)", "McNemar"]
    rows = []
    for d in differences:
        metric = {"value": d["difference"]} | ({} if d["low"] is None else {"low": d["low"], "high": d["high"]})
        names = f"{console.printable(d['a'])} − {console.printable(d['b'])}"
        rows.append(
            [d["metric"], names, format_metric(metric, "+.3f"), *map(p_value, (d["p"], d["p_holm"], d["mcnemar_p"]))]
        )
    return [head, *rows]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns of equal width, the first row underlined."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown_text(text: str) -> str:
    """Untrusted text for Markdown: one line, no markup, no HTML."""
    return html.escape(re.sub(r"([\\`*_\[\]|~])", r"\\\1", console.printable(text)), quote=False)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(markdown_text, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
