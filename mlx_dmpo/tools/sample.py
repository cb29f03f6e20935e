"""Answers drawn from the policy, and margins of all candidate negatives: what preference data and hard negatives are
made of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import assets
from ..config import SampleSettings
from ..data import formats
from ..errors import UserError
from ..judge.rows import rows_of
from ..machine import console, files, memory
from ..machine.progress import Progress
from ..model import generate
from ..model.encode import Encoder
from ..model.open import LanguageModelScorer, choose_template, open_scorer, refuse_for_free_text
from ..prompts.groups import build_group, candidates
from ..prompts.orders import first_negatives, printed_orders
from ..prompts.template import Template
from ..records import Branch, Example, PreferenceGroup

PARSED = {"pairwise": "ordering", "listwise": "title", "direct": "title", "pointwise": "liked"}  # form -> field


@dataclass(frozen=True)
class Task:
    """One prompt to draw answers to: the fields of its line, its tokens, and what each possible answer means."""

    line: dict[str, Any]
    tokens: list[int]
    answers: Sequence[str] = ()
    meanings: Sequence[Any] = ()
    right: Any = None  # the meaning of the right answer; None where any title may be liked

    def read(self, text: str, finished: bool, template: Template) -> dict[str, Any]:
        """What a drawn answer says, None where it is none of the possible ones, and whether that is right."""
        if not self.answers:
            return {}
        which = template.which(text, self.answers) if finished else None
        meaning = None if which is None else self.meanings[which]
        return {PARSED[template.form]: meaning, "right": meaning if meaning is None else meaning == self.right}


def _tasks(examples: Sequence[Example], encoder: Encoder, seed: int) -> Iterator[Task]:
    """The prompts of each example: pairwise each negative's in one printed order, pointwise each candidate's, else
    one."""
    template = encoder.template
    for index, example in enumerate(examples):
        orders = printed_orders(example, index, both=False, redraw=False, seed=seed, form=template.form)
        dropped = encoder.encode(example, orders).dropped  # refuses what does not fit
        line: dict[str, Any] = {"user": example.user, "domain": example.domain}
        if isinstance(example, PreferenceGroup):
            prompt = example.branches[0]
            yield Task(line | {"prompt": list(prompt.messages)}, encoder.prompt(prompt, example.source))
            continue
        group = build_group(example, orders, template, dropped)
        titles = candidates(example)
        line["positive"] = example.positive
        for n, branch in enumerate(_prompts(group)):
            facts: dict[str, Any] = {"prompt": list(branch.messages)}
            tokens = encoder.prompt(branch, example.source)
            if template.form == "pairwise":
                pair = [example.positive, example.negatives[n]]
                facts = {"negative": pair[1], "positive_first": orders[n][0], **facts}
                answers = [template.answer_of(*pair), template.answer_of(*pair[::-1])]
                yield Task(line | facts, tokens, answers, [pair, pair[::-1]], pair)
            elif template.form == "pointwise":
                yield Task(
                    line | {"title": titles[n], **facts},
                    tokens,
                    [template.answer_yes, template.answer_no],
                    [True, False],
                    n == 0,
                )
            else:
                facts = {"negatives": list(example.negatives), **facts}
                yield Task(line | facts, tokens, [template.answer_of(t) for t in titles], titles, example.positive)


def _prompts(group: PreferenceGroup) -> list[Branch]:
    """The first branch of each prompt."""
    return [b for i, b in enumerate(group.branches) if i == 0 or b.messages != group.branches[i - 1].messages]


def draw(
    scorer: LanguageModelScorer, examples: Sequence[Example], settings: SampleSettings
) -> Iterator[dict[str, Any]]:
    """One line a prompt: its answers with log-probs, and what each says: an ordering of two titles, a title, or
    like."""
    base, encoder = scorer.base, scorer.encoder
    tasks = list(_tasks(examples, encoder, settings.seed))
    longest = max(len(task.tokens) for task in tasks) + settings.max_tokens
    size = scorer.prompts_at_once(longest, settings.n)
    with Progress(len(tasks) * settings.n, "sample", "answer") as bar:
        for start in range(0, len(tasks), size):
            chunk = tasks[start : start + size]
            drawn = generate.sample_answers(
                base,
                [task.tokens for task in chunk],
                settings.n,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                max_tokens=settings.max_tokens,
                seed=int(np.random.default_rng([settings.seed, start]).integers(2**31)),
            )
            for task, answers in zip(chunk, drawn, strict=True):
                found: list[dict[str, Any]] = []
                for answer in answers:
                    text = base.tokenizer.decode(list(answer.tokens))
                    facts = {"text": text, "logp": answer.logp, "finished": answer.finished}
                    found.append(facts | task.read(text, answer.finished, encoder.template))
                yield task.line | {"answers": found}
            bar.update(len(chunk) * settings.n)


def summarize(lines: Sequence[dict[str, Any]]) -> str:
    answers = [a for line in lines for a in line["answers"]]
    cut = sum(not a["finished"] for a in answers)
    line = f"{len(answers)} answers to {len(lines)} prompts" + (f", {cut} of them cut at --max-tokens" if cut else "")
    if "right" in answers[0]:
        parsed = [a for a in answers if a["right"] is not None]
        what = {"ordering": "orderings of the two titles", "title": "titles of candidates", "liked": "yes or no"}
        line += f"; {len(parsed)} are {next(words for key, words in what.items() if key in answers[0])}"
        if parsed:
            right = sum(a["right"] for a in parsed) / len(parsed)
            does = {"ordering": "rank the positive first", "title": "name the positive", "liked": "are right"}
            line += f", {right:.3f} of these {next(words for key, words in does.items() if key in answers[0])}"
    return line


def _lines(settings: SampleSettings) -> tuple[list[dict[str, Any]], str]:
    """The lines to write, and a sentence about them."""
    domains = choose_template(settings, settings.adapter_path).domains
    data = settings.data or str(assets.data_dir())
    loaded = formats.load(data, settings.split, domains, settings.skip_bad_rows, console.notice, settings.domain)
    refuse_for_free_text(settings, not loaded.ranking)
    if settings.score and not loaded.ranking:
        raise UserError(
            f"{loaded.name}: holds {loaded.format}, no candidate negatives: give ranking examples, or leave out --score"
        )
    examples = [first_negatives(e, settings.num_negatives) for e in loaded.examples[: settings.limit or None]]
    scorer = open_scorer(settings, settings.adapter_path)
    examples = scorer.usable(examples)
    if settings.score:
        rows = [row for scores in scorer.score(examples) for row in rows_of(scores)]
        lines = [{k: row[k] for k in ("user", "domain", "positive", "negative", "margin")} for row in rows]
        hardest = sorted(row["margin"] for row in lines)
        return lines, (
            f"{len(lines)} margins, {hardest[0]:+.2f} to {hardest[-1]:+.2f} nats; small margins are hard negatives"
        )
    lines = list(draw(scorer, examples, settings))
    return lines, summarize(lines)


def sample(settings: SampleSettings) -> tuple[Path, str]:
    """Writes settings.out, whole or not at all.

    Returns the path and a sentence about its content. Raises UserError for what the user can fix.
    """
    out = Path(settings.out)
    if out.exists() and not settings.overwrite:
        raise UserError(f"{out}: exists already: name another --out, or add --overwrite")
    with memory.memory_limits(settings):
        lines, summary = _lines(settings)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(out, "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}): name another --out") from None
    return out, summary
