"""The command line: parse, call one function, print. Options are made from the settings' fields in config.py."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click

from .. import __version__, config
from ..errors import Interrupted, UserError
from ..machine import console, files, run_directory
from .compare import compare


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


def _given(options: dict[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {
        k: list(v) if isinstance(v, tuple) else v for k, v in options.items() if v is not None and v != ()
    }
    if "quantize" in given:
        given["quantize"] = int(given["quantize"])
    return given


def _settings(cls: type, stage: str, config_file: str | None, options: dict[str, Any]) -> Any:
    from .. import assets

    return config.resolve(cls, config_file, _given(options), config.read_yaml(assets.settings_file())[0].get(stage))


def _done(text: str) -> None:
    """What a run of one or several ranks says at its end, once."""
    from ..machine.ranks import world

    world().say(text)


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
    mlx-dmpo prepare  movielens ml-1m --out D                    your ratings as training and test examples
    mlx-dmpo sft      --model M --data D --adapter-path runs/sft
    mlx-dmpo dmpo     --model M --data D --start-adapter runs/sft --adapter-path runs/dmpo
    mlx-dmpo evaluate --model M --data D --adapter-path runs/dmpo
    mlx-dmpo export   --model M --adapter-path runs/dmpo         one model directory for mlx-lm, or (--to peft) for PEFT

    M is whatever mlx-lm loads: a directory, or a hub repository such as mlx-community/Qwen3-8B-4bit.
    D is a directory with train.jsonl, valid.jsonl and test.jsonl, one file in any of the formats of docs/data.md, or a data set of the hub.
    Without flags every command uses the embedded tiny model and its fictional data.
    """


@cli.group(cls=Group)
def prepare() -> None:
    """Turn the ratings that you already have into train, valid and test examples.

    \b
    mlx-dmpo prepare movielens ml-1m --out data/movies
    mlx-dmpo prepare table ratings.csv --items items.csv --out data/mine
    mlx-dmpo prepare amazon Movies_and_TV_5.json.gz Video_Games_5.json.gz --domains movie,game \\
        --train-domains movie --test-domains game --out data/cross

    One example a user: the last liked item is to be ranked above items that the user disliked, given the liked items before it.
    Users of train, valid and test are different people, also across domains. A PATH of another source bears its name: table:FILE.
    """


def _prepare(source: str, cls: type, paths: tuple[str, ...], config_file: str | None, options: dict[str, Any]) -> None:
    settings = _settings(cls, "prepare", config_file, options)
    from ..data.prepare import prepare as run

    for line in run(source, paths, settings, _command_line()):
        click.echo(console.printable(line))


_paths = click.argument("paths", nargs=-1, required=True, metavar="PATH...")


@prepare.command()
@_paths
@settings_options(config.MovielensSettings)
def movielens(paths: tuple[str, ...], config_file: str | None, **options: Any) -> None:
    """MovieLens 100K, 1M, 10M, or 20M to 32M: PATH is the unpacked folder; its files tell which."""
    _prepare("movielens", config.MovielensSettings, paths, config_file, options)


@prepare.command()
@_paths
@settings_options(config.PrepareSettings)
def amazon(paths: tuple[str, ...], config_file: str | None, **options: Any) -> None:
    """Amazon reviews of 2014, 2018 (json.gz) or 2023 (jsonl): PATH is the review file, or a folder with one; meta_* lies beside it."""
    _prepare("amazon", config.PrepareSettings, paths, config_file, options)


@prepare.command()
@_paths
@settings_options(config.PrepareSettings)
def bookcrossing(paths: tuple[str, ...], config_file: str | None, **options: Any) -> None:
    """Book-Crossing: PATH is the folder with the ratings and books files, the original dump or a comma-separated copy.

    A rating of 0 means "not rated": such rows are left out and counted.
    """
    _prepare("bookcrossing", config.PrepareSettings, paths, config_file, options)


@prepare.command()
@_paths
@settings_options(config.PrepareSettings)
def lastfm(paths: tuple[str, ...], config_file: str | None, **options: Any) -> None:
    """Last.fm of HetRec 2011: PATH is the folder with user_artists.dat and artists.dat.

    Play counts are no ratings: an artist is liked if the user played it more often than the median of the user's own counts;
    --liked-quantile sets another quantile, --liked-above an absolute count.
    """
    _prepare("lastfm", config.PrepareSettings, paths, config_file, options)


