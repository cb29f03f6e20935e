"""Atomic writes, hashes, JSON files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, WriteError

PARTIAL = ".partial-"  # names of what a killed process leaves; the next process that holds the lock removes it


_FIX = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable"),
    **dict.fromkeys((errno.ENOENT, errno.ESTALE), "its directory is missing: put it back"),
    errno.ENOTDIR: "a part of the path is a file, not a directory: name another",
    errno.ELOOP: "there is a link of that name: remove the link",
    **dict.fromkeys((errno.EISDIR, errno.EEXIST), "something else is in its place: name another, or move that away"),
    errno.ENAMETOOLONG: "name a shorter one",
}


def cache_directory() -> Path:
    """Of what is computed once and may be deleted at any time: $MLX_DMPO_CACHE, or ~/.cache/mlx-dmpo."""
    return Path(os.environ.get("MLX_DMPO_CACHE") or Path.home() / ".cache" / "mlx-dmpo")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError inside into a WriteError that names `path` and says how to fix it."""
    try:
        yield
    except OSError as error:
        fix = _FIX.get(error.errno or 0, "check the disk")
        raise WriteError(f"{path}: cannot be written ({error.strerror or error}): {fix}") from None


def sync(path: Path) -> None:
    """Waits until a file's or directory's bytes are on the disk, where the file system can tell."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def partial(parent: Path, suffix: str = "") -> Path:
    """A name for what is not finished, which no other process has."""
    return parent / f"{PARTIAL}{secrets.token_hex(8)}{suffix}"


def check_place(path: Path) -> None:
    """Raises WriteError where no file can be written under this name: a directory, or a device such as /dev/null,
    which a rename would replace, also behind a link.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # nothing there
        return
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise WriteError(f"{path}: cannot be written (it is {what}): name a file")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path of the same suffix beside `path`; it takes the final name only if the block succeeds.

    Raises WriteError where it cannot be written; an earlier file of that name stays as it was.
    """
    check_place(path)
    with writing(path):
        temporary = partial(path.parent, path.suffix)
        # made here, not through a planted link, and with the permissions that the umask leaves
        os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Appends a whole line or nothing. Raises WriteError."""
    with writing(path):
        # not through a planted link
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            data, before = (line + "\n").encode(), os.fstat(handle).st_size
            if os.write(handle, data) != len(data):  # the disk filled up in the middle
                os.ftruncate(handle, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a new directory beside `path`, which takes the final name only if the block succeeds.

    What was there before is replaced then, and kept otherwise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = partial(path.parent), partial(path.parent)
    for directory in (temporary, old):
        directory.mkdir()
    try:
        yield temporary
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
        raise UserError(f"{path}: cannot be read ({error}): write the directory again") from None


def read_lines(path: Path) -> list[Any]:
    """The objects of a JSON-lines file."""
    try:
        # not splitlines: a title may hold U+2028 and the like, which JSON leaves as they are
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}): write the directory again") from None


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
