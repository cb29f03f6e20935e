"""Directories that explain themselves: atomic writes, hashes, a lock, and a manifest that is written last."""

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
from ..errors import UserError
from .console import notice
from .files import PARTIAL, plain, sha256, write_json, write_text

MANIFEST = "manifest.json"


CHECKPOINTS = "checkpoints"


LOCK = ".lock"


def is_complete(directory: Path) -> bool:
    return (directory / MANIFEST).is_file()


def versions() -> dict[str, str]:
    found = {"mlx-dmpo": __version__, "python": platform.python_version()}
    for name in ("mlx", "mlx-lm", "numpy", "transformers", "tokenizers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


class RunDirectory:
    """A directory that a command fills: `config.yaml` at the start, `manifest.json` at the very end; no other may meanwhile.

    A context manager: its lock is held until `finish` or the end of the block, and the kernel lets go of it if the process dies.
    Raises UserError where it cannot be written, another process fills it, or it holds a run that `overwrite` (begin anew)
    or `resume` (go on with an unfinished one) was not given for.
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
        # overwrite and resume are about this process, not about the run: `-c config.yaml --resume` goes on with it
        self.config = {k: v for k, v in plain(settings).items() if k not in ("overwrite", "resume")}
        self.started = time.time()
        self.inputs: dict[str, str] = {}
        if overwrite and resume:
            raise UserError("--overwrite: it begins the run anew, and --resume goes on with it: keep one of them")
        if is_complete(self.path) and not overwrite:
            raise UserError(
                f"{self.path}: is finished: there is nothing to resume"
                if resume
                else f"{self.path}: holds a finished run: name another {flag}, or add --overwrite"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
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
                f"{self.path}: holds an unfinished run: add --resume to go on with it, or --overwrite to begin anew"
            )
        for partial in [*self.path.glob(f"{PARTIAL}*"), *checkpoints.glob(f"{PARTIAL}*")]:
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        (self.path / MANIFEST).unlink(missing_ok=True)
        if overwrite and checkpoints.exists():
            shutil.rmtree(checkpoints)
        write_text(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))

    def _lock(self, flag: str) -> None:
        handle = os.open(
            self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644
        )  # it is written: not through a planted link
        self.close = weakref.finalize(self, os.close, handle)  # closing lets go of the lock
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 20).decode(errors="replace")
            self.close()
            raise UserError(
                f"{self.path}: process {holder} is writing it: let it finish, or name another {flag}"
            ) from None
        except OSError as error:  # some network disks have no locks
            notice(f"note: {self.path} cannot be locked ({error.strerror}): start no second run in it")
            return
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def input(self, path: str | Path) -> None:
        """Records a file, or the data files of a directory, that the result depends on."""
        path = Path(path)
        for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            self.inputs[file.name] = sha256(file)

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
