"""Run directories: config, hashes, a lock, and a manifest that is written last."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import time
import weakref
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..config import without_effect
from ..errors import UserError
from .console import notice
from .files import PARTIAL, plain, sha256, write_json, write_text

CONFIG = "config.yaml"
MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"


def is_complete(directory: Path) -> bool:
    return (directory / MANIFEST).is_file()


def is_taken(directory: Path) -> bool:
    """Whether a run has begun or ended in `directory`."""
    return is_complete(directory) or (directory / CONFIG).is_file()


def versions() -> dict[str, str]:
    found = {"mlx-dmpo": __version__, "python": platform.python_version()}
    for name in ("mlx", "mlx-lm", "numpy", "transformers", "tokenizers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


class RunDirectory:
    """A directory that one command fills: `config.yaml` at the start, `manifest.json` at the very end.

    A context manager. Its lock is held until `finish` or the end of the block; the kernel releases it if the process
    dies.
    Where the block ends with an error before it wrote anything of its own, nothing is left behind.
    Raises UserError where the directory cannot be written, where another process is writing it, or where it holds a run
    and neither `overwrite` (start over) nor `resume` (continue an unfinished one) was given.
    """

    def __init__(
        self,
        path: str | Path,
        command: str,
        settings: Any,
        *,
        overwrite: bool = False,
        resume: bool = False,
        flag: str = "--adapter-path",
    ):
        self.path = Path(path)
        self.command = command
        # overwrite and resume belong to this process, not to the run: `-c config.yaml --resume` continues it
        self.config = {k: v for k, v in plain(settings).items() if k not in ("overwrite", "resume")}
        self.idle = set(without_effect(settings))  # settings which config.yaml leaves out
        self.started = time.time()
        self.inputs: dict[str, str] = {}
        if overwrite and resume:
            raise UserError("--overwrite: it starts the run over, and --resume continues it: keep one of them")
        if is_complete(self.path) and not overwrite:
            raise UserError(
                f"{self.path}: is finished: there is nothing to resume"
                if resume
                else f"{self.path}: holds a finished run: name another {flag}, or add --overwrite"
            )
        try:
            self._made = _make(self.path)
            self._lock(flag)
            try:
                self._begin(overwrite, resume)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror or error}): name another {flag}"
            ) from None

    def _begin(self, overwrite: bool, resume: bool) -> None:
        checkpoints = self.path / CHECKPOINTS
        if any(checkpoints.glob("[0-9]*")) and not (overwrite or resume):
            raise UserError(
                f"{self.path}: holds an unfinished run: add --resume to continue it, or --overwrite to start over"
            )
        for partial in [*self.path.glob(f"{PARTIAL}*"), *checkpoints.glob(f"{PARTIAL}*")]:
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        (self.path / MANIFEST).unlink(missing_ok=True)
        if overwrite and checkpoints.exists():
            shutil.rmtree(checkpoints)
        shown = {k: v for k, v in self.config.items() if k not in self.idle}
        write_text(self.path / CONFIG, yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))

    def _lock(self, flag: str) -> None:
        # the file is written to: not through a planted link
        handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        self.close = weakref.finalize(self, os.close, handle)  # closing releases the lock
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 20).decode(errors="replace")
            self.close()
            raise UserError(
                f"{self.path}: process {holder} is writing it: let it finish, or name another {flag}"
            ) from None
        except OSError as error:  # some network disks have no locks
            notice(f"note: {self.path} cannot be locked ({error.strerror}): do not start a second run in it")
            return
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._made and {p.name for p in self.path.glob("*")} <= {CONFIG, LOCK}:
            shutil.rmtree(self.path, ignore_errors=True)
            for made in self._made[1:]:
                with contextlib.suppress(OSError):  # something else is in it
                    made.rmdir()
        self.close()

    def input(self, path: str | Path) -> None:
        """Records a file, or the data files of a directory, that the result depends on, by the path as given."""
        path = Path(path)
        for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            self.inputs[str(file)] = sha256(file)

    def finish(self, device: str, **results: Any) -> None:
        write_json(
            self.path / MANIFEST,
            {
                "command": self.command,
                "config": self.config,
                "inputs": self.inputs,
                "versions": versions(),
                "device": device,
                "seconds": round(time.time() - self.started, 2),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                **results,
            },
        )
        self.close()


def _make(path: Path) -> list[Path]:
    """Makes a directory and its parents; returns those that were missing, the innermost first."""
    made = []
    for directory in (path, *path.parents):
        if directory.exists():
            break
        made.append(directory)
    path.mkdir(parents=True, exist_ok=True)
    return made
