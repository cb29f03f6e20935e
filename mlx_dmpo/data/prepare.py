"""The body of `prepare`: sources -> histories -> splits -> train, valid, test and items.jsonl, a picture and a manifest."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..config import MovielensSettings, PrepareSettings
from ..errors import UserError
from ..machine import commands, files, run_directory
from ..prompts.pairwise import DOMAINS
from ..records import RankingExample
from ..report import charts
from . import splits
from .release import write_release
from .sources import SOURCES, BadRows, Ratings
from .splits import SPLITS
from .titles import Catalogue, catalogue

SHOWN = 5  # merged titles told on the terminal; all are in items.jsonl


@dataclass(frozen=True, slots=True, eq=False)
class Domain:
    """One domain of the output, with all that was decided on the way."""

    name: str
    source: str
    files: list[Path]
    rules: list[str]
    notes: list[str]
    counts: dict[str, Any]
    examples: dict[str, list[RankingExample]]
    items: list[dict[str, Any]]
    charts: dict[str, Any]


def prepare(source: str, paths: Sequence[str], settings: PrepareSettings, command: str = "prepare") -> list[str]:
    """Writes the directory and returns the lines that sum it up. Raises UserError; then nothing is written."""
    started = time.time()
    _check(settings)
    if isinstance(settings, MovielensSettings) and settings.recipe:
        if len(paths) > 1:
            raise UserError(f"{paths[1]}: recipe dmpo-release takes one folder: name MovieLens-1M only")
        return write_release(Path(paths[0]), settings, command)
    inputs = _inputs(source, paths)
    scores = (
        splits.read_scores(Path(settings.negatives.removeprefix(splits.SCORES)))
        if settings.negatives.startswith(splits.SCORES)
        else None
    )
    taken: dict[str, str] = {}
    domains: list[Domain] = []
    for n, (kind, path) in enumerate(inputs):
        bad = BadRows(settings.skip_bad_rows)
        ratings = SOURCES[kind](path, settings, bad)
        name = _name(n, ratings, inputs, settings, domains)
        domains.append(_domain(name, ratings, bad, settings, scores, taken))
    run = _write(domains, scores, settings, command, started)
    return [*_summary(domains), f"done: {run} (train, valid, test and items.jsonl, summary.png)", *_next(domains, run)]


def _check(settings: PrepareSettings) -> None:
    """What one field alone cannot say. Raises UserError."""
    if not settings.out:
        raise UserError("--out: no directory to write: name one")
    if run_directory.is_complete(Path(settings.out)) and not settings.overwrite:
        raise UserError(f"{settings.out}: holds a finished run: name another --out, or add --overwrite")
    if settings.negatives not in ("disliked", "uniform", "popularity") and not settings.negatives.startswith(
        splits.SCORES
    ):
        raise UserError(
            f"--negatives: {settings.negatives!r} is not a choice: give disliked, uniform, popularity or scores:FILE"
        )
    if settings.negatives in ("uniform", "popularity") and not settings.num_negatives:
        raise UserError("--num-negatives: 0 takes all disliked items, but these are drawn: give a number")
    if settings.few_shot and not settings.train_users:
        raise UserError("--few-shot: there are no training users to take them from: raise --train-users")
    if settings.max_interactions and settings.max_interactions < settings.min_liked + settings.min_disliked:
        raise UserError(
            f"--max-interactions: {settings.max_interactions} cannot hold {settings.min_liked} liked and {settings.min_disliked} disliked: raise it"
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
        raise UserError("--domains: a name stands twice: give each path its own")
    name = names[n] if names else ratings.domain
    if any(d.name == name for d in before):
        raise UserError(f'--domains: two paths are of domain "{name}": name them, as in --domains old,new')
    return name


def _domain(
    name: str,
    ratings: Ratings,
    bad: BadRows,
    settings: PrepareSettings,
    scores: splits.Scores | None,
    taken: dict[str, str],
) -> Domain:
    """One source's ratings as examples."""
    if not len(ratings.interactions.user):
        raise UserError(f"{ratings.files[0]}: no row can be used: check the file's columns, or name another")
    with tqdm(total=4, desc=f"{name}: titles, order, split", unit="step", disable=None) as bar:
        titles = catalogue(ratings.interactions.items, ratings.titles, settings.title_articles, settings.title_years)
        bar.update()
        rule, order = splits.liked_rule(settings, ratings), splits.choose_order(settings, ratings)
        if (titles.of_item[ratings.interactions.item] < 0).all():
            raise UserError(
                f"{ratings.files[-1]}: no title for any item of {ratings.files[0].name}: use the two files of one download"
            )
        histories = splits.histories(ratings, titles, rule, order, settings.seed)
        bar.update()
        eligible, unfit = splits.eligible_users(histories, settings, len(titles.titles))
        wanted = _wanted(name, settings)
        users = splits.assign([histories.users[u] for u in eligible], wanted, settings, taken)
        bar.update()
        popularity = splits.popularity(histories, len(titles.titles))
        rankings = splits.Rankings(name, histories, titles.titles, settings, scores, popularity)
        examples, scored = splits.split_examples(rankings, users)
        bar.update()
    counts = _counts(ratings, bad, histories, titles, eligible, unfit, examples)
    for split, number in wanted.items():
        if number and not examples[split]:
            why = ", ".join(f"{n:,} {reason}" for reason, n in unfit.items())
            mend = "lower --train-users and --valid-users" if eligible else "lower --min-liked or --min-disliked"
            raise UserError(
                f"{ratings.files[0]}: no user left for {split}: {len(eligible):,} of {counts['users']:,} are eligible{why and f' ({why})'}: {mend}"
            )
    if scores and not scored.total():
        raise UserError(
            f"{scores.path}: no pair of it belongs to a chosen user: score the data that these settings give, then choose by it"
        )
    notes = [*ratings.notes, *_notes(bad, titles, histories, wanted, examples, scored if scores else None)]
    return Domain(
        name,
        ratings.name,
        ratings.files,
        _rules(rule, order, settings),
        notes,
        counts,
        examples,
        _items(name, titles, histories, popularity),
        _charts(histories, popularity, examples),
    )


