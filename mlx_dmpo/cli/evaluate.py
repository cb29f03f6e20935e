"""The commands that measure: `evaluate` and `report`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import config
from .options import command_line, say_done, settings_of, settings_options


@click.command()
@settings_options(config.EvaluateSettings)
def evaluate(config_file: str | None, **options: Any) -> None:
    """Measure pairwise ranking, order-debiased, with 95 % intervals over users."""
    settings = settings_of(config.EvaluateSettings, "evaluate", config_file, options)
    from ..judge.evaluate import evaluate as run
    from ..judge.evaluate import output_directory
    from ..report import tables

    result = run(settings, command_line())
    out = output_directory(settings)
    table = tables.results_table({settings.adapter_path or settings.model or "base": result})
    say_done(
        f"{table}\ndone: {out} (metrics.json, scores.jsonl, accuracy.png, margins.png)\nnext: mlx-dmpo report {out} --out report.html"
    )


@click.command()
@click.argument("directories", nargs=-1, required=True, metavar="RUN_OR_EVAL_DIR...")
@click.option(
    "--out", default="report.html", show_default=True, metavar="FILE", help="HTML file to write, pictures included."
)
def report(directories: tuple[str, ...], out: str) -> None:
    """Put runs and evaluations side by side in one HTML file."""
    from ..report.page import write_report

    write_report([Path(d) for d in directories], Path(out))
    click.echo(f"done: {out}")
