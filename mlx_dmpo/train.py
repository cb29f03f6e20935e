"""One training loop for every objective: SFT, and DMPO with its relatives.

A step's loss is the mean over its groups, whatever their shapes and however they are split into micro-batches.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from signal import SIGTERM
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_map
from tqdm import tqdm

from . import assets, checkpoint, config, losses, memory, plan, report, rundir
from . import model as models
from .batches import ahead, by_length, epoch_steps, first_negatives, pad_groups, planned, printed_orders
from .config import DmpoSettings, Lora, SftSettings, TrainSettings
from .data import formats, prompts
from .data.rows import has_split, hub_name
from .distributed import world
from .encode import Encoder
from .errors import Interrupted, UserError, WriteError
from .finite import all_finite, is_finite, locate
from .records import EncodedGroup, Example, GroupBatch, RankingExample
from .reference import Reference, cache_key, score_groups, sequences
from .scoring import FrozenOutputs, Road, choose_road, frozen_layers
from .stopping import Stop

METRICS = "metrics.jsonl"

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

    examples: Sequence[Example]
    encoder: Encoder
    seed: int
    both: bool = False
    redraw: bool = False
    chosen_only: bool = False

    def __post_init__(self) -> None:
        self._fixed: list[EncodedGroup] | None = None

    def _encode(self, epoch: int, both: bool) -> list[EncodedGroup]:
        draw = partial(printed_orders, both=both, redraw=self.redraw, seed=self.seed, epoch=epoch)
        beside = True if epoch else None  # later epochs are encoded beside the training, which has a bar
        rows = tqdm(self.examples, desc="encode", unit="example", disable=beside, leave=False, delay=2)
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


def compiles(road: Road, compiled: bool | None = None) -> bool:
    """Whether a step is compiled; None means on a GPU."""
    return road.shared and (not models.on_cpu() if compiled is None else compiled)


def padding(road: Road, compiled: bool | None = None) -> Callable[[Sequence[EncodedGroup]], GroupBatch]:
    """How a step wants its groups: in planned shapes where it is compiled."""
    return partial(pad_groups, sized=planned) if compiles(road, compiled) else pad_groups


def value_and_grad(
    model: nn.Module, road: Road, loss: Objective, checkpoint: bool, *, keep: float = 0, compiled: bool | None = None
) -> Callable[[GroupBatch, np.ndarray | None, float, int | None], tuple[Any, Any]]:
    """(batch, reference, weight, dropout_seed) -> ((weight * sum of losses, losses (G,), margins (G, K), logps (G, R)), gradients).

    Only the adapter's leaves are differentiated. Tracing leaves its own arrays in the model: they are put back.

    keep      bytes in which outputs of layers below the adapter are kept between epochs
    compiled  by mx.compile, a program a shape (see `padding`); None means on a GPU. Not with dropout, whose seed a compiled step would fix.
    """
    compile_steps = compiles(road, compiled)
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
        compile_it = compile_steps and dropout_seed is None
        if compile_it:
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


Arrays = tuple[GroupBatch, np.ndarray | None]  # a micro-batch and its reference (G, R)


@dataclass(frozen=True)
class PreparedStep:
    """A step's host work, done."""

    groups: Sequence[EncodedGroup]  # of all ranks
    mine: Sequence[EncodedGroup]
    micro_batches: list[tuple[np.ndarray, Arrays]]  # which of mine

    @property
    def count(self) -> int:
        return len(self.groups)


