"""The commands on data: `prepare` with a subcommand for each source, and `check`"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import click

from .. import config
from ..machine import console
from .options import Group, command_line, given, settings_command, settings_of


@click.group(cls=Group, short_help="Turn ratings into train, valid and test examples.")
def prepare() -> None:
    """Turn the ratings that you have into train, valid and test examples.

    \b
    mlx-dmpo prepare movielens ml-1m --out data/movies
    mlx-dmpo prepare letterboxd letterboxd-me --catalogue data/movies --out data/mine
    mlx-dmpo prepare table ratings.csv --items items.csv --out data/songs
    mlx-dmpo prepare amazon Movies_and_TV_5.json.gz Video_Games_5.json.gz --domains movie,game \\
        --train-domains movie --test-domains game --out data/cross

    In an example, a liked item should rank above items that the user disliked, given the items liked before it.
    There is one example per user, or --examples-per-user. Users of train, valid and test are different people, also
    across domains; a single person's ratings are split by time instead. To read a PATH with another source, write its
    name before it: table:FILE.
    """


def _prepare(source: str, cls: type, paths: tuple[str, ...], config_file: str | None, options: dict[str, Any]) -> None:
    settings = settings_of(cls, "prepare", config_file, options)
    from ..data import release
    from ..data.prepare import prepare as run

    if getattr(settings, "recipe", "") == "dmpo-release":
        release.refuse_rules(settings, given(options))

    for line in run(source, tuple(map(_home, paths)), settings, command_line()):
        click.echo(console.folded(console.printable(line), sys.stdout))


def _home(path: str) -> str:
    """`~` as the home directory, also behind a source's name (table:~/ratings.csv), where a shell leaves it."""
    source, colon, rest = path.partition(":")
    if colon and source.isidentifier():
        return f"{source}:{config.home(rest, path)}"
    return config.home(path, path)


_paths = click.argument("paths", nargs=-1, required=True, metavar="PATH...")


# source -> its settings, its line in the list of commands, its help
SOURCES: dict[str, tuple[type, str, str]] = {
    "movielens": (
        config.MovielensSettings,
        "MovieLens 100K to 32M.",
        "MovieLens 100K, 1M, 10M, or 20M to 32M. PATH is the folder or its archive; its files show which one it is.",
    ),
    "amazon": (
        config.PrepareSettings,
        "Amazon reviews of 2014, 2018 or 2023.",
        """Amazon reviews of 2014, 2018 (json.gz) or 2023 (jsonl).

    PATH is the review file, or a folder that holds one; the meta_* file is looked for beside it.
        """,
    ),
    "bookcrossing": (
        config.PrepareSettings,
        "Book-Crossing.",
        """Book-Crossing. PATH is the folder with the ratings and books files: the original dump, or a copy with commas.

    A rating of 0 means "not rated": such rows are left out and counted.
        """,
    ),
    "lastfm": (
        config.PrepareSettings,
        "Last.fm of HetRec 2011.",
        """Last.fm of HetRec 2011. PATH is the folder with user_artists.dat and artists.dat.

    Play counts are not ratings: an artist is liked if the user played it more often than the median of the user's own
    counts; --liked-quantile sets another quantile, --liked-above an absolute count.
        """,
    ),
    "table": (
        config.TableSettings,
        "Any table of user, item, rating and perhaps time.",
        """Any table of user, item, rating and perhaps time: CSV, TSV, Parquet or JSON, also in an archive.

    Columns are guessed from their names and printed; flags set them by name or place. Without a header line columns are
    called 1, 2, 3, 4: user, item, rating, time, unless their values show another order. ARCHIVE.zip/FILE names a file
    of an archive.
        """,
    ),
    "letterboxd": (
        config.PrepareSettings,
        "Letterboxd.",
        """Letterboxd. PATH is the export, an archive or unpacked (ratings.csv, watched.csv), or one file of it.""",
    ),
    "imdb": (
        config.PrepareSettings,
        "IMDb ratings.",
        "IMDb. PATH is the exported ratings (Const, Your Rating, ...).",
    ),
    "goodreads": (
        config.PrepareSettings,
        "Goodreads library.",
        "Goodreads. PATH is the exported library. A rating of 0 means not rated; books still to be read are left out.",
    ),
    "myanimelist": (
        config.PrepareSettings,
        "MyAnimeList.",
        "MyAnimeList. PATH is the exported XML (gzipped or not) or a CSV. A score of 0 means not rated.",
    ),
    "trakt": (
        config.PrepareSettings,
        "Trakt.",
        "Trakt. PATH is the unpacked JSON export, or one of its files (ratings, watched).",
    ),
    "netflix": (
        config.PrepareSettings,
        "Netflix viewing history.",
        "Netflix. PATH is the viewing history. It has no ratings: add --negatives popularity --catalogue FILE.",
    ),
    "scrobbles": (
        config.PrepareSettings,
        "Last.fm scrobbles.",
        "Last.fm scrobbles as CSV. An artist is liked if played more often than the median of your artists.",
    ),
}


