"""Whether a run fits in memory, and what makes it fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.tree import BATCH_TOKENS, EncodedGroup
from ..errors import UserError
from .cost import Training, Work, largest, memory
from .shape import ModelShape

MACS = (8, 16, 24, 32, 36, 48, 64, 96, 128)


def usable(gigabytes: float) -> float:
    """Bytes that Metal recommends as a working set on a Mac of so many GB: two thirds up to 36 GB, three quarters
    above."""
    return gigabytes * 2**30 * (2 / 3 if gigabytes <= 36 else 3 / 4)


def machine_memory() -> float:
    """Bytes that a run can have here: Metal's recommended working set, or all of the machine's memory."""
    import os

    import mlx.core as mx

    if mx.metal.is_available():
        return float(mx.device_info()["max_recommended_working_set_size"])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@dataclass(frozen=True)
class Case:
    """A run to be planned."""

    shape: ModelShape
    training: Training
    groups: Sequence[EncodedGroup]
    batch_size: int
    batch_tokens: int = BATCH_TOKENS

    @property
    def largest(self) -> Work:
        return largest(self.groups, self.batch_size, self.batch_tokens)

    def peak(self) -> float:
        return memory(self.shape, self.largest, self.training)["peak"]


def remedies(case: Case) -> list[tuple[str, Case]]:
    """Changes that save memory, the cheapest first; each on top of those before it."""
    out: list[tuple[str, Case]] = []

    def then(what: str, **change: Any) -> None:
        nonlocal case
        case = replace(case, **change)
        out.append((", ".join([*([out[-1][0]] if out else []), what]), case))

    while case.batch_size > 1:
        then(f"--batch-size {case.batch_size // 2}", batch_size=case.batch_size // 2)
        if len(out) > 1:  # halved again: one flag says it
            out[-1] = (out[-1][0].split(", ")[-1], case)
    if not case.training.checkpoint:
        then("--grad-checkpoint", training=replace(case.training, checkpoint=True))
    if case.training.adapted_layers > 8:
        then("--num-layers 8", training=replace(case.training, adapted_layers=8))
    if case.shape.bits > 4:
        then("--quantize 4", shape=replace(case.shape, bits=4))
    return out


def cheapest(case: Case, limit: float) -> str | None:
    """ "" where the case fits in `limit` bytes, the flags that make it fit, or None."""
    if case.peak() <= limit:
        return ""
    return next((what for what, changed in remedies(case) if changed.peak() <= limit), None)


def check(case: Case, limit: float) -> None:
    """Raises UserError where a run cannot fit in `limit` bytes, with the cheapest flags that make it fit."""
    peak = case.peak()
    if peak <= limit:
        return
    change = cheapest(case, limit)
    raise UserError(
        f"memory: about {peak / 1e9:.1f} GB will be needed, and this machine has {limit / 1e9:.1f} GB: "
        f"{f'add {change}' if change else 'take a smaller model or a shorter --max-seq-length'}, or run it anyway "
        "with --no-memory-check"
    )
