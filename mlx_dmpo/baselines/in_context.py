"""Worked examples in the prompt: in-context learning, in every prompt form"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..errors import UserError
from ..prompts.groups import build_group, candidates
from ..prompts.orders import first_negatives
from ..prompts.template import Template
from ..records import RankingExample

LISTED = 4  # negatives of a worked example that prints a list


def worked(example: RankingExample, template: Template, index: int, seed: int) -> str:
    """One example with its right answer. Printed orders are drawn by seed; pointwise alternates Yes and No.

    Raises UserError for a title that the template cannot print.
    """
    coin = np.random.default_rng([seed, index])
    answer = 0
    if template.form == "pairwise":
        example = first_negatives(example, 1)
        orders: list[tuple[object, ...]] = [(bool(coin.random() < 0.5),)]
    elif template.form == "listwise":
        example = first_negatives(example, LISTED)
        orders = [tuple(int(i) for i in coin.permutation(len(candidates(example))))]
    else:
        example = first_negatives(example, 1)
        orders = []
        if template.form == "pointwise" and index % 2:
            answer = 3  # branches: Yes and No to the positive, Yes and No to the negative
    branch = build_group(example, orders, template).branches[answer]
    return f"{branch.messages[0]['content'].strip()}\nAnswer: {branch.answer.strip()}"


def in_context(template: Template, examples: Sequence[RankingExample], shots: int, seed: int) -> Template:
    """The template with `shots` worked examples, drawn by seed, before each prompt. Raises UserError for too few."""
    if len(examples) < shots:
        raise UserError(f"--shots: {shots}, and there are {len(examples)} training examples: lower --shots")
    chosen = np.random.default_rng([seed, 7]).permutation(len(examples))[:shots]
    parts = [worked(examples[i], template, n, seed) for n, i in enumerate(chosen.tolist())]
    text = "\n\n".join(["Here are examples with their right answers.", *parts, "Now answer for this user."])
    literal = text.replace("{", "{{").replace("}", "}}")
    more = tuple(f"{literal}\n\n{text}" for text in template.more_prompts)
    prompt = f"{literal}\n\n{template.prompt}"
    return replace(template, name=f"{template.name}+{shots}-shot", prompt=prompt, more_prompts=more)