@prepare.command()
@_paths
@settings_options(config.TableSettings)
def table(paths: tuple[str, ...], config_file: str | None, **options: Any) -> None:
    """Any table of user, item, rating and perhaps time: CSV, TSV, Parquet or JSON lines, gzipped or not.

    Columns are guessed from their names, told, and settable. A CSV without a header line is taken as user, item, rating, time;
    its columns are then called 1, 2, 3, 4.
    """
    _prepare("table", config.TableSettings, paths, config_file, options)


@prepare.command()
@click.argument("file", metavar="FILE")
@settings_options(config.ConvertSettings)
def convert(file: str, config_file: str | None, **options: Any) -> None:
    """Write ranking examples from a file in another format, split by user.

    \b
    mlx-dmpo prepare convert rec_data_ml_1m_eval_ranking.json --out data/ml-1m
    mlx-dmpo prepare convert train.json --valid-data valid.json --test-data test.json --out data/movies   (TALLRec)
    mlx-dmpo prepare convert lastfm-val.json --domain song -c configs/songs.yaml --out data/lastfm        (S-DPO)

    FILE is the released DMPO JSON, TALLRec's JSON, S-DPO's candidate lists, or any preference file in the release's ranking prompt.
    Preferences in free text hold no titles: give them to sft, dmpo and evaluate as they are (--data FILE).
    """
    settings = _settings(config.ConvertSettings, "convert", config_file, options)
    from ..data.convert import convert as run

    path = run(file, settings, _command_line(), console.notice)
    click.echo(f"done: {path} (train, valid, test.jsonl, manifest.json)\nnext: mlx-dmpo check {path}")


@cli.command()
@settings_options(config.SftSettings)
def sft(config_file: str | None, **options: Any) -> None:
    """Stage one: teach the model to answer the ranking prompt with the liked item first."""
    settings = _settings(config.SftSettings, "sft", config_file, options)
    from ..train.run import train

    path = train(settings, _command_line())
    model = f" --model {settings.model}" if settings.model else ""
    data = f" --data {settings.data}" if settings.data else ""
    _done(
        f"done: {path} (adapter, metrics.jsonl, training.png)\nnext: mlx-dmpo dmpo{model}{data} --start-adapter {path}"
    )


@cli.command()
@settings_options(config.DmpoSettings)
def dmpo(config_file: str | None, **options: Any) -> None:
    """Stage two: raise the liked item against the average of the disliked ones (or dpo, s-dpo, simpo)."""
    settings = _settings(config.DmpoSettings, "dmpo", config_file, options)
    if not settings.model and not settings.start_adapter and "start_adapter" not in _given(options):
        settings = replace(settings, start_adapter=_embedded_sft())
    if settings.preset == "released-code":
        click.echo(
            "preset released-code: pairwise, reference-free, + SFT: what the DMPO release's trainer computes, not the paper's loss"
        )
    if not settings.start_adapter:
        console.notice("note: no --start-adapter: training starts from the base model, which is also the reference")
    from ..train.run import train

    path = train(settings, _command_line())
    model = f" --model {settings.model}" if settings.model else ""
    data = f" --data {settings.data}" if settings.data else ""
    _done(
        f"done: {path} (adapter, metrics.jsonl, training.png)\nnext: mlx-dmpo evaluate{model}{data} --adapter-path {path}"
    )


def _embedded_sft() -> str:
    path = Path(config.SftSettings().adapter_path)
    if not run_directory.is_complete(path) or files.read_json(path / run_directory.MANIFEST).get("model") != "embedded":
        raise UserError(
            f"{path}: holds no finished sft run of the embedded model: run `mlx-dmpo sft` first, or give --start-adapter"
        )
    return str(path)


@cli.command()
@settings_options(config.EvaluateSettings)
def evaluate(config_file: str | None, **options: Any) -> None:
    """Measure pairwise ranking, order-debiased, with 95 % intervals over users."""
    settings = _settings(config.EvaluateSettings, "evaluate", config_file, options)
    from ..judge.evaluate import evaluate as run
    from ..judge.evaluate import output_directory
    from ..report import tables

    result = run(settings, _command_line())
    out = output_directory(settings)
    table = tables.results_table({settings.adapter_path or settings.model or "base": result})
    _done(
        f"{table}\ndone: {out} (metrics.json, scores.jsonl, accuracy.png, margins.png)\nnext: mlx-dmpo report {out} --out report.html"
    )


