"""A personal ranker as a Python object: load it, then rank, score and explain"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import config
from ..config import UseSettings
from ..errors import UserError
from ..model.open import LanguageModelScorer, choose_template, open_scorer
from .explain import Explanation, explain
from .model_scoring import ModelScoring
from .rank import Job, Ranking, run
from .scoring import check_history, check_titles


def choose_method(method: str, form: str) -> str:
    """The method that is named, or else the prompt form's. Raises UserError where the two do not fit."""
    if method == "items" and form == "pairwise":
        raise UserError(
            "--method items: prompt pairwise only compares pairs: add --prompt direct "
            "(with an adapter also --allow-other-prompt)"
        )
    if method == "pairs" and form != "pairwise":
        raise UserError(f"--method pairs: prompt {form} does not compare pairs: leave it out, or use --prompt pairwise")
    return method or ("pairs" if form == "pairwise" else "items")


def check_settings(settings: UseSettings, adapter: str = "") -> None:
    """What can be refused before the model is loaded. Raises UserError."""
    if settings.num_negatives:
        raise UserError("num_negatives: rank, explain and serve use no negatives: leave it out")
    if settings.skip_bad_rows:
        raise UserError("skip_bad_rows: rank, explain and serve read every row: leave it out")
    method = choose_method(settings.method, choose_template(settings, adapter).form)
    if method == "items" and settings.budget:
        raise UserError("--budget: counts pairs, and the method items compares none: leave it out")
    if method == "items" and settings.start != "random":
        raise UserError("--start: says how comparing pairs begins, and the method items compares none: leave it out")


class Ranker:
    """A model behind a prompt, with or without an adapter, that ranks titles for one history.

    Make it with `Ranker.load`. The objects that its methods return are what the commands print.
    """

    def __init__(self, scorer: LanguageModelScorer, settings: UseSettings, domain: str = "movie"):
        self.settings = settings
        self.scoring = ModelScoring(scorer, domain)
        self.method = choose_method(settings.method, self.scoring.form)

    @classmethod
    def load(cls, model: str | Path = "", adapter: str | Path | None = None, **settings: Any) -> Ranker:
        """A ranker from a model directory or hub repository, whatever mlx-lm loads; the embedded tiny model for "".

        adapter   directory that sft or dmpo wrote; None ranks with the base model
        settings  any setting of `mlx-dmpo rank` by its name: method, budget, prompt, domain, max_seq_length, seed, ...
        Raises UserError for a setting that does not exist or does not fit, and for what cannot be loaded.
        """
        built = config.build(UseSettings, {"model": str(model), **settings})
        return cls.open(built, str(adapter or ""), built.domain or "movie")

    @classmethod
    def open(cls, settings: UseSettings, adapter: str = "", domain: str = "movie") -> Ranker:
        """A ranker from a settings object. Raises UserError as `load` does."""
        check_settings(settings, adapter)
        choose_template(settings, adapter).domain(domain, "--domain")  # raises where it has no words
        return cls(open_scorer(settings, adapter), settings, domain)

    @property
    def name(self) -> str:
        """The adapter's directory, or the model's name."""
        return self.scoring.model.name

    @property
    def prompt(self) -> str:
        """Name of the prompt template."""
        return self.scoring.model.template.name

    def count_tokens(self, texts: Iterable[str]) -> int:
        """Tokens of several texts, each alone, without the prompt around them."""
        tokenizer = self.scoring.model.base.tokenizer
        return sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)

    def job(self, history: Iterable[str], candidates: Iterable[str], budget: int = 0) -> Job:
        """A ranking that is run in steps (see `use.rank.step`).

        Raises UserError for an empty history and for duplicates.
        """
        return Job(
            tuple(history),
            list(candidates),
            self.method,
            self.prompt,
            budget or self.settings.budget,
            self.settings.seed,
            self.settings.start == "items",
        )

    def rank(
        self,
        history: Iterable[str],
        candidates: Iterable[str],
        top: int = 0,
        *,
        budget: int = 0,
        progress: Callable[[Ranking], None] | None = None,
    ) -> Ranking:
        """The candidates, best first; the first `top` of them unless 0. Their order as given does not matter.

        budget    pairs to compare (method pairs); 0 takes the setting
        progress  called with the best ranking so far after each round of pairs
        Raises UserError for an empty history or title, a candidate given twice, and titles that the prompt cannot hold.
        """
        return run(self.job(history, candidates, budget), self.scoring, progress).top(top)

    def score(self, history: Iterable[str], pairs: Iterable[tuple[str, str]]) -> np.ndarray:
        """The margin of each pair (a, b), nats: above 0 where a is put above b.  -> (P,) float64.

        For the pairwise prompt the sum over both printed orders, else the difference of the two items' scores.
        """
        liked = tuple(history)
        check_history(liked)
        wanted = list(pairs)
        check_titles("pairs", [title for pair in wanted for title in pair])
        margins, _ = self.scoring.margins([(liked, a, b) for a, b in wanted])
        return margins

    def explain(
        self,
        history: Iterable[str],
        chosen: str,
        rejected: str,
        *,
        max_flip: int | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> Explanation:
        """Why `chosen` is put above `rejected`, or below it: tokens, history items, the smallest set of items that
        reverses the order.

        max_flip  largest set that is searched, 0 to 3; None takes 3, fewer for a long history (see `flip.affordable`)
        between   called between two rounds of scoring; what it raises ends the search
        Raises UserError as `rank` does.
        """
        return explain(self.scoring, tuple(history), chosen, rejected, max_flip, between)


def pair_job(ranker: Ranker, history: Sequence[str], candidates: Sequence[str], chosen: str, rejected: str) -> Job:
    """The ranking in which the pair to explain is looked for. Raises UserError for too few candidates."""
    pool = list(dict.fromkeys([*candidates, *filter(None, (chosen, rejected))]))
    if len(pool) < 2:
        raise UserError("--candidates: a pair needs two titles: give more candidates, or --chosen and --rejected")
    return ranker.job(history, pool)


def top_pair(ranking: Ranking, chosen: str, rejected: str) -> tuple[str, str]:
    """The pair to explain: what is named, and for the rest the best of the ranking."""
    order = [t for t in ranking.titles if t not in (chosen, rejected)]
    first = chosen or order.pop(0)
    return first, rejected or order[0]


def settings_for(settings: Any) -> UseSettings:
    """A command's settings without what only the command has."""
    from dataclasses import fields

    return UseSettings(**{f.name: getattr(settings, f.name) for f in fields(UseSettings)})
