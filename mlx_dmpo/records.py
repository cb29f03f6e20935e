"""The nouns that flow through the project. No behaviour beyond to and from JSON.

RankingExample (titles) -> PreferenceGroup (text) -> EncodedGroup (tokens) -> GroupBatch (padded arrays).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

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
            not isinstance(first, list) or len(first) != len(row["negatives"]) or any(not isinstance(f, bool) for f in first)
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


def _common(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


@dataclass(frozen=True, slots=True, eq=False)
class EncodedGroup:
    """A group in tokens. Branch r is `prefix + tails[r]`; its answer is the last `answer_lengths[r]` tokens.

    prefix 1 2 3, tails  [7, 8, 9, 4, 5]   # rest of the prompt 7 8, answer 9 4 5; answer_lengths 3
    Every tail starts with at least one token of the prompt: the position that predicts the answer's first.
    """

    prefix: np.ndarray  # (P,) int32
    tails: tuple[np.ndarray, ...]  # R arrays (T_r,) int32
    answer_lengths: tuple[int, ...]  # R
    pairs: np.ndarray  # (K, 2) int32
    user: str = ""
    domain: str = ""
    source: str = ""
    dropped: int = 0  # history items left out to fit max_seq_length

    def tree(self) -> list[tuple[int, int]]:
        """(branch, tokens of its tail in common with the branch before it), so ordered that each token of the prefix tree is met once."""
        order = sorted(range(len(self.tails)), key=lambda r: self.tails[r].tolist())
        return [(r, _common(self.tails[order[i - 1]], self.tails[r]) if i else 0) for i, r in enumerate(order)]

    @property
    def shared_tokens(self) -> int:
        """Tokens when whatever branches have in common from the start is counted once."""
        return len(self.prefix) + sum(len(self.tails[r]) - shared for r, shared in self.tree())

    @property
    def separate_tokens(self) -> int:
        return sum(len(self.prefix) + len(t) for t in self.tails)


@dataclass(frozen=True, slots=True, eq=False)
class GroupBatch:
    """G encoded groups as arrays. R, A, K are the batch's largest sizes; N, M, P, C, T, Q its own or planned ones.

    What branches share from the start is run once: `tokens` has each group's prefix tree in depth-first order, one group after
    another. Attention sees what lies below a prefix as C blocks, each a question with its answers: a token attends to its
    group's prefix and, in its block, to what came before it in its own branch. A few tokens that several blocks begin with
    stand in each of them, and ask in the first. A branch's very last token predicts nothing and is left out.

        sequences 1 2 7 4 9, 1 2 7 5 9, 1 2 8 6 9     tokens 1 2 | 7 4 5 | 8 6     positions 0 1 | 2 3 3 | 2 3     block_ends 3 2 3 | 2 2

    tokens           (N,)       int32
    positions        (N,)       int32: depth in the tree, the token's position in its own sequence
    prefix_index     (G, P)     int32: where the prefix's tokens stand in `tokens`
    prefix_lengths   (G,)       int32
    block_index      (G, C, T)  int32: where a block's tokens stand in `tokens`
    block_ends       (G, C, T)  int32: within its block, one past the last token that follows it in any branch; 0 for padding
    place            (N,)       int32: where a token asks, in the G*P prefix places followed by the G*C*T block places
    rows             (M,)       int32: the tokens that predict an answer's token, each once, as places in `tokens`
    query_rows       (G, C, Q)  int32: which of `rows` ask in a block
    query_at         (G, C, Q)  int32: and where they stand there
    row_place        (M,)       int32: where a row stands in the G*C*Q queries
    answer_rows      (G, R, A)  int32: which of `rows` predicts the answer's token
    answer_targets   (G, R, A)  int32
    answer_mask      (G, R, A)  float32
    chosen_lengths   (G, R)     float32: answer tokens of chosen branches, 0 elsewhere; without pairs every branch is chosen
    pairs            (G, K, 2)  int32: chosen, rejected branch
    pair_mask        (G, K)     float32
    starts           (G + 1,)   int32: where each group's tokens begin in `tokens`; the last is the count of real ones
    """

    tokens: np.ndarray
    positions: np.ndarray
    prefix_index: np.ndarray
    prefix_lengths: np.ndarray
    block_index: np.ndarray
    block_ends: np.ndarray
    place: np.ndarray
    rows: np.ndarray
    query_rows: np.ndarray
    query_at: np.ndarray
    row_place: np.ndarray
    answer_rows: np.ndarray
    answer_targets: np.ndarray
    answer_mask: np.ndarray
    chosen_lengths: np.ndarray
    pairs: np.ndarray
    pair_mask: np.ndarray
    starts: np.ndarray
    groups: tuple[EncodedGroup, ...]

    @property
    def padding_share(self) -> float:
        return 1 - float(self.starts[-1]) / len(self.tokens)
