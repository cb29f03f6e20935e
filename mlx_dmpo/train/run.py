"""The body of `sft` and `dmpo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import assets
from ..config import DmpoSettings, Lora, SftSettings, TrainSettings
from ..core.tree import EncodedGroup
from ..data import formats
from ..data.rows import has_split, hub_name
from ..errors import UserError, WriteError
from ..machine import console, files, memory, run_directory
from ..machine.interrupts import Stop
from ..machine.ranks import world
from ..model import adapters, cost, device, fit, loading
from ..model import shape as model_shape
from ..model.open import LanguageModelScorer, open_scorer, refuse_for_free_text
from ..model.score import score_groups
from ..prompts import pairwise
from ..prompts.orders import first_negatives
from ..records import Example, RankingExample
from ..report import charts
from .batches import GroupSource
from .objective import needs_reference
from .reference import Reference, cache_key
from .trainer import Trainer


def describe_work(trainer: Trainer, groups: Sequence[EncodedGroup]) -> str:
    """The arithmetic of a run, on two lines."""
    n = len(groups)
    prefix, tail = np.mean([len(g.prefix) for g in groups]), np.mean([len(t) for g in groups for t in g.tails])
    branches = np.mean([len(g.tails) for g in groups])
    shared, separate = sum(g.shared_tokens for g in groups), sum(g.separate_tokens for g in groups)
    per = trainer.steps_per_epoch
    return (
        f"{n} groups, {trainer.groups_per_step} a step -> {per} steps an epoch, {trainer.steps} steps in all\n"
        f"a group: prefix {prefix:.0f} + tails {branches:.3g} x {tail:.0f} tokens, {shared / n:.0f} where shared ones count once "
        f"(each answer alone: {separate / n:.0f}, {separate / shared:.1f} x as many)"
    )


def planned_case(settings: TrainSettings, base: loading.Loaded, groups: Sequence[EncodedGroup]) -> fit.Case:
    """A run as `plan` takes it."""
    shape = model_shape.ModelShape.of(base.path)
    if settings.quantize:
        shape = replace(shape, bits=settings.quantize, group_size=settings.quantize_group_size)
    training = cost.Training(
        shape.layers if settings.num_layers < 0 else settings.num_layers,
        settings.lora_parameters.rank,
        settings.lora_parameters.keys,
        settings.grad_checkpoint,
        base.model.model.norm.weight.dtype.size,
        cost.OPTIMIZER_STATES[settings.optimizer],
    )
    return fit.Case(shape, training, groups, settings.batch_size, settings.batch_tokens)


def read_split(settings: TrainSettings, split: str, domains: dict[str, pairwise.Domain]) -> list[Example] | None:
    """The examples of a split with the settings' negatives; None where there is no validation data."""
    data = settings.data or str(assets.data_dir())
    if split == "valid" and settings.valid_data:
        data = settings.valid_data
    elif split == "valid" and not has_split(data, split):
        return None
    loaded = formats.load(data, split, domains, settings.skip_bad_rows, console.notice, settings.domain)
    if not loaded.has_pairs and (isinstance(settings, DmpoSettings) or settings.best_metric == "valid_pair_accuracy"):
        raise UserError(
            f"{loaded.name}: holds {loaded.format}, one answer a prompt: give data with chosen and rejected answers"
        )
    refuse_for_free_text(settings, not loaded.ranking)
    return [first_negatives(e, settings.num_negatives) for e in loaded.examples]


def _adopt_adapter_shape(settings: TrainSettings, stored: dict[str, Any], path: str) -> TrainSettings:
    """The settings with the start adapter's shape. Raises UserError where they ask for another one."""
    lora = stored["lora_parameters"]
    kept: dict[str, Any] = {
        k: tuple(v) if k == "keys" else v for k, v in lora.items() if k in ("rank", "scale", "dropout", "keys") and v
    }
    shape = replace(Lora(), **kept)
    found = {
        "lora_parameters": shape,
        "num_layers": stored["num_layers"],
        "fine_tune_type": stored.get("fine_tune_type", "lora"),
    }
    for name, value in found.items():
        asked, default = getattr(settings, name), getattr(type(settings)(), name)
        if asked != value and asked != default:
            raise UserError(
                f"{name}: the adapter in {path} has {files.plain(value)}: leave {name} out, or start without --start-adapter"
            )
    return replace(settings, **found)


def open_policy(settings: TrainSettings) -> tuple[LanguageModelScorer, TrainSettings]:
    """The base model with the start adapter, or a fresh one, ready to train."""
    start = settings.start_adapter  # type: ignore[attr-defined]
    if start:
        settings = _adopt_adapter_shape(settings, adapters.read_adapter_config(start), start)

    def attach(base: loading.Loaded) -> None:
        if start:
            adapters.load_adapter(base, start)
            base.model.train()
        else:
            adapters.add_lora(base.model, settings)

    return open_scorer(settings, start, attach=attach), settings


