"""Training users held out for validation, where the data brings no validation split"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..data.check import same_user
from ..data.splits import unit
from ..errors import UserError
from ..machine import files, trained_on
from ..records import Example, RankingExample

HELD_OUT = "held_out.json"  # of a run directory: [{"user", "domain", "history"}, ...]
LEAST = 5  # users held out, at least
FEW = 10  # training users below which none is held out


def users(examples: Sequence[Example]) -> set[tuple[str, str]]:
    """(domain, user) of each. Readers name the user of a file without user ids by the history."""
    return {(e.domain, e.user) for e in examples}


def digest(held_out: Sequence[Example]) -> str:
    """SHA-256 of the held-out users, in any order of their rows."""
    return hashlib.sha256("\n".join(sorted(map("\0".join, users(held_out)))).encode()).hexdigest()


def hold_out(
    examples: Sequence[Example], share: float, seed: int, start_adapter: str = ""
) -> tuple[list[Example], list[Example]]:
    """(training rows, held-out rows): all rows of a user on one side, in the data's order.

    share  of the users, rounded, at least LEAST of them; with fewer than FEW users nothing is held out

    The users with the least hash of seed and name are held out, whatever the order of the rows. After an earlier
    stage, its held-out users come first, found by name or by history (`data.check.same_user`), and next the users that
    it was not trained on: no stage validates on an earlier stage's training users while others are left.
    """
    everyone = users(examples)
    if not share or len(everyone) < FEW:
        return list(examples), []
    before = _held_out_before(start_adapter)
    sources = set(same_user(before, [e for e in examples if isinstance(e, RankingExample)])) if before else set()
    named = users(before)
    again = {(e.domain, e.user) for e in examples if (e.domain, e.user) in named or e.source in sources}
    keys = (trained_on.read(start_adapter) or set()) if start_adapter else set()
    trained = {(e.domain, e.user) for e in examples if trained_on.example_key(e) in keys}
    wanted = max(LEAST, round(share * len(everyone)))
    if wanted < len(again) <= len(everyone) - LEAST:
        wanted = len(again)
    order = sorted(everyone, key=lambda u: (u not in again, u in trained, unit(seed, "holdout", *u), u))
    chosen = set(order[:wanted])
    return (
        [e for e in examples if (e.domain, e.user) not in chosen],
        [e for e in examples if (e.domain, e.user) in chosen],
    )


def describe(train: Sequence[Example], held_out: Sequence[Example], share: float, start_adapter: str = "") -> str:
    """What was held out, or why nothing was, on one line."""
    if not share:
        return "note: no validation data, and --no-holdout: nothing is held out; the last adapter is kept"
    if not held_out:
        return (
            f"note: nothing is held out: {len(users(train))} training users are fewer than {FEW}; the last adapter is "
            "kept; add --valid-data FILE to choose by it"
        )
    text = (
        f"held out {len(users(held_out))} of {len(users(train)) + len(users(held_out))} training users for validation "
        f"(digest {digest(held_out)[:12]}); --no-holdout trains on all"
    )
    seen = trained_on.count(start_adapter, held_out) if start_adapter else 0
    return text + (f"; {start_adapter} was trained on {seen} of their {len(held_out)} rows" if seen else "")


def write(run: Path, held_out: Sequence[Example]) -> None:
    """Keeps who was held out, for the next stage; removes an earlier run's file where nobody was."""
    if not held_out:
        (run / HELD_OUT).unlink(missing_ok=True)
        return
    rows = {(e.domain, e.user, e.history if isinstance(e, RankingExample) else ()): None for e in held_out}
    files.write_json(run / HELD_OUT, [{"user": u, "domain": d, "history": list(h)} for d, u, h in rows])


def _held_out_before(start_adapter: str) -> list[RankingExample]:
    """The earlier stage's held-out users, as examples without a positive. Raises UserError for a damaged file."""
    path = Path(start_adapter) / HELD_OUT
    if not start_adapter or not path.is_file():
        return []
    rows = files.read_json(path)
    try:
        return [RankingExample(str(r["user"]), str(r["domain"]), tuple(map(str, r["history"])), "", ()) for r in rows]
    except (TypeError, KeyError):
        raise UserError(f"{path}: holds no list of users: remove it, or train {start_adapter} again") from None
