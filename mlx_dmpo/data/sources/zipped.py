"""Files of a zip or tar archive, read without unpacking the archive into its folder."""

from __future__ import annotations

import contextlib
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ...config import PrepareSettings
from ...errors import UserError
from .contract import BadRows, Ratings

LIMIT = 4 << 30  # bytes that an archive may unpack to
MEMBERS = 100_000  # files that it may hold
SHOWN = 8  # files that a message names
FOLDERS = ("movielens", "bookcrossing", "lastfm", "letterboxd", "trakt", "amazon")  # sources that take several files
TABLES = (
    ".csv .tsv .tab .txt .dat .data .item .user .json .jsonl .ndjson .parquet .xml .inter".split()
)  # files that are data by their name, less .gz

# The files that a source reads of an archive with others
KNOWN = {
    "letterboxd": ("ratings.csv", "diary.csv", "watched.csv"),
    "imdb": ("ratings.csv",),
    "goodreads": ("goodreads_library_export.csv",),
    "netflix": ("viewingactivity.csv", "netflixviewinghistory.csv"),
    "scrobbles": ("scrobbles.csv", "recenttracks.csv", "lastfm.csv"),
}

Source = Callable[[Path, PrepareSettings, BadRows], Ratings]


def is_archive(path: Path) -> bool:
    """A zip or tar archive, compressed or not; no spreadsheet, although these are zip archives too."""
    if not path.is_file():
        return False
    if zipfile.is_zipfile(path):
        with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            return not any(n in ("[Content_Types].xml", "mimetype") or n.startswith("Index/") for n in names)
    try:
        return tarfile.is_tarfile(path)
    except (OSError, EOFError, zlib.error):
        return False


def reading_archives(name: str, source: Source) -> Source:
    """The source, for which an archive is the folder, or the one file, that it holds; ARCHIVE/MEMBER picks a file."""

    def read(path: Path, settings: PrepareSettings, bad: BadRows) -> Ratings:
        items = Path(getattr(settings, "items", ""))
        with contextlib.ExitStack() as stack:
            inner, archives = stack.enter_context(unpacked(path, name))
            if items.name:
                listed, more = stack.enter_context(unpacked(items, "table"))
                settings, archives = replace(settings, items=str(listed)), archives | more  # type: ignore[call-arg]
            if not archives:
                return source(inner, settings, bad)
            try:
                ratings = source(inner, settings, bad)
            except UserError as error:
                raise UserError(outside(str(error), archives)) from None
            bad.first = {what: outside(place, archives) for what, place in bad.first.items()}
            found = [next((a for f, a in archives.items() if p.is_relative_to(f)), p) for p in ratings.files]
            notes = [outside(note, archives) for note in ratings.notes]
            return replace(ratings, files=list(dict.fromkeys(found)), notes=notes)

    read.__doc__ = source.__doc__
    return read


def outside(text: str, archives: dict[Path, Path]) -> str:
    """A message that names the archive instead of the temporary folder."""
    for folder, archive in archives.items():
        text = text.replace(str(folder), str(archive))
    return text


