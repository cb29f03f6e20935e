"""The objects around the loop, made from the settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import SIGTERM

import mlx.nn as nn
import mlx.optimizers as optimizers

from ..config import DmpoSettings, SftSettings
from ..core.tree import pad_groups
from ..errors import Interrupted
from ..machine import commands, console, files
from ..machine.interrupts import Stop
from ..machine.ranks import world
from ..model import adapters, device, fit, trackers
from ..model.open import LanguageModelScorer
from ..report import live
from .batches import Batches, GroupSource
from .checkpoint import Checkpoints
from .inputs import describe_work
from .loop import Callbacks, Schedule
from .memory_plan import MemoryPlan
from .nan import BadSteps
from .objective import lower, objective
from .optimizer import build_optimizer, learning_rate
from .reference import Reference
from .reporting import METRICS, Report
from .resume import check_identity, run_identity
from .step import StepFunction, padding
from .validation import Validation


@dataclass(frozen=True)
class Training:
    """What `fit` takes, and what is read when it returns."""

    model: nn.Module
    optimizer: optimizers.Optimizer
    batches: Batches
    step_function: StepFunction
    schedule: Schedule
    callbacks: Callbacks
    checkpoints: Checkpoints
    report: Report


def set_up(
    settings: SftSettings | DmpoSettings,
    policy: LanguageModelScorer,
    groups: GroupSource,
    valid: GroupSource | None,
    reference: Reference | None,
    plan: MemoryPlan,
    path: Path | None,
    stop: Stop,
) -> Training:
    """Everything of a run, restored from its newest checkpoint where it is resumed.

    path  the run directory; None on all ranks but the first
    """
    model, loss, optimizer = policy.base.model, objective(settings), build_optimizer(settings)
    dropout = bool(settings.lora_parameters.dropout)
    batches = Batches(
        groups,
        groups_per_step=settings.batch_size * settings.grad_accumulation_steps,
        batch_size=settings.batch_size,
        batch_tokens=min(plan.batch_tokens, device.tokens_per_product(model)),
        pad=pad_groups if dropout else padding(policy.groups),
        reference=reference,
        dropout=dropout,
    )
    per_epoch = batches.steps_per_epoch
    steps = settings.iters or max(1, round(settings.epochs * per_epoch))
    world().say(describe_work(groups.epoch(0), batches.groups_per_step, per_epoch, steps))
    schedule = Schedule(
        steps,
        partial(learning_rate, settings, steps=steps),
        max_grad_norm=settings.max_grad_norm,
        save_every=settings.save_every,
        validate_every=(settings.steps_per_eval or per_epoch) if valid else 0,
        patience=settings.patience,
    )
    step_function = StepFunction(
        model,
        policy.groups,
        loss,
        plan.grad_checkpoint,
        keep=settings.frozen_cache_gb * 1e9,
        disk=policy.frozen_cache,
        epoch=len(groups.examples),
        memory_limit=settings.memory_limit,
        leaner=plan.leaner,
    )
    identity = run_identity(settings, policy, groups, valid, reference)
    world().agree("training", json.dumps(identity))
    identity |= {"environment": device.environment(), "memory": plan.to_json()}  # machines may differ in them
    shape = adapters.adapter_config(settings, policy.base)
    checkpoints = Checkpoints(path, model, optimizer, shape, identity, keep=settings.keep_checkpoints)
    if settings.resume and checkpoints.restore(check_identity):
        world().say(f"resumed at step {checkpoints.state.step} of {steps}")
    state = checkpoints.state
    tracker = trackers.tracker(settings.report_to, settings.project_name, path, files.plain(settings)) if path else None
    name = "sft" if isinstance(settings, SftSettings) else settings.loss
    report = Report(
        path / METRICS if path else None,
        state,
        name=name,
        steps=steps,
        steps_per_epoch=per_epoch,
        every=settings.steps_per_report,
        learning_rate=lambda: float(optimizer.learning_rate),
        peak=lambda: step_function.peak,
        view=lambda lines: live.view(
            name,
            steps,
            state.step,
            memory=fit.machine_memory(),
            plain=settings.plain,
            shown=world().first,
            history=lines,
        ),
        tracker=tracker,
        rewards=isinstance(settings, DmpoSettings),
    )
    callbacks = _callbacks(settings, policy, valid, reference, checkpoints, report, stop, steps)
    return Training(model, optimizer, batches, step_function, schedule, callbacks, checkpoints, report)


def _callbacks(
    settings: SftSettings | DmpoSettings,
    policy: LanguageModelScorer,
    valid: GroupSource | None,
    reference: Reference | None,
    checkpoints: Checkpoints,
    report: Report,
    stop: Stop,
    steps: int,
) -> Callbacks:
    model, state, resume = policy.base.model, checkpoints.state, commands.resume(settings)
    bad_steps = BadSteps(model, checkpoints, settings.max_bad_steps, settings.debug_nan, lower(settings), resume)

    def validate() -> None:
        assert valid is not None
        give_up = lambda: bool(stop.requested) and world().size == 1  # noqa: E731
        size, metric = settings.batch_size, settings.best_metric
        Validation(
            model,
            policy.groups,
            valid,
            objective(settings),
            reference,
            size,
            metric,
            give_up,
            policy.tokens_at_once(valid.epoch(0), size),
            policy.frozen,
        ).run(state, report)

    def leaner(step: int, tokens: int, recompute: bool) -> None:
        again = ", and each layer is recomputed" if recompute else ""
        console.notice(
            f"note: step {step}: memory did not suffice: at most {tokens:,} tokens are run at once from here on"
            f"{again}; the result is the same"
        )
        checkpoints.identity["memory"] |= {"batch_tokens": tokens, "grad_checkpoint": recompute, "stepped_down": step}

    def interrupted() -> Interrupted:
        text = f"stopped at step {state.step} of {steps}, saved at {checkpoints.saved}: continue with {resume}"
        return Interrupted(text, stop.requested or SIGTERM)

    return Callbacks(
        stopping=lambda: world().any(bool(stop.requested)),
        interrupted=interrupted,
        validate=validate,
        save=checkpoints.save,
        skipped=bad_steps.skipped,
        leaner=leaner,
        done=report.step_done,
    )
