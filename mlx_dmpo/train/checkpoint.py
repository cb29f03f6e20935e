"""Checkpoints: all that a resumed run needs to end like an uninterrupted one.

RUN/checkpoints/0000050/   adapters.safetensors, adapter_config.json   an mlx-lm adapter directory
                           optimizer.safetensors                       the optimizer's state
                           manifest.json                               the rest of the state, and the other files'
                                                                       hashes

A checkpoint is written under another name and renamed when it is complete. Seed and step determine the data order, the
learning rate and the dropout; a step is never saved half done.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_unflatten

from ..core.finite import is_finite
from ..errors import UserError
from ..machine import console, files, run_directory
from ..machine.ranks import world
from ..machine.run_directory import CHECKPOINTS
from ..model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, save_arrays

OPTIMIZER_STATE = "optimizer.safetensors"


@dataclass
class State:
    """How far a run is, beside its arrays."""

    step: int = 0  # steps done
    validate: bool = False  # the validation at this step is still to be done
    # the best validation's value (less is better), its step, and its loss, which decides among equal values
    best: tuple[float, int, float] | None = None
    waited: int = 0  # validations since
    bad_steps: int = 0  # steps skipped because of NaN or Inf
    bad_in_a_row: int = 0
    window: dict[str, float] = field(default_factory=dict)  # sums since the last report
    since: dict[str, float] = field(default_factory=dict)  # sums since the last validation
    metrics_bytes: int = 0  # length of metrics.jsonl
    seconds: float = 0.0  # of all processes of the run, this one included


def _state(values: Mapping[str, Any]) -> State:
    """A state as a manifest has it. Raises ValueError or TypeError where a value is of another kind."""
    state = State(**values)
    value, best_step, loss = state.best if state.best is not None else (0.0, 0, 0.0)
    counts = (state.step, state.waited, state.bad_steps, state.bad_in_a_row, state.metrics_bytes, best_step)
    if not all(type(n) is int and 0 <= n < 2**53 for n in counts) or type(state.validate) is not bool:
        raise ValueError("a count of its state is of another kind")
    numbers = (state.seconds, value, loss, *state.window.values(), *state.since.values())
    if not all(type(v) in (int, float) and math.isfinite(v) for v in numbers):
        raise ValueError("a number of its state is of another kind")
    state.best = (float(value), best_step, float(loss)) if state.best is not None else None
    return state


@dataclass
class Checkpoint:
    path: Path
    state: State
    identity: dict[str, Any]  # what must be the same for the run to be resumed

    def arrays(self, name: str) -> Any:
        """The tree of its adapter's or its optimizer's file."""
        return load_tree(self.path / name)


def load_tree(path: Path) -> Any:
    arrays: Any = mx.load(str(path))
    mx.eval(arrays)  # mx.load reads lazily, and the file may be gone by then
    return tree_unflatten(list(arrays.items()))


def directory(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"{step:07d}"


def write(
    run: Path,
    state: State,
    identity: Mapping[str, Any],
    adapter: Any,
    adapter_config: Mapping[str, Any],
    optimizer: Any,
) -> Path:
    """Writes the checkpoint of `state.step`. Raises WriteError; what was saved before stays."""
    final = directory(run, state.step)
    with files.writing(final):
        final.parent.mkdir(exist_ok=True)
        temporary = files.partial(final.parent)
        temporary.mkdir()
        try:
            save_arrays(temporary / ADAPTER_WEIGHTS, adapter)
            save_arrays(temporary / OPTIMIZER_STATE, optimizer)
            files.write_json(temporary / ADAPTER_CONFIG, adapter_config)
            hashes = {path.name: files.sha256(path) for path in sorted(temporary.iterdir())}
            for path in temporary.iterdir():
                files.sync(path)
            files.write_json(
                temporary / run_directory.MANIFEST,
                {"state": asdict(state), "identity": files.plain(identity), "files": hashes},
            )
            if os.path.lexists(final):  # one that could not be read
                _remove(final)
            os.rename(temporary, final)
            files.sync(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def _read_manifest(path: Path) -> tuple[Checkpoint, dict[str, str]]:
    """A checkpoint as its manifest has it, and the hashes of its files. Raises UserError where it is not one."""
    try:
        manifest = files.read_json(path / run_directory.MANIFEST)
        state, identity, hashes = _state(manifest["state"]), dict(manifest["identity"]), dict(manifest["files"])
        if not {ADAPTER_WEIGHTS, OPTIMIZER_STATE} <= set(hashes):
            raise ValueError("it names no weights")
        if not isinstance(identity.get("environment", {}), dict):
            raise ValueError("its environment is of another kind")
        if state.step != int(path.name):
            raise ValueError(f"it is of step {state.step}")
        return Checkpoint(path, state, identity), hashes
    except (UserError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path}: is not an intact checkpoint ({error}): remove it") from None


def read(path: Path) -> Checkpoint:
    """Raises UserError where a file is missing or is not what was written."""
    found, hashes = _read_manifest(path)
    for name, expected in hashes.items():
        try:
            whole = files.sha256(path / name) == expected
        except OSError as error:
            raise UserError(f"{path}: is not an intact checkpoint ({error}): remove it") from None
        if not whole:
            raise UserError(f"{path / name}: is damaged: remove {path}")
    return found


def _all(run: Path) -> list[Path]:
    """Everything that has a checkpoint's name, the oldest first."""
    return sorted((run / CHECKPOINTS).glob("[0-9]*"))


