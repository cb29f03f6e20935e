"""`evaluate --generate`: does the model answer? Greedy answers against what was scored.

A model can rank well by log-probs and write nothing that a program could use; this counts both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.generate import sample_answers
from ..model.open import LanguageModelScorer
from ..prompts.groups import build_group, candidates
from ..prompts.orders import first_negatives, printed_orders
from ..records import Example, PreferenceGroup
from .bootstrap import Bootstrap

OTHERS = 10  # answers shown that are none of the possible ones


@dataclass(frozen=True)
class Task:
    """One prompt of an example: its tokens, and the answers that count as valid.

    right   which of the answers ranks the liked title first
    scores  the answers' scores in this prompt: the highest is what the model prefers
    """

    user: str
    domain: str
    prompt: tuple[int, ...]
    answers: tuple[str, ...]
    right: int
    scores: tuple[float, ...]


Rows = Sequence[Mapping[str, Any]]


def tasks(examples: Sequence[Example], rows: Sequence[Rows], scorer: LanguageModelScorer, seed: int) -> Iterator[Task]:
    """One prompt of each example: pairwise and free text its first pair's, pointwise the liked title's, else the only
    one.

    rows  of scores.jsonl, of each example
    seed  draws the printed order where the file fixes none
    """
    encoder, template = scorer.encoder, scorer.template
    answers: tuple[str, ...]
    scores: tuple[float, ...]
    for index, (example, scored) in enumerate(zip(examples, rows, strict=True)):
        if isinstance(example, PreferenceGroup):
            chosen, rejected = (example.branches[b] for b in example.pairs[0])
            branch, answers, scores = chosen, (chosen.answer, rejected.answer), _pair(scored[0]["given"])
        else:
            if template.form == "pairwise":
                example = first_negatives(example, 1)
            orders = printed_orders(example, index, both=False, redraw=False, seed=seed, form=template.form)
            group = build_group(example, orders, template, encoder.encode(example, orders).dropped)
            branch = group.branches[0]
            if template.form == "pairwise":
                answers = (branch.answer, group.branches[1].answer)
                scores = _pair(scored[0]["positive_first" if orders[0][0] else "positive_second"])
            elif template.form == "pointwise":  # the log-odds of Yes to the liked title
                answers = (template.answer_yes, template.answer_no)
                scores = (scored[0]["given"]["chosen_logp"], 0.0)
            else:
                answers = tuple(template.answer_of(title) for title in candidates(example))
                scores = (scored[0]["given"]["chosen_logp"], *(row["given"]["rejected_logp"] for row in scored))
        yield Task(
            example.user, example.domain, tuple(encoder.prompt(branch, example.source)), answers, 0, tuple(scores)
        )


def _pair(order: Mapping[str, float]) -> tuple[float, float]:
    return order["chosen_logp"], order["rejected_logp"]


def answer_rows(scorer: LanguageModelScorer, todo: Sequence[Task], max_tokens: int) -> Iterator[dict[str, Any]]:
    """Rows of answers.jsonl: the greedy answer of each task, and what `generation_metrics` counts of it."""
    drawn = sample_answers(
        scorer.base, [t.prompt for t in todo], 1, temperature=0, top_p=1, top_k=0, max_tokens=max_tokens, seed=0
    )
    for task, (answer,) in zip(todo, drawn, strict=True):
        text = scorer.base.tokenizer.decode(list(answer.tokens))
        which = scorer.template.which(text, task.answers) if answer.finished else None
        best = max(task.scores)
        tied = task.scores.count(best) > 1
        yield {
            "user": task.user,
            "domain": task.domain,
            "text": text,
            "finished": answer.finished,
            "valid": which is not None,
            "right": None if which is None else which == task.right,
            "agrees": None if which is None or tied else task.scores[which] == best,
        }


def generation_metrics(rows: Sequence[Mapping[str, Any]], *, resamples: int, seed: int) -> dict[str, Any]:
    """Shares of rows of answers.jsonl.

    valid   the answer is one of those that were scored, and the model ended it
    agrees  of the valid ones: the answer that scored highest (pairwise: in the same prompt); ties are left out
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