def train(settings: SftSettings | DmpoSettings, command: str) -> Path:
    """Runs `sft` or `dmpo`, from the start or from a checkpoint, and returns the run directory.

    Raises UserError for what the user can mend, Interrupted where SIGINT or SIGTERM came.
    """
    with memory.memory_limits(settings), world().watched(), Stop() as stop:
        domains = pairwise.with_domains(settings.domains)
        examples = read_split(settings, "train", domains)
        valid_examples = read_split(settings, "valid", domains)
        assert examples is not None
        if not world().first:
            _train(settings, examples, valid_examples, domains, None, stop)
            return Path(settings.adapter_path)
        with run_directory.RunDirectory(
            settings.adapter_path, command, settings, overwrite=settings.overwrite, resume=settings.resume
        ) as run:
            try:
                _train(settings, examples, valid_examples, domains, run, stop)
            except WriteError as error:
                raise UserError(f"{error}, then go on with --resume") from None
            return run.path


def _train(
    settings: SftSettings | DmpoSettings,
    examples: list[Example],
    valid_examples: list[Example] | None,
    domains: dict[str, pairwise.Domain],
    run: run_directory.RunDirectory | None,
    stop: Stop,
) -> None:
    say = world().say
    policy, resolved = open_policy(settings)
    base, encoder = policy.base, policy.encoder
    trainable, total = loading.parameter_counts(base.model)
    say(
        f"{base.name}: {trainable:,} of {total:,} parameters train ({100 * trainable / total:.2f} %), on {device.device_name()}"
    )
    scorer = policy.groups
    form = policy.template.form if isinstance(examples[0], RankingExample) else "free text"
    source = partial(GroupSource, encoder=encoder, seed=settings.seed, orders=settings.orders or 1)
    sft = isinstance(settings, SftSettings)
    both = settings.both_orders and form == "pairwise"
    redraw = settings.candidate_order == "epoch" and form in ("pairwise", "listwise")
    for name, given, used in (
        ("both-orders", settings.both_orders, both),
        ("candidate-order", settings.candidate_order == "epoch", redraw),
    ):
        if given and not used and world().first:
            why = "use --orders" if form == "listwise" else f"{form} prints no order of two titles"
            console.notice(f"note: --{name} does not apply: {why}")
    train_groups = source(examples, both=both, redraw=redraw, chosen_only=sft)
    valid_groups = source(valid_examples, both=form == "pairwise") if valid_examples else None
    first = train_groups.epoch(0)
    dropped = [g.dropped for g in first if g.dropped]
    if dropped and world().first:
        console.notice(
            f"note: {sum(dropped)} of the oldest history items were left out of {len(dropped)} groups to fit {settings.max_seq_length} tokens"
        )

    if settings.memory_check and scorer.shared:
        fit.check(planned_case(resolved, base, first), fit.machine_memory())

    reference = None
    if needs_reference(settings):
        start = Path(settings.start_adapter) if settings.start_adapter else None
        key = cache_key(base.fingerprint, start, scorer.shared)
        score = partial(score_groups, base.model, scorer, batch_size=4 * settings.batch_size, describe="")
        reference = Reference(key, lambda groups: score(groups=groups), 4 * settings.batch_size)
        reference.add(train_groups.all_orders() + (valid_groups.epoch(0) if valid_groups else []))
        say(f"reference: {start or base.name}; {reference.computed} groups scored, the others were stored")
    trainer = Trainer(resolved, base, scorer, train_groups, valid_groups, reference, run.path if run else None, stop)
    say(describe_work(trainer, first))
    if settings.resume:
        trainer.restore()

    trainer.run()
    if run is None:
        return
    state = trainer.state
    run.started -= trainer.seconds_before
    files.write_json(run.path / adapters.ADAPTER_CONFIG, adapters.adapter_config(resolved, base))
    charts.plot_training(trainer.lines, run.path / "training.png")
    run.config = {k: v for k, v in files.plain(resolved).items() if k in run.config}
    for data in (settings.data or str(assets.data_dir()), settings.valid_data):
        if data and not hub_name(data):
            run.input(data)
    run.finish(
        device.device_name(),
        model=base.name,
        base_fingerprint=base.fingerprint,
        steps=state.step,
        best_step=state.best[1] if state.best else state.step,
        bad_steps=state.bad_steps,
        ranks=world().size,
        shared_road=scorer.shared,
        peak_memory_gb=max(trainer.peak, mx.get_peak_memory()) / 1e9,
    )
