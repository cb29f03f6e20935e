"""Outputs of the layers below an adapter, kept on disk: every adapter on the same layers of a model starts from them.

One safetensors file per sequence tree, in a directory per base model, layer and environment. What changes the tokens
needs another file, what changes the values another directory. So no stale value is ever used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from ..core.scorer import SCORER_VERSION
from ..errors import WriteError
from ..machine import console, files


def cache_key(fingerprint: str, adapter: str, shared: bool, environment: Mapping[str, str]) -> str:
    """SHA-256 of everything but the tokens that can change a log-prob or a hidden state.

    fingerprint  of the base model's files, quantization and dtype
    adapter      of what is on it: see `train.reference.adapter_digest`
    shared       whether the shared-prefix scorer is used
    environment  versions, device, BLAS: see model.device
    """
    parts = [fingerprint, adapter, f"shared {shared}", f"scorer {SCORER_VERSION}", sorted(environment.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class FrozenCache:
    """A directory of hidden states, by a key of their tokens. What cannot be read is computed and written anew."""

    def __init__(self, directory: Path):
        self.directory, self._full = directory, False

    def _path(self, key: bytes) -> Path:
        return self.directory / f"{key.hex()}.safetensors"

    def get(self, key: bytes) -> mx.array | None:
        """(N, D), or None where there is none."""
        path = self._path(key)
        try:
            if not path.exists():
                return None
            found: mx.array = mx.load(str(path))["h"]  # type: ignore[call-overload,assignment]
            mx.eval(found)
            return found
        except (RuntimeError, ValueError, KeyError):
            console.notice(f"note: {path} cannot be read; it is computed again")
            return None

    def put(self, key: bytes, h: mx.array) -> None:
        """Writes a file, and gives up for good, with a note, where the disk takes no more."""
        if self._full:
            return
        try:
            with files.writing(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
            with files.atomic(self._path(key)) as temporary:
                mx.save_safetensors(str(temporary), {"h": h})
        except (WriteError, RuntimeError) as error:
            self._full = True
            console.notice(f"note: nothing more is kept of the layers below the adapter: {error}")
