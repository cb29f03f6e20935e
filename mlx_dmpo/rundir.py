"""Directories that explain themselves: atomic writes, hashes, and a manifest that is written last.

A directory is complete if and only if its manifest.json exists.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from . import __version__
from .errors import UserError

MANIFEST = "manifest.json"


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path of the same suffix beside `path`; it takes the final name only if the block succeeds."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a new directory beside `path`, which takes the final name only if the block succeeds, in the place of what stood there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent)) for _ in range(2))
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
    """A directory that a command fills: `config.yaml` at the start, `manifest.json` at the very end.

    Raises UserError where it cannot be written, or holds a finished run and `overwrite` is false.
    """

    def __init__(self, path: str | Path, command: str, settings: Any, *, overwrite: bool = False, flag: str = "--adapter-path"):
        self.path = Path(path)
        self.command = command
        self.config = plain(settings)
        self.started = time.time()
        self.inputs: dict[str, str] = {}
        if is_complete(self.path) and not overwrite:
            raise UserError(f"{self.path}: holds a finished run: name another {flag}, or add --overwrite")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / MANIFEST).unlink(missing_ok=True)
            write_text(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error}): name another {flag}") from None

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
