"""Rankings and explanations as text for a terminal"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..machine.console import printable
from .rank import Ranking

if TYPE_CHECKING:
    from .explain import Explanation, TokenScore

BAR = 24  # characters of the longest bar


def _text(*parts: Any, width: int = 110) -> str:
    """rich renderables as text; colours only where the output is a terminal."""
    from rich.console import Console

    out = io.StringIO()
    colours = sys.stdout.isatty()
    console = Console(file=out, width=width, force_terminal=colours, highlight=False, emoji=False, markup=False)
    for part in parts:
        console.print(part)
    return out.getvalue().rstrip("\n")


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return table


def ranking_text(found: Ranking) -> str:
    """The table of `rank`, and a line with what it cost."""
    pairs = found.method == "pairs"
    headings = ["rank", "title", "score", *(["95 % interval", "win probability", "Copeland"] if pairs else [])]
    rows = []
    for r in found.ranking:
        row = [r.rank, printable(r.title), f"{r.score:+.2f}"]
        if pairs:
            row.append(f"{r.low:+.2f} to {r.high:+.2f}")
            row += ["-" if r.win_probability is None else f"{r.win_probability:.2f}", f"{r.copeland:+d}"]
        rows.append(row)
    cost = f"method {found.method}, prompt {found.prompt}: "
    if pairs:
        cost += (
            f"{found.pairs_scored:,} of {found.possible:,} pairs in both printed orders, {found.cyclic_triples:,} "
            "cyclic triples, "
        )
    cost += f"{found.tokens:,} tokens, {found.seconds:.1f} s"
    return _text(_table(headings, rows, (0, 2, 3, 4, 5))) + "\n" + cost


def strip_scale(explanations: Sequence[Explanation]) -> float:
    """The largest difference of any token: what the strongest colour stands for."""
    return max((abs(t.difference) for e in explanations for t in e.tokens), default=0.0) or 1.0


def _strip(tokens: Sequence[TokenScore], scale: float) -> Any:
    """The answers' tokens on one line, blue where they speak for the chosen title and red where they speak
    against it.
    """
    from rich.text import Text

    line = Text()
    for t in tokens:
        share = min(1.0, abs(t.difference) / scale)
        colour = (40, 90, 40 + int(200 * share)) if t.difference >= 0 else (40 + int(200 * share), 60, 40)
        style = f"bold white on rgb({colour[0]},{colour[1]},{colour[2]})" if share > 0.05 else ""
        line.append(printable(t.token) + f"[{t.difference:+.2f}]" * (share > 0.05), style=style)
    return line


def _bar(value: float, scale: float) -> str:
    size = round(BAR * min(1.0, abs(value) / scale))
    return ("+" if value >= 0 else "-") * size


def explanation_text(explanations: Sequence[Explanation]) -> str:
    """What `explain` prints: margins, heat strips, history items, flip sets, the models side by side."""
    last = explanations[-1]
    parts = [
        f'chosen "{printable(last.chosen)}", rejected "{printable(last.rejected)}"',
        "margin (nats; above 0: the chosen title ranks higher):",
        *(f"  {printable(e.model)}: {e.margin:+.3f}" for e in explanations),
        "",
        "tokens of the answers (what each adds to the margin, from 5 % of the strongest on):",
    ]
    text = _text(*(_plain(p) for p in parts))
    scale = strip_scale(explanations)
    text += "\n" + _text(*(_strip(e.tokens, scale) for e in explanations))
    names = [printable(e.model) for e in explanations]
    rows = []
    effects = [{i - len(e.history): h.effect for i, h in enumerate(e.history)} for e in explanations]
    largest = max((abs(v) for e in effects for v in e.values()), default=0.0) or 1.0
    for i in range(-max(len(e.history) for e in explanations), 0):
        title = next(e.history[i].title for e in reversed(explanations) if len(e.history) >= -i)
        found = ["" if i not in e else f"{e[i]:+.3f}" for e in effects]
        rows.append([printable(title), *found, _bar(effects[-1].get(i, 0.0), largest)])
    text += "\n\nhistory: how much each item moves the margin (margin minus margin without it):\n"
    heads = names if len(names) > 1 else ["effect"]
    text += _text(_table(["title", *heads, ""], rows, range(1, 1 + len(heads))))
    for e in explanations:
        text += f"\n{printable(e.model)}: {flip_sentence(e)}"
    return text


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def flip_sentence(e: Explanation) -> str:
    if e.margin == 0:
        return "the two titles are tied, so there is no order to reverse"
    if e.flip is None:
        return f"removing up to {e.searched} history items does not reverse the order"
    items = ", ".join(f'"{printable(t)}"' for t in e.flip)
    return f"without {items} the order is reversed (the smallest such set)"
