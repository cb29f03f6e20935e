"""An evaluation that was stopped continues: rows are appended as they are computed, and a key says what they depend
on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError
from ..machine import files
from ..machine.console import notice
from ..machine.progress import Progress
from ..machine.ranks import world

PROGRESS = "progress.json"

T = TypeVar("T")


def claim(directory: Path, key: dict[str, Any], names: Sequence[str], *, finished: bool, overwrite: bool) -> None:
    """Makes `directory` ready for rows under `key`: what an unfinished evaluation of the same key left stays.

    finished  the directory held a finished evaluation, which --overwrite replaces
    Raises UserError, naming what differs, where it holds an unfinished evaluation of another key.
    """
    progress = directory / PROGRESS
    left = [directory / name for name in names if (directory / name).exists()]
    stored = files.read_json(progress) if progress.is_file() and not finished else None
    if stored == key:
        return
    if isinstance(stored, dict) and left and not overwrite:
        differs = ", ".join(k for k in {**key, **stored} if key.get(k) != stored.get(k))
        raise UserError(
            f"{directory}: holds an unfinished evaluation that differs in: {differs}: name another --out, or add "
            "--overwrite to start over"
        )
    with files.writing(directory):
        for path in left:
            path.unlink()
    files.write_json(progress, key)


def _whole_lines(path: Path) -> list[Any]:
    """Rows of a JSON-lines file of a killed process; its last line may be cut, and is then removed from the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with files.writing(path):
            os.truncate(path, end)
    return files.read_lines(path) if end else []


def rows_in_chunks(
    path: Path | None,
    examples: Sequence[T],
    expected: Callable[[T], int],
    compute: Callable[[Sequence[T]], Iterable[dict[str, Any]]],
    chunk: int,
    describe: str,
) -> list[dict[str, Any]]:
    """The rows of all examples: of `path`, as far as it has whole chunks, then computed and appended chunk by
    chunk.

    expected  rows of an example
    path      None on a rank that writes nothing
    Chunks begin at the same examples in a resumed run, so that its rows equal those of an uninterrupted one.
    """
    rows = _whole_lines(path) if path else []
    ends = [0]
    for start in range(0, len(examples), chunk):
        ends.append(ends[-1] + sum(map(expected, examples[start : start + chunk])))
    done = max(i for i, end in enumerate(ends) if end <= len(rows))
    if path and len(rows) > ends[done]:
        files.write_text(path, "".join(map(_line, rows[: ends[done]])))
    done, rows = world().from_first((done, rows[: ends[done]]))
    if done and world().first:
        notice(f"note: {describe}: {min(done * chunk, len(examples))} of {len(examples)} examples were scored before")
    scored = min(done * chunk, len(examples))
    with Progress(len(examples), describe, "example", done=scored, quiet=not world().first) as bar:
        for start in range(done * chunk, len(examples), chunk):
            part = examples[start : start + chunk]
            with bar.part(len(part)):
                found = list(compute(part))
            if path:
                files.append_line(path, "".join(map(_line, found)).removesuffix("\n"))
            rows += found
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
