"""Lines for the person at the terminal."""

from __future__ import annotations

import sys


def notice(message: str) -> None:
    """One line for the person at the terminal, on stderr."""
    print(printable(message), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """`text` on one line, without control and direction characters: titles are untrusted, and a terminal obeys them."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
