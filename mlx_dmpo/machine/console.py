"""Lines for the person at the terminal."""

from __future__ import annotations

import os
import sys
import textwrap
from typing import TextIO


def notice(message: str) -> None:
    """One line for the person at the terminal, on stderr."""
    print(folded(printable(message), sys.stderr), file=sys.stderr, flush=True)


def folded(line: str, stream: TextIO) -> str:
    """`line` broken between words where `stream` is a terminal too narrow for it.

    Lines with a command stay whole, so that they can be copied.
    """
    if "mlx-dmpo " in line or not stream.isatty():
        return line
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return line
    if len(line) <= columns or columns < 20:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def printable(text: str) -> str:
    """`text` on one line, without control and direction characters: titles are untrusted, and a terminal obeys them."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
