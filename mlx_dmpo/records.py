"""The nouns that flow through the project. No behaviour beyond to and from JSON.

RankingExample (titles) -> PreferenceGroup (text) -> EncodedGroup (tokens) -> GroupBatch (padded arrays).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import UserError

Message = dict[str, str]  # {"role": "user", "content": "..."}


@dataclass(frozen=True, slots=True)
class RankingExample:
    """One user's ranking task: a liked item to be ranked above each of K disliked ones.

    history         titles the user liked, oldest first
    positive        the liked title to be ranked first
    negatives       1..K disliked titles
    positive_first  for files that fix the printed order of each pair: one flag a negative; else None
    source          `file:line` or `file:row`, for messages only; never written
    """

    user: str
    domain: str
    history: tuple[str, ...]
    positive: str
    negatives: tuple[str, ...]
    positive_first: tuple[bool, ...] | None = None
    source: str = ""

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "user": self.user,
            "domain": self.domain,
            "history": list(self.history),
            "positive": self.positive,
            "negatives": list(self.negatives),
        }
        if self.positive_first is not None:
            row["positive_first"] = list(self.positive_first)
        return row

    @classmethod
    def from_json(cls, row: Any, source: str = "") -> RankingExample:
        """Raises UserError, beginning with `source`, for whatever is missing or malformed."""

        def fail(what: str, mend: str) -> UserError:
            return UserError(f"{source}: {what}: {mend}")

        if not isinstance(row, dict):
            raise fail("not a JSON object", 'write {"user", "domain", "history", "positive", "negatives"}')
        for name in ("user", "domain", "history", "positive", "negatives"):
            if name not in row:
                raise fail(f'field "{name}" is missing', f'add "{name}" to the object')
        unknown = set(row) - {"user", "domain", "history", "positive", "negatives", "positive_first"}
        if unknown:
            raise fail(f'unknown field "{sorted(unknown)[0]}"', "remove or rename it")
        user = str(row["user"]) if isinstance(row["user"], int) else row["user"]
        for name, value in (("user", user), ("domain", row["domain"]), ("positive", row["positive"])):
            if not isinstance(value, str) or not value.strip():
                raise fail(f'"{name}" is not a non-empty string', f"give {name} as text")
        for name in ("history", "negatives"):
            value = row[name]
            if not isinstance(value, list) or any(not isinstance(t, str) or not t.strip() for t in value):
                raise fail(f'"{name}" is not a list of non-empty strings', f"give {name} as a list of titles")
            if not value:
                raise fail(f'"{name}" is empty', "give at least one title")
        if row["positive"] in row["negatives"]:
            raise fail("the positive stands among the negatives", "a pair needs two different titles")
        if len(set(row["negatives"])) < len(row["negatives"]):
            raise fail("a negative is listed twice", "list each negative once")
        first = row.get("positive_first")
        if first is not None and (
            not isinstance(first, list)
            or len(first) != len(row["negatives"])
            or any(not isinstance(f, bool) for f in first)
        ):
            raise fail('"positive_first" does not fit', "give one true or false for each negative")
        return cls(
            user,
            row["domain"],
            tuple(row["history"]),
            row["positive"],
            tuple(row["negatives"]),
            None if first is None else tuple(first),
            source,
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
    """

    user: str
    domain: str
    branches: tuple[Branch, ...]
    pairs: tuple[tuple[int, int], ...]
    source: str = ""


Example = RankingExample | PreferenceGroup  # what a data file holds a list of, all of one kind
