"""What a row means: the data types of the project. They do nothing but convert from and to JSON.

RankingExample (titles) -> PreferenceGroup (text) -> EncodedGroup (tokens) -> GroupBatch (padded arrays).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .errors import UserError

Message = dict[str, str]  # {"role": "user", "content": "..."}


REQUIRED = ("user", "domain", "history", "positive", "negatives")
OPTIONAL = ("positive_first", "disliked", "ratings", "times", "answer_ratings", "answer_times", "candidates")


@dataclass(frozen=True, slots=True)
class RankingExample:
    """One user's ranking task: a liked item to be ranked above each of K disliked ones.

    history         titles the user liked, oldest first
    positive        the liked title to be ranked first
    negatives       1..K disliked titles
    positive_first  for files that fix the printed order of each pair: one flag a negative; else None
    source          `file:line` or `file:row`, for messages only; never written

    Optional fields, None where the source does not give them:
    disliked        titles the user disliked before, oldest first
    ratings         the user's rating of each title of the history
    times           when the user rated each title of the history, in seconds since 1970
    answer_ratings  the user's rating of the positive, then of each negative
    answer_times    when the user rated these, in seconds since 1970
    candidates      titles among which the positive is ranked when a whole list is evaluated, the positive not among
                    them

    more_positives  further liked titles to be ranked above the negatives; only training makes them (see
                    `last_positives`), no file holds them
    """

    user: str
    domain: str
    history: tuple[str, ...]
    positive: str
    negatives: tuple[str, ...]
    positive_first: tuple[bool, ...] | None = None
    source: str = ""
    disliked: tuple[str, ...] | None = None
    ratings: tuple[float, ...] | None = None
    times: tuple[float, ...] | None = None
    answer_ratings: tuple[float, ...] | None = None
    answer_times: tuple[float, ...] | None = None
    candidates: tuple[str, ...] | None = None
    more_positives: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The example as a row of a JSON lines file; what is None is left out."""
        row: dict[str, Any] = {name: getattr(self, name) for name in REQUIRED}
        row |= {name: value for name in OPTIONAL if (value := getattr(self, name)) is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in row.items()}

    @classmethod
    def from_json(cls, row: Any, source: str = "") -> RankingExample:
        """Raises UserError, beginning with `source`, for whatever is missing or malformed."""

        def fail(what: str, fix: str) -> UserError:
            return UserError(f"{source}: {what}: {fix}")

        if not isinstance(row, dict):
            raise fail("not a JSON object", 'write {"user", "domain", "history", "positive", "negatives"}')
        for name in REQUIRED:
            if name not in row:
                raise fail(f'field "{name}" is missing', f'add "{name}" to the object')
        unknown = set(row) - {*REQUIRED, *OPTIONAL}
        if unknown:
            raise fail(f'unknown field "{sorted(unknown)[0]}"', "remove or rename it")
        user = str(row["user"]) if isinstance(row["user"], int) else row["user"]
        for name, value in (("user", user), ("domain", row["domain"]), ("positive", row["positive"])):
            if not isinstance(value, str) or not value.strip():
                raise fail(f'"{name}" is not a non-empty string', f"give {name} as text")
        optional = {name: row[name] for name in OPTIONAL if row.get(name) is not None}
        for name in ("history", "negatives", *(n for n in ("disliked", "candidates") if n in optional)):
            value = row[name]
            if not isinstance(value, list) or any(not isinstance(t, str) or not t.strip() for t in value):
                raise fail(f'"{name}" is not a list of non-empty strings', f"give {name} as a list of titles")
            if not value and name in REQUIRED:
                raise fail(f'"{name}" is empty', "give at least one title")
        for name in ("negatives", *(n for n in ("candidates",) if n in optional)):
            what = {"negatives": "negative", "candidates": "candidate"}[name]
            if row["positive"] in row[name]:
                raise fail(f"the positive is among the {name}", "a pair needs two different titles")
            if len(set(row[name])) < len(row[name]):
                raise fail(f"a {what} is listed twice", "list each once")
        first = optional.get("positive_first")
        if first is not None and not _list_of(first, len(row["negatives"]), bool):
            raise fail('"positive_first" does not fit', "give one true or false for each negative")
        answers = 1 + len(row["negatives"])
        for name, length, what in (
            ("ratings", len(row["history"]), "each title of the history"),
            ("times", len(row["history"]), "each title of the history"),
            ("answer_ratings", answers, "the positive, then each negative"),
            ("answer_times", answers, "the positive, then each negative"),
        ):
            if name in optional and not _list_of(optional[name], length, int, float):
                raise fail(f'"{name}" does not fit', f"give one finite number for {what}")
        return cls(
            user,
            row["domain"],
            tuple(row["history"]),
            row["positive"],
            tuple(row["negatives"]),
            source=source,
            **{name: tuple(value) for name, value in optional.items()},
        )


def _list_of(value: Any, length: int, *kinds: type) -> bool:
    """Whether `value` is a list of this many values of these types (true is not a number), without NaN and Inf."""
    return (
        isinstance(value, list)
        and len(value) == length
        and all(type(v) in kinds and (type(v) is not float or math.isfinite(v)) for v in value)
    )


@dataclass(frozen=True, slots=True)
class Branch:
    """One answer to one prompt."""

    messages: tuple[Message, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class PreferenceGroup:
    """K pairs of branches in text. pairs[k] = (index of the chosen branch, index of the rejected one).

    Without pairs (K = 0) it is one answer to learn from (SFT).
    targets: the branches whose answers SFT learns, where these are not the chosen ones (pointwise: Yes and No).
    utilities: of each branch's answer, for the losses that weigh ratings and recency (see prompts.groups.utilities).
    """

    user: str
    domain: str
    branches: tuple[Branch, ...]
    pairs: tuple[tuple[int, int], ...]
    source: str = ""
    targets: tuple[int, ...] | None = None
    utilities: tuple[float, ...] | None = None


Example = RankingExample | PreferenceGroup  # what a data file holds a list of, all of one kind
