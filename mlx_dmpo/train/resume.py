"""What must stay the same for a run to be resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from ..core.tree import EncodedGroup
from ..errors import UserError
from .reference import sequences


def digest(groups: Sequence[EncodedGroup]) -> str:
    """SHA-256 of the groups' tokens, pairs and order."""
    found = hashlib.sha256()
    for group in groups:
        for sequence in sequences(group):
            found.update(sequence)
        found.update(group.pairs.tobytes())
    return found.hexdigest()


def check_identity(stored: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises UserError naming the first difference that would change the result of a resumed run."""
    for name in {**given, **stored}:
        was, now = stored.get(name), given.get(name)
        if was == now:
            continue
        if name in ("model", "train data", "valid data", "reference"):
            raise UserError(
                f"--resume: the {name} is not the one that the run started with: restore it, or start a new run with "
                "another --adapter-path"
            )
        raise UserError(
            f"--resume: {name} was {was} and is now {now}, which would change the result: leave {name} as it was, "
            "or start a new run with another --adapter-path"
        )