class Trainer:
    """One run's policy, optimiser and `state`; `run` is the loop. Only the first rank has a directory to write."""

    def __init__(
        self,
        settings: TrainSettings,
        base: models.Loaded,
        road: Road,
        train: GroupSource,
        valid: GroupSource | None,
        reference: Reference | None,
        directory: Path | None,
        stop: Stop | None = None,
    ):
        self.settings, self.base, self.model, self.road = settings, base, base.model, road
        self.train, self.valid, self.reference, self.directory = train, valid, reference, directory
        self.stop, self.world = stop or Stop(), world()
        self.loss = objective(settings)
        self.step_function = value_and_grad(base.model, road, self.loss, settings.grad_checkpoint, keep=settings.frozen_cache_gb * 1e9)
        self.pad = padding(road) if not settings.lora_parameters.dropout else pad_groups
        self.optimizer = build_optimizer(settings)
        self.state = checkpoint.State()
        self.saved = 0  # step of the last checkpoint
        self.peak = 0  # bytes
        self.begun, self.seconds_before = time.perf_counter(), 0.0
        self.lines: list[dict[str, Any]] = []
        self.groups_per_step = settings.batch_size * settings.grad_accumulation_steps
        per_epoch = math.ceil(len(train.examples) / self.groups_per_step)
        self.steps_per_epoch = per_epoch
        self.steps = settings.iters or max(1, round(settings.epochs * per_epoch))
        self.identity = config.course(settings) | {
            "model": base.fingerprint,
            "train data": digest(train.epoch(0)),
            "valid data": digest(self._validation_groups()),
            "reference": reference.path.stem if reference else "",
        }
        self.world.agree("training", json.dumps(self.identity))
        self.tracker = None
        if directory:
            self.tracker = models.tracker(settings.report_to, settings.project_name, directory, rundir.plain(settings))

    # --- checkpoints

    def save(self) -> None:
        """Writes a checkpoint, unless the weights are not finite: the last good one is then the newest."""
        if self.saved == self.state.step or not is_finite(self.model.trainable_parameters(), self.optimizer.state):
            return
        self.saved = self.state.step
        self.state.seconds = self.seconds_before + time.perf_counter() - self.begun
        if self.directory:
            metrics = self.directory / METRICS
            self.state.metrics_bytes = metrics.stat().st_size if metrics.exists() else 0
            if metrics.exists():
                rundir.sync(metrics)
            adapter, shape = self.model.trainable_parameters(), models.adapter_config(self.settings, self.base)
            checkpoint.write(self.directory, self.state, self.identity, adapter, shape, self.optimizer.state)
            checkpoint.prune(self.directory, self.settings.keep_checkpoints)

    def restore(self) -> None:
        """Goes on from the newest whole checkpoint. Raises UserError where it belongs to a run of another course."""
        found = checkpoint.newest(self.directory) if self.directory else None
        stored = self.world.from_first({"state": asdict(found.state), "identity": found.identity} if found else None)
        if stored is None:
            if self.world.first:
                rundir.notice(f"note: {self.directory} holds no checkpoint: the run begins at step 0")
            return
        _same_course(stored["identity"], rundir.plain(self.identity))
        self.model.update(self.world.arrays_from_first(found and found.arrays(models.ADAPTER_WEIGHTS)))
        self.optimizer.state = self.world.arrays_from_first(found and found.arrays(checkpoint.OPTIMIZER_STATE))
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        self.state = checkpoint.State(**stored["state"])
        self.saved, self.seconds_before = self.state.step, self.state.seconds
        if self.directory:
            metrics = self.directory / METRICS
            with rundir.writing(metrics):
                metrics.touch()
                if metrics.stat().st_size < self.state.metrics_bytes:
                    rundir.notice(f"note: {metrics} is shorter than when step {self.state.step} was saved: some of its lines are lost")
                else:
                    os.truncate(metrics, self.state.metrics_bytes)
            self.lines = rundir.read_lines(metrics)
        self.world.say(f"resumed at step {self.state.step} of {self.steps}")

    # --- validation

    def _validation_groups(self) -> list[EncodedGroup]:
        if self.valid is None:
            return []
        groups = self.valid.epoch(0)
        return groups if self.settings.val_batches < 0 else groups[: self.settings.val_batches * self.settings.batch_size]

    def validate(self) -> None:
        """Loss, margin and order-debiased pair accuracy on the validation groups; put off, whole, where an end is asked for."""
        groups, state = self._validation_groups(), self.state
        orders = 2 if self.valid and self.valid.both else 1
        loss = margin = right = pairs = 0.0
        for group, logps in score_groups(self.model, self.road, groups, self.settings.batch_size, "validate"):
            if self.stop.asked and self.world.size == 1:
                return
            batch = pad_groups([group])
            reference = None if self.reference is None else mx.array(self.reference.logps([group]))
            per_group, margins = self.loss(mx.array(logps[None]), reference, batch)
            loss += float(per_group[0])
            margin += float(margins.mean())
            # the printed orders of a pair stand next to each other; free text has one
            difference = (logps[group.pairs[:, 0]] - logps[group.pairs[:, 1]]).reshape(-1, orders).sum(axis=1)
            right += right_pairs(difference, np.ones_like(difference))
            pairs += len(difference)
        state.validate = False
        numbers = {"valid_loss": loss / len(groups)}
        if pairs:
            numbers |= {"valid_margin": margin / len(groups), "valid_pair_accuracy": right / pairs}
        if not all(map(math.isfinite, numbers.values())):
            state.waited += 1
            rundir.notice(f"note: step {state.step}: the validation is not finite; it cannot be the best")
            return
        self._write({"step": state.step, "epoch": round(state.step / self.steps_per_epoch, 4), **numbers})
        value = numbers["valid_loss"] if self.settings.best_metric == "valid_loss" else -numbers["valid_pair_accuracy"]
        better = state.best is None or value < state.best[0]
        state.waited = 0 if better else state.waited + 1
        if better:
            state.best = (value, state.step)
        if self.world.first:
            of_pairs = f", margin {numbers['valid_margin']:+.3f}, pair accuracy {numbers['valid_pair_accuracy']:.3f}" if pairs else ""
            tqdm.write(f"  step {state.step:>4}: validation loss {numbers['valid_loss']:.4f}{of_pairs}{' (best)' if better else ''}")

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.directory:
            rundir.append_line(self.directory / METRICS, json.dumps(line, allow_nan=False))
        if self.tracker:
            valid = any(k.startswith("valid_") for k in line)
            (self.tracker.on_val_loss_report if valid else self.tracker.on_train_loss_report)({"iteration": line["step"], **line})

    # --- steps

    def _arrays(self, groups: Sequence[EncodedGroup]) -> Arrays:
        return self.pad(groups), None if self.reference is None else self.reference.logps(groups)

    def _micro_batch(self, prepared: PreparedStep, step: int, arrays: Arrays, rows: np.ndarray) -> tuple[Any, dict[str, float], Any]:
        """Gradients of `rows` of a step's groups, their share of it; numbers; groups that are not finite. All of it one evaluation.

        arrays  of all the micro-batch's rows; of half of them they are made anew
        """
        picked = [prepared.mine[i] for i in rows]
        batch, reference = arrays if len(arrays[0].groups) == len(picked) else self._arrays(picked)
        seed = None
        if self.settings.lora_parameters.dropout:
            first = int(rows[0]) * self.world.size + self.world.rank
            seed = int(np.random.default_rng([self.settings.seed, step, first]).integers(2**31))
        if self.settings.memory_limit:
            mx.reset_peak_memory()
        (_, value, margin, logps), gradients = self.step_function(batch, reference, 1 / prepared.count, seed)
        difference, sound = losses.pair_difference(logps, mx.array(batch.pairs)), all_finite(gradients)
        mx.eval(value, margin, difference, sound, gradients)
        self.peak = max(self.peak, mx.get_peak_memory())
        memory.check(self.settings.memory_limit)
        numbers = {
            "loss": float(value.sum()),
            "margin": float((np.array(margin) * batch.pair_mask).sum()),
            "right": right_pairs(np.array(difference), batch.pair_mask),
            "pairs": float(batch.pair_mask.sum()),
            "tokens": float(sum(g.shared_tokens for g in picked)),
        }
        bad = [g for g, v in zip(picked, np.array(value), strict=True) if not math.isfinite(v)]
        return gradients, numbers, bad or ([] if sound.item() else picked)

    def _share(self, groups: Sequence[EncodedGroup]) -> Sequence[EncodedGroup]:
        """This rank's groups of a step: of every length as many as the others'."""
        if self.world.size == 1:
            return groups
        return [groups[i] for rows in by_length(groups, len(groups)) for i in self.world.share(rows.tolist())]

    def _prepare(self, groups: Sequence[EncodedGroup]) -> PreparedStep:
        mine = self._share(groups)
        cut = by_length(mine, self.settings.batch_size, self.settings.batch_tokens)
        return PreparedStep(groups, mine, [(rows, self._arrays([mine[i] for i in rows])) for rows in cut])

    def _step(self, prepared: PreparedStep, step: int) -> dict[str, float] | None:
        """One optimiser step: its summed loss and what else is known of it. None where it was left out.

        One evaluation a micro-batch and one for the update. A step whose loss, gradient or update is not finite leaves the
        weights and the optimiser as they were.
        """
        gradients: Any = None if prepared.mine else tree_map(mx.zeros_like, self.model.trainable_parameters())
        total = dict.fromkeys(("loss", "margin", "right", "pairs", "tokens"), 0.0)
        bad: list[EncodedGroup] = []
        for rows, arrays in prepared.micro_batches:
            for more, numbers, found in memory.in_halves(partial(self._micro_batch, prepared, step, arrays), rows):
                gradients = more if gradients is None else tree_map(mx.add, gradients, more)
                total = {key: value + numbers[key] for key, value in total.items()}
                bad += found
            mx.async_eval(gradients)  # so that no more than one micro-batch's are kept beside their sum
        gradients, total = self.world.sum(gradients), self.world.sum_numbers(total)
        self.state.step = step
        before = self.model.trainable_parameters(), tree_map(lambda a: a, self.optimizer.state)
        clipped = optimizers.clip_grad_norm(gradients, self.settings.max_grad_norm)[0] if self.settings.max_grad_norm else gradients
        self.optimizer.learning_rate = learning_rate(self.settings, step - 1, self.steps)
        self.optimizer.update(self.model, clipped)
        updated = self.model.trainable_parameters(), self.optimizer.state
        sound = all_finite(gradients, *updated)
        mx.eval(sound, *updated)
        if math.isfinite(total["loss"]) and sound.item():
            return {**total, "groups": float(prepared.count)}
        self.model.update(before[0])
        self.optimizer.state = before[1]
        self._left_out(step, bad, prepared.groups, gradients)
        return None

    def _left_out(self, step: int, bad: Sequence[EncodedGroup], groups: Sequence[EncodedGroup], gradients: Any) -> None:
        """Tells of a step that was left out; raises UserError where it is one too many in a row."""
        state, limit = self.state, self.settings.max_bad_steps
        state.bad_steps, state.bad_in_a_row = state.bad_steps + 1, state.bad_in_a_row + 1
        names = ", ".join(g.source or g.user for g in bad[:4]) + (", …" if len(bad) > 4 else "")
        if bad or self.world.first:
            rundir.notice(f"note: step {step}: not finite, left out{f' ({names})' if names else ''}")
        if self.settings.debug_nan and (bad or self.world.first):
            sound = "the update: the loss and its gradient are finite"
            place = sound if not bad and is_finite(gradients) else locate(self.model, list(bad or groups), gradients)
            rundir.notice(f"note: step {step}: first in {place}")
        if state.bad_in_a_row < limit:
            return
        state.bad_in_a_row = 0
        self.save()
        home = checkpoint.directory(self.directory, self.saved) if self.directory and self.saved else None
        raise UserError(
            f"step {step}: {limit} steps in a row were not finite{f' (rows {names})' if names else ''}, and no weight took any of it: "
            f"lower --learning-rate{' or --beta' if isinstance(self.settings, DmpoSettings) else ''} in a new run"
            + (f" from --start-adapter {home}, or leave these steps out and go on: {self._how_to_resume()}" if home else "")
        )

    def _how_to_resume(self) -> str:
        return (
            f"mlx-dmpo {'sft' if isinstance(self.settings, SftSettings) else 'dmpo'} -c {self.settings.adapter_path}/config.yaml --resume"
        )

    def _steps(self) -> Iterator[PreparedStep]:
        """The steps to come. Their host work runs ahead of them: the next epoch is encoded during this one, the next step padded during this one."""
        first, steps = self.state.step, self.steps
        begun, end = first // self.steps_per_epoch, math.ceil(steps / self.steps_per_epoch)

        def prepared() -> Iterator[PreparedStep]:
            for epoch, groups in enumerate(ahead(map(self.train.epoch, range(begun, end))), begun):
                at = epoch * self.steps_per_epoch
                for rows in epoch_steps(len(groups), self.groups_per_step, self.settings.seed, epoch)[max(0, first - at) : steps - at]:
                    yield self._prepare([groups[i] for i in rows])

        return ahead(prepared())

    def run(self) -> None:
        """Trains from `state` on to the end. Writes metrics.jsonl, checkpoints and, last, adapters.safetensors: the best.

        Raises Interrupted, with all saved, where an end is asked for.
        """
        settings, state = self.settings, self.state
        if self.directory and not state.step:
            (self.directory / METRICS).unlink(missing_ok=True)
        mx.reset_peak_memory()
        every = settings.steps_per_eval or self.steps_per_epoch
        validates = bool(self._validation_groups())
        name = "sft" if isinstance(settings, SftSettings) else settings.loss  # type: ignore[attr-defined]
        steps, since = self._steps(), time.perf_counter()
        self.stop.finish_step = True
        with tqdm(total=self.steps, initial=state.step, desc=name, unit="step", disable=None) as bar:
            while True:
                paused = time.perf_counter()
                stopping = self.world.any(bool(self.stop.asked))
                if state.validate and not stopping:
                    self.validate()
                    stopping = self.world.any(bool(self.stop.asked))
                ended = state.step == self.steps or bool(settings.patience and state.waited >= settings.patience)
                best = state.best is not None and state.best[1] == state.step
                if stopping or ended or best or state.step % settings.save_every == 0:
                    self.save()
                if ended and not state.validate:
                    break
                if stopping:
                    raise Interrupted(
                        f"stopped at step {state.step} of {self.steps}, saved at {self.saved}: go on with {self._how_to_resume()}",
                        self.stop.asked or SIGTERM,
                    )
                since += time.perf_counter() - paused
                numbers = self._step(next(steps), state.step + 1)
                bar.update()
                if numbers is not None:
                    state.bad_in_a_row = 0
                    state.window = {key: state.window.get(key, 0.0) + value for key, value in numbers.items()}
                last = state.step == self.steps
                if state.step % settings.steps_per_report == 0 or last:
                    line = self._summary(time.perf_counter() - since)
                    self._write(line)
                    bar.set_postfix(
                        {
                            k: f"{line[k]:.3g}"
                            for k in ("loss", "margin", "pair_accuracy", "groups_per_second", "tokens_per_second", "peak_memory_gb")
                            if k in line
                        }
                    )
                    state.window, since = {}, time.perf_counter()
                state.validate = validates and (state.step % every == 0 or last)
        if state.step < self.steps:
            self.world.say(f"  stopped at step {state.step} of {self.steps}: {state.waited} validations without a new best")
        if self.directory:
            if state.best is not None and state.best[1] != state.step:
                self.model.update(checkpoint.load_tree(checkpoint.directory(self.directory, state.best[1]) / models.ADAPTER_WEIGHTS))
            if not is_finite(self.model.trainable_parameters()):
                raise UserError(f"step {state.step}: the adapter is not finite: go on from step {self.saved} with {self._how_to_resume()}")
            models.save_adapter(self.model, self.directory / models.ADAPTER_WEIGHTS)

    def _summary(self, seconds: float) -> dict[str, Any]:
        total, state = self.state.window, self.state
        line: dict[str, Any] = {"step": state.step, "epoch": round(state.step / self.steps_per_epoch, 4)}
        if state.bad_steps:
            line["bad_steps"] = state.bad_steps
        if not total:  # every step was left out
            return line
        line["loss"] = total["loss"] / total["groups"]
        if total["pairs"]:
            line |= {"margin": total["margin"] / total["pairs"], "pair_accuracy": total["right"] / total["pairs"]}
        return line | {
            "learning_rate": float(self.optimizer.learning_rate),
            "groups_per_second": total["groups"] / seconds,
            "tokens_per_second": total["tokens"] / seconds,
            "peak_memory_gb": max(self.peak, mx.get_peak_memory()) / 1e9,
        }


