"""Micro-batches and recomputation, chosen before the run so that it fits in memory."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import DmpoSettings, SftSettings
from ..core.tree import BATCH_TOKENS, EncodedGroup, pad_groups
from ..model import fit
from ..model.open import LanguageModelScorer
from . import checkpoint
from .step import padding


@dataclass(frozen=True)
class MemoryPlan:
    """What a run does to fit in memory. Neither changes the result of a step.

    batch_tokens     tokens run at once, at most
    grad_checkpoint  whether each layer is recomputed in the backward pass
    why              who chose it
    planned, limit   bytes; 0 where nothing was planned
    leaner           whether a failed allocation may turn recomputation on
    wait_at          bytes in use above which MLX waits before it allocates more; 0 for none
    """

    batch_tokens: int
    grad_checkpoint: bool
    why: str
    planned: float = 0.0
    limit: float = 0.0
    leaner: bool = False
    wait_at: float = 0.0

    def line(self) -> str:
        again = "each layer recomputed" if self.grad_checkpoint else "nothing recomputed"
        planned = f"; {self.planned / 1e9:.3g} GB planned of {self.limit / 1e9:.3g} GB" if self.planned else ""
        return f"memory: at most {self.batch_tokens:,} tokens at once, {again} ({self.why}){planned}"

    def to_json(self) -> dict[str, Any]:
        """The manifest's entry."""
        return {
            "batch_tokens": self.batch_tokens,
            "grad_checkpoint": self.grad_checkpoint,
            "chosen_by": self.why,
            "planned_gb": round(self.planned / 1e9, 6),
            "limit_gb": round(self.limit / 1e9, 6),
        }


def plan_memory(
    settings: SftSettings | DmpoSettings, policy: LanguageModelScorer, groups: Sequence[EncodedGroup], run: Path | None
) -> MemoryPlan:
    """The run's micro-batches and recomputation: as given, as its checkpoint has them, or as --memory auto chooses.

    run  the run directory; None on all ranks but the first
    Raises UserError for a run that by `plan` does not fit in memory, unless --no-memory-check.
    """
    tokens, again = settings.batch_tokens, settings.grad_checkpoint
    auto, why = settings.memory == "auto", f"--memory {settings.memory}"
    stored = checkpoint.stored(run, "memory") if run and settings.resume and auto else None
    if stored:
        tokens = tokens or stored["batch_tokens"]
        again = stored["grad_checkpoint"] if again is None else again
        why = "as in the checkpoint"
    if tokens and again is not None and not stored:
        why = "as given"
    leaner = auto and settings.grad_checkpoint is None
    if not policy.groups.shared or not policy.counted:  # one sequence at a time, or of unknown size: not planned
        return MemoryPlan(tokens or BATCH_TOKENS, bool(again), why, leaner=leaner)
    shape, training = policy.shape, policy.training(settings)
    kept = 0.0
    if training.adapted_layers < shape.layers:  # outputs of the layers below the adapter
        held = sum(g.shared_tokens for g in groups) * shape.hidden * training.activation_bytes
        kept = min(settings.frozen_cache_gb * 1e9, float(held))
    gc.collect()  # the model of an earlier run in this process is no longer in use
    counted = shape.weight_bytes(training.activation_bytes) + 4.0 * training.adapter_parameters(shape)
    case = fit.Case(
        shape,
        replace(training, checkpoint=bool(again)),
        groups,
        settings.batch_size,
        tokens or BATCH_TOKENS,
        pad_groups if settings.lora_parameters.dropout else padding(policy.groups),
        policy.scale,
        kept + policy.beside(counted),
    )
    limit = fit.limit(settings.memory_limit) if auto else fit.machine_memory()
    if auto:
        case = fit.choose(case, limit, tokens, again)
    if settings.memory_check:
        free = auto and (tokens is None or again is None)
        fit.refuse(case, limit) if free else fit.check(case, limit)
    return MemoryPlan(case.batch_tokens, case.training.checkpoint, why, case.peak(), limit, leaner, case.wait_at(limit))
