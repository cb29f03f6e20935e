"""The one way to a model that scores: load it, attach the adapter, check the scorers against each other, encode."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..config import CommonSettings
from ..core.selfcheck import GroupScorer, choose_scorer
from ..errors import UserError
from ..machine import console
from ..prompts import pairwise
from ..records import Example, PreferenceGroup, RankingExample
from ..scores import Scores
from . import adapters, loading
from .encode import Encoder
from .score import score_groups


class LanguageModelScorer:
    """A `Scorer`: a language model, with or without an adapter, behind a prompt."""

    def __init__(self, base: loading.Loaded, settings: CommonSettings, name: str = ""):
        self.base, self.settings, self.name = base, settings, name or base.name
        domains = pairwise.with_domains(settings.domains)
        self.encoder = Encoder(base.tokenizer, settings.max_seq_length, domains, base.date)

    @functools.cached_property
    def groups(self) -> GroupScorer:
        """The shared-prefix scorer where it equals the plain one on this model, checked on first use."""
        groups = choose_scorer(self.base.model, self.base.vocabulary, self.settings.scoring)
        if not groups.shared:
            console.notice(f"note: every sequence is run alone, which is slower: {groups.reason}")
        return groups

    def usable(self, examples: Sequence[Example], *, chosen_only: bool = False) -> list[Example]:
        """Under --skip-bad-rows, the examples whose tokens can be made, each other one named; else all of them.

        Raises UserError where none is left.
        """
        if not self.settings.skip_bad_rows:
            return list(examples)
        return self.encoder.usable(examples, console.notice, chosen_only=chosen_only)

    def score(self, examples: Sequence[Example]) -> Iterator[Scores]:
        """Every pair in both printed orders; free text in its one prompt. Raises UserError for NaN or Inf."""
        encoded = [
            self.encoder.encode(e, [(True, False)] * len(e.negatives) if isinstance(e, RankingExample) else [])
            for e in examples
        ]
        scored = {
            id(group): logps
            for group, logps in score_groups(
                self.base.model, self.groups, encoded, self.settings.batch_size, "evaluate"
            )
        }
        for example, group in zip(examples, encoded, strict=True):
            logps = np.asarray(scored[id(group)], np.float64)
            if not np.isfinite(logps).all():
                raise UserError(
                    f"{example.source or example.user}: a log-prob is NaN or Inf: look at the adapter ({self.name}) "
                    "and at --dtype"
                )
            if isinstance(example, PreferenceGroup):
                by_pair = logps[np.array(example.pairs, np.int32).reshape(-1, 2)][:, None]  # (K, 1, 2)
            else:  # branches: negative, printed order (positive first, then second), answer (chosen, then rejected)
                by_pair = logps.reshape(len(example.negatives), 2, 2)
            yield Scores(example, (by_pair[..., 0] - by_pair[..., 1]).sum(axis=1), by_pair)


def open_scorer(
    settings: CommonSettings, adapter: str = "", *, attach: Callable[[loading.Loaded], None] | None = None
) -> LanguageModelScorer:
    """The model that `settings` names, ready to score.

    adapter  adapter directory to load
    attach   instead: a function that puts an adapter on the loaded base, to be trained
    Raises UserError for a model or adapter that cannot be loaded.
    """
    base = loading.load(settings)
    if attach:
        attach(base)
    else:
        if adapter:
            adapters.load_adapter(base, adapter)
        base.model.eval()
    return LanguageModelScorer(base, settings, adapter)