cli.add_command(compare)


@cli.command()
@click.argument("data", nargs=-1, required=True, metavar="DATA...")
@settings_options(config.CheckSettings)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def check(data: tuple[str, ...], as_json: bool, config_file: str | None, **options: Any) -> int:
    """Say what is wrong or suspicious in data, with the rows it is about.

    \b
    mlx-dmpo check data/movies                               a prepared directory: each split, and each two of them
    mlx-dmpo check sft.json eval.json                        files that should have no user and no pair in common
    mlx-dmpo check data/movies --model M                     token counts too, and what sharing the prefix saves

    Exit code 0: clean; 1: warnings; 2: errors.
    """
    settings = _settings(config.CheckSettings, "check", config_file, options)
    for name in ("max_seq_length", "num_negatives"):
        if options[name] is not None and not settings.model:
            raise UserError(f"--{name.replace('_', '-')}: counts tokens, for which --model is needed: add it")
    import json

    from ..data import check
    from ..prompts import pairwise

    domains = pairwise.with_domains(settings.domains)
    parts = check.read_parts(data, domains, settings.domain)
    findings = check.check(parts)
    tokens: list[dict[str, Any]] = []
    if settings.model:
        from ..tools.lengths import measure_all

        tokens, more = measure_all(parts, settings, domains)
        findings += more
    report = check.to_json(findings, tokens)
    if as_json:
        click.echo(json.dumps(report, indent=2))  # ASCII: a terminal obeys escapes
    else:
        for finding in findings:
            click.echo(console.printable(finding.line()))
        click.echo(f"{report['errors']} errors, {report['warnings']} warnings")
    return check.exit_code(findings)


@cli.command()
@settings_options(config.SampleSettings)
def sample(config_file: str | None, **options: Any) -> None:
    """Draw answers to each prompt, with log-probs; or, with --score, margins of all candidate negatives.

    \b
    mlx-dmpo sample --model M --data D --n 10 --temperature 0.8 --top-p 0.95 --top-k 50 --out samples.jsonl
    mlx-dmpo sample --model M --data D --score --out scores.jsonl      then: mlx-dmpo prepare ... --negatives scores:scores.jsonl

    Each negative is one prompt, printed in one order (the file's, or drawn by seed). An answer that ranks the two titles is parsed;
    its log-prob is the policy's, in nats, before temperature, top-p and top-k.
    """
    given = [name for name in ("n", "temperature", "top_p", "top_k", "max_tokens") if options[name] is not None]
    settings = _settings(config.SampleSettings, "evaluate", config_file, options)
    if settings.score and given:
        raise UserError(
            f"--{given[0].replace('_', '-')}: does not apply with --score, which draws no answers: leave one of them out"
        )
    if options["scoring"] is not None and not settings.score:
        raise UserError("--scoring: applies with --score only: leave it out")
    from ..tools.sample import sample as run

    path, told = run(settings)
    click.echo(f"{told}\ndone: {path}")


@cli.command()
@click.argument("directories", nargs=-1, required=True, metavar="RUN_OR_EVAL_DIR...")
@click.option(
    "--out", default="report.html", show_default=True, metavar="FILE", help="HTML file to write, pictures included."
)
def report(directories: tuple[str, ...], out: str) -> None:
    """Put runs and evaluations side by side in one HTML file."""
    from ..report.page import write_report

    write_report([Path(d) for d in directories], Path(out))
    click.echo(f"done: {out}")


@cli.command()
@settings_options(config.ExportSettings)
def export(config_file: str | None, **options: Any) -> None:
    """Hand an adapter to other tools: a fused model directory for mlx-lm (--to mlx), or an adapter for PEFT (--to peft).

    A 4-bit base is dequantised and fused, unless --keep-quantized or --requantize says otherwise. What was written is read back,
    and the difference of its log-probs from those of base and adapter is printed.
    """
    settings = config.resolve(config.ExportSettings, config_file, _given(options))
    from ..tools.export import export as run

    done = run(settings, _command_line())
    click.echo(f"done: {console.printable(str(done.path))} (README.md is its model card)")
    click.echo(str(done.difference) if done.difference else "log-probs were not compared (--examples 0)")
    click.echo("to run it:")
    for line in done.commands:
        click.echo(f"  {console.printable(line)}")


