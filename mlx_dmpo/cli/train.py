"""The commands that train: `sft` and `dmpo`"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from .. import config
from ..errors import UserError
from ..machine import commands, console, files, run_directory
from .options import command_line, given, say_done, settings_command, settings_of, was_given


@settings_command(config.SftSettings, "Stage one: learn to answer with the liked item first.")
def sft(config_file: str | None, **options: Any) -> None:
    """Stage one: teach the model to answer the ranking prompt with the liked item first."""
    settings = _ready(settings_of(config.SftSettings, "sft", config_file, options), config_file, options)
    from ..train.run import train

    _done(train(settings, command_line()), settings, config_file)


@settings_command(config.DmpoSettings, "Stage two: rank the liked item above the disliked ones.")
def dmpo(config_file: str | None, **options: Any) -> None:
    """Stage two: rank the liked item above the average of the disliked ones (or dpo, s-dpo, simpo)."""
    settings = settings_of(config.DmpoSettings, "dmpo", config_file, options)
    if not settings.model and not settings.start_adapter and "start_adapter" not in given(options):
        settings = replace(settings, start_adapter=_embedded_sft())
    if settings.preset:
        console.notice(config.describe_preset(settings))
    if not settings.start_adapter:
        console.notice("note: no --start-adapter: training starts from the base model, which is also the reference")
    settings = _ready(settings, config_file, options)
    from ..train.run import train

    _done(train(settings, command_line()), settings, config_file)


def _ready(settings: Any, config_file: str | None, options: dict[str, Any]) -> Any:
    from ..train.inputs import refuse_other_shape

    # a resumed run's own file lists every setting, given or not
    from_file = config.read_yaml(config_file)[0] if config_file and not settings.resume else {}
    refuse_other_shape(settings, {**from_file, **given(options)})
    settings = _own_directory(settings, config_file, options)
    _notes(settings)
    return settings


def _done(path: Path, settings: Any, config_file: str | None) -> None:
    from ..data.rows import has_split

    if settings.domains:
        worded = yaml.safe_dump({"domains": settings.domains}, allow_unicode=True)
        files.write_text(path / commands.DOMAINS, worded)
    has_test = bool(settings.data) and has_split(settings.data, "test")
    then = commands.after_training(settings, path, has_test=has_test, config_file=config_file)
    say_done(f"done: {path} (adapter, metrics.jsonl, training.png)\nnext: {then}")


def _own_directory(settings: Any, config_file: str | None, options: dict[str, Any]) -> Any:
    """The settings with a directory of their own where the default one holds a run on other data."""
    if was_given("adapter_path", config_file, options):
        return settings
    path = commands.own_directory(Path(settings.adapter_path), settings)
    if str(path) == settings.adapter_path:
        return settings
    console.notice(f"note: {settings.adapter_path} holds a run on other data: writing {path}")
    return replace(settings, adapter_path=str(path))


def _notes(settings: Any) -> None:
    if settings.data and not settings.model:
        console.notice(
            "note: no --model: this trains the embedded toy model, which knows a fictional catalogue only; "
            "name a real one, such as --model mlx-community/Qwen3-0.6B-4bit"
        )


def _embedded_sft() -> str:
    path = Path(config.SftSettings().adapter_path)
    if not run_directory.is_complete(path) or files.read_json(path / run_directory.MANIFEST).get("model") != "embedded":
        raise UserError(
            f"{path}: holds no finished sft run of the embedded model: run `mlx-dmpo sft` first, or give "
            "--start-adapter"
        )
    return str(path)