def newest(run: Path) -> Checkpoint | None:
    """The newest intact checkpoint, or None; damaged ones are named.

    One whose best adapter is intact too is preferred. Where there is none, the best so far is forgotten.
    """
    without_best: Checkpoint | None = None
    for path in reversed(_all(run)):
        try:
            found = read(path)
        except UserError as error:
            console.notice(f"note: {error}; an older checkpoint is used")
            continue
        try:
            if found.state.best:  # its adapter is part of the state
                read(directory(run, found.state.best[1]))
            return found
        except UserError as error:
            if without_best is None:
                console.notice(f"note: the best adapter of step {found.state.step} is lost: {error}")
            without_best = without_best or found
    if without_best:
        console.notice(f"note: the best of the validations after step {without_best.state.step} is kept instead")
        without_best.state.best = None
    return without_best


def stored(run: Path, name: str) -> Any:
    """An entry of the identity in the newest checkpoint that can be read; None where there is none."""
    for path in reversed(_all(run)):
        try:
            return _read_manifest(path)[0].identity.get(name)
        except UserError:
            continue
    return None


def prune(run: Path, keep: int) -> None:
    """Removes all but the last `keep` checkpoints and the best ones that these refer to; also damaged ones."""
    kept: set[Path] = set()
    for path in reversed(_all(run)):
        try:
            state = _read_manifest(path)[0].state
        except UserError:
            continue
        kept.add(path)
        if state.best:
            kept.add(directory(run, state.best[1]))
        keep -= 1
        if not keep:
            break
    with files.writing(run / CHECKPOINTS):
        for path in _all(run):
            if path not in kept:
                _remove(path)


def _remove(path: Path) -> None:
    """No reader sees it half removed."""
    aside = path.with_name(f"{files.PARTIAL}removed-{path.name}")
    os.rename(path, aside)
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


class Checkpoints:
    """Saves and restores a run: its adapter, its optimizer and its `state`. Only the first rank has a directory."""

    def __init__(
        self,
        run: Path | None,
        model: nn.Module,
        optimizer: optimizers.Optimizer,
        adapter_config: Mapping[str, Any],
        identity: dict[str, Any],
        *,
        keep: int,
        metrics: str = "metrics.jsonl",
    ):
        self.run, self.model, self.optimizer, self.adapter_config = run, model, optimizer, adapter_config
        self.identity, self.keep, self.metrics = identity, keep, metrics
        self.state = State()
        self.saved = 0  # step of the last checkpoint
        self.seconds_before = 0.0  # of the processes before this one
        self._begun = time.perf_counter()

    def last(self) -> Path | None:
        """The last checkpoint's directory."""
        return directory(self.run, self.saved) if self.run and self.saved else None

    def save(self) -> None:
        """Writes a checkpoint, unless it exists or a weight is NaN or Inf: the last good one is then the newest."""
        if self.saved == self.state.step or not is_finite(self.model.trainable_parameters(), self.optimizer.state):
            return
        self.saved = self.state.step
        self.state.seconds = self.seconds_before + time.perf_counter() - self._begun
        if not self.run:
            return
        metrics = self.run / self.metrics
        self.state.metrics_bytes = metrics.stat().st_size if metrics.exists() else 0
        if metrics.exists():
            files.sync(metrics)
        adapter = self.model.trainable_parameters()
        write(self.run, self.state, self.identity, adapter, self.adapter_config, self.optimizer.state)
        prune(self.run, self.keep)

    def restore(self, check: Callable[[dict[str, Any], dict[str, Any]], None]) -> bool:
        """Continues from the newest intact checkpoint -> whether there is one.

        Raises what `check(stored identity, given identity)` raises.
        """
        found = newest(self.run) if self.run else None
        stored = world().from_first({"state": asdict(found.state), "identity": found.identity} if found else None)
        if stored is None:
            if world().first:
                console.notice(f"note: {self.run} holds no checkpoint: the run starts at step 0")
            return False
        check(stored["identity"], files.plain(self.identity))
        self.model.update(world().arrays_from_first(found and found.arrays(ADAPTER_WEIGHTS)))
        self.optimizer.state = world().arrays_from_first(found and found.arrays(OPTIMIZER_STATE))
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        self.state = State(**stored["state"])
        self.saved, self.seconds_before = self.state.step, self.state.seconds
        return True

    def load_best(self) -> None:
        """Puts the best adapter into the model, where that is not the last. One that was damaged since is named."""
        best = self.state.best
        if not self.run or best is None or best[1] == self.state.step:
            return
        try:
            self.model.update(read(directory(self.run, best[1])).arrays(ADAPTER_WEIGHTS))
        except UserError as error:
            console.notice(f"note: the best adapter is lost: {error}; the last one, of step {self.state.step}, is kept")
            self.state.best = None
