"""What must stay the same for a run to be resumed, and how to resume one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from ..config import SftSettings, TrainSettings
from ..core.tree import EncodedGroup
from ..errors import UserError
from .reference import sequences


def how_to_resume(settings: TrainSettings) -> str:
    """The command that resumes a run, to be pasted into a shell."""
    command = "sft" if isinstance(settings, SftSettings) else "dmpo"
    return f"mlx-dmpo {command} -c {settings.adapter_path}/config.yaml --resume"


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
