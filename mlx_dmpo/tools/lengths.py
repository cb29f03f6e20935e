"""How long data is in a model's tokens, what max_seq_length would cut, and what running a shared prefix once saves."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..config import CheckSettings
from ..data.check import ERROR, NOTE, SHOWN, WARNING, Finding, Part
from ..errors import UserError
from ..machine.progress import track
from ..model import loading
from ..model.encode import Encoder, longest
from ..prompts import template as prompts
from ..prompts.orders import first_negatives, printed_orders

WHOLE = 1 << 30  # a max_seq_length that cuts nothing


def measure(part: Part, tokenizer: Any, settings: CheckSettings) -> tuple[dict[str, Any], list[Finding]]:
    """A part's token counts, each negative printed in one order, and the findings about them.

    {} for the counts where no group can be made into tokens.
    """
    assert part.loaded
    template = prompts.load(settings.prompt or "pairwise").with_domains(settings.domains)
    whole, cutting = Encoder(tokenizer, WHOLE, template), Encoder(tokenizer, settings.max_seq_length, template)
    sequences: list[int] = []
    shared = separate = dropped = 0
    cut: list[str] = []
    unfit: list[str] = []
    refused: list[str] = []
    examples = track(part.loaded.examples, "tokens", "group")
    for i, example in enumerate(first_negatives(e, settings.num_negatives) for e in examples):
        orders = printed_orders(example, i, both=False, redraw=False, seed=0, form=template.form)
        try:
            group = whole.encode(example, orders)
        except UserError as error:
            refused.append(str(error))
            continue
        sequences += [len(group.prefix) + len(tail) for tail in group.tails]
        shared += group.shared_tokens
        separate += group.separate_tokens
        if longest(group) > settings.max_seq_length:
            try:
                dropped += cutting.encode(example, orders).dropped
                cut.append(example.source)
            except UserError:
                unfit.append(example.source)
    findings = [Finding(ERROR, message, 1) for message in refused[:SHOWN]]
    if len(refused) > SHOWN:
        what = f"{len(refused)} groups of {part.name} cannot be made into tokens in all"
        findings.append(Finding(ERROR, what, len(refused), tuple(refused)))
    if not sequences:
        return {}, findings
    n = len(part.loaded.examples) - len(refused)
    numbers = {
        "name": part.name,
        "groups": n,
        "mean": float(np.mean(sequences)),
        "p90": float(np.percentile(sequences, 90)),
        "max": max(sequences),
        "max_seq_length": settings.max_seq_length,
        "groups_cut": len(cut),
        "history_items_cut": dropped,
        "groups_that_do_not_fit": len(unfit),
        "separate_tokens_a_group": separate / n,
        "shared_tokens_a_group": shared / n,
    }
    findings.append(
        Finding(
            NOTE,
            f"{part.name}: {numbers['mean']:.0f} tokens a prompt with answer (90 % within {numbers['p90']:.0f}, "
            f"longest {numbers['max']}); a group: {separate / n:.0f} tokens run separately, {shared / n:.0f} with the "
            f"prefix shared ({separate / shared:.2f} x fewer)",
        )
    )
    if cut:
        what = (
            f"{len(cut)} groups of {part.name} exceed {settings.max_seq_length} tokens and lose {dropped} history "
            "items in all"
        )
        findings.append(Finding(WARNING, what, len(cut), tuple(cut)))
    if unfit:
        what = (
            f"{len(unfit)} groups of {part.name} do not fit {settings.max_seq_length} tokens at all: raise "
            "--max-seq-length"
        )
        findings.append(Finding(ERROR, what, len(unfit), tuple(unfit)))
    return numbers, findings


def measure_all(parts: list[Part], settings: CheckSettings) -> tuple[list[dict[str, Any]], list[Finding]]:
    tokenizer = loading.load_tokenizer(settings.model)
    measured = [measure(part, tokenizer, settings) for part in parts if part.loaded]
    return [numbers for numbers, _ in measured if numbers], [f for _, found in measured for f in found]
