"""The reference is data: the policy's log-probs at step 0, computed once, outside gradient tracing, kept on disk.

One file per base model, adapter, scorer and environment; one number per token sequence. What changes the tokens (data,
template, truncation) needs another sequence, what changes the values another file. So no stale value is ever used.
"""

from __future__ import annotations

import hashlib
import itertools
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..core.tree import EncodedGroup, by_length
from ..errors import UserError, WriteError
from ..machine import console, files
from ..machine.progress import Progress
from ..machine.ranks import world

CHUNK = 16  # batches that a rank scores between two exchanges with the others
SAVE_SECONDS = 60.0


def adapter_digest(adapter: Path | None) -> str:
    """SHA-256 of an adapter's weights and config; "" for the bare base."""
    if adapter is None:
        return ""
    both = files.sha256(adapter / "adapters.safetensors") + files.sha256(adapter / "adapter_config.json")
    return hashlib.sha256(both.encode()).hexdigest()


def sequences(group: EncodedGroup) -> list[bytes]:
    """A hash of each branch's tokens and of where its answer begins."""
    return [
        hashlib.blake2b(group.prefix.tobytes() + tail.tobytes() + n.to_bytes(4, "little"), digest_size=16).digest()
        for tail, n in zip(group.tails, group.answer_lengths, strict=True)
    ]


def _read(path: Path) -> dict[bytes, float]:
    try:
        with np.load(path) as stored:
            return {
                key.tobytes(): float(value)
                for key, value in zip(stored["sequences"], stored["logps"], strict=True)
                if np.isfinite(value)
            }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        console.notice(f"note: {path} cannot be read; the reference is computed again")
        return {}


class Reference:
    """Log-probs of token sequences under the policy at step 0.

    `add` computes what is not stored yet and writes the file; `logps` looks up one row a group, padded to R with 0.
    Only the first rank reads and writes the file.
    """

    def __init__(
        self,
        key: str,
        score: Callable[[Sequence[EncodedGroup]], Iterable[tuple[EncodedGroup, np.ndarray]]],
        batch_size: int,
    ):
        self.path = files.cache_directory() / "reference" / f"{key}.npz"
        self._score, self._batch_size = score, batch_size
        self._table = _read(self.path) if world().first else {}
        self.computed = 0

    def add(self, groups: Sequence[EncodedGroup]) -> None:
        """Raises UserError for NaN or Inf. What was scored before an error or an interrupt is kept."""
        self._from_first(groups)
        # batches do not depend on what is stored: so a resumed run scores the rest in the same batches
        batches = [[groups[i] for i in rows] for rows in by_length(groups, self._batch_size)]
        chunk, before, saved = CHUNK * world().size, self.computed, time.monotonic()
        try:
            with Progress(len(groups), "reference", "group", quiet=not world().first) as bar:
                for start in range(0, len(batches), chunk):
                    together = batches[start : start + chunk]
                    for batch in together if world().size == 1 else [list(itertools.chain(*together))]:
                        self._add(batch)
                        bar.update(len(batch))
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self._write()
                        saved = time.monotonic()
        finally:
            if self.computed > before:
                self._write()

    def _add(self, batch: Sequence[EncodedGroup]) -> None:
        wanted = [g for g in batch if any(s not in self._table for s in sequences(g))]
        for group, row in self._score(wanted) if wanted else ():
            if not np.isfinite(row).all():
                raise UserError(
                    f"{group.source or group.user}: its reference log-prob is NaN or Inf: look at the start adapter "
                    "and at --dtype"
                )
            for sequence, value in zip(sequences(group), map(float, row), strict=True):
                self._table.setdefault(sequence, value)
        self.computed += len(wanted)

    def _from_first(self, groups: Sequence[EncodedGroup]) -> None:
        """Gives every rank the first one's stored values, so that all want the same groups scored."""
        if world().size == 1:
            return
        wanted = list(dict.fromkeys(s for g in groups for s in sequences(g)))
        stored = np.array([[s in self._table, self._table.get(s, 0.0)] for s in wanted], np.float32)
        got = np.array(world().arrays_from_first({"stored": mx.array(stored)} if world().first else None)["stored"])
        self._table.update({s: float(value) for s, (known, value) in zip(wanted, got, strict=True) if known})

    def _write(self) -> None:
        if not world().first:
            return
        try:
            with files.writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            with files.atomic(self.path) as temporary:
                np.savez(
                    temporary,
                    sequences=np.frombuffer(b"".join(self._table), np.uint8).reshape(-1, 16),
                    logps=np.array(list(self._table.values()), np.float32),
                )
        except WriteError as error:
            console.notice(f"note: the reference is not saved: {error}")

    def logps(self, groups: Sequence[EncodedGroup]) -> np.ndarray:
        """(G, R) float32 in nats."""
        rows = [[self._table[s] for s in sequences(g)] for g in groups]
        width = max(map(len, rows))
        return np.array([row + [0.0] * (width - len(row)) for row in rows], np.float32)