def digest(groups: Sequence[EncodedGroup]) -> str:
    """SHA-256 of the groups' tokens, pairs and order."""
    found = hashlib.sha256()
    for group in groups:
        for sequence in sequences(group):
            found.update(sequence)
        found.update(group.pairs.tobytes())
    return found.hexdigest()


def _same_course(stored: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises UserError naming the first setting that would change the course of a run that goes on."""
    for name in {**given, **stored}:
        was, now = stored.get(name), given.get(name)
        if was != now:
            if name in ("model", "train data", "valid data", "reference"):
                raise UserError(
                    f"--resume: the {name} is not what the run began with: give it back, or begin anew with another --adapter-path"
                )
            raise UserError(
                f"--resume: {name} was {was} and is {now} now, which would change the run's course: leave {name} as it was, or begin anew with another --adapter-path"
            )


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
    return plan.Case(shape, training, groups, settings.batch_size, settings.batch_tokens)


def read_split(settings: TrainSettings, split: str, domains: dict[str, prompts.Domain]) -> list[Example] | None:
    """The examples of a split with the settings' negatives; None where there is no validation data."""
    data = settings.data or str(assets.data_dir())
    if split == "valid" and settings.valid_data:
        data = settings.valid_data
    elif split == "valid" and not has_split(data, split):
        return None
    loaded = formats.load(data, split, domains, settings.skip_bad_rows, rundir.notice, settings.domain)
    if not loaded.has_pairs and (isinstance(settings, DmpoSettings) or settings.best_metric == "valid_pair_accuracy"):
        raise UserError(f"{loaded.name}: holds {loaded.format}, one answer a prompt: give data with chosen and rejected answers")
    return [first_negatives(e, settings.num_negatives) for e in loaded.examples]


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
    """Runs `sft` or `dmpo`, from the start or from a checkpoint, and returns the run directory.

    Raises UserError for what the user can mend, Interrupted where SIGINT or SIGTERM came.
    """
    with memory.manners(settings), world().watched(), Stop() as stop:
        domains = prompts.with_domains(settings.domains)
        examples = read_split(settings, "train", domains)
        valid_examples = read_split(settings, "valid", domains)
        assert examples is not None
        if not world().first:
            _train(settings, examples, valid_examples, domains, None, stop)
            return Path(settings.adapter_path)
        with rundir.RunDirectory(settings.adapter_path, command, settings, overwrite=settings.overwrite, resume=settings.resume) as run:
            try:
                _train(settings, examples, valid_examples, domains, run, stop)
            except WriteError as error:
                raise UserError(f"{error}, then go on with --resume") from None
            return run.path


def _train(
    settings: SftSettings | DmpoSettings,
    examples: list[Example],
    valid_examples: list[Example] | None,
    domains: dict[str, prompts.Domain],
    run: rundir.RunDirectory | None,
    stop: Stop,
) -> None:
    say = world().say
    base, resolved = prepare_policy(settings)
    trainable, total = models.parameter_counts(base.model)
    say(f"{base.name}: {trainable:,} of {total:,} parameters train ({100 * trainable / total:.2f} %), on {models.device_name()}")
    road = choose_road(base.model, base.vocabulary, settings.scoring)
    if not road.shared:
        rundir.notice(f"note: every sequence is run alone, which is slower: {road.reason}")

    encoder = Encoder(base.tokenizer, settings.max_seq_length, domains)
    source = partial(GroupSource, encoder=encoder, seed=settings.seed)
    sft, redraw = isinstance(settings, SftSettings), settings.candidate_order == "epoch"
    titles = isinstance(examples[0], RankingExample)
    if not titles and (settings.both_orders or redraw):
        rundir.notice(f"note: --{'both-orders' if settings.both_orders else 'candidate-order'} does not apply: free text has one order")
    train_groups = source(examples, both=settings.both_orders and titles, redraw=redraw and titles, chosen_only=sft)
    valid_groups = source(valid_examples, both=isinstance(valid_examples[0], RankingExample)) if valid_examples else None
    first = train_groups.epoch(0)
    dropped = [g.dropped for g in first if g.dropped]
    if dropped and world().first:
        rundir.notice(
            f"note: {sum(dropped)} of the oldest history items were left out of {len(dropped)} groups to fit {settings.max_seq_length} tokens"
        )

    if settings.memory_check and road.shared:
        plan.check(planned_case(resolved, base, first), plan.machine_memory())

    reference = None
    if needs_reference(settings):
        start = Path(settings.start_adapter) if settings.start_adapter else None
        key = cache_key(base.fingerprint, start, road.shared)
        score = partial(score_groups, base.model, road, batch_size=4 * settings.batch_size, describe="")
        reference = Reference(key, lambda groups: score(groups=groups), 4 * settings.batch_size)
        reference.add(train_groups.all_orders() + (valid_groups.epoch(0) if valid_groups else []))
        say(f"reference: {start or base.name}; {reference.computed} groups scored, the others were stored")
    trainer = Trainer(resolved, base, road, train_groups, valid_groups, reference, run.path if run else None, stop)
    say(describe_work(trainer, first))
    if settings.resume:
        trainer.restore()

    trainer.run()
    if run is None:
        return
    state = trainer.state
    run.started -= trainer.seconds_before
    rundir.write_json(run.path / models.ADAPTER_CONFIG, models.adapter_config(resolved, base))
    report.plot_training(trainer.lines, run.path / "training.png")
    run.config = {k: v for k, v in rundir.plain(resolved).items() if k in run.config}
    for data in (settings.data or str(assets.data_dir()), settings.valid_data):
        if data and not hub_name(data):
            run.input(data)
    run.finish(
        models.device_name(),
        model=base.name,
        base_fingerprint=base.fingerprint,
        steps=state.step,
        best_step=state.best[1] if state.best else state.step,
        bad_steps=state.bad_steps,
        ranks=world().size,
        shared_road=road.shared,
        peak_memory_gb=max(trainer.peak, mx.get_peak_memory()) / 1e9,
    )
