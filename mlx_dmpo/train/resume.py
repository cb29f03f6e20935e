"""What must stay the same for a run to be resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DmpoSettings, SftSettings, resume_key
from ..core.scorer import SCORER_VERSION
from ..core.tree import EncodedGroup
from ..errors import UserError
from ..machine import console
from ..model.open import LanguageModelScorer
from .batches import GroupSource
from .reference import Reference, adapter_digest, sequences


def digest(groups: Sequence[EncodedGroup]) -> str:
    """SHA-256 of the groups' tokens, pairs, utilities and order."""
    found = hashlib.sha256()
    for group in groups:
        for sequence in sequences(group):
            found.update(sequence)
        found.update(group.pairs.tobytes())
        found.update(np.array(group.utilities or (), np.float64).tobytes())
    return found.hexdigest()


FORMAT = 3  # of the identity


def run_identity(
    settings: SftSettings | DmpoSettings,
    policy: LanguageModelScorer,
    groups: GroupSource,
    valid: GroupSource | None,
    reference: Reference | None,
) -> dict[str, Any]:
    """What must stay the same for a run to be resumed, by name."""
    start = settings.start_adapter if reference else ""
    return {
        "checkpoint format": FORMAT,
        **resume_key(settings),
        "dtype of the weights": str(policy.base.dtype).removeprefix("mlx.core."),
        "model": policy.base.fingerprint,
        "train data": digest(groups.epoch(0)),
        "number of validation groups": len(valid.examples) if valid else 0,
        "valid data": digest(valid.epoch(0) if valid else []),
        "reference": adapter_digest(Path(start) if start else None) if reference else "none",
        "scorer": f"{'shared-prefix' if policy.groups.shared else 'plain'} (version {SCORER_VERSION})",
    }


def check_identity(stored: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises UserError naming the first difference that would change the result of a resumed run.

    Another environment changes at most the last digits: it is named in a note.
    """
    old, new = stored.get("environment", {}), given.get("environment", {})
    changes = [
        f"{name} {old.get(name)} -> {new.get(name)}" for name in {**new, **old} if old.get(name) != new.get(name)
    ]
    if stored.get("checkpoint format") == FORMAT and changes:
        console.notice(
            f"note: the run continues with {', '.join(changes)}: its result may differ in the last digits from that of "
            "an uninterrupted run"
        )
    for name in {**given, **stored}:
        was, now = stored.get(name), given.get(name)
        if was == now or name in ("environment", "memory"):
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
