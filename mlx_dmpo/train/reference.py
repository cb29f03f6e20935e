"""The reference is data: the policy's log-probs at step 0, computed once, outside gradient tracing, kept on disk.

One file a (base model, adapter, scorer), one number a token sequence: whatever changes the tokens (data, template,
truncation) asks for another sequence, whatever changes the weights opens another file. A stale value cannot be met.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ..core.scorer import SCORER_VERSION
from ..core.tree import EncodedGroup, by_length
from ..errors import UserError, WriteError
from ..machine import console, files
from ..machine.ranks import world

CHUNK = 16  # batches a rank scores between two exchanges with the others


SAVE_SECONDS = 60.0


def cache_directory() -> Path:
    return Path(os.environ.get("MLX_DMPO_CACHE", Path.home() / ".cache" / "mlx-dmpo"))


def cache_key(base_fingerprint: str, adapter: Path | None, shared_road: bool) -> str:
    """SHA-256 of everything but the tokens that a reference log-prob depends on. `adapter` is None for the bare base."""
    digest = hashlib.sha256(f"{base_fingerprint} scorer {SCORER_VERSION} shared {shared_road}".encode())
    for name in ("adapters.safetensors", "adapter_config.json") if adapter else ():
        digest.update(files.sha256(adapter / name).encode())  # type: ignore[operator]
    return digest.hexdigest()


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
        console.notice(f"note: {path} cannot be read; the reference is computed anew")
        return {}


class Reference:
    """Log-probs of token sequences under the policy at step 0.

    `add` computes what is not stored yet and writes the file; `logps` looks up one row a group, padded to R with 0.
    The first rank's file is the one that counts.
    """

    def __init__(
        self,
        key: str,
        score: Callable[[Sequence[EncodedGroup]], Iterable[tuple[EncodedGroup, np.ndarray]]],
        batch_size: int,
    ):
        self.path = cache_directory() / "reference" / f"{key}.npz"
        self._score, self._batch_size = score, batch_size
        self._table = _read(self.path) if world().first else {}
        self.computed = 0

    def add(self, groups: Sequence[EncodedGroup]) -> None:
        """Raises UserError for a log-prob that is not finite. What was scored is kept also where this is interrupted."""
        self._from_first(groups)
        # cut up before it is asked what is stored: what an interrupted run still has to score then meets in the same batches
        batches = [[groups[i] for i in rows] for rows in by_length(groups, self._batch_size)]
        chunk, before, saved = CHUNK * world().size, self.computed, time.monotonic()
        try:
            with tqdm(total=len(groups), desc="reference", unit="group", disable=None, leave=False) as bar:
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
            console.notice(f"note: the reference is not kept: {error}")

    def logps(self, groups: Sequence[EncodedGroup]) -> np.ndarray:
        """(G, R) float32 in nats."""
        rows = [[self._table[s] for s in sequences(g)] for g in groups]
        width = max(map(len, rows))
        return np.array([row + [0.0] * (width - len(row)) for row in rows], np.float32)
