"""What the server accepts: bodies checked field by field"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .flip import affordable
from .rank import Ranking

SETS = 1000  # sets of history items of one size that an explanation searches unless the request says otherwise


class Refused(Exception):
    """A request that is answered with an error status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def _bad(message: str) -> Refused:
    return Refused(400, message)


def _mapping(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise _bad("the body is not a JSON object")
    return body


def _title(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _bad(f"{where}: is not a title: give text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _bad(f"{where}: holds half a surrogate pair: send valid Unicode") from None
    return value.strip()


def _history(body: dict[str, Any], most: int, others: int, match: Callable[[str], str]) -> tuple[str, ...]:
    """`query` (or `history`): a list of titles, or text with one title a line. With `others` at most `most` of them,
    which is checked before each is looked for in the catalogue.
    """
    value = body.get("query", body.get("history"))
    if isinstance(value, str):
        value = [line for line in value.split("\n") if line.strip()]
    if not isinstance(value, list) or not value:
        raise _bad("query: is missing or empty: give the liked titles, as a list or as text with one title a line")
    _limit(len(value) + others, most)
    return tuple(_matched(_title(t, f"query[{i}]"), f"query[{i}]", match) for i, t in enumerate(value))


def _matched(title: str, where: str, match: Callable[[str], str]) -> str:
    found = match(title)
    if not found.strip():
        raise _bad(f"{where}: is not a title: it holds invisible characters only")
    return found


def _count(body: dict[str, Any], name: str, low: int, high: int, default: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _bad(f"{name}: is not a whole number from {low} to {high}")
    return value


def _limit(number: int, most: int) -> None:
    if number > most:
        raise Refused(413, f"{number:,} titles, and at most {most:,} are allowed: send fewer, or raise --max-items")


@dataclass(frozen=True, slots=True)
class Rerank:
    """titles[i] is what documents[i] is taken for; equal documents get equal scores."""

    history: tuple[str, ...]
    titles: tuple[str, ...]
    documents: tuple[str, ...]
    top_n: int
    return_documents: bool

    def results(self, found: Ranking) -> list[dict[str, Any]]:
        """Best first; ties in the order in which the documents came.

        relevance_score is between 0 and 1, `score` the method's own.
        """
        relevance = dict(zip(found.titles, relevances(found), strict=True))
        score = {r.title: r.score for r in found.ranking}
        place = {r.title: r.rank for r in found.ranking}
        order = sorted(range(len(self.titles)), key=lambda i: (place[self.titles[i]], i))
        rows = []
        for i in order[: self.top_n]:
            title = self.titles[i]
            row: dict[str, Any] = {"index": i, "relevance_score": relevance[title], "score": score[title]}
            if self.return_documents:
                row["document"] = {"text": self.documents[i]}
            rows.append(row)
        return rows


def relevances(found: Ranking) -> list[float]:
    """Numbers from 0 to 1 in the order of the ranking: pairs give the mean win probability, items the softmax of the
    scores.
    """
    if all(r.win_probability is not None for r in found.ranking):
        return [float(r.win_probability or 0.0) for r in found.ranking]
    if found.method == "pairs":  # one candidate, nothing to compare it with
        return [1.0] * len(found.ranking)
    scores = np.array([r.score for r in found.ranking])
    shares = np.exp(scores - scores.max())
    return [float(s) for s in shares / shares.sum()]


def rerank_request(body: Any, most: int, match: Callable[[str], str]) -> Rerank:
    """Raises Refused with the status and what is wrong."""
    body = _mapping(body)
    documents = body.get("documents")
    if not isinstance(documents, list) or not documents:
        raise _bad("documents: is missing or empty: give the titles to rank, as a list")
    _limit(len(documents), most)
    history = _history(body, most, len(documents), match)
    texts = []
    for i, d in enumerate(documents):
        texts.append(_title(d.get("text") if isinstance(d, dict) else d, f"documents[{i}]"))
    flag = body.get("return_documents", True)
    if flag is not None and not isinstance(flag, bool):
        raise _bad("return_documents: is not true or false")
    if not isinstance(body.get("model", ""), str | None):
        raise _bad("model: is not text")
    top = _count(body, "top_n", 1, 10**9, len(texts))
    titles = tuple(_matched(t, f"documents[{i}]", match) for i, t in enumerate(texts))
    return Rerank(history, titles, tuple(texts), top, flag is not False)


@dataclass(frozen=True, slots=True)
class Explain:
    history: tuple[str, ...]
    chosen: str
    rejected: str
    max_flip: int


def explain_request(body: Any, most: int, match: Callable[[str], str]) -> Explain:
    """Raises Refused with the status and what is wrong."""
    body = _mapping(body)
    history = _history(body, most, 2, match)
    chosen, rejected = (_matched(_title(body.get(name), name), name, match) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise _bad("rejected: is the chosen title too: name two titles")
    largest = affordable(len(history), SETS)
    return Explain(history, chosen, rejected, _count(body, "max_flip", 0, 3, largest))
