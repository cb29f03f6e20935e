"""`evaluate --generate`: does the model answer? Greedy answers against what was scored.

A model can rank well by log-probs and write nothing that a program could use; this counts both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.encode import Encoder
from ..model.generate import sample_answers
from ..model.loading import Loaded
from ..prompts.groups import build_group
from ..prompts.orders import first_negatives, printed_orders
from ..records import Example, PreferenceGroup, RankingExample
from .bootstrap import Bootstrap

OTHERS = 10  # answers shown that are none of the possible ones


@dataclass(frozen=True)
class Task:
    """One prompt of an example: its tokens, the two possible answers, and the order in which it prints the pair."""

    example: Example
    prompt: tuple[int, ...]
    chosen: str
    rejected: str
    order: str  # the key of a row of scores.jsonl: "positive_first", "positive_second" or "given"


def tasks(examples: Sequence[Example], encoder: Encoder, seed: int) -> Iterator[Task]:
    """The first pair of each example, in the order that its file printed, or one drawn by `seed`."""
    for index, example in enumerate(examples):
        one: Example = first_negatives(example, 1)  # type: ignore[type-var]
        form = encoder.template.form
        orders = printed_orders(one, index, both=False, redraw=False, seed=seed, form=form)
        group: Example = one
        if isinstance(one, RankingExample):
            group = build_group(one, orders, encoder.template, encoder.encode(one, orders).dropped)
        assert isinstance(group, PreferenceGroup)
        # pointwise: Yes and No to the positive; else the chosen and the rejected answer to one prompt
        chosen, rejected = (group.branches[b] for b in ((0, 1) if group.targets else group.pairs[0]))
        printed = form == "pairwise" and orders
        order = ("positive_first" if orders[0][0] else "positive_second") if printed else "given"
        prompt = tuple(encoder.prompt(chosen, example.source))
        yield Task(example, prompt, chosen.answer, rejected.answer, order)


def same_text(a: str, b: str) -> bool:
    """White space is free."""
    return " ".join(a.split()) == " ".join(b.split())


def answer_rows(
    base: Loaded, todo: Sequence[Task], preferences: Sequence[Mapping[str, Any]], max_tokens: int
) -> Iterator[dict[str, Any]]:
    """Rows of answers.jsonl: the greedy answer of each task, whether it is one of the two answers that were scored, and
    whether it is the one with the higher log-prob in the same prompt.

    preferences  the row of scores.jsonl of each task's pair
    """
    drawn = sample_answers(
        base, [t.prompt for t in todo], 1, temperature=0, top_p=1, top_k=0, max_tokens=max_tokens, seed=0
    )
    for task, row, (answer,) in zip(todo, preferences, drawn, strict=True):
        text = base.tokenizer.decode(list(answer.tokens))
        is_chosen = answer.finished and same_text(text, task.chosen)
        valid = is_chosen or (answer.finished and same_text(text, task.rejected))
        scored = (
            row[task.order]["chosen_logp"] - row[task.order]["rejected_logp"] if task.order in row else row["margin"]
        )
        yield {
            "user": task.example.user,
            "domain": task.example.domain,
            "order": task.order,
            "text": text,
            "finished": answer.finished,
            "valid": valid,
            "right": is_chosen if valid else None,
            "agrees": is_chosen == (scored > 0) if valid and scored != 0 else None,
        }


def generation_metrics(rows: Sequence[Mapping[str, Any]], *, resamples: int, seed: int) -> dict[str, Any]:
    """Shares of rows of answers.jsonl.

    valid   the answer is one of the two that were scored, and the model ended it
    agrees  of the valid ones: the answer with the higher log-prob in the same prompt (a tie counts as no comparison)
    right   of the valid ones: the liked title is ranked first
    cut     answers that reached --max-tokens
    others  the first answers that are not valid
    """
    import numpy as np

    bootstrap = Bootstrap([row["user"] for row in rows], resamples, seed)

    def share(name: str) -> Callable[[], dict[str, Any]]:
        mask = np.array([row[name] is not None for row in rows])
        mean = bootstrap.mean(np.array([float(row[name] or 0) for row in rows]), mask)
        return lambda: bootstrap.metric(mean, mask)

    shares = {name: share(name) for name in ("valid", "agrees", "right")}
    bootstrap.run()
    return {
        "n": len(rows),
        **{name: metric() for name, metric in shares.items()},
        "cut": sum(not row["finished"] for row in rows),
        "others": [row["text"][:300] for row in rows if not row["valid"]][:OTHERS],
    }
