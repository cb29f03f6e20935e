"""The command that runs a whole comparison: `reproduce`"""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import UserError
from ..machine import console


@click.command(short_help="Run a comparison that a YAML file describes.")
@click.argument("file", metavar="FILE.yaml")
@click.option("--dry-run", is_flag=True, help="Print the cells, which of them are done, and the hours of the others.")
@click.option(
    "--only", multiple=True, metavar="TEXT", help="Run only cells whose path holds this text.  May be repeated."
)
@click.option("--tables", default="", metavar="DIR", help="Where the tables are written.  [default: the file's `out`]")
@click.option(
    "--tflops",
    default=0.0,
    type=click.FloatRange(0),
    help="TFLOP/s to estimate the hours with (measured when left out).",
)
@click.option(
    "--no-hours", is_flag=True, help="With --dry-run: do not estimate hours, which needs the models and their data."
)
def reproduce(file: str, dry_run: bool, only: tuple[str, ...], tables: str, tflops: float, no_hours: bool) -> None:
    """Run a comparison that a YAML file describes: data sets x models x prompts x systems x k x few-shot sizes x seeds.

    \b
    mlx-dmpo reproduce configs/reproduce/ml-100k.yaml --dry-run
    mlx-dmpo reproduce configs/reproduce/ml-100k.yaml                  after a stop, again: finished cells are skipped
    mlx-dmpo reproduce configs/reproduce/ml-100k.yaml --only /sft --tables docs/results

    Each cell is a run directory. The tables are written again after every cell.
    """
    from ..tools import reproduce as tool
    from ..tools.hours import hours_of
    from ..tools.reproduce_data import check_data, make_subsets
    from ..tools.results import write_tables

    if (tflops or no_hours) and not dry_run:
        raise UserError(f"--{'tflops' if tflops else 'no-hours'}: has no effect without --dry-run: leave it out")
    plan = tool.read(file)
    every = tool.cells(plan)
    chosen = [c for c in every if not only or any(text in str(c.path) for text in only)]
    if not chosen:
        raise UserError(f"--only: none of {len(every)} cells has {' or '.join(only)} in its path: see --dry-run")
    if not (dry_run and no_hours):
        check_data(plan)
        make_subsets(plan)
    if dry_run:
        total = 0.0
        for cell in chosen:
            hours = None if cell.done or no_hours else hours_of(cell, tflops * 1e12)
            total += hours or 0
            state = "done" if cell.done else "to do" if hours is None else f"{hours:.2f} h"
            click.echo(f"{state:>8}  {console.printable(str(cell.path))}")
        left = sum(not cell.done for cell in chosen)
        click.echo(f"{len(chosen)} cells, {left} to do" + ("" if no_hours else f", {total:.1f} h"))
        return
    out = Path(tables or plan.out)
    failed: list[Path] = []
    for n, cell in enumerate(chosen, 1):
        for part in (cell.needs, cell):
            if part is None or part.done or part.path in failed:
                continue
            console.notice(f"== {n} of {len(chosen)}: {part.path}")
            try:
                if part.needs and part.needs.path in failed:
                    raise UserError(f"{part.path}: not run: {part.needs.path} failed")
                tool.run_cell(part)
            except UserError as error:  # one cell that cannot run is no reason to leave out the others
                failed.append(part.path)
                console.notice(f"error: {error}")
            write_tables(plan, every, out)
    for path in write_tables(plan, every, out):
        click.echo(f"wrote {console.printable(str(path))}")
    if failed:
        names = ", ".join(map(str, failed))
        raise UserError(f"{len(failed)} of {len(chosen)} cells failed ({names}): see above, then run this again")
