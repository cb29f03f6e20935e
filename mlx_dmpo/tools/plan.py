"""Memory, FLOPs and time of a training run before it starts"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..config import PlanSettings
from ..core.tree import BATCH_TOKENS, EncodedGroup, by_length, pad_groups, part
from ..errors import UserError
from ..model.calibrate import calibrate
from ..model.cost import (
    OPTIMIZER_STATES,
    Training,
    Work,
    assumed_groups,
    forward_flops,
    separate_flops,
    step_flops,
)
from ..model.fit import MACS, ROOM, Case, cheapest, choose, deciding, usable
from ..model.shape import ModelShape
from ..prompts import template as prompts
from ..prompts.pairwise import DOMAINS, PAIRWISE


def _works(case: Case) -> list[Work]:
    """An epoch's micro-batches."""
    cut = by_length(case.groups, case.batch_size, case.batch_tokens)
    return [Work.of(pad_groups([case.groups[i] for i in rows])) for rows in cut]


def on_macs(
    case: Case, batch_tokens: int | None, checkpoint: bool | None, flops_per_second: float
) -> dict[str, dict[str, Any]]:
    """What --memory auto chooses on each Mac, by its gigabytes: see `format_plan`.

    batch_tokens, checkpoint  what the user gave; None is free
    """
    found: dict[str, dict[str, Any]] = {}
    few = replace(case, groups=deciding(case.groups, case.batch_size))
    seconds: dict[tuple[int, bool], float] = {}
    for gigabytes in MACS:
        limit = usable(gigabytes)
        chosen = choose(few, limit, batch_tokens, checkpoint)
        key, peak = (chosen.batch_tokens, chosen.training.checkpoint), chosen.peak()
        if flops_per_second and key not in seconds:
            works = _works(replace(chosen, groups=case.groups))
            seconds[key] = sum(step_flops(case.shape, w, chosen.training) for w in works) / flops_per_second
        found[str(gigabytes)] = {
            "usable": limit,
            "fits": peak <= limit,
            "with_room": ROOM * peak <= limit,
            "batch_tokens": key[0],
            "grad_checkpoint": key[1],
            "peak": peak,
            "seconds_per_epoch": seconds.get(key),
            "add": None if peak <= limit else cheapest(chosen, limit),
        }
    return found


def plan(
    case: Case,
    *,
    epochs: float = 1.0,
    flops_per_second: float = 0.0,
    batch_tokens: int | None = None,
    checkpoint: bool | None = None,
) -> dict[str, Any]:
    """Everything that `mlx-dmpo plan` reports, in bytes, FLOPs, tokens and seconds.

    batch_tokens, checkpoint  what --memory auto may not choose, because the user did
    """
    works = _works(case)
    flops = sum(step_flops(case.shape, w, case.training) for w in works)
    reference = sum(forward_flops(case.shape, w) for w in works)
    separate = 3 * separate_flops(case.shape, case.groups)
    found: dict[str, Any] = {
        "memory": case.memory(),
        "fits": on_macs(case, batch_tokens, checkpoint, flops_per_second),
        "groups": len(case.groups),
        "tokens_per_epoch": sum(g.shared_tokens for g in case.groups),
        "tokens_per_epoch_separate": sum(g.separate_tokens for g in case.groups),
        "flops_per_epoch": flops,
        "flops_per_epoch_separate": separate,
        "flops_of_reference": reference,
        "padding_share": 1 - sum(g.shared_tokens - len(g.tails) for g in case.groups) / sum(w.tokens for w in works),
    }
    if flops_per_second:
        found["seconds_per_epoch"] = flops / flops_per_second
        found["seconds"] = epochs * flops / flops_per_second + reference / flops_per_second
    return found


