"""Histories, candidates and the catalogue, from flags, files and a prepared data set"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import assets
from ..data import formats
from ..data.rows import has_split
from ..errors import UserError
from ..machine import files
from ..prompts import pairwise
from ..records import RankingExample
from .match import Catalogue

ITEMS = "items.jsonl"
USERS = "users.jsonl"
SPLITS = ("test", "valid", "train")


@dataclass(frozen=True)
class DataSet:
    """A prepared data set as rank, explain and serve need it: its catalogue, domain and users.

    users  user -> liked titles, oldest first
    seen   user -> every title that a ranking of the catalogue leaves out, where users.jsonl lists them
    """

    source: str
    catalogue: Catalogue
    domain: str
    users: dict[str, tuple[str, ...]]
    seen: dict[str, frozenset[str]] = field(default_factory=dict)

    def history(self, user: str) -> tuple[str, ...]:
        """Raises UserError for a user who is not in the data set."""
        if user not in self.users:
            raise UserError(
                f"--user: {user} is not in {self.source}: name one of its users, such as "
                f"{next(iter(self.users), '(none)')}"
            )
        return self.users[user]


def read_data(data: str, domain: str = "", domains: Any = None) -> DataSet:
    """The titles of items.jsonl, or, where there is none, all titles of the splits. Raises UserError where there are
    none.

    A data set of several domains needs `domain`: only its titles and users are taken.
    """
    source = data or str(assets.data_dir())
    known = pairwise.with_domains(domains)

    def load(split: str) -> list[RankingExample]:
        try:
            return formats.load_examples(source, split, known)
        except UserError:  # rows that name no domain need it; it is refused for rows that do
            if not domain:
                raise
            return formats.load_examples(source, split, known, domain=domain)

    examples = [e for split in SPLITS if has_split(source, split) for e in load(split)]
    if not examples and not (Path(source) / ITEMS).is_file():
        examples = load("test")  # a file, or the error that says what a directory must hold
    rows = _items(Path(source) / ITEMS) if (Path(source) / ITEMS).is_file() else []
    found = list(dict.fromkeys([*(r["domain"] for r in rows), *(e.domain for e in examples)]))
    if len(found) > 1 and not domain:
        raise UserError(f"--domain: {source} holds several domains ({', '.join(found)}): name one")
    domain = domain or (found[0] if found else "movie")
    titles = [r["title"] for r in rows if r["domain"] == domain]
    if not rows:
        titles = [t for e in examples if e.domain == domain for t in (*e.history, e.positive, *e.negatives)]
    users = {e.user: e.history for e in reversed(examples) if e.domain == domain}
    users = dict(reversed(list(users.items())))
    longest = max((len(e.history) for e in examples if e.domain == domain), default=0)
    rows = _users(Path(source) / USERS, domain) if (Path(source) / USERS).is_file() else []
    # no history is longer than those that training saw
    users |= {str(r["user"]): tuple(r["liked"][-longest:]) for r in rows if r["liked"]}
    seen = {str(r["user"]): frozenset([*r["liked"], *r["seen"]]) for r in rows}
    return DataSet(source, Catalogue(tuple(dict.fromkeys(titles))), domain, users, seen)


def _users(path: Path, domain: str) -> list[dict[str, Any]]:
    """The rows of users.jsonl that list titles: "user", "liked" (oldest first), "seen"."""
    found = []
    for number, row in enumerate(files.read_lines(path), 1):
        if not isinstance(row, dict) or "user" not in row:
            raise UserError(f'{path}:{number}: "user" is missing: prepare the directory again')
        if not {"liked", "seen"} <= set(row) or row.get("domain", domain) != domain:
            continue
        if any(not isinstance(row[k], list) or any(not isinstance(t, str) for t in row[k]) for k in ("liked", "seen")):
            raise UserError(f'{path}:{number}: "liked" and "seen" are not lists of titles: prepare the directory again')
        found.append(row)
    return found


def _items(path: Path) -> list[dict[str, Any]]:
    rows = files.read_lines(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("title"), str) or not row["title"].strip():
            raise UserError(f'{path}:{number}: "title" is missing: write {{"domain", "title"}} lines, as prepare does')
    return [{"title": row["title"], "domain": str(row.get("domain", ""))} for row in rows]


def titles_of(given: Sequence[str], flag: str) -> list[str]:
    """The titles that a repeated flag gives: each value is a title, a file with one title a line, or an items.jsonl.

    Raises UserError for a file that cannot be read or holds no title.
    """
    found: list[str] = []
    for value in given:
        path = Path(value)
        if not value.strip():
            raise UserError(f"{flag}: a title is empty: give a title, or leave the flag out")
        if _is_file(path):
            found += _titles_in(path)
        elif path.suffix in (".txt", ".jsonl", ".csv") and ("/" in value or " " not in value):
            raise UserError(f"{flag}: {value}: no such file: name a file with one title a line, or a title")
        else:
            found.append(value)
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a name, or a NUL inside: a title
        return False


def _titles_in(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        found = [row["title"] for row in _items(path)]
    else:
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}): name a text file with one title a line") from None
        found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"{path}: holds no title: write one title a line")
    return found


@dataclass(frozen=True)
class Request:
    """What is to be ranked, as the flags or standard input gave it, titles matched to the catalogue."""

    history: tuple[str, ...]
    candidates: tuple[str, ...]


def read_request(
    data: DataSet,
    history: Sequence[str],
    user: str,
    candidates: Sequence[str],
    stdin: str | None = None,
    notice: Callable[[str], None] = lambda message: None,
) -> Request:
    """The history of --history, --user or standard input, and the candidates: the catalogue without the history, and
    without all that users.jsonl lists as seen by the user, if none are given.

    stdin  JSON: {"history": [titles], "candidates": [titles]}; the candidates may be left out
    Raises UserError for none or several of the three, and for JSON of another shape.
    """
    given = {"--history": bool(history), "--user": bool(user), "standard input": bool(stdin and stdin.strip())}
    named = [name for name, is_given in given.items() if is_given]
    if not named:
        raise UserError('no history: give --history TITLE, --user ID, or {"history": [...]} on standard input')
    if len(named) > 1:
        raise UserError(f"{named[1]}: the history is given twice, by {named[0]} too: keep one of them")
    liked = titles_of(history, "--history")
    wanted = titles_of(candidates, "--candidates")
    if stdin and not history and not user:
        liked, more = _from_json(stdin)
        if more and wanted:
            raise UserError("--candidates: standard input has candidates too: keep one of them")
        wanted = wanted or more
    seen = data.history(user) if user else tuple(data.catalogue.match_all(liked, notice))
    if wanted:
        return Request(seen, tuple(data.catalogue.match_all(wanted, notice)))
    left_out = {*seen, *data.seen.get(user, ())}
    chosen = [t for t in data.catalogue.titles if t not in left_out]
    if not chosen:
        raise UserError(
            f"{data.source}: {user or 'the history'} has seen every title of its catalogue: give --candidates FILE, or "
            "prepare with --catalogue FILE"
        )
    return Request(seen, tuple(chosen))


def _from_json(text: str) -> tuple[list[str], list[str]]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f'standard input: not JSON ({error}): write {{"history": [titles]}}') from None
    if not isinstance(value, dict) or not set(value) <= {"history", "candidates"} or "history" not in value:
        raise UserError('standard input: another shape: write {"history": [titles], "candidates": [titles]}')
    for name, titles in value.items():
        if not isinstance(titles, list) or any(not isinstance(t, str) or not t.strip() for t in titles):
            raise UserError(f'standard input: "{name}" is not a list of titles: write them as text, in a list')
    return value["history"], value.get("candidates", [])
