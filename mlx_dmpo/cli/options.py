"""Options made from the settings' fields, their help in groups, and what every command shares"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import click

from .. import config
from ..machine import console

# The sections of a command's help. A setting that is in none of them comes under "Other options".
GROUPS = {
    "Model": "model quantize quantize_group_size quantize_mode dtype tokenizer base_name",
    "Data": "data split domain domains valid_data skip_bad_rows limit num_negatives max_seq_length candidate_order "
    "both_orders holdout history title_tokens groups user candidates chosen rejected",
    "Prompt": "prompt allow_other_prompt orders calibrate per_token",
    "Ranking": "method budget start calibrate per_token top base max_flip",
    "Server": "host port api_key max_body max_items max_request_tokens max_queue",
    "Adapter": "adapter_path start_adapter fine_tune_type num_layers lora_rank lora_scale lora_dropout lora_keys",
    "Training": "config_file stage preset loss beta gamma num_positives negatives_select dynamic_beta label_smoothing "
    "sft_weight reference_free epochs iters "
    "learning_rate lr_schedule warmup weight_decay optimizer max_grad_norm grad_accumulation_steps steps_per_eval "
    "val_batches best_metric patience resume save_every keep_checkpoints max_bad_steps debug_nan seed",
    "Memory and speed": "batch_size batch_tokens grad_checkpoint frozen_cache_gb frozen_cache memory memory_limit "
    "memory_check scoring tflops caffeinate",
    "Output": "out as_json overwrite steps_per_report report_to project_name plain",
}
# What `--help` shows, the most important first; `--help-all` shows the rest as well.
FIRST = (
    "config_file model data adapter_path start_adapter chosen rejected loss beta prompt learning_rate epochs out "
    "resume history user candidates top as_json base method limit split to overwrite n temperature score eval "
    "liked_above min_liked examples_per_user order negatives items user_column item_column rating_column valid test "
    "stage num_negatives tflops grad_checkpoint host port api_key domains train_users test_users num_layers"
).split()
ALL = "mlx_dmpo.help_all"  # in click's context: whether every option is shown
AT_MOST = 10


class SettingsCommand(click.Command):
    """A command whose help shows its options in groups, the first ten unless all are wanted."""

    def shown(self, everything: bool) -> list[click.Option]:
        options = [p for p in self.params if isinstance(p, click.Option) and not p.hidden]
        first = sorted((str(o.name) for o in options if o.name in FIRST), key=FIRST.index)[:AT_MOST]
        if everything or len(options) <= AT_MOST or not first:
            return options
        return [o for o in options if o.name in first]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        everything = bool(ctx.meta.get(ALL))
        shown = self.shown(everything)
        place = {name: title for title, names in GROUPS.items() for name in names.split()}
        for title in [*GROUPS, "Other options"]:
            rows = [
                r for o in shown if place.get(str(o.name), "Other options") == title if (r := o.get_help_record(ctx))
            ]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
        helps = [("-h, --help", "Show this message.")]
        if (hidden := len(self.shown(True)) - len(shown)) or everything:
            helps.append(("--help-all", "Show every option." if everything else f"Show {hidden} more options."))
        with formatter.section("Help"):
            formatter.write_dl(helps)


def _help_all(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[ALL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


def settings_options(cls: type) -> Callable[[Any], Any]:
    """A decorator that adds `-c`, `--help-all` and one option per field; only given options reach the function."""

    def add(function: Any) -> Any:
        for option in reversed([*_options(cls)]):
            function = option(function)
        return click.option(
            "--help-all", is_flag=True, is_eager=True, expose_value=False, hidden=True, callback=_help_all
        )(function)

    return add


def settings_command(cls: type, short_help: str, group: Any = click) -> Callable[[Any], click.Command]:
    """A decorator: a command, of `group` where one is named, with the options of `cls` in groups."""

    def add(function: Any) -> click.Command:
        return group.command(cls=SettingsCommand, short_help=short_help)(settings_options(cls)(function))

    return add


def _options(cls: type) -> Iterable[Callable[[Any], Any]]:
    hints = get_type_hints(cls)
    yield click.option(
        "-c", "--config", "config_file", metavar="FILE", help="YAML file of settings; flags override it."
    )
    for spec in fields(cls):
        default, hint = config.default_of(spec), hints[spec.name]
        if is_dataclass(default):
            for inner in fields(default):
                kind = get_type_hints(type(default))[inner.name]
                yield _option(f"lora_{inner.name}", kind, config.default_of(inner), inner.metadata)
        elif not isinstance(default, dict):
            yield _option(spec.name, hint, default, spec.metadata)
            if spec.metadata["off"]:
                flag = f"--{spec.name.replace('_', '-')}"
                yield click.option(
                    f"--no-{flag[2:]}", spec.name, flag_value=0.0, type=float, help=f"The same as {flag} 0."
                )


def _click_type(annotation: Any, choices: tuple[str, ...]) -> Any:
    kinds = set(get_args(annotation)) or {annotation}
    if choices:
        return click.Choice([c for c in choices if c])
    return int if int in kinds else float if float in kinds else str


def _option(name: str, hint: Any, default: Any, meta: Any) -> Any:
    flags = [*([meta["short"]] if meta.get("short") else []), f"--{name.replace('_', '-')}"]
    shown = f"  [default: {default}]" if default not in ("", None, ()) and not isinstance(default, bool) else ""
    if bool in (hint, *get_args(hint)):
        return click.option(f"{flags[-1]}/--no-{flags[-1][2:]}", name, default=None, help=meta["help"])
    if isinstance(default, tuple):
        return click.option(*flags, name, multiple=True, metavar="NAME", help=meta["help"] + "  May be repeated.")
    kind = _click_type(hint, meta["choices"])
    return click.option(*flags, name, type=kind, default=None, help=meta["help"] + shown)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as YAML would have them."""
    found: dict[str, Any] = {
        k: list(v) if isinstance(v, tuple) else v for k, v in options.items() if v is not None and v != ()
    }
    if "quantize" in found:
        found["quantize"] = int(found["quantize"])
    return found


def was_given(name: str, config_file: str | None, options: dict[str, Any]) -> bool:
    """Whether a flag or the config file gives a setting."""
    return options.get(name) is not None or bool(config_file and name in config.read_yaml(config_file)[0])


def settings_of(cls: type, stage: str, config_file: str | None, options: dict[str, Any]) -> Any:
    """The settings of a command; `stage` names the embedded model's own. A prepared directory brings the wording of its
    domains. Raises UserError."""
    from .. import assets

    embedded = config.read_yaml(assets.settings_file())[0].get(stage) if stage else None
    settings: Any = config.resolve(cls, config_file, given(options), embedded, console.notice)
    if not isinstance(settings, config.CommonSettings):
        return settings
    from ..data.wording import with_own_domains

    writes = isinstance(settings, config.TrainSettings)  # what it reads is --start-adapter
    adapter = getattr(settings, "start_adapter" if writes else "adapter_path", "")
    if isinstance(adapter, tuple):  # of several, the last one ranks
        adapter = adapter[-1] if adapter else ""
    return with_own_domains(settings, adapter)


def say_done(text: str) -> None:
    """What a run of one or several ranks prints at its end, once."""
    from ..machine.ranks import world

    world().say(text)


def command_line() -> str:
    """The command as it was typed, quoted for a shell."""
    from ..machine import commands

    return commands.join(["mlx-dmpo", *sys.argv[1:]])


class Group(click.Group):
    """Lists its commands in the order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)
