"""Scoring by a language model: pairs that share a history, and histories that differ in one item, run as one prefix
tree
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import UserError
from ..model.open import LanguageModelScorer
from ..prompts import template as prompts
from ..prompts.groups import build_group
from ..records import Branch, PreferenceGroup
from .scoring import History, Scoring

TOGETHER = 48  # pairs in one prefix tree
BOTH = (True, False)  # printed orders: first title first, then second


def joined(groups: Sequence[PreferenceGroup]) -> PreferenceGroup:
    """Several groups as one, so that whatever their prompts have in common from the start is run once."""
    branches: list[Branch] = []
    pairs: list[tuple[int, int]] = []
    for group in groups:
        pairs += [(len(branches) + a, len(branches) + b) for a, b in group.pairs]
        branches += group.branches
    first = groups[0]
    return PreferenceGroup(first.user, first.domain, tuple(branches), tuple(pairs), first.source)


class ModelScoring(Scoring):
    """`Scoring` by a language model. Each score equals the one that the pair or item gets alone."""

    def __init__(self, scorer: LanguageModelScorer, domain: str = "movie"):
        super().__init__(scorer, domain)
        scorer.describe = ""
        self.model = scorer
        self._direct: LanguageModelScorer | None = None

    @property
    def form(self) -> str:
        return self.model.template.form

    @property
    def independent(self) -> bool:
        return self.form != "listwise"

    def _counted(self, scorer: LanguageModelScorer, before: int) -> None:
        self.cost.tokens += scorer.tokens - before

    def _score_pairs(self, tasks: Sequence[tuple[History, str, str]]) -> list[tuple[float, int]]:
        before = self.model.tokens
        try:
            return self._score_joined(tasks) if self._may_join else super()._score_pairs(tasks)
        finally:
            self._counted(self.model, before)

    @property
    def _may_join(self) -> bool:
        return self.form in ("pairwise", "direct") and not (self.model.calibrate or self.model.per_token)

    def _score_joined(self, tasks: Sequence[tuple[History, str, str]]) -> list[tuple[float, int]]:
        by_history: dict[History, list[int]] = {}
        for i, (history, _, _) in enumerate(tasks):
            by_history.setdefault(history, []).append(i)
        parts = [rows[at : at + TOGETHER] for rows in by_history.values() for at in range(0, len(rows), TOGETHER)]
        if len(by_history) == len(tasks) > 1:  # the history with one item left out, and the like: they begin alike
            parts = [list(range(at, min(at + TOGETHER, len(tasks)))) for at in range(0, len(tasks), TOGETHER)]
        orders = [BOTH] if self.form == "pairwise" else []
        if tasks and self._drops(*tasks[0], orders):
            return super()._score_pairs(tasks)
        try:
            groups = [
                joined(
                    [
                        build_group(self._example(h, a, (b,)), orders, self.model.template)
                        for h, a, b in (tasks[i] for i in part)
                    ]
                )
                for part in parts
            ]
            scores = list(self.model.score(groups))
        except UserError:  # one is too long: scored example by example, which leaves old items out as it must
            return super()._score_pairs(tasks)
        found: dict[int, tuple[float, int]] = {}
        for part, of_part in zip(parts, scores, strict=True):
            for i, margins in zip(part, of_part.margins.reshape(len(part), -1), strict=True):
                found[i] = (float(margins.sum()), len(margins))
        return [found[i] for i in range(len(tasks))]

    def _drops(self, history: History, a: str, b: str, orders: list[tuple[bool, bool]]) -> bool:
        """Whether a history is too long for the prompt. Then the prompts of all pairs are not even tried with it."""
        return bool(self.model.encoder.encode(self._example(history, a, (b,)), orders).dropped)

    def _score_items(self, wanted: Mapping[History, Sequence[str]]) -> list[np.ndarray]:
        scorer = self.item_scorer
        before = scorer.tokens
        try:
            if self.form == "listwise" or len(wanted) > 1:
                examples = [self._example(h, t[0], tuple(t[1:])) for h, t in wanted.items()]
                return [scores.items for scores in scorer.score(examples) if scores.items is not None]
            ((history, titles),) = wanted.items()
            return [scorer.score_items(history, titles, self.domain, describe="rank")]
        finally:
            self._counted(scorer, before)

    @property
    def item_scorer(self) -> LanguageModelScorer:
        """Scores items: the model behind its own prompt, or, where that only compares pairs, behind the direct one."""
        if self.form != "pairwise":
            return self.model
        if self._direct is None:
            template = prompts.built_in("direct").with_domains(self.model.settings.domains)
            self._direct = LanguageModelScorer(self.model.base, self.model.settings, self.model.name, template)
            self._direct.describe = ""
        return self._direct
