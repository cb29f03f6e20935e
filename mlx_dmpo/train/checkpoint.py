"""Checkpoints: all that a run needs to go on as if nothing had happened.

RUN/checkpoints/0000050/   adapters.safetensors, adapter_config.json   an mlx-lm adapter directory
                           optimizer.safetensors                       the optimiser's state
                           manifest.json                               the rest of the state, and the other files' hashes

A checkpoint is filled under another name and renamed when it is whole. The seed and the step determine the data order,
the learning rate and the dropout; a step is never saved half done.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..errors import UserError
from ..machine import console, files, run_directory
from ..machine.run_directory import CHECKPOINTS
from ..model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, save_arrays

OPTIMIZER_STATE = "optimizer.safetensors"


@dataclass
class State:
    """Where a run stands, beside its arrays."""

    step: int = 0  # steps done
    validate: bool = False  # the validation at this step is still to come
    best: tuple[float, int] | None = None  # the best validation's value (less is better) and its step
    waited: int = 0  # validations since
    bad_steps: int = 0  # steps left out because of numbers that are not finite: in all
    bad_in_a_row: int = 0
    window: dict[str, float] = field(default_factory=dict)  # sums since the last report
    metrics_bytes: int = 0  # length of metrics.jsonl
    seconds: float = 0.0  # of all processes that worked on the run


@dataclass
class Checkpoint:
    path: Path
    state: State
    identity: dict[str, Any]  # what must be the same for the run to go on on its course

    def arrays(self, name: str) -> Any:
        """The tree of its adapter's or its optimiser's file."""
        return load_tree(self.path / name)


def load_tree(path: Path) -> Any:
    arrays: Any = mx.load(str(path))
    mx.eval(arrays)  # they are read from the file only when needed, and the file may be gone by then
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
            if final.exists():  # one that could not be read
                _remove(final)
            os.rename(temporary, final)
            files.sync(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def read(path: Path) -> Checkpoint:
    """Raises UserError where a file is missing or is not what was written."""
    manifest = files.read_json(path / run_directory.MANIFEST)
    try:
        for name, expected in manifest["files"].items():
            if files.sha256(path / name) != expected:
                raise UserError(f"{path / name}: is damaged: remove {path}")
        state = State(**manifest["state"])
        state.best = state.best and (state.best[0], state.best[1])
        return Checkpoint(path, state, manifest["identity"])
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no whole checkpoint ({error}): remove it") from None


def newest(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None; a damaged one is named and left out."""
    for path in sorted((run / CHECKPOINTS).glob("[0-9]*"), reverse=True):
        try:
            found = read(path)
            if found.state.best:  # its adapter is part of the state
                read(directory(run, found.state.best[1]))
            return found
        except UserError as error:
            console.notice(f"note: {error}; an older checkpoint is taken")
    return None


def prune(run: Path, keep: int) -> None:
    """Removes all but the last `keep` checkpoints and the best ones that these refer to."""
    paths = sorted((run / CHECKPOINTS).glob("[0-9]*"))
    kept = set(paths[-keep:])
    for path in list(kept):
        best = files.read_json(path / run_directory.MANIFEST)["state"]["best"]
        if best:
            kept.add(directory(run, best[1]))
    with files.writing(run / CHECKPOINTS):
        for path in paths:
            if path not in kept:
                _remove(path)


def _remove(path: Path) -> None:
    """No reader meets it half removed."""
    aside = path.with_name(f"{files.PARTIAL}removed-{path.name}")
    os.rename(path, aside)
    shutil.rmtree(aside)
