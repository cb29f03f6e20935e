"""The reference is data: the policy's log-probs at step 0, computed once, outside gradient tracing, kept on disk.

One file a (base model, adapter, scorer), one number a token sequence: whatever changes the tokens (data, template,
truncation) asks for another sequence, whatever changes the weights opens another file. A stale value cannot be met.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from . import rundir
from .batches import by_length, pad_groups
from .records import EncodedGroup
from .scoring import SCORER_VERSION, Road


def cache_directory() -> Path:
    return Path(os.environ.get("MLX_DMPO_CACHE", Path.home() / ".cache" / "mlx-dmpo"))


def cache_key(base_fingerprint: str, adapter: Path | None, shared_road: bool) -> str:
    """SHA-256 of everything but the tokens that a reference log-prob depends on. `adapter` is None for the bare base."""
    digest = hashlib.sha256(f"{base_fingerprint} scorer {SCORER_VERSION} shared {shared_road}".encode())
    for name in ("adapters.safetensors", "adapter_config.json") if adapter else ():
        digest.update(rundir.sha256(adapter / name).encode())  # type: ignore[operator]
    return digest.hexdigest()


def _sequences(group: EncodedGroup) -> list[bytes]:
    return [
        hashlib.blake2b(group.prefix.tobytes() + tail.tobytes() + n.to_bytes(4, "little"), digest_size=16).digest()
        for tail, n in zip(group.tails, group.answer_lengths, strict=True)
    ]


def _read(path: Path) -> dict[bytes, float]:
    try:
        with np.load(path) as stored:
            return {key.tobytes(): float(value) for key, value in zip(stored["sequences"], stored["logps"], strict=True)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        rundir.notice(f"note: {path} cannot be read; the reference is computed anew")
        return {}


def score_groups(
    model: nn.Module, road: Road, groups: Sequence[EncodedGroup], batch_size: int, describe: str
) -> Iterable[tuple[EncodedGroup, np.ndarray]]:
    """Each group with its (R,) log-probs, outside gradient tracing, in batches of like length."""
    training = model.training
    model.eval()
    try:
        with tqdm(total=len(groups), desc=describe, unit="group", disable=None, leave=False) as bar:
            for rows in by_length(groups, batch_size):
                picked = [groups[i] for i in rows]
                logps = np.array(road.logps(model, pad_groups(picked)))
                for group, row in zip(picked, logps, strict=True):
                    yield group, row[: len(group.tails)]
                bar.update(len(picked))
    finally:
        model.train(training)


class Reference:
    """Log-probs of token sequences under the policy at step 0.

    `add` computes what is not stored yet and writes the file; `logps` looks up one row a group, padded to R with 0.
    """

    def __init__(self, key: str, score: Callable[[Sequence[EncodedGroup]], Iterable[tuple[EncodedGroup, np.ndarray]]]):
        self.path = cache_directory() / "reference" / f"{key}.npz"
        self._score = score
        self._table = _read(self.path)
        self.computed = 0

    def add(self, groups: Sequence[EncodedGroup]) -> None:
        wanted = [g for g in groups if any(s not in self._table for s in _sequences(g))]
        for group, row in self._score(wanted):
            self._table.update(zip(_sequences(group), map(float, row), strict=True))
        self.computed += len(wanted)
        if wanted:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with rundir.atomic(self.path) as temporary:
                    np.savez(
                        temporary,
                        sequences=np.frombuffer(b"".join(self._table), np.uint8).reshape(-1, 16),
                        logps=np.array(list(self._table.values()), np.float32),
                    )
            except OSError as error:
                rundir.notice(f"note: the reference is not kept ({self.path}: {error.strerror or error})")

    def logps(self, groups: Sequence[EncodedGroup]) -> np.ndarray:
        """(G, R) float32 in nats."""
        rows = [[self._table[s] for s in _sequences(g)] for g in groups]
        width = max(map(len, rows))
        return np.array([row + [0.0] * (width - len(row)) for row in rows], np.float32)
