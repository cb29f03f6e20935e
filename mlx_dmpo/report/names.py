"""Short names for directories that are shown side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def short_names(directories: Sequence[Path]) -> dict[Path, str]:
    """Each directory's name without what all have in common: runs/demo/sft/eval and runs/demo/dmpo/eval -> sft,
    dmpo."""
    parts = {d: list(d.absolute().parts) for d in directories}
    if len(parts) > 1:
        while len({p[0] for p in parts.values()}) == 1 and min(map(len, parts.values())) > 1:
            parts = {d: p[1:] for d, p in parts.items()}
    else:
        parts = {d: p[-2:] for d, p in parts.items()}
    names = {d: "/".join(p[:-1] if p[-1] == "eval" and len(p) > 1 else p) for d, p in parts.items()}
    return names if len(set(names.values())) == len(names) else {d: str(d) for d in directories}
