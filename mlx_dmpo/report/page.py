"""Numbers -> tables, pictures and one HTML file. Reads run and evaluation directories; never loads a model.

Titles, users and paths are untrusted text: escaped in HTML, stripped of control characters in pictures and terminals.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..machine import console, files, run_directory
from .charts import plot_comparison, plot_margins, plot_training
from .read import _manifest, _read, _score, _training, read_evaluation
from .tables import result_rows

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:14px}th,td{border:1px solid #ccc;padding:.3rem .6rem;text-align:left}
th{background:#f3f3f3}img{max-width:100%}code{background:#f3f3f3;padding:0 .2rem}.scroll{overflow-x:auto}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}th,code{background:#2a2a2a}th,td{border-color:#444}img{background:#fff}}"""


POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a browser's own guard, should an escape be missed
)


HARDEST = 10  # pairs shown that the model ranks most wrongly


def _table(rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(console.printable(c))}</{tag}>" for c in cells) + "</tr>"

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
        if not run_directory.is_complete(directory) or (
            directory in runs and not (directory / "metrics.jsonl").is_file()
        ):
            raise UserError(
                f"{directory}: holds no finished run or evaluation: name a directory that sft, dmpo or evaluate wrote"
            )
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
                raise UserError(
                    f"{directory / 'scores.jsonl'}: mixes free text and ranking pairs: write the directory anew"
                )
            parts += [
                f"<h3>{html.escape(console.printable(names[directory]))}</h3>",
                _picture(plot_margins, "histogram of margins", rows),
            ]
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
            manifest = _read(directory / run_directory.MANIFEST, _manifest)
            parts += [
                f"<h3>{html.escape(console.printable(names[directory]))}</h3>",
                f"<p><code>{html.escape(console.printable(manifest['command']))}</code></p>",
            ]
            parts.append(
                _picture(
                    plot_training,
                    "loss, margin and pair accuracy over the steps",
                    _read(directory / "metrics.jsonl", _training),
                )
            )
            facts = {
                k: manifest.get(k) for k in ("device", "seconds", "steps", "best_step", "peak_memory_gb", "finished")
            }
            parts += [
                f"<details><summary>settings</summary>{_settings_table({**facts, **manifest['config']})}</details>"
            ]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>mlx-dmpo report</title><style>{STYLE}</style>{"".join(parts)}</html>\n'
    with files.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, page)