@cli.command()
@click.option("--out", default="runs/demo", show_default=True, metavar="DIR", help="Directory to write.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of both training stages.")
def demo(out: str, seed: int) -> None:
    """The whole chain on the embedded model and data, in a few minutes: sft, dmpo, evaluate, report."""
    from ..tools.demo import demo as run

    run(Path(out), seed)


@cli.command()
@click.option("--model", default="qwen3-0.6b", show_default=True, help="Built-in name (qwen3-0.6b to qwen3-32b, -4bit or -8bit at the end), model directory, or config.json.")  # fmt: skip
@click.option("--data", default="", metavar="D", help="Measure the lengths of this data with --tokenizer's tokens (default: assumed lengths).")  # fmt: skip
@click.option("--tokenizer", default="", metavar="DIR", help="Directory of the tokenizer for --data (default: --model, where it is a directory).")  # fmt: skip
@click.option(
    "--history",
    default=22,
    show_default=True,
    type=click.IntRange(1),
    help="Assumed items of a history, without --data.",
)
@click.option(
    "--title-tokens",
    default=5,
    show_default=True,
    type=click.IntRange(1),
    help="Assumed tokens of a title, without --data.",
)
@click.option(
    "--groups", default=100, show_default=True, type=click.IntRange(1), help="Assumed training groups, without --data."
)
@click.option(
    "-k", "--num-negatives", default=5, show_default=True, type=click.IntRange(1), help="Negatives of a group."
)
@click.option("--stage", default="dmpo", show_default=True, type=click.Choice(["sft", "dmpo"]), help="What is trained.")
@click.option("--batch-size", default=config.TrainSettings().batch_size, show_default=True, type=click.IntRange(1), help="Groups run at once.")  # fmt: skip
@click.option("--batch-tokens", default=config.TrainSettings().batch_tokens, show_default=True, type=click.IntRange(1), help="Tokens run at once.")  # fmt: skip
@click.option("--max-seq-length", default=config.TrainSettings().max_seq_length, show_default=True, type=click.IntRange(16), help="Longest prompt with answer, in tokens, with --data.")  # fmt: skip
@click.option("--num-layers", default=-1, show_default=True, type=click.IntRange(-1), help="Adapt this many of the last layers; -1 adapts all.")  # fmt: skip
@click.option(
    "--lora-rank",
    default=config.Lora().rank,
    show_default=True,
    type=click.IntRange(1),
    help="Rank of the LoRA matrices.",
)
@click.option(
    "--lora-keys", multiple=True, metavar="NAME", help="Linear layers to adapt (default: all). May be repeated."
)
@click.option("--optimizer", default="adamw", show_default=True, type=click.Choice(["adamw", "adam", "sgd", "adafactor", "muon", "lion"]), help="Optimiser.")  # fmt: skip
@click.option("--grad-checkpoint", is_flag=True, help="Recompute each layer in the backward pass.")
@click.option("--dtype", default="16", show_default=True, type=click.Choice(["16", "32"]), help="Bits of an activation, and of an unquantised weight.")  # fmt: skip
@click.option(
    "--epochs", default=3.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Passes over the groups."
)
@click.option("--tflops", default=0.0, type=click.FloatRange(0), help="The rate that a step reaches; without it a few seconds of this machine's own matrix products tell.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def plan(**options: Any) -> None:
    """Will it fit, and how long will it take: memory, FLOPs and time of a training run before it starts.

    \b
    mlx-dmpo plan --model qwen3-8b-4bit -k 5 --history 36 --batch-size 1
    mlx-dmpo plan --model M --data D --grad-checkpoint --tflops 10
    """
    from ..tools.plan import run, told

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
    from ..tools.doctor import examine, told

    found = examine()
    if as_json:
        import json

        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(told(found))


def main(arguments: list[str] | None = None) -> None:
    """Exit codes: 0 done; 2 what the user can mend, one line on stderr; 130, 143 stopped by Ctrl-C, SIGTERM; 1 a fault of ours."""
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
        console.notice("error: " + " ".join(text.split()))
        raise SystemExit(2) from None
    except Interrupted as error:
        console.notice(str(error))
        raise SystemExit(128 + error.signal) from None
    except (KeyboardInterrupt, click.Abort):
        console.notice("interrupted")
        raise SystemExit(130) from None
    except Exception as error:
        if verbose:
            traceback.print_exc()
        console.notice(
            f"fault: {type(error).__name__}: {error} (a fault of mlx-dmpo: run again with --verbose before the command and report it)"
        )
        raise SystemExit(1) from None
