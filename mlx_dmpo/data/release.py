"""The DMPO release's recipe: its seven MovieLens-1M files, byte for byte, from MovieLens-1M.

As found by comparing with the files: ratings are taken in file order, not by time; each user's last 42 lines for
training and last 40 for evaluation; liked are ratings >= 4. A user with 5 of each is eligible; the first liked item is
the positive, the other liked ones are the history, the first disliked ones the negatives. The first 100 eligible users
by id train, the next 1000 evaluate. Python's generator, seeded with 1234 for each file, draws which title is printed
first. Training titles end at the first comma or bracket, evaluation titles are whole; movies.dat, which is latin-1, is
read as UTF-8 with replacement characters.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ..config import MovielensSettings, default_of
from ..errors import UserError
from ..machine import files, run_directory
from ..prompts.pairwise import DOMAINS, pair_prompt, ranking_answer
from ..records import RankingExample
from . import sources
from .sources.files import opened

TRAIN_LINES, EVAL_LINES = 42, 40


TRAIN_USERS, EVAL_USERS = 100, 1000


NAME = "rec_data_ml_1m_{}.json"


FREE = {"out", "overwrite", "skip_bad_rows", "recipe"}  # settings that the recipe leaves open


@dataclass(frozen=True, slots=True)
class _User:
    id: int
    liked: list[str]  # items, in file order
    disliked: list[str]


def _eligible(interactions: sources.Interactions, lines: int) -> list[_User]:
    """Users with 5 liked and 5 disliked among their last `lines`, by id."""
    i = interactions
    by_user = np.argsort(i.user, kind="stable")
    start = np.searchsorted(i.user[by_user], np.arange(len(i.users) + 1))
    users = []
    for u, name in enumerate(i.users):
        last = by_user[start[u] : start[u + 1]][-lines:]
        liked, disliked = (
            [i.items[n] for n in i.item[last[which]]] for which in (i.rating[last] >= 4, i.rating[last] <= 3)
        )
        if len(liked) >= 5 and len(disliked) >= 5:
            users.append(_User(int(name), liked, disliked))
    return sorted(users, key=lambda user: user.id)


def _file(users: Sequence[_User], negatives: int, both: bool, title: Callable[[str], str]) -> str:
    """A file's text: a row for each of the negatives; its output is the chosen answer, or [chosen, rejected]."""
    draw = random.Random(1234)
    rows = []
    for user in users:
        positive, *history = map(title, user.liked)
        disliked = tuple(map(title, user.disliked[:negatives]))
        example = RankingExample(str(user.id), "movie", tuple(history), positive, disliked)
        for negative in disliked:
            instruction = pair_prompt(example, negative, draw.random() < 0.5, DOMAINS["movie"])
            chosen, rejected = ranking_answer(positive, negative), ranking_answer(negative, positive)
            rows.append({"instruction": instruction, "input": "", "output": [chosen, rejected] if both else chosen})
    return json.dumps(rows, allow_nan=False)


def released_files(
    interactions: sources.Interactions,
    titles: Mapping[str, str],
    train_users: int = TRAIN_USERS,
    eval_users: int = EVAL_USERS,
) -> dict[str, str]:
    """File name -> text, for whole titles by item."""
    train = _eligible(interactions, TRAIN_LINES)[:train_users]
    evaluation = _eligible(interactions, EVAL_LINES)[train_users : train_users + eval_users]

    def short(item: str) -> str:
        return re.split(r"[,(]", titles[item])[0]

    files = {NAME.format("sft_ranking"): _file(train, 1, False, short)}
    files |= {NAME.format(f"dpo_ranking_{k}"): _file(train, k, True, short) for k in range(1, 6)}
    return files | {NAME.format("eval_ranking"): _file(evaluation, 1, False, titles.__getitem__)}


def refuse_rules(settings: MovielensSettings, given: Collection[str] = ()) -> None:
    """Raises UserError for a rule that is set, or given as a flag with the default's value: the recipe fixes them."""
    for spec in fields(settings):
        changed = spec.name in given or getattr(settings, spec.name) != default_of(spec)
        if spec.name not in FREE and changed:
            raise UserError(f"--{spec.name.replace('_', '-')}: recipe dmpo-release fixes every rule: leave it out")


def write_release(path: Path, settings: MovielensSettings, command: str) -> list[str]:
    """Writes the seven files and a manifest to --out; returns lines to print. Raises UserError."""
    refuse_rules(settings)
    kind, file, movies = sources.movielens_files(path)
    if kind != "1M":
        raise UserError(f"{path}: recipe dmpo-release is for MovieLens-1M: it should hold ratings.dat and movies.dat")
    bad = sources.BadRows(settings.skip_bad_rows)
    interactions = sources.movielens_interactions(kind, file, bad)
    titles = {}
    with opened(movies, bar=False) as text:
        lines = text.read().decode("utf-8", "replace").splitlines()
    for n, line in enumerate(lines, 1):
        cells = line.split("::")
        if len(cells) < 2:
            raise UserError(f"{movies}:{n}: no '::' in the line: use the file as it was downloaded")
        titles[cells[0]] = cells[1]
    missing = [item for item in interactions.items if item not in titles]
    if missing:
        raise UserError(f'{movies}: no title for movie "{missing[0]}" of {file.name}: use the files of one download')
    if any(not user.isdecimal() for user in interactions.users):
        raise UserError(f"{file}: user ids are not whole numbers: use the file as it was downloaded")
    texts = released_files(interactions, titles)
    if texts[NAME.format("eval_ranking")] == "[]":
        raise UserError(
            f"{file}: no more than {TRAIN_USERS} eligible users: the recipe is for the whole of MovieLens-1M"
        )
    with run_directory.RunDirectory(settings.out, command, settings, overwrite=settings.overwrite, flag="--out") as run:
        for name, text in texts.items():
            files.write_text(run.path / name, text)
        for source in (file, movies):
            run.input(source)
        run.finish("cpu", recipe="dmpo-release", left_out=dict(bad.counts))
        lines = [
            f"{reason}: {count:,} rows left out (first: {bad.first[reason]})" for reason, count in bad.counts.items()
        ]
        return [*lines, *(f"wrote {run.path / name}" for name in texts)]