def _wanted(name: str, settings: PrepareSettings) -> dict[str, int]:
    """Users of each split that a domain gives."""
    trains = not settings.train_domains or name in _listed(settings.train_domains)
    tests = not settings.test_domains or name in _listed(settings.test_domains)
    train = settings.few_shot or settings.train_users
    return {"train": train * trains, "valid": settings.valid_users * trains, "test": settings.test_users * tests}


def _rules(rule: splits.LikedRule, order: str, s: PrepareSettings) -> list[str]:
    """Every rule in words, for the terminal and the manifest."""
    window = (
        f"the last {s.max_interactions} interactions of a user" if s.max_interactions else "all interactions of a user"
    )
    order = {
        "time": "by time, ties in the file's order",
        "file": "in the file's order",
        "random": f"in random order (seed {s.seed})",
    }[order]
    source = {
        "disliked": "of the user's disliked items among them, drawn by seed",
        "uniform": "drawn evenly from items that the user never met",
        "popularity": "drawn by popularity from items that the user never met",
    }.get(
        s.negatives,
        f"of the user's disliked items among them, least margin in {Path(s.negatives).name} first, the rest drawn by seed",
    )
    number = f"up to {s.num_negatives}" if s.num_negatives else "all"
    return [
        rule.told + ", all others disliked",
        f"{window}, {order}; a title met twice counts the last time",
        f"users with at least {s.min_liked} liked and {s.min_disliked} disliked among them",
        "positive: the last liked; history: the liked before it",
        f"negatives: {number} {source}",
        f"users drawn by seed {s.seed}; nobody is in two splits"
        + (f"; few-shot: the first {s.few_shot} of train" if s.few_shot else ""),
        f"titles: articles {'first' if s.title_articles else 'as they are'}, years {'kept' if s.title_years else 'dropped'}",
    ]


def _counts(
    ratings: Ratings,
    bad: BadRows,
    h: splits.Histories,
    titles: Catalogue,
    eligible: Sequence[int],
    unfit: dict[str, int],
    examples: dict[str, list[RankingExample]],
) -> dict[str, Any]:
    users = int((np.diff(h.start) > 0).sum())
    lengths = {s: [len(e.history) for e in es] for s, es in examples.items() if es}
    return {
        "ratings": len(ratings.interactions.user),
        "rows_unreadable": dict(bad.counts),
        "ratings_without_title": h.untitled,
        "items_without_title": int((titles.of_item < 0).sum()),
        "ratings_repeated": h.repeated,
        "ratings_used": len(h.title),
        "liked": int(h.liked.sum()),
        "users": users,
        "titles": len(titles.titles),
        "titles_merged": len(titles.merged),
        "users_eligible": len(eligible),
        "users_unfit": unfit,
        "examples": {split: len(found) for split, found in examples.items()},
        "history": {s: {"min": min(n), "median": float(np.median(n)), "max": max(n)} for s, n in lengths.items()},
        "negatives": {
            s: dict(sorted(Counter(len(e.negatives) for e in es).items())) for s, es in examples.items() if es
        },
    }


def _notes(
    bad: BadRows,
    titles: Catalogue,
    h: splits.Histories,
    wanted: dict[str, int],
    examples: dict[str, list[RankingExample]],
    scored: Counter[str] | None,
) -> Iterator[str]:
    """What was left out, and why."""
    for reason, count in bad.counts.items():
        yield f"{count:,} rows left out: {reason} (first: {bad.first[reason]})"
    if h.untitled:
        yield f"{h.untitled:,} ratings left out: no title for {int((titles.of_item < 0).sum()):,} items"
    if h.repeated:
        yield f"{h.repeated:,} ratings left out: the same user and title again later"
    merged = titles.merged
    if merged:
        shown = "; ".join(f"{titles.titles[t]} ({', '.join(titles.ids[t][:SHOWN])})" for t in merged[:SHOWN])
        yield f"titles of more than one item, which count as one (all in items.jsonl): {len(merged):,}: {shown}{'; ...' if len(merged) > SHOWN else ''}"
    for split, number in wanted.items():
        if len(examples[split]) < number:
            yield f"{split}: {len(examples[split]):,} users instead of {number:,}: no more are eligible"
    if scored is not None:
        yield "negatives by margin: " + ", ".join(
            f"{scored[split]} of {len(found)} {split} users" for split, found in examples.items()
        )


