"""Which examples a run was trained on, so that an evaluation on the same ones is noticed, whatever their file is
called"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ..records import Example, RankingExample
from . import files

TRAINED_ON = "trained_on.txt"  # one key per line


def example_key(example: Example) -> str:
    """A hash of what the model is given and of what it should prefer; the user's name and the negatives do not
    count."""
    if isinstance(example, RankingExample):
        learned = [*example.history, *example.more_positives, example.positive]
    else:
        branch = example.branches[example.pairs[0][0] if example.pairs else 0]
        learned = [*(m["content"] for m in branch.messages), branch.answer]
    return hashlib.blake2b(json.dumps(learned).encode(), digest_size=8).hexdigest()


def read(adapter: str | Path) -> set[str] | None:
    """The keys of a run's training examples, or of the run that a checkpoint belongs to; None where none were kept."""
    path = Path(adapter)
    for directory in (path, path.parent.parent):
        if (directory / TRAINED_ON).is_file():
            return set((directory / TRAINED_ON).read_text(encoding="ascii", errors="replace").split())
    return None


def write(directory: Path, examples: Sequence[Example], start_adapter: str = "") -> None:
    """Keeps the keys of `examples` and of what the start adapter was trained on."""
    keys = {example_key(e) for e in examples} | (read(start_adapter) or set() if start_adapter else set())
    files.write_text(directory / TRAINED_ON, "".join(f"{key}\n" for key in sorted(keys)))


def count(adapter: str, examples: Sequence[Example]) -> int | None:
    """How many of `examples` the adapter was trained on; None where that is not known."""
    keys = read(adapter) if adapter else None
    return None if keys is None else sum(example_key(e) in keys for e in examples)
