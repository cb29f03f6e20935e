"""`sft` and `dmpo`: read, open, encode, score the reference, train, write."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from .. import assets
from ..config import DmpoSettings, SftSettings
from ..core.finite import is_finite
from ..data.rows import hub_inputs, hub_name
from ..errors import UserError, WriteError
from ..machine import commands, console, files, mac, memory, trained_on
from ..machine.interrupts import Stop
from ..machine.ranks import world
from ..machine.run_directory import RunDirectory
from ..model import adapters, device, loading
from ..model.frozen_cache import cache_key
from ..model.open import LanguageModelScorer
from ..model.score import score_groups
from ..report import charts
from . import holdout, overfitting
from .batches import GroupSource
from .inputs import Examples, encode, open_policy, read_examples
from .loop import fit
from .memory_plan import plan_memory
from .objective import lower, needs_reference
from .reference import Reference, adapter_digest
from .setup import Training, set_up


def train(settings: SftSettings | DmpoSettings, command: str) -> Path:
    """Runs `sft` or `dmpo`, from the start or from a checkpoint, and returns the run directory.

    Raises UserError for what the user can fix, Interrupted where SIGINT or SIGTERM came.
    """
    with memory.memory_limits(settings), world().watched(), Stop() as stop, mac.awake(settings.caffeinate):
        examples = read_examples(settings)
        with _output(settings, command) as run:
            policy, settings = open_policy(settings)
            _say_parameters(policy.base)
            groups, valid = encode(settings, policy, examples)
            plan = plan_memory(settings, policy, groups.epoch(0), run.path if run else None)
            world().say(plan.line())
            for line in mac.notes(plan.planned, awake=settings.caffeinate) if world().first else ():
                console.notice(f"note: {line}")
            reference = score_reference(settings, policy, groups, valid)
            training = set_up(settings, policy, groups, valid, reference, plan, run.path if run else None, stop)
            state, schedule = training.checkpoints.state, training.schedule
            stop.finish_step = True
            mx.reset_peak_memory()
            with training.report, memory.waiting_at(plan.wait_at):
                steps = training.batches.steps(state.step, schedule.steps)
                fit(
                    training.model,
                    training.optimizer,
                    steps,
                    training.step_function,
                    state,
                    schedule,
                    training.callbacks,
                )
            if state.step < schedule.steps:
                world().say(f"  stopped at step {state.step}: {state.waited} validations without a new best")
            if run:
                _finish(run, settings, policy, training, examples)
    return Path(settings.adapter_path)


@contextlib.contextmanager
def _output(settings: SftSettings | DmpoSettings, command: str) -> Iterator[RunDirectory | None]:
    """The run directory on the first rank, None on the others. A file that cannot be written is a UserError."""
    if not world().first:
        yield None
        return
    with RunDirectory(
        settings.adapter_path, command, settings, overwrite=settings.overwrite, resume=settings.resume
    ) as run:
        try:
            yield run
        except WriteError as error:
            raise UserError(f"{error}, then continue with --resume") from None


def _say_parameters(base: loading.Loaded) -> None:
    trainable, total = loading.parameter_counts(base.model)
    share = f"{trainable:,} of {total:,} parameters train ({100 * trainable / total:.2f} %)"
    world().say(f"{base.name}: {share}, on {device.device_name()}")


def _say_best(settings: SftSettings | DmpoSettings, training: Training) -> None:
    """Which step is kept, where that is not the last, and whether the run overfitted."""
    state = training.checkpoints.state
    best = state.best[1] if state.best else state.step
    if text := overfitting.last_line(training.report.lines, best, lower(settings)):
        world().say(f"  {text}")
    if best != state.step:
        last = training.checkpoints.last()
        world().say(
            f"  {adapters.ADAPTER_WEIGHTS} holds step {best}, the best; the last step, {state.step}, is in {last}"
        )


def _finish(
    run: RunDirectory,
    settings: SftSettings | DmpoSettings,
    policy: LanguageModelScorer,
    training: Training,
    examples: Examples,
) -> None:
    """Writes the best adapter, the picture and, last, the manifest."""
    base, checkpoints = policy.base, training.checkpoints
    checkpoints.load_best()
    state = checkpoints.state
    _say_best(settings, training)
    if not is_finite(base.model.trainable_parameters()):
        raise UserError(
            f"step {state.step}: the adapter has NaN or Inf: continue from step {checkpoints.saved} with "
            f"{commands.resume(settings)}"
        )
    adapters.save_adapter(base.model, run.path / adapters.ADAPTER_WEIGHTS)
    run.started -= checkpoints.seconds_before
    files.write_json(run.path / adapters.ADAPTER_CONFIG, adapters.adapter_config(settings, base))
    charts.plot_training(training.report.lines, run.path / "training.png")
    run.config = {k: v for k, v in files.plain(settings).items() if k in run.config}
    trained_on.write(run.path, examples.train, settings.start_adapter)
    held_out = examples.held_out
    holdout.write(run.path, held_out)
    data = settings.data or str(assets.data_dir())
    read = [(data, "train")] + ([(settings.valid_data or data, "valid")] if examples.valid and not held_out else [])
    for name, split in read:
        if hub_name(name):
            run.inputs |= hub_inputs(name, split)
        else:
            run.input(name)
    run.finish(
        device.device_name(),
        model=base.name,
        base_fingerprint=base.fingerprint,
        steps=state.step,
        held_out={"users": len(holdout.users(held_out)), "digest": holdout.digest(held_out)} if held_out else None,
        best_step=state.best[1] if state.best else state.step,
        bad_steps=state.bad_steps,
        ranks=world().size,
        shared_prefix_scorer=policy.groups.shared,
        memory=checkpoints.identity["memory"],
        peak_memory_gb=max(training.step_function.peak, mx.get_peak_memory()) / 1e9,
    )


def score_reference(
    settings: SftSettings | DmpoSettings, policy: LanguageModelScorer, groups: GroupSource, valid: GroupSource | None
) -> Reference | None:
    """Log-probs of all groups under the policy as it starts; None for a loss without a reference."""
    if not needs_reference(settings):
        return None
    start, size, model = settings.start_adapter, 4 * settings.batch_size, policy.base.model
    adapter = adapter_digest(Path(start) if start else None)
    key = cache_key(policy.base.fingerprint, adapter, policy.groups.shared, device.environment())
    wanted = groups.all_orders() + (valid.epoch(0) if valid else [])
    tokens = policy.tokens_at_once(wanted, size)
    frozen = policy.frozen
    reference = Reference(
        key, lambda some: score_groups(model, policy.groups, some, size, "", tokens, frozen=frozen), size
    )
    reference.add(wanted)
    world().say(f"reference: {start or policy.base.name}; {reference.computed} groups scored, the others were stored")
    return reference
