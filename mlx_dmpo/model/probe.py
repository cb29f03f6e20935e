"""What the device at hand takes beside what is counted: the self-check's probes, and the weights in memory."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..core.selfcheck import GroupScorer, Probe
from .cost import Scale, Training, Work, memory, scoring_memory
from .shape import ModelShape

AGREES = 0.25  # a measured share of the plan that is this near to 1 is the probe's error, not the device's
# what a probe takes of its count on the CPU that this was fitted on, without and with recomputation
SMALL_BATCH = {False: 1.02, True: 1.04}


def scale_of(shape: ModelShape, training: Training, scorer: GroupScorer) -> Scale:
    """What the self-check's probes took on this device, beside what is counted for them.

    Coarse, in steps of a quarter, and 1 within a quarter of it: a probe is a small batch, and a choice must not differ
    between two runs.
    """

    def ratio(probe: Probe | None, counted: float, beside: float) -> float:
        if probe is None or counted <= 0:
            return 1.0
        found = max(0.0, probe.peak - beside) / counted
        return 1.0 if abs(found - 1) <= AGREES else max(0.25, round(4 * found) / 4)

    def trained(probe: Probe | None, checkpoint: bool) -> float:
        if probe is None:
            return 1.0
        found = memory(shape, Work.of(probe.batch), replace(training, checkpoint=checkpoint, optimizer_states=0))
        return ratio(probe, SMALL_BATCH[checkpoint] * found["activations"], found["gradients"] + found["logits"])

    forward = 1.0
    if scorer.forward:
        counted = scoring_memory(shape, Work.of(scorer.forward.batch), training.activation_bytes)
        forward = ratio(scorer.forward, counted, 0.0)
    return Scale(trained(scorer.kept, False), trained(scorer.recomputed, True), forward)


def beside(model: nn.Module, counted: float) -> float:
    """Bytes in use, or of the model's weights, that `counted` bytes of weights and adapter leave out."""
    held = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    return max(0.0, max(held, mx.get_active_memory()) - counted)
