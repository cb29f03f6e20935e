"""What is known about users and titles beside their pairs: popularity, titles of the training data, users' attributes.

All of it comes from files beside the evaluated data, and is added to the rows, so that metrics need the rows alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..machine import files
from ..records import Example, RankingExample

Title = tuple[str, str]  # domain, title


@dataclass(frozen=True)
class Facts:
    """Look-ups for the rows of an evaluation.

    counts    (domain, title) -> how often it was rated, or liked; see `source`
    source    where the counts come from, in words
    own       (user, domain, title) -> of these, how many are the user's own, which do not count for this user
    trained   titles of the training data; None where there is none beside the evaluated data
    groups    user -> attribute -> value
    """

    counts: Mapping[Title, int] = field(default_factory=dict)
    source: str = ""
    own: Mapping[tuple[str, str, str], int] = field(default_factory=dict)
    trained: frozenset[Title] | None = None
    groups: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def popularity(self, user: str, domain: str, title: str) -> int:
        return self.counts.get((domain, title), 0) - self.own.get((user, domain, title), 0)

    def add_to(self, row: dict[str, Any], example: Example) -> dict[str, Any]:
        """The row of scores.jsonl with `popularity`, `seen`, `history` and `groups`, where they are known."""
        if isinstance(example, RankingExample):
            pair = [(row["domain"], row["positive"]), (row["domain"], row["negative"])]
            if self.counts:
                row["popularity"] = [self.popularity(row["user"], *title) for title in pair]
            if self.trained is not None:
                row["seen"] = [title in self.trained for title in pair]
            row["history"] = len(example.history)
        if row["user"] in self.groups:
            row["groups"] = dict(self.groups[row["user"]])
        return row


def _rows(path: Path, *fields: str) -> list[dict[str, Any]]:
    rows = files.read_lines(path)
    for n, row in enumerate(rows, 1):
        for name in fields:
            if not isinstance(row, dict) or not isinstance(row.get(name), str | int) or isinstance(row[name], bool):
                raise UserError(f'{path}:{n}: field "{name}" is missing or malformed: write the directory again')
    return rows


def _examples(path: Path) -> list[RankingExample]:
    return [RankingExample.from_json(row, f"{path}:{n}") for n, row in enumerate(files.read_lines(path), 1)]


def read_groups(path: Path) -> dict[str, dict[str, str]]:
    """users.jsonl, one object per user: "user", and attributes such as "gender" and "age_band" as text."""
    found = {}
    for row in _rows(path, "user"):
        attributes = {k: v for k, v in row.items() if k not in ("user", "domain") and isinstance(v, str) and v}
        found[str(row["user"])] = attributes
    return found


def catalogue(directory: Path, examples: Sequence[Example], facts: Facts) -> list[Title]:
    """Every title that could be recommended: of items.jsonl, else of the training and the evaluated data."""
    items = directory / "items.jsonl"
    if items.is_file():
        return [(str(row["domain"]), str(row["title"])) for row in _rows(items, "domain", "title")]
    titles = dict.fromkeys(sorted(facts.trained or ()))
    for e in examples:
        if isinstance(e, RankingExample):
            titles |= dict.fromkeys((e.domain, title) for title in (*e.history, e.positive, *e.negatives))
    return list(titles)


def _histories(examples: Sequence[Example]) -> tuple[Counter[Title], Counter[tuple[str, str, str]]]:
    """How often each title is in a user's histories; a user's history counts once, however many examples repeat
    it."""
    liked = {(e.user, e.domain, title) for e in examples if isinstance(e, RankingExample) for title in e.history}
    return Counter((domain, title) for _, domain, title in liked), Counter(liked)


def load_facts(data: str, examples: Sequence[Example]) -> Facts:
    """Facts beside `data`, a prepared directory (items.jsonl, train.jsonl, users.jsonl) or a single file.

    Popularity is the number of ratings in items.jsonl; without that file, how often the title was liked in train.jsonl;
    without either, in how many histories of the other evaluated users it stands. Raises UserError for a malformed file.
    """
    directory = Path(data)
    found: dict[str, Any] = {}
    items, train, users = (directory / name for name in ("items.jsonl", "train.jsonl", "users.jsonl"))
    if not directory.is_dir():
        items = train = users = Path("/nonexistent")
    training = _examples(train) if train.is_file() else []
    if training:
        liked = Counter((e.domain, t) for e in training for t in (*e.history, e.positive))
        found["trained"] = frozenset((e.domain, t) for e in training for t in (*e.history, e.positive, *e.negatives))
        found |= {"counts": liked, "source": "how often the title was liked in train.jsonl"}
    if items.is_file():
        rows = _rows(items, "domain", "title", "ratings")
        found["counts"] = {(str(r["domain"]), str(r["title"])): int(r["ratings"]) for r in rows}
        found["source"] = "number of ratings in items.jsonl"
    if not found.get("counts"):
        counts, own = _histories(examples)
        found |= {"counts": counts, "own": own, "source": "histories of the other evaluated users that hold the title"}
    if users.is_file():
        found["groups"] = read_groups(users)
    return Facts(**found)
