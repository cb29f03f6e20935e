"""One training loop for every objective: SFT, and DMPO with its relatives.

A step's loss is the mean over its groups, whatever their shapes and however they are split into micro-batches.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from signal import SIGTERM
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_map
from tqdm import tqdm

from .. import config
from ..config import DmpoSettings, SftSettings, TrainSettings
from ..core import losses
from ..core.finite import all_finite, is_finite
from ..core.selfcheck import GroupScorer
from ..core.tree import EncodedGroup, GroupBatch, by_length, pad_groups
from ..errors import Interrupted, UserError
from ..machine import commands, console, files, memory
from ..machine.interrupts import Stop
from ..machine.prefetch import prefetch
from ..machine.ranks import world
from ..model import adapters, loading, trackers
from ..model.score import score_groups
from . import checkpoint
from .batches import GroupSource, epoch_steps
from .nan import locate
from .objective import objective
from .optimizer import build_optimizer, learning_rate
from .reference import Reference, sequences
from .step import padding, right_pairs, value_and_grad

METRICS = "metrics.jsonl"


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
        base: loading.Loaded,
        scorer: GroupScorer,
        train: GroupSource,
        valid: GroupSource | None,
        reference: Reference | None,
        directory: Path | None,
        stop: Stop | None = None,
    ):
        self.settings, self.base, self.model, self.scorer = settings, base, base.model, scorer
        self.train, self.valid, self.reference, self.directory = train, valid, reference, directory
        self.stop, self.world = stop or Stop(), world()
        self.loss = objective(settings)
        self.step_function = value_and_grad(
            base.model, scorer, self.loss, settings.grad_checkpoint, keep=settings.frozen_cache_gb * 1e9
        )
        self.pad = padding(scorer) if not settings.lora_parameters.dropout else pad_groups
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
        self.identity = config.resume_key(settings) | {
            "model": base.fingerprint,
            "train data": digest(train.epoch(0)),
            "valid data": digest(self._validation_groups()),
            "reference": reference.path.stem if reference else "",
        }
        self.world.agree("training", json.dumps(self.identity))
        self.tracker = None
        if directory:
            self.tracker = trackers.tracker(settings.report_to, settings.project_name, directory, files.plain(settings))

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
                files.sync(metrics)
            adapter, shape = self.model.trainable_parameters(), adapters.adapter_config(self.settings, self.base)
            checkpoint.write(self.directory, self.state, self.identity, adapter, shape, self.optimizer.state)
            checkpoint.prune(self.directory, self.settings.keep_checkpoints)

    def restore(self) -> None:
        """Goes on from the newest whole checkpoint. Raises UserError where it belongs to a run of another course."""
        found = checkpoint.newest(self.directory) if self.directory else None
        stored = self.world.from_first({"state": asdict(found.state), "identity": found.identity} if found else None)
        if stored is None:
            if self.world.first:
                console.notice(f"note: {self.directory} holds no checkpoint: the run begins at step 0")
            return
        _check_resume_key(stored["identity"], files.plain(self.identity))
        self.model.update(self.world.arrays_from_first(found and found.arrays(adapters.ADAPTER_WEIGHTS)))
        self.optimizer.state = self.world.arrays_from_first(found and found.arrays(checkpoint.OPTIMIZER_STATE))
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        self.state = checkpoint.State(**stored["state"])
        self.saved, self.seconds_before = self.state.step, self.state.seconds
        if self.directory:
            metrics = self.directory / METRICS
            with files.writing(metrics):
                metrics.touch()
                if metrics.stat().st_size < self.state.metrics_bytes:
                    console.notice(
                        f"note: {metrics} is shorter than when step {self.state.step} was saved: some of its lines are lost"
                    )
                else:
                    os.truncate(metrics, self.state.metrics_bytes)
            self.lines = files.read_lines(metrics)
        self.world.say(f"resumed at step {self.state.step} of {self.steps}")

    # --- validation

    def _validation_groups(self) -> list[EncodedGroup]:
        if self.valid is None:
            return []
        groups = self.valid.epoch(0)
        return (
            groups if self.settings.val_batches < 0 else groups[: self.settings.val_batches * self.settings.batch_size]
        )

    def validate(self) -> None:
        """Loss, margin and order-debiased pair accuracy on the validation groups; put off, whole, where an end is asked for."""
        groups, state = self._validation_groups(), self.state
        orders = 2 if self.valid and self.valid.both else 1
        loss = margin = right = pairs = 0.0
        for group, logps in score_groups(self.model, self.scorer, groups, self.settings.batch_size, "validate"):
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
            console.notice(f"note: step {state.step}: the validation is not finite; it cannot be the best")
            return
        self._write({"step": state.step, "epoch": round(state.step / self.steps_per_epoch, 4), **numbers})
        value = numbers["valid_loss"] if self.settings.best_metric == "valid_loss" else -numbers["valid_pair_accuracy"]
        better = state.best is None or value < state.best[0]
        state.waited = 0 if better else state.waited + 1
        if better:
            state.best = (value, state.step)
        if self.world.first:
            of_pairs = (
                f", margin {numbers['valid_margin']:+.3f}, pair accuracy {numbers['valid_pair_accuracy']:.3f}"
                if pairs
                else ""
            )
            tqdm.write(
                f"  step {state.step:>4}: validation loss {numbers['valid_loss']:.4f}{of_pairs}{' (best)' if better else ''}"
            )

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.directory:
            files.append_line(self.directory / METRICS, json.dumps(line, allow_nan=False))
        if self.tracker:
            valid = any(k.startswith("valid_") for k in line)
            (self.tracker.on_val_loss_report if valid else self.tracker.on_train_loss_report)(
                {"iteration": line["step"], **line}
            )

    # --- steps

    def _arrays(self, groups: Sequence[EncodedGroup]) -> Arrays:
        return self.pad(groups), None if self.reference is None else self.reference.logps(groups)

    def _micro_batch(
        self, prepared: PreparedStep, step: int, arrays: Arrays, rows: np.ndarray
    ) -> tuple[Any, dict[str, float], Any]:
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
        clipped = (
            optimizers.clip_grad_norm(gradients, self.settings.max_grad_norm)[0]
            if self.settings.max_grad_norm
            else gradients
        )
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
            console.notice(f"note: step {step}: not finite, left out{f' ({names})' if names else ''}")
        if self.settings.debug_nan and (bad or self.world.first):
            sound = "the update: the loss and its gradient are finite"
            place = sound if not bad and is_finite(gradients) else locate(self.model, list(bad or groups), gradients)
            console.notice(f"note: step {step}: first in {place}")
        if state.bad_in_a_row < limit:
            return
        state.bad_in_a_row = 0
        self.save()
        home = checkpoint.directory(self.directory, self.saved) if self.directory and self.saved else None
        raise UserError(
            f"step {step}: {limit} steps in a row were not finite{f' (rows {names})' if names else ''}, and no weight took any of it: "
            f"lower --learning-rate{' or --beta' if isinstance(self.settings, DmpoSettings) else ''} in a new run"
            + (
                f" from --start-adapter {home}, or leave these steps out and go on: {self._how_to_resume()}"
                if home
                else ""
            )
        )

    def _how_to_resume(self) -> str:
        return commands.resume(self.settings)

    def _steps(self) -> Iterator[PreparedStep]:
        """The steps to come. Their host work runs ahead of them: the next epoch is encoded during this one, the next step padded during this one."""
        first, steps = self.state.step, self.steps
        begun, end = first // self.steps_per_epoch, math.ceil(steps / self.steps_per_epoch)

        def prepared() -> Iterator[PreparedStep]:
            for epoch, groups in enumerate(prefetch(map(self.train.epoch, range(begun, end))), begun):
                at = epoch * self.steps_per_epoch
                for rows in epoch_steps(len(groups), self.groups_per_step, self.settings.seed, epoch)[
                    max(0, first - at) : steps - at
                ]:
                    yield self._prepare([groups[i] for i in rows])

        return prefetch(prepared())

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
                            for k in (
                                "loss",
                                "margin",
                                "pair_accuracy",
                                "groups_per_second",
                                "tokens_per_second",
                                "peak_memory_gb",
                            )
                            if k in line
                        }
                    )
                    state.window, since = {}, time.perf_counter()
                state.validate = validates and (state.step % every == 0 or last)
        if state.step < self.steps:
            self.world.say(
                f"  stopped at step {state.step} of {self.steps}: {state.waited} validations without a new best"
            )
        if self.directory:
            if state.best is not None and state.best[1] != state.step:
                self.model.update(
                    checkpoint.load_tree(checkpoint.directory(self.directory, state.best[1]) / adapters.ADAPTER_WEIGHTS)
                )
            if not is_finite(self.model.trainable_parameters()):
                raise UserError(
                    f"step {state.step}: the adapter is not finite: go on from step {self.saved} with {self._how_to_resume()}"
                )
            adapters.save_adapter(self.model, self.directory / adapters.ADAPTER_WEIGHTS)

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


def _check_resume_key(stored: dict[str, Any], given: dict[str, Any]) -> None:
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
