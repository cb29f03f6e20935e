"""What a run reads: its examples, its validation sample, its policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import assets
from ..config import DmpoSettings, Lora, SftSettings, TrainSettings
from ..core.tree import EncodedGroup
from ..data import formats
from ..data.rows import has_split
from ..errors import UserError
from ..machine import console, files
from ..machine.ranks import world
from ..model import adapters, loading, trackers
from ..model import shape as model_shape
from ..model.open import LanguageModelScorer, choose_template, open_scorer, refuse_for_free_text
from ..prompts.groups import utilities
from ..prompts.orders import first_negatives, last_positives
from ..prompts.template import Domain
from ..records import Example, RankingExample
from .batches import GroupSource
from .holdout import describe, hold_out
from .optimizer import check_optimizer

VALIDATION_GROUPS = 1000  # by default, at most


def refuse(settings: SftSettings | DmpoSettings) -> None:
    """Raises UserError for all that can be known to fail before data and model are read."""
    template = choose_template(settings, settings.start_adapter)
    several = isinstance(settings, DmpoSettings) and settings.loss == "mult-dpo"
    if several and (template.form not in ("direct", "listwise") or (settings.orders or 1) > 1):
        raise UserError(
            f"loss: mult-dpo needs all answers after one prompt, and --prompt {template.name} has several: take "
            "direct, or listwise with --orders 1, or --loss s-dpo"
        )
    check_optimizer(settings)
    trackers.check(settings.report_to)
    if settings.start_adapter:
        config = adapters.read_adapter_config(settings.start_adapter)
        settings = _with_adapter_shape(settings, config, settings.start_adapter)
    layers = model_shape.layer_count(Path(settings.model or assets.model_dir()))
    if settings.num_layers == 0 or layers:
        adapters.check_layers(settings, layers or 1)
    if settings.fine_tune_type == "dora" and settings.quantize in (3, 5, 6):
        raise UserError(adapters.no_dora(settings.quantize))


@dataclass(frozen=True)
class Examples:
    train: Sequence[Example]
    valid: Sequence[Example]  # those that validations measure
    held_out: Sequence[Example] = ()  # training users' rows that `valid` was taken from, if any


def read_examples(settings: SftSettings | DmpoSettings) -> Examples:
    """Both splits. Raises UserError for settings that cannot work, and for data that their loss cannot use."""
    refuse(settings)
    domains = dict(choose_template(settings, settings.start_adapter).domains)
    train, held_out = _read_split(settings, "train", domains), list[Example]()
    if not validates_on_own_data(settings) and settings.val_batches != 0:
        share, start = settings.holdout, settings.start_adapter
        train, held_out = hold_out(train, share, settings.seed, start)
        world().say(describe(train, held_out, share, start))
    valid = validation_sample(settings, held_out or _read_split(settings, "valid", domains))
    if not valid and settings.patience:
        raise UserError("patience: there is nothing to validate on: give --valid-data, or leave patience out")
    return Examples(train, valid, held_out)


def validates_on_own_data(settings: TrainSettings) -> bool:
    """Whether there is a validation file or split, so that no training user is held out."""
    return bool(settings.valid_data) or has_split(settings.data or str(assets.data_dir()), "valid")


def validation_sample(settings: TrainSettings, examples: Sequence[Example]) -> Sequence[Example]:
    """The examples that validations measure, in the split's order; says so where it is a sample.

    The sample is the same for every seed, so that runs can be compared.
    """
    wanted = VALIDATION_GROUPS if settings.val_batches is None else settings.val_batches * settings.batch_size
    if wanted < 0 or len(examples) <= wanted:
        return examples
    if wanted and world().first:
        console.notice(
            f"note: validation takes {wanted:,} of {len(examples):,} groups, drawn at random; "
            "--val-batches -1 takes all"
        )
    rows = np.random.default_rng(0).choice(len(examples), wanted, replace=False)
    return [examples[i] for i in sorted(rows)]


def _read_split(settings: SftSettings | DmpoSettings, split: str, domains: dict[str, Domain]) -> list[Example]:
    """The examples of a split with the settings' negatives; none where there is no validation data."""
    data = settings.data or str(assets.data_dir())
    if split == "valid" and settings.valid_data:
        data = settings.valid_data
    elif split == "valid" and not has_split(data, split):
        return []
    loaded = formats.load(data, split, domains, settings.skip_bad_rows, console.notice, settings.domain)
    if not loaded.has_pairs and (isinstance(settings, DmpoSettings) or settings.best_metric == "valid_pair_accuracy"):
        raise UserError(
            f"{loaded.name}: holds {loaded.format}, one answer per prompt: give data with chosen and rejected answers"
        )
    refuse_for_free_text(settings, not loaded.ranking)
    count = settings.num_negatives
    if count < 0:  # sft's default: one pair is enough to learn from, but a list is printed whole
        count = 0 if loaded.ranking and choose_template(settings, settings.start_adapter).form == "listwise" else 1
    return _for_loss(settings, [first_negatives(e, count) for e in loaded.examples])


