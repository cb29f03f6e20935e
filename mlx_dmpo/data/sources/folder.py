"""Finding the files of a download in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import UserError
from . import files
from .contract import BadRows
from .files import Encoding
from .tables import Dialect, dialect, plain


def listed(path: Path, what: str) -> list[Path]:
    """The files of a folder. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path}: no such folder: name the unpacked {what} download")
    if not path.is_dir():
        raise UserError(f"{path}: not a folder: name the folder of the unpacked {what} download")
    return sorted(p for p in path.iterdir() if p.is_file())


def one(found: Sequence[Path], folder: Path, what: str, names: str) -> Path:
    """The only file found. Raises UserError."""
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{folder}: holds no {what}: put {names} there")
    raise UserError(
        f"{folder}: holds several files of {what} ({', '.join(p.name for p in found)}): keep one of them there"
    )


def stem(path: Path) -> str:
    """The name without .gz and the like: "ratings.csv.gz" -> "ratings"."""
    return path.name.split(".")[0]


def named_columns(path: Path, columns: dict[str, str], encoding: Encoding = files.UTF8) -> tuple[Dialect, list[int]]:
    """The dialect of a CSV with a header line, and the places of these columns in it. Raises UserError."""
    how = dialect(path, encoding=encoding, known=columns.values())
    places = {plain(name): n for n, name in reversed(list(enumerate(how.names)))}
    for name in columns.values():
        if not how.header or plain(name) not in places:
            raise UserError(
                f'{path}:1: no column "{name}" (found: {", ".join(how.names)}): use the file as it was downloaded, '
                "or `mlx-dmpo prepare table`, which takes any column names"
            )
    return how, [places[plain(name)] for name in columns.values()]


def split_lines(path: Path, separator: str, bad: BadRows, encoding: Encoding) -> Iterator[tuple[str, str]]:
    """The first two cells of each line of a small table without quotes."""
    for n, line in files.text_lines(path, encoding):
        cells = line.split(separator)
        if len(cells) < 2:
            bad.add(f"{path}:{n}", f"no {separator!r} in the line", "separate id and title by it")
        else:
            yield cells[0], cells[1]
