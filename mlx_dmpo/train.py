"""One training loop for every objective: SFT, and DMPO with its relatives.

A step's loss is the mean over its groups, whatever their shapes and however they are split into micro-batches.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_map
from tqdm import tqdm

from . import assets, losses, plan, report, rundir
from . import model as models
from .batches import by_length, epoch_steps, first_negatives, pad_groups, planned, printed_orders
from .config import DmpoSettings, Lora, SftSettings, TrainSettings
from .data import formats, prompts
from .encode import Encoder
from .errors import UserError
from .records import EncodedGroup, GroupBatch, RankingExample
from .reference import Reference, cache_key, score_groups
from .scoring import FrozenOutputs, Road, choose_road, frozen_layers

# (policy (G, R), reference (G, R) or None, batch) -> losses (G,), margins (G, K)
Objective = Callable[[mx.array, mx.array | None, GroupBatch], tuple[mx.array, mx.array]]


def objective(settings: TrainSettings) -> Objective:
    """The settings' loss of a batch's log-probs, and its margins (SFT's are policy differences in nats)."""

    def sft(policy: mx.array, reference: mx.array | None, batch: GroupBatch) -> tuple[mx.array, mx.array]:
        return losses.sft(policy, mx.array(batch.chosen_lengths)), losses.pair_difference(policy, mx.array(batch.pairs))

    if not isinstance(settings, DmpoSettings):
        return sft
    reductions: dict[str, Callable[..., mx.array]] = {
        "dpo": losses.dpo,
        "dmpo": losses.dmpo,
        "s-dpo": losses.s_dpo,
        "simpo": partial(losses.simpo, gamma=settings.gamma),
    }
    reduce = reductions[settings.loss]

    def preference(policy: mx.array, reference: mx.array | None, batch: GroupBatch) -> tuple[mx.array, mx.array]:
        scored = policy / mx.maximum(mx.array(batch.answer_mask).sum(axis=-1), 1) if settings.loss == "simpo" else policy
        margin = losses.margins(scored, reference, mx.array(batch.pairs), settings.beta)
        loss = reduce(margin, mx.array(batch.pair_mask), smoothing=settings.label_smoothing)
        if settings.sft_weight:
            loss = loss + settings.sft_weight * losses.sft(policy, mx.array(batch.chosen_lengths))
        return loss, margin

    return preference


def needs_reference(settings: TrainSettings) -> bool:
    return isinstance(settings, DmpoSettings) and settings.loss != "simpo" and not settings.reference_free


def learning_rate(settings: TrainSettings, step: int, steps: int) -> float:
    """The rate of 0-based `step` of `steps`: warm-up to the peak, which its last step reaches, then the schedule down to 0."""
    if isinstance(settings.lr_schedule, dict):
        return models.schedule_rate(settings.lr_schedule, step)
    warmup = round(settings.warmup * steps) if settings.warmup < 1 else int(settings.warmup)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    fall = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[settings.lr_schedule]
    return settings.learning_rate * fall


def build_optimizer(settings: TrainSettings) -> optimizers.Optimizer:
    """Raises UserError for arguments that the optimiser does not take."""
    kind = {
        "adamw": optimizers.AdamW,
        "adam": optimizers.Adam,
        "sgd": optimizers.SGD,
        "adafactor": optimizers.Adafactor,
        "muon": optimizers.Muon,
        "lion": optimizers.Lion,
    }[settings.optimizer]
    arguments = dict(settings.optimizer_config)
    if settings.weight_decay or settings.optimizer == "adamw":  # adamw's own default is not 0
        arguments.setdefault("weight_decay", settings.weight_decay)
    if settings.optimizer == "adafactor":
        arguments.setdefault("relative_step", False)
    try:
        return kind(learning_rate=settings.learning_rate, **arguments)
    except TypeError as error:
        raise UserError(f"optimizer: {settings.optimizer}: {error}: change optimizer_config or weight_decay") from None


@dataclass
class GroupSource:
    """A split as encoded groups: which negatives, which printed orders, which answers."""

    examples: Sequence[RankingExample]
    encoder: Encoder
    seed: int
    both: bool = False
    redraw: bool = False
    chosen_only: bool = False

    def __post_init__(self) -> None:
        self._fixed: list[EncodedGroup] | None = None

    def _encode(self, epoch: int, both: bool) -> list[EncodedGroup]:
        draw = partial(printed_orders, both=both, redraw=self.redraw, seed=self.seed, epoch=epoch)
        rows = tqdm(self.examples, desc="encode", unit="example", disable=None, leave=False, delay=2)
        return [self.encoder.encode(e, draw(e, i), chosen_only=self.chosen_only) for i, e in enumerate(rows)]

    def epoch(self, epoch: int) -> list[EncodedGroup]:
        if self.redraw and not self.both:
            return self._encode(epoch, False)
        if self._fixed is None:
            self._fixed = self._encode(0, self.both)
        return self._fixed

    def all_orders(self) -> list[EncodedGroup]:
        """Groups that hold every sequence of every epoch."""
        return self._encode(0, True) if self.redraw and not self.both else self.epoch(0)


COMPILED_SHAPES = 64  # a compiled step keeps one program a shape for ever; past so many, a step of a new shape is not compiled


def value_and_grad(
    model: nn.Module, road: Road, loss: Objective, checkpoint: bool, *, keep: float = 0, compiled: bool | None = None
) -> Callable[[GroupBatch, np.ndarray | None, float, int | None], tuple[Any, Any]]:
    """(batch, reference, weight, dropout_seed) -> ((weight * sum of losses, losses (G,), margins (G, K), logps (G, R)), gradients).

    Only the adapter's leaves are differentiated. Tracing leaves its own arrays in the model: they are put back.

    keep      bytes in which outputs of layers below the adapter are kept between epochs
    compiled  by mx.compile, in planned shapes; None means on a GPU. Not with dropout, whose seed a compiled step would fix.
    """
    compiled = road.shared and (not models.on_cpu() if compiled is None else compiled)
    frozen = FrozenOutputs(model, keep) if road.shared and frozen_layers(model) else None

    def run(
        parameters: Any, batch: GroupBatch, reference: mx.array | None, weight: Any, dropout_seed: int | None, **options: Any
    ) -> tuple[mx.array, ...]:
        model.update(parameters)
        logps = road.logps(model, batch, checkpoint=checkpoint, dropout_seed=dropout_seed, **options)
        value, margin = loss(logps, reference, batch)
        return weight * value.sum(), value, margin, logps

    differentiate = mx.value_and_grad(run)

    def of_arrays(parameters: Any, arrays: dict[str, Any], reference: Any, weight: mx.array, options: Any) -> Any:
        return differentiate(parameters, GroupBatch(**arrays, groups=()), reference, weight, None, **options)

    program = mx.compile(of_arrays)
    shapes: set[Any] = set()

    def step(batch: GroupBatch, reference: np.ndarray | None, weight: float, dropout_seed: int | None) -> tuple[Any, Any]:
        parameters = model.trainable_parameters()
        compile_it = compiled and dropout_seed is None
        if compile_it:
            batch = pad_groups(batch.groups, planned)
            arrays = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "groups"}
            shape = tuple(a.shape for a in arrays.values())
            compile_it = shape in shapes or len(shapes) < COMPILED_SHAPES
        given = None if reference is None else mx.array(reference)
        options = {"frozen": frozen(batch)} if frozen else {}
        try:
            if compile_it:
                shapes.add(shape)
                return program(parameters, {k: mx.array(a) for k, a in arrays.items()}, given, mx.array(weight), options)
            return differentiate(parameters, batch, given, weight, dropout_seed, **options)
        finally:
            model.update(parameters)

    return step


