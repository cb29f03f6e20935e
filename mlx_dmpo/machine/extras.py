"""Packages that only some commands need, and the command that installs them"""

from __future__ import annotations

import importlib.util
import sys

from ..errors import UserError
from . import commands

# the extras of pyproject.toml that commands need
SERVE = ("starlette>=0.40", "uvicorn>=0.30")
BASELINES = ("implicit>=0.7.2",)


def not_installed(where: str, name: str, packages: tuple[str, ...]) -> UserError:
    """The error for a package that is missing, with a command that installs it for the Python in use.

    The command names the packages, not an extra of mlx-dmpo: that is on no index, and need not be installed.
    """
    pip = ["-m", "pip", "install"]
    program = (
        [sys.executable, *pip] if importlib.util.find_spec("pip") else ["uv", *pip[1:], "--python", sys.executable]
    )
    return UserError(f"{where}: {name} is not installed: run {commands.join([*program, *packages])}")
