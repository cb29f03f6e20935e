"""The commands that use a ranker: `rank`, `explain` and `serve`"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .. import config
from ..errors import UserError
from ..machine import console, extras
from .options import SettingsCommand, settings_of, settings_options

NOT_HERE = ("num_negatives", "skip_bad_rows")  # settings of training and evaluation without a meaning here


def _command(cls: type, short_help: str) -> Callable[[Any], click.Command]:
    """A command with the options of `cls` in groups, without those that have no effect here."""

    def add(function: Any) -> click.Command:
        function = settings_options(cls)(function)
        function.__click_params__ = [o for o in function.__click_params__ if o.name not in NOT_HERE]
        return click.command(cls=SettingsCommand, short_help=short_help)(function)

    return add


def _stdin(settings: Any) -> str | None:
    """Standard input, where nothing else gives the history."""
    if settings.history or settings.user or sys.stdin is None or sys.stdin.isatty():
        return None
    try:
        raw = getattr(sys.stdin, "buffer", None)  # sys.stdin itself hides what is not UTF-8 in some locales
        return sys.stdin.read() if raw is None else raw.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:  # a directory, or another encoding
        raise UserError(f'standard input: cannot be read ({error}): write {{"history": [titles]}} in UTF-8') from None


def _check_out(settings: Any) -> None:
    """Raises UserError for an --out that cannot be a file, before any work is done."""
    from ..machine import files

    if settings.out:
        out = Path(settings.out)
        files.check_place(out)
        with files.writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)


def _request(settings: Any) -> Any:
    from ..use.inputs import read_data, read_request

    data = read_data(settings.data, settings.domain, settings.domains)
    found = read_request(data, settings.history, settings.user, settings.candidates, _stdin(settings), console.notice)
    return data, found


def _say_work(job: Any, candidates: int, settings: Any) -> None:
    """Prints how many pairs a long ranking compares, and the flags that shorten it.

    Raises UserError for a --start that changes nothing.
    """
    from ..use.rank import ALL_PAIRS

    if settings.start == "items" and not job.starts_from_items:
        raise UserError("--start: every pair of these candidates is compared: leave it out, or add a --budget")
    if job.pairs_to_compare and candidates > ALL_PAIRS:
        possible = candidates * (candidates - 1) // 2
        console.notice(
            f"note: {candidates:,} candidates: {job.pairs_to_compare:,} of {possible:,} pairs are compared; "
            "--budget N compares fewer, --candidates FILE ranks fewer"
        )


@_command(config.RankSettings, "Rank titles for one user.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def rank(as_json: bool, config_file: str | None, **options: Any) -> int:
    """Rank titles for one user: the catalogue, or your own list.

    \b
    mlx-dmpo rank --model M --data D --adapter-path runs/dmpo --user 42 --top 10
    mlx-dmpo rank --model M --data D --history "Heat (1995)" --history "Ronin (1998)" --candidates tonight.txt
    echo '{"history": ["Heat (1995)"], "candidates": ["Casino (1995)", "Babe (1995)"]}' | mlx-dmpo rank --json

    Typed titles are matched to the catalogue of --data; a note says which title was taken. Ctrl-C prints the best order
    so far.
    """
    settings = settings_of(config.RankSettings, "evaluate", config_file, options)
    from ..machine import files, memory
    from ..use.rank import run
    from ..use.ranker import Ranker, check_settings, settings_for
    from ..use.show import ranking_text

    check_settings(settings, settings.adapter_path)
    data, request = _request(settings)
    _check_out(settings)
    with memory.memory_limits(settings):
        ranker = Ranker.open(settings_for(settings), settings.adapter_path, data.domain)
        job = ranker.job(request.history, request.candidates)
        _say_work(job, len(request.candidates), settings)
        try:
            found = run(job, ranker.scoring)
        except KeyboardInterrupt:
            if not job.scored:
                raise
            found = job.ranking()
            console.notice(f"interrupted after {found.pairs_scored} pairs: the best order so far")
    code = 0 if found.finished else 130
    found = found.top(settings.top)
    text = json.dumps(found.to_json(), ensure_ascii=True, allow_nan=False)
    click.echo(text if as_json else ranking_text(found))
    if settings.out:
        files.write_json(Path(settings.out), found.to_json())
        console.notice(f"done: {settings.out}")
    return code


@_command(config.ExplainSettings, "Explain why one title ranks above another.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def explain(as_json: bool, config_file: str | None, **options: Any) -> None:
    """Explain why one title ranks above another.

    Tokens of the answers, history items, and the smallest set of items whose removal reverses the order.

    \b
    mlx-dmpo explain --model M --data D --adapter-path runs/dmpo --user 42 --out why.html
    mlx-dmpo explain --model M --data D --base --adapter-path runs/sft --adapter-path runs/dmpo \\
        --history "Heat (1995)" --history "Ronin (1998)" --chosen "Casino (1995)" --rejected "Babe (1995)"

    Without --chosen and --rejected the first two titles of the ranking are explained. docs/explain.md says what the
    numbers show.
    """
    settings = settings_of(config.ExplainSettings, "evaluate", config_file, options)
    from ..machine import memory
    from ..use.explain import to_json
    from ..use.rank import run
    from ..use.ranker import Ranker, check_settings, pair_job, settings_for, top_pair

    if settings.chosen and settings.rejected:
        for name in ("candidates", "budget", "method", "start"):
            if getattr(settings, name) != getattr(config.ExplainSettings(), name):
                raise UserError(f"--{name}: --chosen and --rejected name the pair, and nothing is ranked: leave it out")
    adapters = list(settings.adapter_path)
    for adapter in adapters or [""]:
        check_settings(settings, adapter)
    data, request = _request(settings)
    _check_out(settings)
    chosen, rejected = (
        data.catalogue.match(t, console.notice) if t else "" for t in (settings.chosen, settings.rejected)
    )
    for name in ("chosen", "rejected"):
        if getattr(settings, name) and not {"chosen": chosen, "rejected": rejected}[name]:
            raise UserError(f"--{name}: the title is empty: give a title, or leave the flag out")
    names = ["", *adapters] if settings.base or not adapters else adapters
    found: list[Any] = []
    prompts: list[str] = []
    with memory.memory_limits(settings):
        for adapter in reversed(names):  # the last one names the pair
            ranker = Ranker.open(settings_for(settings), adapter, data.domain)
            prompts.insert(0, ranker.prompt)
            if not chosen or not rejected:
                job = pair_job(ranker, request.history, request.candidates, chosen, rejected)
                _say_work(job, len(job.candidates), settings)
                chosen, rejected = top_pair(run(job, ranker.scoring), chosen, rejected)
            found.insert(0, ranker.explain(request.history, chosen, rejected, max_flip=settings.max_flip))
            del ranker
    if len(set(prompts)) > 1:
        console.notice(f"note: the prompts differ ({', '.join(prompts)}): the margins are not on one scale")
    if as_json:
        click.echo(json.dumps(to_json(found), ensure_ascii=True, allow_nan=False))
    else:
        from ..use.show import explanation_text

        click.echo(explanation_text(found))
    if settings.out:
        from ..use.html import write

        write(found, Path(settings.out))
        console.notice(f"done: {settings.out}")


@_command(config.ServeSettings, "Serve the ranker over HTTP, with a page.")
def serve(config_file: str | None, **options: Any) -> None:
    """Serve the ranker over HTTP, with a page to try it out. Needs the packages starlette and uvicorn.

    \b
    mlx-dmpo serve --model M --data D --adapter-path runs/dmpo           then open http://127.0.0.1:8765
    curl http://127.0.0.1:8765/v1/rerank -H 'Content-Type: application/json' \\
        -d '{"query": ["Heat (1995)"], "documents": ["Casino (1995)", "Babe (1995)"]}'

    docs/serve.md describes the endpoints, the limits and the statuses. Ctrl-C or SIGTERM: waiting requests are
    answered first.
    """
    settings = settings_of(config.ServeSettings, "evaluate", config_file, options)
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise extras.not_installed("serve", str(error.name), extras.SERVE) from None
    from ..use.ranker import check_settings
    from ..use.serve import run

    check_settings(settings, settings.adapter_path)
    run(settings)