def _for_loss(settings: SftSettings | DmpoSettings, examples: list[Example]) -> list[Example]:
    """The examples with what the loss needs. Raises UserError for a row that does not give it."""
    if not isinstance(settings, DmpoSettings) or settings.loss not in ("recpo", "mult-dpo"):
        return examples
    ranking = [e for e in examples if isinstance(e, RankingExample)]
    if len(ranking) < len(examples):
        raise UserError(
            f"loss: {settings.loss} needs titles, and the data is free text: take another loss, such as s-dpo"
        )
    if settings.loss == "recpo":
        for e in ranking:
            weights = utilities(e)
            if weights is None:
                raise UserError(
                    f"{e.source}: no times, answer_ratings and answer_times, which recpo needs: make the data with "
                    "`prepare` from ratings with times, or take another loss, such as s-dpo"
                )
            if min(weights) <= 0:
                raise UserError(
                    f"{e.source}: a rating of 0 or less, of which recpo has no ratio: shift the ratings, or take s-dpo"
                )
        return examples
    found = [last_positives(e, settings.num_positives) for e in ranking]
    short = sum(1 + len(e.more_positives) < settings.num_positives for e in found)
    if short and world().first:
        console.notice(f"note: {short} of {len(found)} examples have fewer than {settings.num_positives} positives")
    return list(found)


def encode(
    settings: TrainSettings, policy: LanguageModelScorer, examples: Examples
) -> tuple[GroupSource, GroupSource | None]:
    """Training and validation groups. Says how many history items were left out."""
    form = policy.template.form if isinstance(examples.train[0], RankingExample) else "free text"
    if form == "free text":  # brings its own prompts: the next stage may take any form
        start = settings.start_adapter if isinstance(settings, SftSettings | DmpoSettings) else ""
        policy.base.prompt = adapters.read_adapter_config(start).get("prompt", {}) if start else {}
    source = partial(GroupSource, encoder=policy.encoder, seed=settings.seed, orders=settings.orders or 1)
    both = settings.both_orders and form == "pairwise"
    redraw = settings.candidate_order == "epoch" and form in ("pairwise", "listwise")
    for name, given, used in (
        ("both-orders", settings.both_orders, both),
        ("candidate-order", settings.candidate_order == "epoch", redraw),
    ):
        if given and not used and world().first:
            why = "use --orders" if form == "listwise" else f"{form} prints no order of two titles"
            console.notice(f"note: --{name} does not apply: {why}")
    sft = isinstance(settings, SftSettings)
    rows, valid_rows = policy.usable(examples.train, chosen_only=sft), policy.usable(examples.valid)
    train = source(rows, both=both, redraw=redraw, chosen_only=sft)
    valid = source(valid_rows, both=form == "pairwise") if valid_rows else None
    dropped = [g.dropped for g in train.epoch(0) if g.dropped]
    if dropped and world().first:
        console.notice(
            f"note: {sum(dropped)} of the oldest history items were left out of {len(dropped)} groups to fit "
            f"{settings.max_seq_length} tokens"
        )
    return train, valid


