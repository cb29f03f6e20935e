"""Explanations as one HTML file"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..machine import files
from ..machine.console import printable
from .explain import Explanation
from .show import flip_sentence, strip_scale

TEMPLATE = Path(__file__).with_name("explanation.html")


def explanation_page(explanations: Sequence[Explanation]) -> str:
    """A page without scripts; titles and tokens are escaped."""
    from jinja2 import Environment

    page = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    scale = strip_scale(explanations)
    largest = max((abs(h.effect) for e in explanations for h in e.history), default=0.0) or 1.0
    models = [
        {
            "name": printable(e.model),
            "margin": f"{e.margin:+.3f}",
            "tokens": [
                {
                    "text": printable(t.token) or " ",
                    "strength": round(min(1.0, abs(t.difference) / scale), 3),
                    "side": "for" if t.difference >= 0 else "against",
                    "title": f"{t.side}: {t.difference:+.4f} nats",
                    "shown": f"{t.difference:+.2f}",
                }
                for t in e.tokens
            ],
            "history": [
                {
                    "title": printable(h.title),
                    "effect": f"{h.effect:+.3f}",
                    "side": "for" if h.effect >= 0 else "against",
                    "width": round(100 * abs(h.effect) / largest, 1),
                    "in_flip": e.flip is not None and h.title in e.flip,
                }
                for h in e.history
            ],
            "flip": flip_sentence(e),
        }
        for e in explanations
    ]
    last = explanations[-1]
    return page.render(models=models, chosen=printable(last.chosen), rejected=printable(last.rejected))


def write(explanations: Sequence[Explanation], out: Path) -> None:
    """Raises WriteError where the file cannot be written."""
    with files.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, explanation_page(explanations))