@contextlib.contextmanager
def unpacked(path: Path, source: str = "table") -> Iterator[tuple[Path, dict[Path, Path]]]:
    """(the path to read, {temporary folder: archive}); a path outside of any archive is itself.

    Raises UserError for a damaged archive, one that is too large, and where it is not clear which file is meant.
    """
    archive = next((p for p in (path, *path.parents) if is_archive(p)), None)
    if archive is None:
        yield path, {}
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            with _opened(archive) as (members, open_member):
                inside = PurePosixPath(*path.parts[len(archive.parts) :])
                chosen, place = _chosen(archive, sorted(members), inside, source)
                left = LIMIT
                for member in chosen:
                    left -= _copy(open_member(members[member]), folder.joinpath(*member.parts), archive, member, left)
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
            kind = "zip" if zipfile.is_zipfile(archive) else "tar"
            raise UserError(f"{archive}: not a valid {kind} archive ({error}): download it again") from None
        except (RuntimeError, NotImplementedError) as error:  # encrypted, or packed in a way that Python does not know
            raise UserError(f"{archive}: cannot be read ({error}): unpack it, then name the folder") from None
        yield folder.joinpath(*place.parts), {folder: archive}


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[tuple[dict[PurePosixPath, Any], Callable[[Any], IO[bytes]]]]:
    """(name -> member, opens one) of the regular files of an archive. A name that leads outside is left out, and so is
    what a Mac adds."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            yield _safe((m.filename, m) for m in zipped.infolist() if not m.is_dir()), zipped.open
        return
    with tarfile.open(archive) as tarred:
        yield _safe((m.name, m) for m in tarred if m.isfile()), lambda member: tarred.extractfile(member)  # type: ignore


def _safe(members: Any) -> dict[PurePosixPath, Any]:
    found: dict[PurePosixPath, Any] = {}
    for name, member in members:
        path = PurePosixPath(name.replace("\\", "/"))
        outward = path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name)
        if not (outward or "__MACOSX" in path.parts or path.name.startswith(".")):
            found.setdefault(path, member)
        if len(found) > MEMBERS:
            raise UserError(f"archive with more than {MEMBERS:,} files: unpack it, then name the file or folder")
    return found


def _is_data(member: PurePosixPath) -> bool:
    return PurePosixPath(member.name.lower().removesuffix(".gz")).suffix in TABLES


def _chosen(
    archive: Path, members: list[PurePosixPath], inside: PurePosixPath, source: str
) -> tuple[list[PurePosixPath], PurePosixPath]:
    """(the members to unpack, the one to read or their folder). Raises UserError where several may be meant."""
    if inside.parts:
        if inside in members:
            return [inside], inside
        within = [m for m in members if inside in m.parents]
        if not within:
            raise UserError(f"{archive}: holds no {inside}: it has {_listed(members)}")
        members = within
    data = [m for m in members if _is_data(m) and "readme" not in m.name.lower()]
    if not data:
        raise UserError(f"{archive}: holds no table: it has {_listed(members)}")
    known = KNOWN.get(source, ())
    if source in FOLDERS:
        if known and not (data := [m for m in data if m.name.lower() in known]):
            raise UserError(f"{archive}: holds no {' or '.join(known)}: it has {_listed(members)}")
        top = min((m.parent for m in data), key=lambda p: (len(p.parts), str(p)))
        if source == "trakt":
            return [m for m in data if m.parent == top or top in m.parents], top
        beside = [m for m in data if m.parent == top]
        return beside, beside[0] if len(beside) == 1 and source == "letterboxd" else top
    data = [m for m in data if m.name.lower().removesuffix(".gz") in known] or data
    if len(data) > 1:
        names = {m.name.lower().removesuffix(".gz") for m in data}
        movies = bool({"u.data", "ratings.dat"} & names or {"ratings.csv", "movies.csv"} <= names)
        also = f", or read it as MovieLens: mlx-dmpo prepare movielens {archive.name}" if movies else ""
        likely = next((m for m in data if "rating" in m.name.lower()), data[0])
        raise UserError(f"{archive}: holds several tables ({_listed(data)}): name one, as in {archive}/{likely}{also}")
    return data, data[0]


def _listed(members: list[PurePosixPath]) -> str:
    more = f", and {len(members) - SHOWN:,} more" if len(members) > SHOWN else ""
    return ", ".join(map(str, members[:SHOWN])) + more if members else "nothing"


def _copy(source: IO[bytes], to: Path, archive: Path, member: PurePosixPath, left: int) -> int:
    """The bytes written. Raises UserError for more than `left`, whatever size the archive claims."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with source, open(to, "wb") as target:
        limited = _Limited(source, f"{archive}/{member}", left)
        shutil.copyfileobj(limited, target, 1 << 20)
        return left - limited.left


class _Limited:
    """What `source` holds, up to `left` bytes."""

    def __init__(self, source: IO[bytes], where: str, left: int):
        self.source, self.where, self.left = source, where, left

    def read(self, size: int = -1) -> bytes:
        """Raises UserError above the limit."""
        data = self.source.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise UserError(f"{self.where}: is larger than {LIMIT >> 20:,} MB: unpack it, then name the file or folder")
        return data
