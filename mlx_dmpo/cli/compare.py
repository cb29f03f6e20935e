"""`mlx-dmpo compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command(short_help="Compare evaluations on the same examples.")
@click.argument("directories", nargs=-1, required=True, metavar="EVAL_DIR...")
@click.option(
    "--against",
    multiple=True,
    type=click.Choice(["popularity", "first-listed"]),
    help="Also compare with a ranker that needs no directory. May be repeated.",
)
@click.option("--resamples", default=2000, show_default=True, type=click.IntRange(100), help="Bootstrap resamples.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the bootstrap.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def compare(directories: tuple[str, ...], against: tuple[str, ...], resamples: int, seed: int, as_json: bool) -> None:
    """Compare evaluations on the same examples: difference, 95 % interval over users, p-values.

    Directories of runs that differ only in the seed are pooled. Examples that not all of them scored are left out of
    the comparison and counted.

    \b
    mlx-dmpo compare runs/dmpo/eval runs/sft/eval
    mlx-dmpo compare runs/dmpo/eval --against popularity --json
    """
    from ..judge.compare import compare as run

    found = run([Path(d).expanduser() for d in directories], against, resamples=resamples, seed=seed)
    click.echo(json.dumps(found, indent=2, allow_nan=False) if as_json else format_comparison(found))


def format_comparison(found: dict[str, Any]) -> str:
    """Lines for the terminal."""
    from ..report import tables

    lines = [f"{found['n']} pairs of {found['users']} users that all evaluations scored"]
    lines += [f"  only in {name}: {len(rows)} pairs, left out" for name, rows in found["only_in"].items()]
    for name, spread in found.get("pooled", {}).items():
        accuracy = spread["pair_accuracy"]
        lines.append(f"  {name}: pair accuracy {accuracy['mean']:.3f} ± {accuracy['spread']:.3f} (standard deviation)")
    return "\n".join([*lines, tables.aligned(tables.difference_rows(found["differences"]))])
