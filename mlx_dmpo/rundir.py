"""Directories that explain themselves: atomic writes, hashes, a lock, and a manifest that is written last.

A directory is complete if and only if its manifest.json exists.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from . import __version__
from .errors import UserError, WriteError

MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
PARTIAL = ".partial-"  # what a killed process leaves under such a name is removed by the next one that holds the lock

_MEND = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ESTALE), "its directory is gone or no directory: put it back"),
    errno.ELOOP: "a link stands under its name: remove the link",
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError inside into a WriteError that names `path` and says how to mend it."""
    try:
        yield
    except OSError as error:
        mend = _MEND.get(error.errno or 0, "look at the disk")
        raise WriteError(f"{path}: cannot be written ({error.strerror or error}): {mend}") from None


def sync(path: Path) -> None:
    """Waits until a file's or directory's bytes are on the disk, where the file system can tell."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path of the same suffix beside `path`; it takes the final name only if the block succeeds.

    Raises WriteError where the disk refuses; what stood under the name before still does.
    """
    with writing(path):
        handle, name = tempfile.mkstemp(prefix=PARTIAL, suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            os.chmod(temporary, 0o644)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Appends a whole line or nothing. Raises WriteError."""
    with writing(path):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)  # not through a planted link
        try:
            data, before = (line + "\n").encode(), os.fstat(handle).st_size
            if os.write(handle, data) != len(data):  # the disk filled up in the middle
                os.ftruncate(handle, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a new directory beside `path`, which takes the final name only if the block succeeds, in the place of what stood there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (Path(tempfile.mkdtemp(prefix=PARTIAL, dir=path.parent)) for _ in range(2))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        moved = path.exists()
        if moved:
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except OSError:
            if moved:
                os.replace(old, path)
            raise
    finally:
        for directory in (temporary, old):
            shutil.rmtree(directory, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises UserError where the file is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: name a directory that this program wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}): write the directory anew") from None


def read_lines(path: Path) -> list[Any]:
    """The objects of a JSON-lines file."""
    try:
        # not splitlines: a title may hold U+2028 and the like, which JSON leaves as they are
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}): write the directory anew") from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        self, path: str | Path, command: str, settings: Any, *, overwrite: bool = False, resume: bool = False, flag: str = "--adapter-path"
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
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error}): name another {flag}") from None

    def _begin(self, overwrite: bool, resume: bool) -> None:
        checkpoints = self.path / CHECKPOINTS
        if any(checkpoints.glob("[0-9]*")) and not (overwrite or resume):
            raise UserError(f"{self.path}: holds an unfinished run: add --resume to go on with it, or --overwrite to begin anew")
        for partial in [*self.path.glob(f"{PARTIAL}*"), *checkpoints.glob(f"{PARTIAL}*")]:
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        (self.path / MANIFEST).unlink(missing_ok=True)
        if overwrite and checkpoints.exists():
            shutil.rmtree(checkpoints)
        write_text(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))

    def _lock(self, flag: str) -> None:
        handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)  # it is written: not through a planted link
        self.close = weakref.finalize(self, os.close, handle)  # closing lets go of the lock
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 20).decode(errors="replace")
            self.close()
            raise UserError(f"{self.path}: process {holder} is writing it: let it finish, or name another {flag}") from None
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


def plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as YAML and JSON have them."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def notice(message: str) -> None:
    """One line for the person at the terminal, on stderr."""
    print(printable(message), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """`text` on one line, without control and direction characters: titles are untrusted, and a terminal obeys them."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
