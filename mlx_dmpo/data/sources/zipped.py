"""Files of a zip archive, read without unpacking the archive."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO

from ...errors import UserError
from .contract import BadRows, Ratings

LIMIT = 512 << 20  # bytes of one unpacked file


def is_zip(path: Path) -> bool:
    return path.is_file() and zipfile.is_zipfile(path)


@contextlib.contextmanager
def unpacked(path: Path, names: Sequence[str], what: str) -> Iterator[Path]:
    """A temporary folder with these files of the archive, each under its own name; of several, the least deep one.

    An error inside names the archive instead of the temporary folder. Raises UserError for a damaged, an encrypted
    or another archive.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                members = sorted(archive.infolist(), key=lambda m: len(PurePosixPath(m.filename).parts))
                for name in names:
                    found = next((m for m in members if PurePosixPath(m.filename).name.lower() == name), None)
                    if found is not None:
                        _copy(archive, found, Path(folder) / name, path)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UserError(f"{path}: not a valid zip archive ({error}): download it again") from None
        except (RuntimeError, NotImplementedError) as error:  # encrypted, or packed in a way that Python does not know
            raise UserError(f"{path}: cannot be read ({error}): unpack it, then name the folder") from None
        if not any(Path(folder).iterdir()):
            raise UserError(f"{path}: holds no {' or '.join(names)}: name the {what}")
        try:
            yield Path(folder)
        except UserError as error:
            raise UserError(str(error).replace(folder, str(path))) from None


def _copy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, to: Path, path: Path) -> None:
    """Raises UserError for a file above LIMIT, whatever size the archive claims."""
    with archive.open(member) as source, open(to, "wb") as target:
        shutil.copyfileobj(_Limited(source, f"{path}/{member.filename}"), target)


class _Limited:
    """What `source` holds, up to LIMIT bytes."""

    def __init__(self, source: IO[bytes], where: str):
        self.source, self.where, self.read_so_far = source, where, 0

    def read(self, size: int = -1) -> bytes:
        """Raises UserError above LIMIT."""
        data = self.source.read(size)
        self.read_so_far += len(data)
        if self.read_so_far > LIMIT:
            raise UserError(f"{self.where}: is larger than {LIMIT >> 20} MB: unpack the archive, then name the folder")
        return data


def of_archive(ratings: Ratings, bad: BadRows, folder: Path, path: Path) -> Ratings:
    """Ratings read from `unpacked`, as of the archive: it is their file, and notes and skipped rows name it."""
    bad.first = {what: place.replace(str(folder), str(path)) for what, place in bad.first.items()}
    return replace(ratings, files=[path], notes=[note.replace(str(folder), str(path)) for note in ratings.notes])
