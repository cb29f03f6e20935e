"""An example and a template -> a group of prompts and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..records import Branch, Message, PreferenceGroup, RankingExample
from .template import Domain, Template

Orders = Sequence[tuple[Any, ...]]  # see `printed_orders`


def candidates(example: RankingExample) -> tuple[str, ...]:
    """The titles that a group compares: the positive, then the negatives."""
    return (example.positive, *example.negatives)


def shortened(example: RankingExample, drop: int) -> RankingExample:
    """The example without `drop` of its oldest titles, each from the longer of history and disliked; one liked title
    stays.
    """
    liked, disliked = len(example.history), len(example.disliked or ())
    for _ in range(drop):
        if liked > max(1, disliked) or not disliked:
            liked -= 1
        else:
            disliked -= 1
    history = example.history[len(example.history) - liked :]
    old = example.disliked
    return replace(example, history=history, disliked=old and old[len(old) - disliked :])


def droppable(example: RankingExample, template: Template) -> int:
    """How many titles `shortened` can leave out of the prompt."""
    printed = len(example.disliked or ()) if template.prints_disliked else 0
    return max(0, len(example.history) + printed - 1)


def context(example: RankingExample, template: Template, **places: Any) -> tuple[Message, ...]:
    """The prompt of an example, `places` filled in.

    Disliked titles that are candidates are left out: they give the answer.
    """
    domain: Domain = template.domain(example.domain, example.source)
    if template.prints_disliked:
        known = set(candidates(example)) if example.disliked else ()
        places["disliked"] = [t for t in example.disliked or () if t not in known]
    content = template.message(domain, example.source, history=example.history, **places)
    return ({"role": "user", "content": content},)


def build_group(example: RankingExample, orders: Orders, template: Template, drop_history: int = 0) -> PreferenceGroup:
    """All prompts and answers of an example, the oldest `drop_history` titles left out; `orders` from `printed_orders`.

    pairwise   a prompt for each negative and each of its printed orders, two answers a prompt; K x O pairs
    listwise   a prompt for each printed order of the candidates, each title an answer; O x K pairs
    direct     one prompt, each title an answer; K pairs of one chosen answer
    pointwise  a prompt for each candidate, answered Yes and No; pair k is (Yes to the positive, Yes to negative k), SFT
               learns Yes to the positive and No to the negatives
    """
    if drop_history:
        example = shortened(example, drop_history)
    branches: list[Branch] = []
    pairs: list[tuple[int, int]] = []
    targets: tuple[int, ...] | None = None
    k = len(example.negatives)
    if template.form == "pairwise":
        for negative, flags in zip(example.negatives, orders, strict=True):
            for positive_first in flags:
                first, second = (example.positive, negative) if positive_first else (negative, example.positive)
                messages = context(example, template, first=first, second=second)
                pairs.append((len(branches), len(branches) + 1))
                branches.append(Branch(messages, template.answer_of(example.positive, negative)))
                branches.append(Branch(messages, template.answer_of(negative, example.positive)))
    elif template.form == "pointwise":
        for title in candidates(example):
            messages = context(example, template, target=title)
            branches += [Branch(messages, template.answer_yes), Branch(messages, template.answer_no)]
        pairs = [(0, 2 * n) for n in range(1, k + 1)]
        targets = (0, *(2 * n + 1 for n in range(1, k + 1)))
    else:
        titles = candidates(example)
        for order in orders if template.form == "listwise" else [()]:
            places = {"candidates": [titles[c] for c in order]} if order else {}
            messages = context(example, template, **places)
            pairs += [(len(branches), len(branches) + n) for n in range(1, k + 1)]
            branches += [Branch(messages, template.answer_of(title)) for title in titles]
    return PreferenceGroup(example.user, example.domain, tuple(branches), tuple(pairs), example.source, targets)