def _add(name: str, cls: type, short: str, text: str) -> None:
    @_paths
    def command(paths: tuple[str, ...], config_file: str | None, **options: Any) -> None:
        _prepare(name, cls, paths, config_file, options)

    command.__name__, command.__doc__ = name, text
    settings_command(cls, short, prepare)(command)


for _name, _source in SOURCES.items():
    _add(_name, *_source)


@settings_command(config.ConvertSettings, "A file of another project's format.", prepare)
@click.argument("file", metavar="FILE")
def convert(file: str, config_file: str | None, **options: Any) -> None:
    """Write ranking examples from a file in another format, split by user.

    \b
    mlx-dmpo prepare convert rec_data_ml_1m_eval_ranking.json --out data/ml-1m
    mlx-dmpo prepare convert train.json --valid-data valid.json --test-data test.json --out data/movies   (TALLRec)
    mlx-dmpo prepare convert lastfm-val.json --domain song -c configs/songs.yaml --out data/lastfm        (S-DPO)

    FILE is the released DMPO JSON, TALLRec's JSON, S-DPO's candidate lists, or any preference file in the release's
    ranking prompt. Preferences in free text hold no titles: give them to sft, dmpo and evaluate as they are
    (--data FILE).
    """
    settings = settings_of(config.ConvertSettings, "convert", config_file, options)
    from ..data.convert import convert as run
    from ..machine import commands

    path = run(_home(file), settings, command_line(), console.notice)
    done = f"done: {path} (train, valid, test.jsonl, manifest.json)"
    click.echo(f"{done}\nnext: {commands.command('check', str(path))}")


@settings_command(config.CheckSettings, "Find what is wrong or suspicious in data.")
@click.argument("data", nargs=-1, required=True, metavar="DATA...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def check(data: tuple[str, ...], as_json: bool, config_file: str | None, **options: Any) -> int:
    """Report what is wrong or suspicious in data, with the rows concerned.

    \b
    mlx-dmpo check data/movies                    a prepared directory: each split, and each pair of splits
    mlx-dmpo check sft.json eval.json             files that should have no user and no pair in common
    mlx-dmpo check data/movies --model M          token counts too, and what sharing the prefix saves

    Exit code 0: clean; 1: warnings; 2: errors.
    """
    settings = settings_of(config.CheckSettings, "check", config_file, options)
    from ..data import check, wording
    from ..prompts import pairwise

    # a prepared directory may have been made with a wording of its own; the config's comes first
    settings = replace(settings, domains=wording.own_domains(tuple(map(_home, data))) | settings.domains)
    domains = pairwise.with_domains(settings.domains)
    parts = check.read_parts(tuple(map(_home, data)), domains, settings.domain)
    findings = check.check(parts)
    tokens: list[dict[str, Any]] = []
    if settings.model:
        from ..tools.lengths import measure_all

        tokens, more = measure_all(parts, settings)
        findings += more
    report = check.to_json(findings, tokens)
    if as_json:
        click.echo(json.dumps(report, indent=2, allow_nan=False))  # ASCII: a terminal obeys escapes
    else:
        for finding in findings:
            click.echo(console.printable(finding.line()))
        click.echo(f"{report['errors']} errors, {report['warnings']} warnings")
    return check.exit_code(findings)
