"""Scores -> rows of scores.jsonl, one per pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..records import PreferenceGroup
from ..scores import Scores


def rows_of(scores: Scores) -> Iterator[dict[str, Any]]:
    """One row per (positive, negative) pair; log-probs in nats, summed over the answer.

    "given" replaces the two orders where a pair is not printed: free text, and the two titles' own scores in the
    listwise, direct and pointwise forms. A scorer without log-probs has neither. "places" (listwise): share of printed
    orders that each place won.
    """
    example = scores.example
    for k, margin in enumerate(scores.margins):
        row: dict[str, Any] = {"user": example.user, "domain": example.domain}
        if isinstance(example, PreferenceGroup):
            chosen, rejected = (example.branches[b].answer for b in example.pairs[k])
            row |= {"positive": chosen, "negative": rejected}
        else:
            row |= {"positive": example.positive, "negative": example.negatives[k]}
        if scores.logps is not None:
            names = ("positive_first", "positive_second") if len(scores.logps[k]) == 2 else ("given",)
            for name, (chosen_logp, rejected_logp) in zip(names, scores.logps[k].tolist(), strict=True):
                row[name] = {"chosen_logp": chosen_logp, "rejected_logp": rejected_logp}
        row["margin"] = float(margin)
        if scores.places is not None:  # of the whole example, the same in each of its rows
            row["places"] = scores.places.tolist()
        if not isinstance(example, PreferenceGroup) and example.positive_first is not None:
            row["source_positive_first"] = example.positive_first[k]
        yield row