def run(settings: PlanSettings) -> dict[str, Any]:
    """The command's plan. Raises UserError for a model, data or setting that it cannot plan with."""
    s = settings
    shape = ModelShape.of(s.model)
    if s.num_layers == 0 or s.num_layers > shape.layers:
        raise UserError(
            f"--num-layers: {s.num_layers} does not fit a model of {shape.layers} layers: "
            f"give 1 to {shape.layers}, or -1"
        )
    for key in s.lora_keys:
        if key.rsplit(".", 1)[-1] not in shape.projections:
            known = ", ".join(shape.projections)
            raise UserError(f'--lora-keys: "{key}" is not a linear layer of the model: choose among {known}')
    template = prompts.load(s.prompt or "pairwise")
    if s.data:
        encoded = measured_groups(
            s.data, s.tokenizer or s.model, s.num_negatives, s.max_seq_length, s.stage == "sft", template
        )
    else:
        encoded = assumed_groups(
            s.groups, s.num_negatives, history=s.history, title_tokens=s.title_tokens, form=template.form
        )
        if s.stage == "sft":
            encoded = [chosen_only(g) for g in encoded]
    training = Training(
        shape.layers if s.num_layers < 0 else s.num_layers,
        s.lora_rank,
        s.lora_keys,
        bool(s.grad_checkpoint),
        int(s.dtype) // 8,
        OPTIMIZER_STATES[s.optimizer],
    )
    case = Case(shape, training, encoded, s.batch_size, s.batch_tokens or BATCH_TOKENS)
    rate = s.tflops * 1e12 or calibrate(shape, training)
    found = plan(
        case,
        epochs=s.epochs,
        flops_per_second=rate,
        batch_tokens=s.batch_tokens,
        checkpoint=s.grad_checkpoint,
    )
    return found | {
        "flops_per_second": rate,
        "rate": "given" if s.tflops else "measured here",
        "parameters": shape.parameters,
    }


def measured_groups(
    data: str, tokenizer: str, k: int, max_seq_length: int, sft: bool, template: prompts.Template = PAIRWISE
) -> list[EncodedGroup]:
    """A data set's groups in tokens, without its model."""
    from ..data import formats
    from ..machine import console
    from ..machine.progress import track
    from ..model.encode import Encoder
    from ..model.loading import load_tokenizer
    from ..prompts.orders import first_negatives, printed_orders

    examples = [
        first_negatives(e, k) for e in formats.load_examples(Path(data), "train", DOMAINS, False, console.notice)
    ]
    encoder = Encoder(load_tokenizer(tokenizer), max_seq_length, template)
    order = partial(printed_orders, both=False, redraw=False, seed=0, form=template.form)
    return [encoder.encode(e, order(e, i), chosen_only=sft) for i, e in enumerate(track(examples, "encode", "example"))]


def chosen_only(group: EncodedGroup) -> EncodedGroup:
    """The answers that SFT learns, each once."""
    targets = group.targets if group.targets is not None else group.pairs[:, 0].tolist()
    return part(group, np.array(list(dict.fromkeys(targets))))


def format_plan(found: dict[str, Any]) -> str:
    """The plan as a table."""
    lines = ["memory of a training step at its highest"]
    for name, value in found["memory"].items():
        lines.append(f"  {name:<12} {value / 1e9:>8.2f} GB")
    lines.append("what --memory auto runs on a Mac of")
    lines += [f"  {gigabytes:>4} GB ({_on_mac(row)}" for gigabytes, row in found["fits"].items()]
    shared, separate = found["tokens_per_epoch"], found["tokens_per_epoch_separate"]
    lines.append(f"an epoch of {found['groups']} groups")
    lines.append(f"  tokens       {shared:>12,} ({separate:,} with every sequence alone: {separate / shared:.1f} x)")
    flops, alone = found["flops_per_epoch"], found["flops_per_epoch_separate"]
    lines.append(
        f"  TFLOP        {flops / 1e12:>12,.1f} ({alone / 1e12:,.1f}: {alone / flops:.1f} x); "
        f"the reference, once: {found['flops_of_reference'] / 1e12:,.1f}"
    )
    if "seconds" in found:
        rate = f"{found['flops_per_second'] / 1e12:.3g} TFLOP/s, {found['rate']}"
        lines.append(
            f"  time         {clock(found['seconds_per_epoch']):>12}; "
            f"with the reference and all epochs {clock(found['seconds'])} ({rate})"
        )
    return "\n".join(lines)


def _on_mac(row: dict[str, Any]) -> str:
    """A row of the table, from the usable memory on."""
    usable, peak = f"{row['usable'] / 1e9:>4.1f} GB usable)", f"{row['peak'] / 1e9:>6.2f} GB"
    what = f"{row['batch_tokens']:>6,} tokens at once, {'recomputed' if row['grad_checkpoint'] else 'kept      '}"
    if not row["fits"]:
        return f"{usable}  {what} {peak}: {'add ' + row['add'] if row['add'] else 'does not fit'}"
    seconds = row["seconds_per_epoch"]
    time = f"  {clock(seconds):>8} per epoch" if seconds else ""
    return f"{usable}  {what} {peak}{time}" + ("" if row["with_room"] else "  (no room to spare)")


def clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
