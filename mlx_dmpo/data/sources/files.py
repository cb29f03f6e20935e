"""Bytes of a file as UTF-8 text: gzip, encodings, line ends, and a clear error for what is not text."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...machine.progress import Progress, Reading
from . import encodings

BLOCK = 16 << 20  # bytes read at once


@contextlib.contextmanager
def opened(path: Path, bar: bool = True) -> Iterator[Any]:
    """The file's bytes, unzipped where it is a gzip file, with a progress bar over what is read from disk.

    Raises UserError for a file that cannot be read to its end.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            size = path.stat().st_size
            with Progress(size, path.name, "byte", quiet=not bar) as shown:
                counted: Any = Reading(file, shown)  # a file as far as gzip and arrow care
                yield gzip.GzipFile(fileobj=counted) if zipped else counted
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: name an existing file") from None
    except EOFError:
        raise UserError(f"{path}: the gzip file is cut short: download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not a valid gzip file ({error}): download it again") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder: name a file of it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}): name a readable file") from None


# first bytes of what is not text, what it is, and what to do about it
_OTHER = (
    (b"\xd0\xcf\x11\xe0", "a spreadsheet (.xls)", "open it and save it as CSV (UTF-8)"),
    (b"SQLite format 3\0", "an SQLite database", "export its table as CSV"),
    (b"ARROW1", "a Feather (Arrow IPC) file", "save it as Parquet or CSV"),
    (b"\x89HDF", "an HDF5 file", "save it as Parquet or CSV"),
    (b"BZh", "a bzip2 file", "unpack it first (bunzip2)"),
    (b"\xfd7zXZ\0", "an xz file", "unpack it first (unxz)"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it first (unzstd)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (b"Rar!", "a rar archive", "unpack it first"),
    (b"\x80\x04\x95", "a Python pickle", "save it as Parquet or CSV (pickles run code when they are read)"),
    (b"%PDF", "a PDF", "name the table itself"),
)


def _refuse_other(path: Path, start: bytes) -> None:
    """Raises UserError that says what the file is, where it is not text."""
    if start[:4] == b"PK\x03\x04":
        head = start[:4096]
        if b"opendocument" in head:
            raise UserError(f"{path}: is a spreadsheet (.ods): open it and save it as CSV (UTF-8)")
        if b"[Content_Types].xml" in head or b"xl/" in head:
            raise UserError(f"{path}: is a spreadsheet (.xlsx): open it and save it as CSV (UTF-8)")
        if b"Index/Document.iwa" in start or b"Index/" in head:
            raise UserError(f"{path}: is a spreadsheet (Numbers): open it and export it as CSV (UTF-8)")
        raise UserError(f"{path}: is a zip archive: unpack it first, then name the file or folder")
    for magic, what, fix in _OTHER:
        if start.startswith(magic):
            raise UserError(f"{path}: is {what}: {fix}")
    if start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{path}: is a web page, not a table: download the file itself")


def _refuse_wide(path: Path, start: bytes) -> None:
    """Raises UserError for UTF-16 and UTF-32, with a byte order mark or without."""
    if codec := encodings.wide(start):
        name = codec[:6].upper()
        raise UserError(f"{path}: is {name} text: save it as UTF-8, or add --encoding {codec}")


def start(path: Path, size: int = 1 << 16, encoding: str = "") -> str:
    """The first characters of a text file. Raises UserError for an empty or a binary one, and names what it is."""
    with opened(path, bar=False) as file:
        first = file.read(size)
    if not first.strip():
        raise UserError(f"{path}: is empty: give at least one row")
    _refuse_other(path, first)
    if encoding:
        codec = lookup(encoding)
        return codecs.getincrementaldecoder(codec)("replace").decode(first).removeprefix("\ufeff")
    _refuse_wide(path, first)
    if b"\0" in first:
        raise UserError(f"{path}: is a binary file: give text, Parquet or JSON lines")
    return codecs.getincrementaldecoder("utf-8")("mlx_dmpo.cp1252").decode(first).removeprefix("\ufeff")


# --- encodings


def _as_latin1(error: UnicodeError) -> tuple[str, int]:
    """The five bytes that Windows-1252 leaves undefined, as control characters; titles lose these."""
    assert isinstance(error, UnicodeDecodeError)
    return error.object[error.start : error.end].decode("latin-1"), error.end


def _as_cp1252(error: UnicodeError) -> tuple[str, int]:
    """Bytes that are not UTF-8, as Windows-1252 has them."""
    assert isinstance(error, UnicodeDecodeError)
    return error.object[error.start : error.end].decode("cp1252", "mlx_dmpo.latin1"), error.end


codecs.register_error("mlx_dmpo.latin1", _as_latin1)
codecs.register_error("mlx_dmpo.cp1252", _as_cp1252)


@dataclass(frozen=True, slots=True)
class Encoding:
    """How bytes become text. `errors` is a codec error handler; `note` says what was decided, "" for plain UTF-8."""

    codec: str = "utf-8"
    errors: str = "strict"
    note: str = ""


UTF8 = Encoding()


def lookup(name: str) -> str:
    """Python's name of a text encoding. Raises UserError for an unknown one."""
    try:
        info = codecs.lookup(name)
        "".encode(info.name)
    except LookupError:
        raise UserError(
            f"--encoding: {name!r} is unknown: give one such as utf-8, cp1252, utf-16 or shift_jis"
        ) from None
    return "utf-8" if info.name == "utf-8-sig" else info.name


def encoding_of(path: Path, given: str = "") -> Encoding:
    """The encoding of a file of titles: the one given, UTF-8, or Windows-1252 for old dumps.

    A file that is UTF-8 but for some bytes stays UTF-8; only these bytes are read as Windows-1252. Where Windows-1252
    reads as no language, UserError names the encodings that decode all of it. A given encoding of two bytes a character
    is that of the files which have it. Raises UserError.
    """
    with opened(path, bar=False) as file:
        first = file.read(4096)
    if given:
        codec, found = lookup(given), encodings.wide(first)
        if first.startswith(codecs.BOM_UTF8) or (codec[:5] in ("utf-1", "utf-3") and not found):
            return UTF8
        return Encoding(found if found in ("utf-16", "utf-32") else codec)
    _refuse_wide(path, first)
    wide, lines, wrong = _not_utf8(path)
    if not wrong:
        return UTF8
    number, text = next(iter(wrong.items()))
    place = f"{path}:{number}"
    if wide >= len(wrong):
        these = "1 line is" if len(wrong) == 1 else f"{len(wrong):,} lines are"
        note = (
            f"{path.name}: {these} not UTF-8, the others are: read there as Windows-1252 (first: {place}: "
            f"{_around(text, 'utf-8')})"
        )
        return Encoding("utf-8", "mlx_dmpo.cp1252", note)
    judged = list(itertools.islice(wrong.items(), encodings.SAMPLED))
    odd = [(n, line) for n, line in judged if encodings.suspect(line.decode("cp1252", "mlx_dmpo.latin1"))]
    many = len(wrong) > 3 or 100 * len(wrong) > lines
    if many and odd and len(odd) >= encodings.SUSPECT * len(judged):
        number, text = odd[0]
        raise UserError(
            f"{path}:{number}: is not UTF-8, and as Windows-1252 it reads {_around(text, 'cp1252')}: name its encoding"
            f"{_readings([line for _, line in judged], text, 'cp1252')}, or cp1252 if it reads well as it is"
        )
    note = (
        f"{path.name} is not UTF-8: read as Windows-1252 (first at {place}: {_around(text, 'cp1252')}); "
        "--encoding names another"
    )
    return Encoding("cp1252", "mlx_dmpo.latin1", note)


def _not_utf8(path: Path) -> tuple[int, int, dict[int, bytes]]:
    """Lines with characters beyond ASCII in UTF-8, all lines, and those that are not UTF-8, by their numbers."""
    wide = number = 0
    wrong: dict[int, bytes] = {}
    with opened(path, bar=False) as file:
        for block in whole_lines(file):
            if not block.isascii():
                for n, text in enumerate(block.split(b"\n"), number + 1):
                    if text.isascii():
                        continue
                    try:
                        text.decode()
                        wide += 1
                    except UnicodeDecodeError:
                        wrong[n] = text
            number += block.count(b"\n")
    return wide, number, wrong


def _readings(lines: Sequence[bytes], line: bytes, but: str = "") -> str:
    """Encodings that decode all of these lines, with what one line reads as: `, as in --encoding cp1251 ('Король')`."""
    found = [codec for codec in encodings.guesses(lines) if codec != but] or ["cp1252", "shift_jis"]
    shown = []
    for codec in found:
        word = re.search(r"[^\s,;|:\"]*[^\x00-\x7f][^\t,;|:\"\r\n]{0,15}", line.decode(codec, "replace"))
        shown.append(f"{codec} ({word[0].strip()!r})" if word else codec)
    return f", as in --encoding {', '.join(shown)}"


def _around(line: bytes, codec: str) -> str:
    """The word at the first byte that is not UTF-8, as it is read."""
    try:
        line.decode()
        return ""
    except UnicodeDecodeError as error:
        handler = "mlx_dmpo.cp1252" if codec == "utf-8" else "mlx_dmpo.latin1"
        before = line[: error.start].decode(codec, handler)[-20:]
        return repr((before + line[error.start :].decode(codec, handler)[:20]).strip())


class _Utf8(io.RawIOBase):
    """Any text as UTF-8 bytes without a byte order mark, checked as it is read, with \\n where lines end by a
    lone \\r.
    """

    def __init__(self, file: Any, path: Path, encoding: Encoding):
        self.file, self.path, self.encoding, self.line = file, path, encoding, 1
        self.rest = memoryview(b"")
        self.decoder = codecs.getincrementaldecoder(encoding.codec)(encoding.errors)
        self.first, self.lone = True, False

    def readable(self) -> bool:
        return True

    def _next(self) -> bytes | None:
        """The next bytes; None at the end."""
        data = self.file.read(BLOCK)
        try:
            text = self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = self.line + error.object[: error.start].count(b"\n")
            utf8 = self.encoding.codec == "utf-8"
            wrong = _not_utf8(self.path)[2] if utf8 else {}
            judged = list(itertools.islice(wrong.values(), encodings.SAMPLED))
            other = ", or name another --encoding"
            if judged:
                other = f", or name its encoding{_readings(judged, judged[0])}"
            raise UserError(
                f"{self.path}:{line}: is not {'UTF-8' if utf8 else self.encoding.codec} text "
                f"(byte 0x{error.object[error.start]:02X}): save the file as UTF-8{other}"
            ) from None
        self.line += data.count(b"\n")
        if self.first and data:
            self.first, self.lone = False, "\r" in text and "\n" not in text
            text = text.removeprefix("\ufeff")
            data = data.removeprefix(codecs.BOM_UTF8)
        if not data and not text:
            return None
        if self.encoding == UTF8 and not self.lone:
            return data
        return (text.replace("\r", "\n") if self.lone else text).encode("utf-8", "replace")

    def readinto(self, buffer: Any) -> int:
        """Raises UserError where the bytes are not text in the encoding."""
        while not self.rest:
            more = self._next()
            if more is None:
                return 0
            self.rest = memoryview(more)
        number = min(len(buffer), len(self.rest))
        buffer[:number] = self.rest[:number]
        self.rest = self.rest[number:]
        return number


@contextlib.contextmanager
def text(path: Path, encoding: Encoding = UTF8, bar: bool = True) -> Iterator[io.BufferedReader]:
    """The file as UTF-8 bytes. Raises UserError where it is not text in this encoding."""
    with opened(path, bar) as file:
        yield io.BufferedReader(_Utf8(file, path, encoding), 1 << 20)


def whole_lines(file: Any) -> Iterator[bytes]:
    """Blocks that end where a line ends."""
    rest: list[bytes] = []
    while chunk := file.read(BLOCK):
        head, newline, tail = chunk.rpartition(b"\n")
        if newline:
            yield b"".join([*rest, head, newline])
            rest = [tail] if tail else []
        else:
            rest.append(chunk)
    if rest:
        yield b"".join(rest)


def all_lines(path: Path, encoding: Encoding = UTF8, bar: bool = False) -> Iterator[str]:
    """The lines of a text file, each with its end."""
    with text(path, encoding, bar) as file:
        for block in whole_lines(file):
            for line in block.split(b"\n")[: -1 if block.endswith(b"\n") else None]:
                yield line.decode() + "\n"


def text_lines(path: Path, encoding: Encoding = UTF8) -> Iterator[tuple[int, str]]:
    """(number, text) of each line that is not blank."""
    start(path)
    for n, line in enumerate(all_lines(path, encoding, bar=True), 1):
        if line.strip():
            yield n, line.rstrip("\r\n")
