"""Atomic writes, hashes, JSON files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, WriteError

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
        handle = os.open(
            path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644
        )  # not through a planted link
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


def plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as YAML and JSON have them."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
