"""The commands that train: `sft` and `dmpo`"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .. import config
from ..errors import UserError
from ..machine import console, files, run_directory
from .options import command_line, given, say_done, settings_of, settings_options


@click.command()
@settings_options(config.SftSettings)
def sft(config_file: str | None, **options: Any) -> None:
    """Stage one: teach the model to answer the ranking prompt with the liked item first."""
    settings = settings_of(config.SftSettings, "sft", config_file, options)
    from ..train.run import train

    path = train(settings, command_line())
    model = f" --model {settings.model}" if settings.model else ""
    data = f" --data {settings.data}" if settings.data else ""
    say_done(
        f"done: {path} (adapter, metrics.jsonl, training.png)\nnext: mlx-dmpo dmpo{model}{data} --start-adapter {path}"
    )


@click.command()
@settings_options(config.DmpoSettings)
def dmpo(config_file: str | None, **options: Any) -> None:
    """Stage two: raise the liked item against the average of the disliked ones (or dpo, s-dpo, simpo)."""
    settings = settings_of(config.DmpoSettings, "dmpo", config_file, options)
    if not settings.model and not settings.start_adapter and "start_adapter" not in given(options):
        settings = replace(settings, start_adapter=_embedded_sft())
    if settings.preset == "released-code":
        click.echo(
            "preset released-code: pairwise, reference-free, + SFT: what the DMPO release's trainer computes, not the paper's loss"
        )
    if not settings.start_adapter:
        console.notice("note: no --start-adapter: training starts from the base model, which is also the reference")
    from ..train.run import train

    path = train(settings, command_line())
    model = f" --model {settings.model}" if settings.model else ""
    data = f" --data {settings.data}" if settings.data else ""
    say_done(
        f"done: {path} (adapter, metrics.jsonl, training.png)\nnext: mlx-dmpo evaluate{model}{data} --adapter-path {path}"
    )


def _embedded_sft() -> str:
    path = Path(config.SftSettings().adapter_path)
    if not run_directory.is_complete(path) or files.read_json(path / run_directory.MANIFEST).get("model") != "embedded":
        raise UserError(
            f"{path}: holds no finished sft run of the embedded model: run `mlx-dmpo sft` first, or give --start-adapter"
        )
    return str(path)