def _items(name: str, titles: Catalogue, h: splits.Histories, popularity: np.ndarray) -> list[dict[str, Any]]:
    """The catalogue: every title with the items that it stands for, and how often it was rated and liked."""
    liked = np.bincount(h.title[h.liked], minlength=len(titles.titles))
    rows = zip(titles.titles, titles.ids, popularity.tolist(), liked.tolist(), strict=True)
    return [{"domain": name, "title": title, "ids": ids, "ratings": n, "liked": k} for title, ids, n, k in rows if n]


def _charts(h: splits.Histories, popularity: np.ndarray, examples: dict[str, list[RankingExample]]) -> dict[str, Any]:
    """The numbers behind the picture."""
    values, which = np.unique(h.rating, return_inverse=True)
    return {
        "ratings": (
            values,
            np.bincount(which[h.liked], minlength=len(values)),
            np.bincount(which[~h.liked], minlength=len(values)),
        ),
        "per_user": np.diff(h.start),
        "popularity": popularity,
        "history": {split: [len(e.history) for e in found] for split, found in examples.items()},
        "negatives": {split: [len(e.negatives) for e in found] for split, found in examples.items()},
    }


def _write(
    domains: Sequence[Domain], scores: splits.Scores | None, settings: PrepareSettings, command: str, started: float
) -> Path:
    """The directory; its manifest comes last."""
    asked = {*_listed(settings.train_domains), *_listed(settings.test_domains)}
    unknown = sorted(asked - {d.name for d in domains})
    if unknown:
        raise UserError(
            f'--train-domains and --test-domains: "{unknown[0]}" is no domain here: there are {", ".join(d.name for d in domains)}'
        )
    run = run_directory.RunDirectory(settings.out, command, settings, overwrite=settings.overwrite, flag="--out")
    run.started = started
    try:
        for split in SPLITS:
            examples = [e for d in domains for e in d.examples[split]]
            (run.path / f"{split}.jsonl").unlink(missing_ok=True)
            if examples:
                files.write_text(run.path / f"{split}.jsonl", _json_lines(e.to_json() for e in examples))
        files.write_text(run.path / "items.jsonl", _json_lines(item for d in domains for item in d.items))
        charts.plot_preparation({d.name: d.charts for d in domains}, run.path / "summary.png")
        for name, file in tqdm(
            [(d.name, file) for d in domains for file in d.files], desc="hash the inputs", unit="file", disable=None
        ):
            run.inputs[f"{name}/{file.name}"] = files.sha256(file)
        if scores:
            run.input(scores.path)
        told = {d.name: {"source": d.source, "rules": d.rules, "notes": d.notes, "counts": d.counts} for d in domains}
        run.finish("cpu", domains=told)
    except OSError as error:
        raise UserError(
            f"{run.path}: cannot be written ({error.strerror or error}): free some space or name another --out"
        ) from None
    return run.path


def _json_lines(rows: Iterator[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _summary(domains: Sequence[Domain]) -> Iterator[str]:
    for d in domains:
        c = d.counts
        yield f"{d.name}: {d.source}"
        yield f"  {c['ratings']:,} ratings of {c['titles']:,} titles by {c['users']:,} users; {c['liked'] / max(1, c['ratings_used']):.0%} liked"
        yield from (f"  note: {note}" for note in d.notes)
        yield from (f"  rule: {rule}" for rule in d.rules)
        unfit = ", ".join(f"{n:,} {reason}" for reason, n in c["users_unfit"].items())
        yield f"  {c['users_eligible']:,} users are eligible{f'; not: {unfit}' if unfit else ''}"
        for split, n in c["examples"].items():
            if n:
                h = c["history"][split]
                k = ", ".join(
                    f"{k} ({times:,}x)" if len(c["negatives"][split]) > 1 else str(k)
                    for k, times in c["negatives"][split].items()
                )
                yield f"  {split:<5} {n:>5,} users  history {h['min']} to {h['max']}, median {h['median']:g}  k = {k}"


def _next(domains: Sequence[Domain], run: Path) -> Iterator[str]:
    unworded = [d.name for d in domains if d.name not in DOMAINS]
    if unworded:
        yield f"next: word the domain {', '.join(unworded)} under `domains:` in a config (configs/songs.yaml shows how), then train with -c"
    else:
        yield f"next: {commands.after_prepare(run)}"
