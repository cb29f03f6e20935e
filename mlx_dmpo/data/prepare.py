"""The body of `prepare`: sources -> histories -> splits -> train, valid, test and items.jsonl, a picture and a
manifest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import MovielensSettings, PrepareSettings
from ..errors import UserError
from ..machine import files, run_directory
from ..machine.progress import Progress, track
from ..report import charts
from . import splits, summary
from .advice import advice, extreme
from .examples import SCORES, Rankings, Scores, read_scores, split_examples, units_per_second
from .release import write_release
from .sources import SOURCES, BadRows, Ratings
from .sources.catalogue import read_catalogue
from .splits import DRAWN, SPLITS
from .summary import Domain
from .titles import Catalogue, catalogue, normalize, years_differ


def prepare(source: str, paths: Sequence[str], settings: PrepareSettings, command: str = "prepare") -> list[str]:
    """Writes the directory and returns the lines that sum it up. Raises UserError; then nothing is written."""
    started = time.time()
    _check(settings)
    inputs = _inputs(source, paths)
    if isinstance(settings, MovielensSettings) and settings.recipe == "dmpo-release":
        if len(inputs) > 1:
            raise UserError(f"{paths[1]}: recipe dmpo-release takes one folder: name MovieLens-1M only")
        return write_release(inputs[0][1], settings, command)
    scores = None
    if settings.negatives.startswith(SCORES):
        scores = read_scores(Path(settings.negatives.removeprefix(SCORES)))
    further = read_catalogue(Path(settings.catalogue), settings.encoding) if settings.catalogue else None
    taken: dict[str, str] = {}
    domains: list[Domain] = []
    for n, (kind, path) in enumerate(inputs):
        bad = BadRows(settings.skip_bad_rows)
        ratings = SOURCES[kind](path, settings, bad)
        name = _name(n, ratings, inputs, settings, domains)
        domains.append(_domain(name, ratings, bad, settings, scores, taken, further))
    run = _write(domains, scores, settings, command, started)
    written = "train, valid, test and items.jsonl" + (", users.jsonl" if any(d.users for d in domains) else "")
    return [*summary.lines(domains), f"done: {run} ({written}, summary.png)", *summary.following(domains, run)]


def _check(settings: PrepareSettings) -> None:
    """Checks that need several settings. Raises UserError."""
    if not settings.out:
        raise UserError("--out: no directory to write: name one")
    if run_directory.is_complete(Path(settings.out)) and not settings.overwrite:
        raise UserError(f"{settings.out}: holds a finished run: name another --out, or add --overwrite")
    if settings.negatives not in ("disliked", *DRAWN) and not settings.negatives.startswith(SCORES):
        raise UserError(
            f"--negatives: {settings.negatives!r} is not a choice: give disliked, uniform, popularity or scores:FILE"
        )
    if settings.negatives in DRAWN and not settings.num_negatives:
        raise UserError("--num-negatives: 0 takes all disliked items, but these are drawn: give a number")
    if settings.few_shot and settings.train_users == 0:
        raise UserError("--few-shot: there are no training users to take them from: raise --train-users")
    if settings.max_interactions and settings.max_interactions < settings.min_liked + settings.min_disliked:
        raise UserError(
            f"--max-interactions: {settings.max_interactions} cannot hold {settings.min_liked} liked and "
            f"{settings.min_disliked} disliked: raise it"
        )
    if settings.recipe == "paper":
        for name in ("examples_per_user", "split"):
            if getattr(settings, name) not in ("", "1", "user"):
                raise UserError(
                    f"--{name.replace('_', '-')}: recipe paper has one example a user: leave one of them out"
                )


def _inputs(source: str, paths: Sequence[str]) -> list[tuple[str, Path]]:
    """(source, path) of each PATH; one that begins with the name of a source is of that source."""
    found = []
    for path in paths:
        kind, colon, rest = path.partition(":")
        found.append((kind, Path(rest)) if colon and kind in SOURCES else (source, Path(path)))
    return found


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _name(n: int, ratings: Ratings, inputs: Sequence[Any], settings: PrepareSettings, before: Sequence[Domain]) -> str:
    """The name of the n-th domain. Raises UserError where the names do not fit."""
    names = _listed(settings.domains)
    if names and len(names) != len(inputs):
        raise UserError(f"--domains: {len(names)} names for {len(inputs)} paths: name each")
    if len(set(names)) < len(names):
        raise UserError("--domains: a name is used twice: give each path its own")
    name = names[n] if names else ratings.domain
    if any(d.name == name for d in before):
        raise UserError(f'--domains: two paths have domain "{name}": name them, as in --domains old,new')
    return name


def _domain(
    name: str,
    ratings: Ratings,
    bad: BadRows,
    settings: PrepareSettings,
    scores: Scores | None,
    taken: dict[str, str],
    further: tuple[dict[str, int], str] | None,
) -> Domain:
    """One source's ratings as examples. Raises UserError where a split stays empty, with what would fill it."""
    ratings = _rated(ratings, settings)
    if further and settings.title_years and years_differ(ratings.titles.values(), further[0]):
        settings = replace(settings, title_years=False)
        why = (
            "years end most titles of the ratings and few of the catalogue, or the reverse, and would tell liked titles"
        )
        ratings = replace(ratings, notes=[*ratings.notes, f"{why} from negatives: they are dropped from both"])
    with Progress(4, f"{name}: titles, order, split", "step") as bar:
        titles = catalogue(ratings.interactions.items, ratings.titles, settings.title_articles, settings.title_years)
        bar.update()
        rule, order = splits.liked_rule(settings, ratings), splits.choose_order(settings, ratings)
        if (titles.of_item[ratings.interactions.item] < 0).all():
            raise UserError(
                f"{ratings.files[-1]}: no title for any item of {ratings.files[0].name}: use the two files of one "
                "download"
            )
        histories = splits.histories(ratings, titles, rule, order, settings.seed)
        settings = splits.for_this(settings, int((np.diff(histories.start) > 0).sum()), ratings.personal)
        bar.update()
        rankings = _rankings(name, ratings, titles, histories, order, settings, scores, further)
        eligible, unfit = splits.eligible_users(histories, settings, len(rankings.titles))
        wanted = _wanted(name, len(eligible), settings)
        users = [histories.users[u] for u in eligible]
        by_split = {"train": users} if settings.split == "time" else splits.assign(users, wanted, settings, taken)
        bar.update()
        examples, scored = split_examples(rankings, by_split)
        bar.update()
    counted = summary.counts(ratings, bad, histories, titles, eligible, unfit, examples)
    counted["users_left_over"] = len(eligible) - len({u for found in by_split.values() for u in found})
    why = ", ".join(f"{n:,} {reason}" for reason, n in unfit.items())
    for split in _needed(wanted, settings):
        if not examples[split]:
            fix = advice(histories, rule, settings, len(rankings.titles))
            if len(eligible) >= len(SPLITS) and settings.split != "time":
                fix = "lower --train-users, --valid-users and --test-users"
            raise UserError(
                f"{ratings.files[0]}: no user left for {split}: {len(eligible):,} of {counted['users']:,} are eligible"
                f"{why and f' ({why})'}: {fix}"
            )
    if scores and not scored.total():
        raise UserError(
            f"{scores.path}: no pair of it belongs to a chosen user: score the data that these settings give, then "
            "choose by it"
        )
    notes = [*ratings.notes, *([further[1]] if further else [])]
    notes += summary.notes(bad, titles, histories, ratings.interactions.items, examples, scored if scores else None)
    notes += _short(examples, wanted, settings)
    if rankings.dropped.total():
        notes.append(
            f"{rankings.dropped.total():,} liked items are not used as positives: no negative from the same period"
        )
    ids = [*titles.ids, *([] for _ in rankings.titles[len(titles.titles) :])]
    return Domain(
        name,
        ratings.name,
        settings.split,
        ratings.files,
        summary.rules(rule, order, settings, bool(histories.liked.all())),
        notes,
        counted,
        examples,
        summary.items(name, rankings.titles, ids, histories, rankings.popularity),
        summary.users(name, rankings, ratings.attributes, examples),
        summary.charts(histories, splits.popularity(histories, len(titles.titles)), examples),
    )