def open_policy(
    settings: SftSettings | DmpoSettings,
) -> tuple[LanguageModelScorer, SftSettings | DmpoSettings]:
    """The base model with the start adapter, or a new one, ready to train; the settings with the adapter's shape."""
    start, resolved = settings.start_adapter, settings
    if start:
        resolved = _with_adapter_shape(settings, adapters.read_adapter_config(start), start)

    def attach(base: loading.Loaded) -> None:
        if start:
            adapters.load_adapter(base, start)
            base.model.train()
        else:
            adapters.add_lora(base.model, resolved)
        if settings.resume and base.date:  # the prompts show the day on which the run began
            base.date = adapters.template_date(settings.adapter_path) or base.date

    return open_scorer(resolved, start, attach=attach), resolved


def _with_adapter_shape(
    settings: SftSettings | DmpoSettings, stored: dict[str, Any], path: str
) -> SftSettings | DmpoSettings:
    """The settings with the start adapter's shape. Raises UserError where they name another one."""
    lora = stored["lora_parameters"]
    kept: dict[str, Any] = {
        k: tuple(v) if k == "keys" else v for k, v in lora.items() if k in ("rank", "scale", "dropout", "keys") and v
    }
    found = {
        "lora_parameters": replace(Lora(), **kept),
        "num_layers": stored["num_layers"],
        "fine_tune_type": stored.get("fine_tune_type", "lora"),
    }
    for name in ("num_layers", "fine_tune_type"):
        given, default = getattr(settings, name), getattr(type(settings)(), name)
        if given not in (found[name], default):
            raise UserError(_other_shape(name, found[name], path))
    for spec in fields(Lora):  # part by part: a part that agrees may be given alone
        part, value = getattr(settings.lora_parameters, spec.name), getattr(found["lora_parameters"], spec.name)
        if part not in (value, getattr(Lora(), spec.name)):
            raise UserError(_other_shape(f"lora_parameters.{spec.name}", value, path))
    return replace(settings, **found)


def _other_shape(name: str, value: Any, path: str) -> str:
    return f"{name}: the adapter in {path} has {files.plain(value)}: leave {name} out, or start without --start-adapter"


def refuse_other_shape(settings: SftSettings | DmpoSettings, given: Mapping[str, Any]) -> None:
    """Raises UserError where a setting that was given, be it the default's value, is not the start adapter's.

    given  what the flags and the config file name: num_layers, fine_tune_type, lora_parameters, lora_rank, ...
    """
    if not settings.start_adapter:
        return
    found = _with_adapter_shape(settings, adapters.read_adapter_config(settings.start_adapter), settings.start_adapter)
    for name in ("num_layers", "fine_tune_type"):
        if name in given and getattr(settings, name) != getattr(found, name):
            raise UserError(_other_shape(name, getattr(found, name), settings.start_adapter))
    parts = set(given.get("lora_parameters") or ()) | {n[5:] for n in given if n.startswith("lora_")}
    for part in sorted(parts & {f.name for f in fields(Lora)}):
        wanted, has = getattr(settings.lora_parameters, part), getattr(found.lora_parameters, part)
        if wanted != has:
            raise UserError(_other_shape(f"lora_parameters.{part}", has, settings.start_adapter))


def describe_work(groups: Sequence[EncodedGroup], groups_per_step: int, steps_per_epoch: int, steps: int) -> str:
    """The arithmetic of a run, on two lines."""
    n = len(groups)
    prefix, tail = np.mean([len(g.prefix) for g in groups]), np.mean([len(t) for g in groups for t in g.tails])
    branches = np.mean([len(g.tails) for g in groups])
    shared, separate = sum(g.shared_tokens for g in groups), sum(g.separate_tokens for g in groups)
    return (
        f"{n} groups, {groups_per_step} per step -> {steps_per_epoch} steps per epoch, {steps} steps in all\n"
        f"a group: prefix {prefix:.0f} + tails {branches:.3g} x {tail:.0f} tokens, {shared / n:.0f} with shared ones "
        f"counted once (each answer alone: {separate / n:.0f}, {separate / shared:.1f} x as many)"
    )
