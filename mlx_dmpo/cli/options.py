"""Options made from the settings' fields, and what every command shares"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import click

from .. import config


def _click_type(annotation: Any, choices: tuple[str, ...]) -> Any:
    kinds = set(get_args(annotation)) or {annotation}
    if int in kinds and choices:
        return click.Choice(choices)
    if str in kinds and choices:
        return click.Choice([c for c in choices if c])
    return int if int in kinds else float if float in kinds else str


def settings_options(cls: type) -> Callable[[Any], Any]:
    """A decorator that adds `-c` and one option a field; only options that were given reach the command."""

    def add(command: Any) -> Any:
        hints = get_type_hints(cls)
        options = [
            click.option(
                "-c", "--config", "config_file", metavar="FILE", help="YAML file of settings; flags win over it."
            )
        ]
        for spec in fields(cls):
            default, hint = config.default_of(spec), hints[spec.name]
            if is_dataclass(default):
                for inner in fields(default):
                    options.append(
                        _option(
                            f"lora_{inner.name}",
                            get_type_hints(type(default))[inner.name],
                            config.default_of(inner),
                            inner.metadata,
                        )
                    )
            elif not isinstance(default, dict):
                options.append(_option(spec.name, hint, default, spec.metadata))
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _option(name: str, hint: Any, default: Any, meta: Any) -> Any:
    flag = f"--{name.replace('_', '-')}"
    told = f"  [default: {default}]" if default not in ("", None, ()) and not isinstance(default, bool) else ""
    if hint is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=meta["help"])
    if isinstance(default, tuple):
        return click.option(flag, name, multiple=True, metavar="NAME", help=meta["help"] + "  May be repeated.")
    return click.option(flag, name, type=_click_type(hint, meta["choices"]), default=None, help=meta["help"] + told)


def given(options: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        k: list(v) if isinstance(v, tuple) else v for k, v in options.items() if v is not None and v != ()
    }
    if "quantize" in found:
        found["quantize"] = int(found["quantize"])
    return found


def settings_of(cls: type, stage: str, config_file: str | None, options: dict[str, Any]) -> Any:
    from .. import assets

    return config.resolve(cls, config_file, given(options), config.read_yaml(assets.settings_file())[0].get(stage))


def say_done(text: str) -> None:
    """What a run of one or several ranks says at its end, once."""
    from ..machine.ranks import world

    world().say(text)


def command_line() -> str:
    return " ".join(["mlx-dmpo", *sys.argv[1:]])


class Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of use
