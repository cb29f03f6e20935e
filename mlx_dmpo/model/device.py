"""The device MLX runs on."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..machine import run_directory

# Floating-point operations of one matrix product at most: half a second on an M1's GPU, well under what its display
# watchdog allows. MLX ends a Metal command buffer after about 50 operations or 50 million elements of their inputs,
# whichever comes first, however large an evaluation is: so products of this size are nearly alone in theirs.
PRODUCT = 1e12


def tokens_per_product(model: nn.Module) -> int:
    """Tokens that may be run together so that no layer's product exceeds PRODUCT. (The head runs in chunks anyway.)"""
    layers = [m for layer in model.layers for m in layer.modules()]
    sizes = [m.weight.size for m in layers if type(m) is nn.Linear]
    sizes += [m.weight.size * 32 // m.bits for m in layers if type(m) is nn.QuantizedLinear]
    return max(1, int(PRODUCT / (2 * max(sizes, default=1))))


def on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def device_name() -> str:
    info = mx.device_info() if not on_cpu() else {}
    return str(info.get("device_name", mx.default_device().type.name if on_cpu() else "gpu"))


def compiling() -> str:
    """One line where the first operations take minutes: MLX compiles its CUDA kernels when they are first needed."""
    if on_cpu() or not mx.cuda.is_available():
        return ""
    usual = Path(tempfile.gettempdir()) / "mlx" / run_directory.versions()["mlx"] / "ptx"
    kept = Path(os.environ.get("MLX_PTX_CACHE_DIR") or usual)
    if any(kept.glob("*.ptx")):
        return ""
    return f"MLX compiles its CUDA kernels when they are first needed, which takes minutes; they are kept in {kept}"


def environment() -> dict[str, str]:
    """What computes a log-prob, beside model and tokens: another one may change its last digits."""
    versions = run_directory.versions()
    found = {"mlx": versions["mlx"], "mlx-lm": versions["mlx-lm"], "device": device_name()}
    return found | {"BLAS": _blas()} if on_cpu() else found


def _blas() -> str:
    """The libraries that may do a CPU's matrix products: Apple's, or those that this process has loaded."""
    if sys.platform == "darwin":
        return f"Accelerate of macOS {platform.mac_ver()[0]}"
    names = set[str]()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            name = os.path.basename(line.split(maxsplit=5)[-1])
            if "blas" in name and "scipy" not in name:  # numpy and scipy bring their own
                names.add(name)
    return " ".join(sorted(names)) or "unknown"
