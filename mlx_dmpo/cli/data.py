"""The commands on data: `prepare` with a subcommand for each source, and `check`"""

from __future__ import annotations

from typing import Any

import click

from .. import config
from ..errors import UserError
from ..machine import console
from .options import Group, command_line, settings_of, settings_options


@click.group(cls=Group)
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
    settings = settings_of(cls, "prepare", config_file, options)
    from ..data.prepare import prepare as run

    for line in run(source, paths, settings, command_line()):
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
    settings = settings_of(config.ConvertSettings, "convert", config_file, options)
    from ..data.convert import convert as run

    path = run(file, settings, command_line(), console.notice)
    click.echo(f"done: {path} (train, valid, test.jsonl, manifest.json)\nnext: mlx-dmpo check {path}")


@click.command()
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
    settings = settings_of(config.CheckSettings, "check", config_file, options)
    for name in ("max_seq_length", "num_negatives", "prompt"):
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

        tokens, more = measure_all(parts, settings)
        findings += more
    report = check.to_json(findings, tokens)
    if as_json:
        click.echo(json.dumps(report, indent=2))  # ASCII: a terminal obeys escapes
    else:
        for finding in findings:
            click.echo(console.printable(finding.line()))
        click.echo(f"{report['errors']} errors, {report['warnings']} warnings")
    return check.exit_code(findings)
