"""An example and a template -> a group of prompts and answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..records import Branch, Message, PreferenceGroup, RankingExample
from .template import Domain, Template

Orders = Sequence[tuple[Any, ...]]  # see `printed_orders`


def candidates(example: RankingExample) -> tuple[str, ...]:
    """The titles that a group compares: the positives, then the negatives."""
    return (example.positive, *example.more_positives, *example.negatives)


def utilities(example: RankingExample) -> tuple[float, ...] | None:
    """Of the positive, then of each negative: rating / sqrt(delay) (RecPO, Ouyang et al., arXiv 2506.02261).

    delay  1 for the answer that was rated nearest in time to the end of the history, 2 for the next, ...; equal times
           have equal delays. Where the answers are the next items in their order, these are the paper's steps.
    None where the example has no ratings or times of its answers, or no times of its history; and where its negatives
    are other ones than the row's, as when a list of candidates is scored.
    """
    if example.answer_ratings is None or example.answer_times is None or not example.times:
        return None
    if len(example.answer_ratings) != 1 + len(example.negatives):
        return None
    away = [abs(t - example.times[-1]) for t in example.answer_times]
    return tuple(
        rating / math.sqrt(1 + sum(other < own for other in away))
        for rating, own in zip(example.answer_ratings, away, strict=True)
    )


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
    template = template.worded_for(example.user)
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
               listwise and direct: K pairs of each chosen answer where there are more positives
    pointwise  a prompt for each candidate, answered Yes and No; pair k is (Yes to the positive, Yes to negative k), SFT
               learns Yes to the positive and No to the negatives
    """
    if drop_history:
        example = shortened(example, drop_history)
    branches: list[Branch] = []
    pairs: list[tuple[int, int]] = []
    targets: tuple[int, ...] | None = None
    k, p = len(example.negatives), 1 + len(example.more_positives)
    answers: list[int] = []  # of each branch: the candidate that it speaks for
    if template.form == "pairwise":
        for n, (negative, flags) in enumerate(zip(example.negatives, orders, strict=True), 1):
            for positive_first in flags:
                first, second = (example.positive, negative) if positive_first else (negative, example.positive)
                messages = context(example, template, first=first, second=second)
                pairs.append((len(branches), len(branches) + 1))
                branches.append(Branch(messages, template.answer_of(example.positive, negative)))
                branches.append(Branch(messages, template.answer_of(negative, example.positive)))
                answers += [0, n]
    elif template.form == "pointwise":
        for n, title in enumerate(candidates(example)):
            messages = context(example, template, target=title)
            branches += [Branch(messages, template.answer_yes), Branch(messages, template.answer_no)]
            answers += [n, n]
        pairs = [(0, 2 * n) for n in range(1, k + 1)]
        targets = (0, *(2 * n + 1 for n in range(1, k + 1)))
    else:
        titles = candidates(example)
        for order in orders if template.form == "listwise" else [()]:
            places = {"candidates": [titles[c] for c in order]} if order else {}
            messages = context(example, template, **places)
            start = len(branches)
            pairs += [(start + c, start + p + n) for c in range(p) for n in range(k)]
            branches += [Branch(messages, template.answer_of(title)) for title in titles]
            answers += range(len(titles))
    weights = None if example.more_positives else utilities(example)
    return PreferenceGroup(
        example.user,
        example.domain,
        tuple(branches),
        tuple(pairs),
        example.source,
        targets,
        weights and tuple(weights[n] for n in answers),
    )
