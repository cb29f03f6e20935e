"""Charts as SVG text: axes, ticks, marks. Colours are CSS variables, so that a chart follows light and dark mode.

Every text that is drawn is escaped and stripped of control characters.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from ..machine import console

SERIES = 8  # colours; more series use them again

# Okabe and Ito's colours, which colour-blind readers tell apart; lighter ones on a dark page.
LIGHT = "--ink:#1d2430;--soft:#5b6675;--line:#dfe3e8;--page:#fff;--card:#f6f7f9;--good:#0b7a53;--bad:#b3431a"
LIGHT += ";--s0:#0072b2;--s1:#d55e00;--s2:#009e73;--s3:#b5568f;--s4:#3a8fc4;--s5:#b07a00;--s6:#6a51a3;--s7:#555"
DARK = "--ink:#e7eaee;--soft:#9aa5b4;--line:#343b46;--page:#14181d;--card:#1c2229;--good:#4ec99a;--bad:#f0885a"
DARK += ";--s0:#56b4e9;--s1:#f0884a;--s2:#3ccf9f;--s3:#e39ac4;--s4:#8fc9f0;--s5:#e6b23c;--s6:#b3a2e0;--s7:#bbb"

STYLE = (
    ".chart{display:block;width:100%;height:auto;overflow:visible;"
    "font:12px/1.2 system-ui,-apple-system,'Segoe UI',sans-serif}"
    ".chart text{fill:var(--ink)}.chart .soft{fill:var(--soft)}.chart .strong{font-weight:600}"
    ".chart .grid{stroke:var(--line);stroke-width:1}"
    ".chart .zero{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 3}"
    ".chart path,.chart polyline{fill:none;stroke-width:1.6;stroke-linejoin:round}.chart .thick{stroke-width:2.4}"
    ".chart .faint{opacity:.45}.chart .hollow{fill:var(--page);stroke-width:1.6}"
    + "".join(f".chart .f{i}{{fill:var(--s{i})}}.chart .l{i}{{stroke:var(--s{i})}}" for i in range(SERIES))
)


def variables(selector: str) -> str:
    """CSS that gives `selector` the light colours, and the dark ones where the reader's system is dark."""
    return f"{selector}{{color-scheme:light dark;{LIGHT}}}@media(prefers-color-scheme:dark){{{selector}{{{DARK}}}}}"


def escape(text: object) -> str:
    return html.escape(console.printable(str(text)))


def number(value: float) -> str:
    """A coordinate: one decimal, no trailing zero."""
    return f"{value:.1f}".removesuffix(".0")


def text(x: float, y: float, content: object, *, css: str = "", anchor: str = "start") -> str:
    where = f' text-anchor="{anchor}"' if anchor != "start" else ""
    style = f' class="{css}"' if css else ""
    return f'<text x="{number(x)}" y="{number(y)}"{where}{style}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    ends = " ".join(f'{n}="{number(v)}"' for n, v in (("x1", x1), ("y1", y1), ("x2", x2), ("y2", y2)))
    return f'<line {ends} class="{css}"/>'


def dot(x: float, y: float, radius: float, css: str, label: str = "") -> str:
    """A circle; `label` is shown where the pointer rests on it."""
    title = f"<title>{escape(label)}</title>" if label else ""
    return f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(radius)}" class="{css}">{title}</circle>'


def rect(x: float, y: float, width: float, height: float, css: str) -> str:
    size = f'width="{number(max(width, 0))}" height="{number(max(height, 0))}"'
    return f'<rect x="{number(x)}" y="{number(y)}" {size} class="{css}"/>'


def polyline(points: Iterable[tuple[float, float]], css: str) -> str:
    return f'<polyline points="{" ".join(f"{number(x)},{number(y)}" for x, y in points)}" class="{css}"/>'


def chart(width: float, height: float, parts: Sequence[str], label: str) -> str:
    """The `<svg>` element; `label` is what a screen reader reads."""
    box = f'viewBox="0 0 {number(width)} {number(height)}"'
    return f'<svg class="chart" {box} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def standalone(svg: str) -> str:
    """A chart as a file of its own, with its colours and its background."""
    style = f"<style>{variables('svg')}svg{{background:var(--page)}}{STYLE}</style>"
    head, body = svg.split(">", 1)
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{head}>{style}{body}\n"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / most))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def spread(values: Sequence[float], pad: float = 0.05) -> tuple[float, float]:
    """The range of values with a margin; never empty."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    return low - pad * (high - low), high + pad * (high - low)


class Axes:
    """A plotting area inside a chart, and the way from values to coordinates."""

    def __init__(
        self,
        box: tuple[float, float, float, float],
        x_range: tuple[float, float],
        y_range: tuple[float, float],
    ):
        self.left, self.top, self.right, self.bottom = box
        self.x_range, self.y_range = x_range, y_range

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def x_axis(self, form: str = "g", label: str = "", most: int = 5) -> list[str]:
        parts = []
        for value in ticks(*self.x_range, most):
            parts.append(line(self.x(value), self.top, self.x(value), self.bottom, "grid"))
            parts.append(text(self.x(value), self.bottom + 15, shown(value, form), css="soft", anchor="middle"))
        if label:
            parts.append(text((self.left + self.right) / 2, self.bottom + 31, label, css="soft", anchor="middle"))
        return parts

    def y_axis(self, form: str = "g", most: int = 4) -> list[str]:
        parts = []
        for value in ticks(*self.y_range, most):
            parts.append(line(self.left, self.y(value), self.right, self.y(value), "grid"))
            parts.append(text(self.left - 6, self.y(value) + 4, shown(value, form), css="soft", anchor="end"))
        return parts


def shown(value: float, form: str) -> str:
    """A tick's number: `%` for shares, `g` otherwise; a real minus sign."""
    made = f"{100 * value:g} %" if form == "%" else f"{value:.3g}"
    return made.replace("e-0", "e-").replace("-", "−") if form != "g" or "e" not in made else made.replace("e-0", "e-")
