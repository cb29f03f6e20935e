"""Answers drawn from the policy, and margins of all candidate negatives: what preference data and hard negatives are made of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import assets
from ..config import SampleSettings
from ..data import formats
from ..errors import UserError
from ..judge.rows import rows_of
from ..machine import console, files
from ..model import generate, loading
from ..model.encode import Encoder
from ..model.open import open_scorer
from ..prompts import pairwise
from ..prompts.orders import first_negatives, printed_orders
from ..records import Example, PreferenceGroup, RankingExample


def ordering(answer: str, first: str, second: str) -> list[str] | None:
    """The titles in the order in which an answer ranks them; None where it is no ordering of the two. White space is free."""
    orders = {" ".join(pairwise.ranking_answer(a, b).split()): [a, b] for a, b in ((first, second), (second, first))}
    return orders.get(" ".join(answer.split()))


def _tasks(examples: Sequence[Example], encoder: Encoder, seed: int) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """(the fields of a line, the prompt's tokens), one for each prompt: each negative's in one printed order, or the text as it is."""
    for index, example in enumerate(examples):
        orders = printed_orders(example, index, both=False, redraw=False, seed=seed)
        dropped = encoder.encode(example, orders).dropped  # refuses what does not fit
        facts: list[dict[str, Any]] = [{}]
        group: Example = example
        branches = [0]
        if isinstance(example, RankingExample):
            group = pairwise.build_group(example, orders, encoder.domains, dropped)
            branches = [chosen for chosen, _ in group.pairs]
            facts = [
                {"positive": example.positive, "negative": negative, "positive_first": flag}
                for negative, (flag,) in zip(example.negatives, orders, strict=True)
            ]
        assert isinstance(group, PreferenceGroup)
        for fact, branch in zip(facts, (group.branches[b] for b in branches), strict=True):
            line = {"user": example.user, "domain": example.domain, **fact, "prompt": list(branch.messages)}
            yield line, encoder.prompt(branch, example.source)


def draw(
    base: loading.Loaded, encoder: Encoder, examples: Sequence[Example], settings: SampleSettings
) -> Iterator[dict[str, Any]]:
    """One line a prompt: its answers with log-probs, and, where it ranks two titles, how each answer orders them."""
    tasks = list(_tasks(examples, encoder, settings.seed))
    with tqdm(total=len(tasks) * settings.n, desc="sample", unit="answer", disable=None, leave=False) as bar:
        for start in range(0, len(tasks), settings.batch_size):
            chunk = tasks[start : start + settings.batch_size]
            drawn = generate.sample_answers(
                base,
                [tokens for _, tokens in chunk],
                settings.n,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                max_tokens=settings.max_tokens,
                seed=int(np.random.default_rng([settings.seed, start]).integers(2**31)),
            )
            for (line, _), answers in zip(chunk, drawn, strict=True):
                told: list[dict[str, Any]] = []
                for answer in answers:
                    text = base.tokenizer.decode(list(answer.tokens))
                    told.append({"text": text, "logp": answer.logp, "finished": answer.finished})
                    if "positive" in line:
                        found = ordering(text, line["positive"], line["negative"]) if answer.finished else None
                        told[-1] |= {"ordering": found, "right": found and found[0] == line["positive"]}
                yield line | {"answers": told}
            bar.update(len(chunk) * settings.n)


def summary(lines: Sequence[dict[str, Any]]) -> str:
    answers = [a for line in lines for a in line["answers"]]
    cut = sum(not a["finished"] for a in answers)
    told = f"{len(answers)} answers to {len(lines)} prompts" + (f", {cut} of them cut at --max-tokens" if cut else "")
    if "right" in answers[0]:
        parsed = [a for a in answers if a["ordering"]]
        told += f"; {len(parsed)} are orderings of the two titles"
        if parsed:
            told += f", {sum(a['right'] for a in parsed) / len(parsed):.3f} of these rank the positive first"
    return told


def sample(settings: SampleSettings) -> tuple[Path, str]:
    """Writes settings.out, whole or not at all; returns it and what it holds in words. Raises UserError for what the user can mend."""
    out = Path(settings.out)
    if out.exists() and not settings.overwrite:
        raise UserError(f"{out}: exists already: name another --out, or add --overwrite")
    domains = pairwise.with_domains(settings.domains)
    data = settings.data or str(assets.data_dir())
    loaded = formats.load(data, settings.split, domains, settings.skip_bad_rows, console.notice, settings.domain)
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
        told = (
            f"{len(lines)} margins, {hardest[0]:+.2f} to {hardest[-1]:+.2f} nats; the least are the hardest negatives"
        )
    else:
        lines = list(draw(scorer.base, scorer.encoder, examples, settings))
        told = summary(lines)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}): name another --out") from None
    return out, told
