"""How many queries of a prefix attention runs at once on this device: 128, or all of them. Measured once, and kept

Both are exact. All at once is faster where a device has a fused causal backward pass, and computes and stores twice the
scores where it has none.
"""

from __future__ import annotations

import statistics
import time
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..core import family
from ..core.attention import attend_prefix
from ..core.layout import PREFIX_CHUNK, WHOLE, prefix_chunks
from ..errors import UserError, WriteError
from ..machine import files, run_directory
from .device import device_name, on_cpu

TOKENS = 1024  # of the prefix that is measured
GAIN = 0.95  # all at once must take less than this share of the time, and no more memory


def chunk_for(model: nn.Module) -> int:
    """Queries of a prefix that a scorer of this model runs at once: PREFIX_CHUNK, or WHOLE.

    On a CPU always PREFIX_CHUNK, as benchmarks/prefix_attention.py measured there. On a GPU as measured, once for these
    sizes on this machine, in the cache directory.
    """
    if on_cpu() or family.unsupported(model):
        return PREFIX_CHUNK
    body = family.decoder(model).model
    attention, norm = body.layers[0].self_attn, body.norm.weight
    wide = attention.k_proj(mx.zeros((1, norm.shape[-1]), norm.dtype)).shape[-1]
    return _chosen(attention.n_heads, attention.n_kv_heads, wide // attention.n_kv_heads, norm.dtype)


@lru_cache
def _chosen(heads: int, kv_heads: int, size: int, dtype: mx.Dtype) -> int:
    path = files.cache_directory() / "attention.json"
    key = f"mlx {run_directory.versions()['mlx']}, {device_name()}, {heads} x {kv_heads} heads of {size}, {dtype}"
    try:
        kept = files.read_json(path) if path.exists() else {}
    except UserError:
        kept = {}
    kept = kept if isinstance(kept, dict) else {}
    if not _is_measured(kept.get(key)):
        kept[key] = measure(heads, kv_heads, size, dtype)
        try:
            with files.writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, kept)
        except WriteError:
            pass  # the next process measures again
    return WHOLE if kept[key]["whole"] else PREFIX_CHUNK


def _is_measured(found: Any) -> bool:
    return isinstance(found, dict) and isinstance(found.get("whole"), bool)


def measure(
    heads: int, kv_heads: int, size: int, dtype: mx.Dtype, tokens: int = TOKENS, repeats: int = 5
) -> dict[str, Any]:
    """Seconds and bytes of prefix attention, forward and backward, in chunks and whole, in turn; which one is chosen.

    A device that fails at one of them gets chunks.
    """
    keys = [mx.random.key(seed) for seed in range(3)]  # the global generator stays as it is
    q, k, v = (
        mx.random.normal((1, n, tokens, size), key=key).astype(dtype)
        for n, key in zip((heads, kv_heads, kv_heads), keys, strict=True)
    )
    mx.eval(q, k, v)
    seconds: dict[str, list[float]] = {"chunks": [], "whole": []}
    peaks = {"chunks": 0, "whole": 0}

    def run(chunk: int) -> Any:
        chunks = prefix_chunks(tokens, None, chunk)
        attend = lambda q, k, v: attend_prefix(q, k, v, size**-0.5, chunks).sum()  # noqa: E731
        return mx.grad(attend, argnums=(0, 1, 2))(q, k, v)

    try:
        for _ in range(repeats + 1):
            for name, chunk in (("chunks", PREFIX_CHUNK), ("whole", WHOLE)):
                mx.synchronize()
                mx.reset_peak_memory()
                before, started = mx.get_active_memory(), time.perf_counter()
                mx.eval(run(chunk))
                seconds[name].append(time.perf_counter() - started)
                peaks[name] = mx.get_peak_memory() - before
    except (RuntimeError, ValueError, MemoryError) as error:
        return {"whole": False, "error": str(error)[:200]}
    best = {name: statistics.median(of[1:]) for name, of in seconds.items()}  # the first compiles kernels
    whole = best["whole"] < GAIN * best["chunks"] and peaks["whole"] <= peaks["chunks"]
    return {"whole": whole, "seconds": best, "bytes": peaks}
