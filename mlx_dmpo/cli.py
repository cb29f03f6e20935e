"""The command line: parse, call one function, print. Options are made from the settings' fields in config.py."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click

from . import __version__, config, rundir
from .errors import UserError


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
        options = [click.option("-c", "--config", "config_file", metavar="FILE", help="YAML file of settings; flags win over it.")]
        for spec in fields(cls):
            default, hint = config.default_of(spec), hints[spec.name]
            if is_dataclass(default):
                for inner in fields(default):
                    options.append(
                        _option(f"lora_{inner.name}", get_type_hints(type(default))[inner.name], config.default_of(inner), inner.metadata)
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


def _given(options: dict[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items() if v is not None and v != ()}
    if "quantize" in given:
        given["quantize"] = int(given["quantize"])
    return given


def _settings(cls: type, stage: str, config_file: str | None, options: dict[str, Any]) -> Any:
    from . import assets

    return config.resolve(cls, config_file, _given(options), config.read_yaml(assets.settings_file())[0].get(stage))


def _command_line() -> str:
    return " ".join(["mlx-dmpo", *sys.argv[1:]])


class Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of use


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mlx-dmpo")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def cli(verbose: bool) -> None:
    """Fine-tune a language model into a personal ranker on this Mac: SFT, then DMPO, then pairwise ranking evaluation.

    \b
    mlx-dmpo demo                                                the whole chain on the embedded model and data
    mlx-dmpo sft      --model M --data D --adapter-path runs/sft
    mlx-dmpo dmpo     --model M --data D --start-adapter runs/sft --adapter-path runs/dmpo
    mlx-dmpo evaluate --model M --data D --adapter-path runs/dmpo

    M is whatever mlx-lm loads: a directory, or a hub repository such as mlx-community/Qwen3-8B-4bit.
    D is a directory with train.jsonl, valid.jsonl and test.jsonl, or one file.
    Without flags every command uses the embedded tiny model and its fictional data.
    """


@cli.command()
@settings_options(config.SftSettings)
def sft(config_file: str | None, **options: Any) -> None:
    """Stage one: teach the model to answer the ranking prompt with the liked item first."""
    settings = _settings(config.SftSettings, "sft", config_file, options)
    from .train import train

    path = train(settings, _command_line())
    model = f" --model {settings.model}" if settings.model else ""
    data = f" --data {settings.data}" if settings.data else ""
    click.echo(f"done: {path} (adapter, metrics.jsonl, training.png)\nnext: mlx-dmpo dmpo{model}{data} --start-adapter {path}")


@cli.command()
@settings_options(config.DmpoSettings)
def dmpo(config_file: str | None, **options: Any) -> None:
    """Stage two: raise the liked item against the average of the disliked ones (or dpo, s-dpo, simpo)."""
    settings = _settings(config.DmpoSettings, "dmpo", config_file, options)
    if not settings.model and not settings.start_adapter and "start_adapter" not in _given(options):
        settings = replace(settings, start_adapter=_embedded_sft())
    if settings.preset == "released-code":
        click.echo("preset released-code: pairwise, reference-free, + SFT: what the DMPO release's trainer computes, not the paper's loss")
    if not settings.start_adapter:
        rundir.notice("note: no --start-adapter: training starts from the base model, which is also the reference")
    from .train import train

    path = train(settings, _command_line())
    model = f" --model {settings.model}" if settings.model else ""
    data = f" --data {settings.data}" if settings.data else ""
    click.echo(f"done: {path} (adapter, metrics.jsonl, training.png)\nnext: mlx-dmpo evaluate{model}{data} --adapter-path {path}")


def _embedded_sft() -> str:
    path = Path(config.SftSettings().adapter_path)
    if not rundir.is_complete(path) or rundir.read_json(path / rundir.MANIFEST).get("model") != "embedded":
        raise UserError(f"{path}: holds no finished sft run of the embedded model: run `mlx-dmpo sft` first, or give --start-adapter")
    return str(path)


@cli.command()
@settings_options(config.EvaluateSettings)
def evaluate(config_file: str | None, **options: Any) -> None:
    """Measure pairwise ranking, order-debiased, with 95 % intervals over users."""
    settings = _settings(config.EvaluateSettings, "evaluate", config_file, options)
    from . import report
    from .evaluate import evaluate as run
    from .evaluate import output_directory

    result = run(settings, _command_line())
    click.echo(report.results_table({settings.adapter_path or settings.model or "base": result}))
    out = output_directory(settings)
    click.echo(f"done: {out} (metrics.json, scores.jsonl, accuracy.png, margins.png)\nnext: mlx-dmpo report {out} --out report.html")


@cli.command()
@click.argument("directories", nargs=-1, required=True, metavar="RUN_OR_EVAL_DIR...")
@click.option("--out", default="report.html", show_default=True, metavar="FILE", help="HTML file to write, pictures included.")
def report(directories: tuple[str, ...], out: str) -> None:
    """Put runs and evaluations side by side in one HTML file."""
    from .report import write_report

    write_report([Path(d) for d in directories], Path(out))
    click.echo(f"done: {out}")


@cli.command()
@click.option("--out", default="runs/demo", show_default=True, metavar="DIR", help="Directory to write.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of both training stages.")
def demo(out: str, seed: int) -> None:
    """The whole chain on the embedded model and data, in a few minutes: sft, dmpo, evaluate, report."""
    from .demo import demo as run

    run(Path(out), seed)


@cli.command()
@click.option("--model", default="qwen3-0.6b", show_default=True, help="Built-in name (qwen3-0.6b to qwen3-32b, -4bit or -8bit at the end), model directory, or config.json.")  # fmt: skip
@click.option("--data", default="", metavar="D", help="Measure the lengths of this data with --tokenizer's tokens (default: assumed lengths).")  # fmt: skip
@click.option("--tokenizer", default="", metavar="DIR", help="Directory of the tokenizer for --data (default: --model, where it is a directory).")  # fmt: skip
@click.option("--history", default=22, show_default=True, type=click.IntRange(1), help="Assumed items of a history, without --data.")
@click.option("--title-tokens", default=5, show_default=True, type=click.IntRange(1), help="Assumed tokens of a title, without --data.")
@click.option("--groups", default=100, show_default=True, type=click.IntRange(1), help="Assumed training groups, without --data.")
@click.option("-k", "--num-negatives", default=5, show_default=True, type=click.IntRange(1), help="Negatives of a group.")
@click.option("--stage", default="dmpo", show_default=True, type=click.Choice(["sft", "dmpo"]), help="What is trained.")
@click.option("--batch-size", default=config.TrainSettings().batch_size, show_default=True, type=click.IntRange(1), help="Groups run at once.")  # fmt: skip
@click.option("--max-seq-length", default=config.TrainSettings().max_seq_length, show_default=True, type=click.IntRange(16), help="Longest prompt with answer, in tokens, with --data.")  # fmt: skip
@click.option("--num-layers", default=-1, show_default=True, type=click.IntRange(-1), help="Adapt this many of the last layers; -1 adapts all.")  # fmt: skip
@click.option("--lora-rank", default=config.Lora().rank, show_default=True, type=click.IntRange(1), help="Rank of the LoRA matrices.")
@click.option("--lora-keys", multiple=True, metavar="NAME", help="Linear layers to adapt (default: all). May be repeated.")
@click.option("--optimizer", default="adamw", show_default=True, type=click.Choice(["adamw", "adam", "sgd", "adafactor", "muon", "lion"]), help="Optimiser.")  # fmt: skip
@click.option("--grad-checkpoint", is_flag=True, help="Recompute each layer in the backward pass.")
@click.option("--dtype", default="16", show_default=True, type=click.Choice(["16", "32"]), help="Bits of an activation, and of an unquantised weight.")  # fmt: skip
@click.option("--epochs", default=3.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Passes over the groups.")
@click.option("--tflops", default=0.0, type=click.FloatRange(0), help="The rate that a step reaches; without it a few seconds of this machine's own matrix products tell.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def plan(**options: Any) -> None:
    """Will it fit, and how long will it take: memory, FLOPs and time of a training run before it starts.

    \b
    mlx-dmpo plan --model qwen3-8b-4bit -k 5 --history 36 --batch-size 1
    mlx-dmpo plan --model M --data D --grad-checkpoint --tflops 10
    """
    from .plan import run, told

    found = run(**options)
    if options["as_json"]:
        import json

        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(told(found))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, for a bug report.")
def doctor(as_json: bool) -> None:
    """What is installed, on which device it runs, what is slow here and how to mend it."""
    from .doctor import examine, told

    found = examine()
    if as_json:
        import json

        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(told(found))


def main(arguments: list[str] | None = None) -> None:
    """Exit codes: 0 done; 2 what the user can mend, one line on stderr; 130 interrupted; 1 a fault of ours."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verbose = "--verbose" in arguments
    try:
        code = cli.main(arguments, prog_name="mlx-dmpo", standalone_mode=False)
        raise SystemExit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        raise SystemExit(0) from None
    except (UserError, click.ClickException) as error:
        if verbose:
            traceback.print_exc()
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        rundir.notice("error: " + " ".join(text.split()))
        raise SystemExit(2) from None
    except (KeyboardInterrupt, click.Abort):
        rundir.notice("interrupted")
        raise SystemExit(130) from None
    except Exception as error:
        if verbose:
            traceback.print_exc()
        rundir.notice(
            f"fault: {type(error).__name__}: {error} (a fault of mlx-dmpo: run again with --verbose before the command and report it)"
        )
        raise SystemExit(1) from None
