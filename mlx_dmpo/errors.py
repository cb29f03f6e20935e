"""The exceptions that are not internal errors."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a flag, file, row or setting.

    The message is one line, `where: what is wrong: how to fix it`; the command line prints it
    without a traceback and exits with code 2.
    """


class WriteError(UserError):
    """A file could not be written: disk full, read-only, permission lost, directory gone. The earlier file stays."""


class Interrupted(Exception):
    """Stopped by SIGINT or SIGTERM. The message says how to continue; the command line exits with 128 + `signal`."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
