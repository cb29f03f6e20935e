"""Whether a name that the user gave is a path or a repository of the Hugging Face hub: one rule for models and data
sets."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import UserError

# owner/name: no "..", no leading dot or slash
REPOSITORY = re.compile(r"[A-Za-z0-9]\w*(?:[.-]\w+)*/\w+(?:[.-]\w+)*", re.ASCII)


SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zip", ".safetensors", ".gguf")


def is_repository(name: str) -> bool:
    """Whether `owner/name` is meant for the hub: nothing of that name is here, `owner` is not a directory here (then
    the name is a mistyped path), and it does not end like a file."""
    return bool(REPOSITORY.fullmatch(name)) and not (
        Path(name).exists() or Path(name).parent.is_dir() or name.lower().endswith(SUFFIXES)
    )


def missing(name: str, wanted: str) -> UserError:
    """The error for a name that is neither a path nor a repository of the hub; `wanted` says what to give."""
    parent = Path(name).parent
    if REPOSITORY.fullmatch(name) and parent.is_dir():
        near = ", ".join(sorted(p.name for p in parent.iterdir() if not p.name.startswith("."))[:5])
        holds = f"{parent}/ is a directory here and holds {near or 'nothing'}"
        return UserError(
            f"{name}: no such file or directory ({holds}): {wanted}; for the hub repository of that name, run the "
            f"command in a directory without {parent}/"
        )
    return UserError(f"{name}: no such file or directory: {wanted}")