def _rated(ratings: Ratings, settings: PrepareSettings) -> Ratings:
    """Without the rows that --unrated names; with a note on a value that may mean the same.

    Raises UserError if none is left.
    """
    i, notes = ratings.interactions, list(ratings.notes)
    if settings.unrated is not None:
        keep = i.rating != settings.unrated
        notes.append(f"{int((~keep).sum()):,} ratings of {settings.unrated:g} left out: not rated (--unrated)")
        i = i.where(keep)
    elif ratings.scale is None and not ratings.liked_quantile and len(i.rating):
        notes += filter(None, [extreme(i.rating)])
    if not len(i.user):
        raise UserError(f"{ratings.files[0]}: no row can be used: check the file's columns, or name another")
    return replace(ratings, interactions=i, notes=notes)


def _rankings(
    name: str,
    ratings: Ratings,
    titles: Catalogue,
    h: splits.Histories,
    order: str,
    settings: PrepareSettings,
    scores: Scores | None,
    further: tuple[dict[str, int], str] | None,
) -> Rankings:
    """What makes the examples; titles of the catalogue come after those of the ratings."""
    all_titles = list(titles.titles)
    place = {title: n for n, title in enumerate(all_titles)}
    popularity = splits.popularity(h, len(all_titles)).tolist()

    def at(raw: str) -> int | None:
        title = normalize(raw, settings.title_articles, settings.title_years)
        if not title:
            return None
        if title not in place:
            place[title] = len(all_titles)
            all_titles.append(title)
            popularity.append(0)
        return place[title]

    for raw, weight in (further[0] if further else {}).items():
        n = at(raw)
        if n is not None:
            popularity[n] += weight
    seen = {user: [n for raw in raws if (n := at(raw)) is not None] for user, raws in ratings.seen.items()}
    times = ratings.interactions.time[h.row] if order == "time" and ratings.interactions.time is not None else None
    return Rankings(
        name,
        h,
        all_titles,
        settings,
        scores,
        np.array(popularity, np.int64),
        seen,
        times,
        units_per_second(times),
        bool(h.rating.min() < h.rating.max()),
    )


