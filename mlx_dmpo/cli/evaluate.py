"""The commands that measure: `evaluate` and `report`"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .. import config
from ..machine import commands, console
from .options import command_line, say_done, settings_command, settings_of


@settings_command(config.EvaluateSettings, "Measure ranking, with 95 % intervals.")
def evaluate(config_file: str | None, **options: Any) -> None:
    """Measure pairwise ranking in both printed orders, with 95 % intervals over users."""
    settings = settings_of(config.EvaluateSettings, "evaluate", config_file, options)
    from ..judge.evaluate import evaluate as run
    from ..judge.evaluate import output_directory
    from ..report import tables

    if not settings.out:
        settings = replace(settings, out=str(commands.own_directory(output_directory(settings), settings)))
    if settings.data and not settings.model:
        console.notice(
            "note: no --model: this evaluates the embedded toy model, which knows a fictional catalogue only"
        )
    result = run(settings, command_line())
    table = tables.results_table({settings.adapter_path or settings.model or "base": result})
    say_done(
        f"{table}\ndone: {settings.out} (metrics.json, scores.jsonl, accuracy.png, margins.png)\n"
        f"next: {commands.after_evaluation(settings.out)}"
    )


@click.command(short_help="Put runs and evaluations side by side in one HTML file.")
@click.argument("directories", nargs=-1, required=True, metavar="RUN_OR_EVAL_DIR...")
@click.option(
    "--out",
    default="report.html",
    show_default=True,
    metavar="FILE",
    help="HTML file to write; NAME.md and NAME-charts are written beside it.",
)
def report(directories: tuple[str, ...], out: str) -> None:
    """Put runs and evaluations side by side: a self-contained HTML page, Markdown, and SVG charts."""
    from ..judge.compare import for_report
    from ..report.page import write_report

    page, markdown, *charts = write_report(
        [Path(d).expanduser() for d in directories], Path(out).expanduser(), for_report
    )
    where = f", {charts[0].parent} ({len(charts)} charts)" if charts else ""
    click.echo(f"done: {page}, {markdown}{where}")