def right_pairs(difference: np.ndarray, mask: np.ndarray) -> float:
    """How many pairs the policy ranks right, a tie ½.  (G, K), (G, K)."""
    return float((((difference > 0) + 0.5 * (difference == 0)) * mask).sum())


class Trainer:
    """State of one run; `run` is the loop."""

    def __init__(
        self,
        settings: TrainSettings,
        base: models.Loaded,
        road: Road,
        train: GroupSource,
        valid: GroupSource | None,
        reference: Reference | None,
        directory: Path,
    ):
        self.settings, self.model, self.road = settings, base.model, road
        self.train, self.valid, self.reference, self.directory = train, valid, reference, directory
        self.loss = objective(settings)
        self.step_function = value_and_grad(base.model, road, self.loss, settings.grad_checkpoint, keep=settings.frozen_cache_gb * 1e9)
        self.optimizer = build_optimizer(settings)
        self.lines: list[dict[str, Any]] = []
        self.best: tuple[float, int, Any] | None = None  # value, step, parameters
        self.waited = 0
        self.groups_per_step = settings.batch_size * settings.grad_accumulation_steps
        per_epoch = math.ceil(len(train.examples) / self.groups_per_step)
        self.steps_per_epoch = per_epoch
        self.steps = settings.iters or max(1, round(settings.epochs * per_epoch))
        self.tracker = models.tracker(settings.report_to, settings.project_name, directory, rundir.plain(settings))

    def validate(self, step: int, epoch: float) -> None:
        """Loss, margin and order-debiased pair accuracy on the validation groups; keeps the best adapter."""
        assert self.valid is not None
        groups = self.valid.epoch(0)
        if self.settings.val_batches >= 0:
            groups = groups[: self.settings.val_batches * self.settings.batch_size]
        if not groups:
            return
        loss = margin = right = pairs = 0.0
        for group, logps in score_groups(self.model, self.road, groups, self.settings.batch_size, "validate"):
            batch = pad_groups([group])
            reference = None if self.reference is None else mx.array(self.reference.logps([group]))
            per_group, margins = self.loss(mx.array(logps[None]), reference, batch)
            loss += float(per_group[0])
            margin += float(margins.mean())
            # the two printed orders of a pair stand next to each other
            difference = (logps[group.pairs[:, 0]] - logps[group.pairs[:, 1]]).reshape(-1, 2).sum(axis=1)
            right += right_pairs(difference, np.ones_like(difference))
            pairs += len(difference)
        line = {
            "step": step,
            "epoch": round(epoch, 4),
            "valid_loss": loss / len(groups),
            "valid_margin": margin / len(groups),
            "valid_pair_accuracy": right / pairs,
        }
        self._write(line)
        value = line["valid_loss"] if self.settings.best_metric == "valid_loss" else -line["valid_pair_accuracy"]
        better = self.best is None or value < self.best[0]
        self.waited = 0 if better else self.waited + 1
        if better:
            self.best = (value, step, tree_map(mx.array, self.model.trainable_parameters()))
        tqdm.write(
            f"  step {step:>4}: validation loss {line['valid_loss']:.4f}, margin {line['valid_margin']:+.3f}, "
            f"pair accuracy {line['valid_pair_accuracy']:.3f}{' (best)' if better else ''}"
        )

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with open(self.directory / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.tracker:
            valid = any(k.startswith("valid_") for k in line)
            (self.tracker.on_val_loss_report if valid else self.tracker.on_train_loss_report)({"iteration": line["step"], **line})

    def _step(self, groups: Sequence[EncodedGroup], step: int) -> dict[str, float]:
        """One optimiser step on `groups`; the mean loss over them and what else is known of them."""
        gradients: Any = None
        total = {"loss": 0.0, "margin": 0.0, "right": 0.0, "pairs": 0.0, "tokens": 0.0}
        dropout = self.settings.lora_parameters.dropout
        for rows in by_length(groups, self.settings.batch_size):
            picked = [groups[i] for i in rows]
            batch = pad_groups(picked)
            reference = None if self.reference is None else self.reference.logps(picked)
            seed = None if not dropout else int(np.random.default_rng([self.settings.seed, step, int(rows[0])]).integers(2**31))
            (_, value, margin, logps), more = self.step_function(batch, reference, 1 / len(groups), seed)
            gradients = more if gradients is None else tree_map(mx.add, gradients, more)
            mx.eval(value, margin, logps, gradients)
            difference = np.array(losses.pair_difference(logps, mx.array(batch.pairs)))
            total["loss"] += float(value.sum())
            total["margin"] += float((np.array(margin) * batch.pair_mask).sum())
            total["right"] += right_pairs(difference, batch.pair_mask)
            total["pairs"] += float(batch.pair_mask.sum())
            total["tokens"] += sum(g.shared_tokens for g in picked)
        if not math.isfinite(total["loss"]):
            rows_named = ", ".join(g.source or g.user for g in groups[:3])
            raise UserError(f"step {step}: the loss is not finite (rows {rows_named}, …): lower --learning-rate or --beta")
        if self.settings.max_grad_norm:
            gradients, _ = optimizers.clip_grad_norm(gradients, self.settings.max_grad_norm)
        self.optimizer.learning_rate = learning_rate(self.settings, step - 1, self.steps)
        self.optimizer.update(self.model, gradients)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        return {**total, "groups": len(groups)}

    def run(self) -> int:
        """Trains; returns the number of steps done. Writes metrics.jsonl, numbered adapters and adapters.safetensors."""
        settings = self.settings
        (self.directory / "metrics.jsonl").unlink(missing_ok=True)
        mx.reset_peak_memory()
        step, epoch, since = 0, 0, time.perf_counter()
        window: list[dict[str, float]] = []
        every = settings.steps_per_eval or self.steps_per_epoch
        with tqdm(total=self.steps, desc="sft" if isinstance(settings, SftSettings) else settings.loss, unit="step", disable=None) as bar:  # type: ignore[attr-defined]
            while step < self.steps:
                groups = self.train.epoch(epoch)
                for rows in epoch_steps(len(groups), self.groups_per_step, settings.seed, epoch):
                    step += 1
                    window.append(self._step([groups[i] for i in rows], step))
                    bar.update()
                    last = step == self.steps
                    if step % settings.steps_per_report == 0 or last:
                        line = self._summary(window, step, time.perf_counter() - since)
                        self._write(line)
                        bar.set_postfix(
                            {
                                k: f"{line[k]:.3g}"
                                for k in ("loss", "margin", "pair_accuracy", "groups_per_second", "tokens_per_second", "peak_memory_gb")
                                if k in line
                            }
                        )
                        window, since = [], time.perf_counter()
                    if self.valid is not None and (step % every == 0 or last):
                        paused = time.perf_counter()
                        self.validate(step, step / self.steps_per_epoch)
                        since += time.perf_counter() - paused
                    if step % settings.save_every == 0 and not last:
                        models.save_adapter(self.model, self.directory / f"{step:07d}_adapters.safetensors")
                    if last or (settings.patience and self.waited >= settings.patience):
                        break
                else:
                    epoch += 1
                    continue
                break
        if step < self.steps:
            tqdm.write(f"  stopped at step {step} of {self.steps}: {self.waited} validations without a new best")
        if self.best is not None and self.best[1] != step:
            models.save_adapter(self.model, self.directory / "last_adapters.safetensors")
            self.model.update(self.best[2])
        models.save_adapter(self.model, self.directory / models.ADAPTER_WEIGHTS)
        return step

    def _summary(self, window: Sequence[dict[str, float]], step: int, seconds: float) -> dict[str, Any]:
        total = {key: sum(w[key] for w in window) for key in window[0]}
        line: dict[str, Any] = {"step": step, "epoch": round(step / self.steps_per_epoch, 4), "loss": total["loss"] / total["groups"]}
        if total["pairs"]:
            line |= {"margin": total["margin"] / total["pairs"], "pair_accuracy": total["right"] / total["pairs"]}
        return line | {
            "learning_rate": float(self.optimizer.learning_rate),
            "groups_per_second": total["groups"] / seconds,
            "tokens_per_second": total["tokens"] / seconds,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }


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


def planned_case(settings: TrainSettings, base: models.Loaded, groups: Sequence[EncodedGroup]) -> plan.Case:
    """A run as `plan` takes it."""
    shape = plan.ModelShape.of(base.path)
    if settings.quantize:
        shape = replace(shape, bits=settings.quantize, group_size=settings.quantize_group_size)
    training = plan.Training(
        shape.layers if settings.num_layers < 0 else settings.num_layers,
        settings.lora_parameters.rank,
        settings.lora_parameters.keys,
        settings.grad_checkpoint,
        base.model.model.norm.weight.dtype.size,
        plan.OPTIMIZER_STATES[settings.optimizer],
    )
    return plan.Case(shape, training, groups, settings.batch_size)


def read_split(settings: TrainSettings, split: str, domains: dict[str, prompts.Domain]) -> list[RankingExample] | None:
    """The examples of a split with the settings' negatives; None where there is no validation data."""
    data = Path(settings.data) if settings.data else assets.data_dir()
    if split == "valid" and settings.valid_data:
        data = Path(settings.valid_data)
    elif split == "valid" and (data.is_file() or not (data / "valid.jsonl").exists()):
        return None
    examples = formats.load_examples(data, split, domains, settings.skip_bad_rows, rundir.notice)
    return [first_negatives(e, settings.num_negatives) for e in examples]


def _same_adapter(settings: TrainSettings, stored: dict[str, Any], path: str) -> TrainSettings:
    """The settings with the start adapter's shape. Raises UserError where they ask for another one."""
    lora = stored["lora_parameters"]
    kept: dict[str, Any] = {k: tuple(v) if k == "keys" else v for k, v in lora.items() if k in ("rank", "scale", "dropout", "keys") and v}
    shape = replace(Lora(), **kept)
    found = {"lora_parameters": shape, "num_layers": stored["num_layers"], "fine_tune_type": stored.get("fine_tune_type", "lora")}
    for name, value in found.items():
        asked, default = getattr(settings, name), getattr(type(settings)(), name)
        if asked != value and asked != default:
            raise UserError(f"{name}: the adapter in {path} has {rundir.plain(value)}: leave {name} out, or start without --start-adapter")
    return replace(settings, **found)


def prepare_policy(settings: TrainSettings) -> tuple[models.Loaded, TrainSettings]:
    """The base model with the start adapter, or a fresh one, ready to train."""
    start = settings.start_adapter  # type: ignore[attr-defined]
    if start:
        settings = _same_adapter(settings, models.read_adapter_config(start), start)
    base = models.load(settings)
    if start:
        models.load_adapter(base, start)
        base.model.train()
    else:
        models.add_lora(base.model, settings)
    return base, settings


def train(settings: SftSettings | DmpoSettings, command: str) -> Path:
    """Runs `sft` or `dmpo` and returns the run directory. Raises UserError for what the user can mend."""
    domains = prompts.with_domains(settings.domains)
    examples = read_split(settings, "train", domains)
    valid_examples = read_split(settings, "valid", domains)
    assert examples is not None
    run = rundir.RunDirectory(settings.adapter_path, command, settings, overwrite=settings.overwrite)
    base, resolved = prepare_policy(settings)
    trainable, total = models.parameter_counts(base.model)
    print(f"{base.name}: {trainable:,} of {total:,} parameters train ({100 * trainable / total:.2f} %), on {models.device_name()}")
    road = choose_road(base.model, base.vocabulary, settings.scoring)
    if not road.shared:
        rundir.notice(f"note: every sequence is run alone, which is slower: {road.reason}")

    encoder = Encoder(base.tokenizer, settings.max_seq_length, domains)
    source = partial(GroupSource, encoder=encoder, seed=settings.seed)
    sft = isinstance(settings, SftSettings)
    train_groups = source(examples, both=settings.both_orders, redraw=settings.candidate_order == "epoch", chosen_only=sft)
    valid_groups = source(valid_examples, both=True) if valid_examples else None
    first = train_groups.epoch(0)
    dropped = [g.dropped for g in first if g.dropped]
    if dropped:
        rundir.notice(
            f"note: {sum(dropped)} of the oldest history items were left out of {len(dropped)} groups to fit {settings.max_seq_length} tokens"
        )

    if settings.memory_check and road.shared:
        plan.check(planned_case(resolved, base, first), plan.machine_memory())

    reference = None
    if needs_reference(settings):
        start = Path(settings.start_adapter) if settings.start_adapter else None
        score = partial(score_groups, base.model, road, batch_size=4 * settings.batch_size, describe="reference")
        reference = Reference(cache_key(base.fingerprint, start, road.shared), lambda groups: score(groups=groups))
        reference.add(train_groups.all_orders() + (valid_groups.epoch(0) if valid_groups else []))
        print(f"reference: {start or base.name}; {reference.computed} groups scored, the others were stored")
    trainer = Trainer(resolved, base, road, train_groups, valid_groups, reference, run.path)
    print(describe_work(trainer, first))

    steps = trainer.run()
    rundir.write_json(run.path / models.ADAPTER_CONFIG, models.adapter_config(resolved, base))
    report.plot_training(trainer.lines, run.path / "training.png")
    run.config = rundir.plain(resolved)
    run.input(settings.data or assets.data_dir())
    if settings.valid_data:
        run.input(settings.valid_data)
    run.finish(
        models.device_name(),
        model=base.name,
        base_fingerprint=base.fingerprint,
        steps=steps,
        best_step=trainer.best[1] if trainer.best else steps,
        shared_road=road.shared,
        peak_memory_gb=mx.get_peak_memory() / 1e9,
    )
    return run.path
