"""Margins of pairs and scores of items for any history, through any Scorer; what was scored lately is kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import UserError
from ..records import RankingExample
from ..scores import Scorer

History = tuple[str, ...]
KEPT_HISTORIES = 32  # histories whose scores are kept
KEPT_SCORES = 20_000  # scores kept of one history
FIRST_LINE = 2.0  # seconds before the first line of progress without a terminal


def check_titles(where: str, titles: Sequence[str]) -> None:
    """Raises UserError for an empty title: a model would score it like any other."""
    if any(not title.strip() for title in titles):
        raise UserError(f"{where}: a title is empty: remove it")


def check_history(history: Sequence[str]) -> None:
    """Raises UserError for no history, and for an empty title in it."""
    if not history:
        raise UserError("history: it is empty: give at least one title")
    check_titles("history", history)


@dataclass
class Cost:
    """What scoring has cost so far: pairs and items run through the model, and tokens, shared ones counted once."""

    pairs: int = 0
    items: int = 0
    tokens: int = 0
    kept: int = 0  # answered from what was scored before


@dataclass
class Scoring:
    """Scores (history, title) and (history, a, b), each once: a repeated history finds its scores here.

    Margins are those of `Scores.margins`: above 0 where a is put above b; for prompts in two printed orders the sum
    over both.
    """

    scorer: Scorer
    domain: str = "movie"
    cost: Cost = field(default_factory=Cost)
    _kept: OrderedDict[History, dict[Any, Any]] = field(default_factory=OrderedDict, repr=False)

    def _of(self, history: History) -> dict[Any, Any]:
        kept = self._kept.setdefault(history, {})
        self._kept.move_to_end(history)
        while len(self._kept) > KEPT_HISTORIES:
            self._kept.popitem(last=False)
        if sum(len(v) if isinstance(v, dict) else 1 for v in kept.values()) > KEPT_SCORES:
            kept.clear()
        return kept

    def _example(self, history: History, title: str, others: tuple[str, ...]) -> RankingExample:
        return RankingExample("", self.domain, history, title, others, source="history and candidates")

    def probabilities(self, tasks: Sequence[tuple[History, str, str]]) -> np.ndarray:
        """P(a above b) of each task, from the mean margin over the printed orders.  -> (T,) float64."""
        margins, orders = self.margins(tasks)
        return np.exp(-np.logaddexp(0, -margins / orders))

    def fresh_margins(self, tasks: Sequence[tuple[History, str, str]]) -> np.ndarray:
        """Margins of tasks whose histories are alike, such as one history with an item left out: nothing of them is
        kept.
        """
        self.cost.pairs += len(tasks)
        return np.array([margin for margin, _ in self._score_pairs(tasks)], np.float64)

    def margins(self, tasks: Sequence[tuple[History, str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """(margin of each task (T,) float64, printed orders it sums over (T,) int). A pair and its reverse are one."""
        found: list[tuple[float, int] | None] = [self._of(h).get((a, b)) for h, a, b in tasks]
        keys: list[tuple[History, str, str]] = [(h, min(a, b), max(a, b)) for h, a, b in tasks]
        missing = list(dict.fromkeys(key for key, f in zip(keys, found, strict=True) if f is None))
        fresh = {}
        for (history, a, b), (margin, orders) in zip(missing, self._score_pairs(missing), strict=True):
            fresh[history, a, b] = (margin, orders)
            fresh[history, b, a] = (-margin, orders)
        for (history, a, b), value in fresh.items():
            self._of(history)[a, b] = value
        self.cost.pairs += len(missing)
        self.cost.kept += len(tasks) - len(missing)
        pairs = [f if f is not None else fresh[task] for task, f in zip(tasks, found, strict=True)]
        return np.array([m for m, _ in pairs], np.float64), np.array([n for _, n in pairs], np.int64)

    def _score_pairs(self, tasks: Sequence[tuple[History, str, str]]) -> list[tuple[float, int]]:
        by_first: dict[tuple[History, str], list[str]] = {}
        for history, a, b in tasks:
            by_first.setdefault((history, a), []).append(b)
        examples = [self._example(h, a, tuple(others)) for (h, a), others in by_first.items()]
        found = {}
        for (history, a), scores in zip(by_first, self.scorer.score(examples), strict=True):
            orders = 1 if scores.logps is None else scores.logps.shape[1]
            for b, margin in zip(by_first[history, a], scores.margins, strict=True):
                found[history, a, b] = (float(margin), orders)
        return [found[task] for task in tasks]

    @property
    def independent(self) -> bool:
        """Whether an item's score does not depend on the other candidates; not so where the prompt prints them all."""
        return True

    def items(self, tasks: Sequence[tuple[History, str]]) -> np.ndarray:
        """The score of each title for its history; a higher one ranks higher.  -> (T,) float64.

        Raises UserError where the scorer only compares pairs.
        """
        titles: dict[History, dict[str, None]] = {}
        for history, title in tasks:
            titles.setdefault(history, {})[title] = None
        key = {h: () if self.independent else tuple(sorted(found)) for h, found in titles.items()}
        kept = {h: self._of(h).setdefault(key[h], {}) for h in titles}
        wanted = {h: [t for t in found if t not in kept[h]] for h, found in titles.items()}
        wanted = {h: sorted(found) for h, found in wanted.items() if found}
        scored = dict(zip(wanted, self._score_items(wanted), strict=True)) if wanted else {}
        values: dict[History, dict[str, float]] = {h: dict(kept[h]) for h in titles}
        for history, scores in scored.items():
            new = dict(zip(wanted[history], map(float, scores), strict=True))
            values[history].update(new)
            kept[history].update(new)
            self.cost.items += len(new)
        self.cost.kept += len(tasks) - sum(map(len, wanted.values()))
        return np.array([values[h][t] for h, t in tasks], np.float64)

    def _score_items(self, wanted: Mapping[History, Sequence[str]]) -> list[np.ndarray]:
        """The scores of each history's titles, in order."""
        examples = [self._example(h, titles[0], tuple(titles[1:])) for h, titles in wanted.items()]
        found = []
        for scores in self.scorer.score(examples):
            if scores.items is None:
                raise UserError(f"{self.scorer.name}: compares pairs and gives no score of an item: use --method pairs")
            found.append(scores.items)
        return found