def _wanted(name: str, eligible: int, settings: PrepareSettings) -> dict[str, int]:
    """Users of each split that a domain gives."""
    trains = not settings.train_domains or name in _listed(settings.train_domains)
    tests = not settings.test_domains or name in _listed(settings.test_domains)
    return splits.sizes(eligible, settings, trains, tests)


def _needed(wanted: Mapping[str, int], settings: PrepareSettings) -> list[str]:
    """Splits that must not stay empty: all that users are wanted for; by default at least train and test."""
    if settings.split == "time":
        return list(SPLITS)
    given = {split: getattr(settings, f"{split}_users") for split in SPLITS}
    trains = bool(wanted["train"] or wanted["valid"] or not wanted["test"])
    needed = [split for split in SPLITS if wanted[split]]
    if trains and given["train"] is None and "train" not in needed:
        needed.append("train")
    if given["test"] is None and "test" not in needed and not settings.test_domains:
        needed.append("test")
    return needed


def _short(examples: Mapping[str, Sequence[Any]], wanted: Mapping[str, int], s: PrepareSettings) -> Iterable[str]:
    """Splits with fewer users than were requested."""
    if s.split == "time":
        return
    for split, number in wanted.items():
        users = len({e.user for e in examples[split]})
        if users < number:
            yield f"{split}: {users:,} users instead of {number:,}: no more are eligible"


def _write(
    domains: Sequence[Domain], scores: Scores | None, settings: PrepareSettings, command: str, started: float
) -> Path:
    """The directory; its manifest comes last."""
    named = {*_listed(settings.train_domains), *_listed(settings.test_domains)}
    unknown = sorted(named - {d.name for d in domains})
    if unknown:
        raise UserError(
            f'--train-domains and --test-domains: "{unknown[0]}" is not a domain here: there are '
            f"{', '.join(d.name for d in domains)}"
        )
    try:
        with run_directory.RunDirectory(
            settings.out, command, settings, overwrite=settings.overwrite, flag="--out"
        ) as run:
            run.started = started
            for split in SPLITS:
                _write_rows(run.path / f"{split}.jsonl", (e.to_json() for d in domains for e in d.examples[split]))
            _write_rows(run.path / "items.jsonl", (item for d in domains for item in d.items))
            _write_rows(run.path / "users.jsonl", (user for d in domains for user in d.users))
            charts.plot_preparation({d.name: d.charts for d in domains}, run.path / "summary.png")
            for name, file in track([(d.name, file) for d in domains for file in d.files], "hash the inputs", "file"):
                run.inputs[f"{name}/{file.name}"] = files.sha256(file)
            for read in [scores.path] if scores else []:
                run.input(read)
            if settings.catalogue:
                path = Path(settings.catalogue)
                run.input(path / "items.jsonl" if path.is_dir() else path)
            found = {
                d.name: {"source": d.source, "rules": d.rules, "notes": d.notes, "counts": d.counts} for d in domains
            }
            run.finish("cpu", domains=found, split="time" if any(d.split == "time" for d in domains) else "user")
    except OSError as error:
        raise UserError(
            f"{settings.out}: cannot be written ({error.strerror or error}): free some space or name another --out"
        ) from None
    return run.path


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A JSON lines file; none where there are no rows; an earlier file is removed."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    if text:
        files.write_text(path, text)
    else:
        path.unlink(missing_ok=True)
