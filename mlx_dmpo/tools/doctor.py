"""What is installed, on which device it runs, what is slow here and how to fix it."""

from __future__ import annotations

import glob
import os
import platform
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import assets
from ..core.scorer import shared_logps
from ..core.tree import pad_groups
from ..machine import files, mac, run_directory
from ..model import calibrate, cost, device, fit
from ..model import random as random_models
from ..model import shape as model_shape

SMALL = model_shape.ModelShape(4, 256, 768, 4, 2, 64, 4096, True)  # of the step that plan is checked on


AGREES = "plan agrees with it"


SLOW = 20e9  # FLOP/s of float32 products: a reference BLAS makes 2 to 4, any tuned one more than 20


def _matmul_rate(dtype: mx.Dtype) -> float:
    """FLOP/s, the best of about half a second."""
    n, best, until = 512, 0.0, time.perf_counter() + 0.5
    while True:
        a = mx.random.normal((n, n)).astype(dtype)
        mx.eval(a)
        started = time.perf_counter()
        mx.eval(a @ a)
        took = time.perf_counter() - started
        best = max(best, 2 * n**3 / took)
        if time.perf_counter() + 8 * took > until:
            return best
        n = min(2 * n, 8192)


def blas_remedy(rate: float) -> str:
    """One line for a slow Linux CPU, or nothing."""
    if platform.system() != "Linux" or not device.on_cpu() or rate > SLOW:
        return ""
    why = "MLX's Linux CPU wheel uses the slow reference BLAS"
    found = sorted(glob.glob("/usr/lib/*/libopenblas.so.0") + glob.glob("/usr/lib*/libopenblas.so.0"))
    if found:
        return f"LD_PRELOAD={found[0]} mlx-dmpo ... makes float32 products many times faster ({why})"
    return f"apt install libopenblas0-pthread, then LD_PRELOAD=libopenblas.so.0 mlx-dmpo ... ({why})"


def _caches() -> dict[str, Any]:
    hub = Path(
        os.environ.get("HF_HUB_CACHE")
        or Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"
    )
    names = sorted(p.name.removeprefix("models--").replace("--", "/") for p in hub.glob("models--*"))
    return {"path": str(hub), "models": names, "embedded_model": (assets.model_dir() / "config.json").is_file()}


def _plan_beside_a_step() -> dict[str, Any]:
    """plan's memory and time, by its own calibration, for a small model's step beside a real one's."""
    width = 4 if device.on_cpu() else 2
    training = cost.Training(SMALL.layers, activation_bytes=width)
    rate = calibrate.calibrate(SMALL, training, seconds=2.0)
    model = random_models.random_qwen3(SMALL, mx.float32 if width == 4 else mx.bfloat16)
    batch = pad_groups(cost.assumed_groups(2, 5, vocabulary=SMALL.vocabulary))
    work = cost.Work.of(batch)
    mx.clear_cache()

    differentiate = nn.value_and_grad(model, lambda: shared_logps(model, batch).sum())
    seconds, peak = [], 0.0
    for _ in range(4):
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        started = time.perf_counter()
        mx.eval(differentiate())
        seconds.append(time.perf_counter() - started)
        peak = mx.get_peak_memory() - before
    expected = cost.memory(SMALL, work, training)
    planned = expected["activations"] + expected["logits"] + expected["gradients"]
    predicted = cost.step_flops(SMALL, work, training) / rate
    measured = float(np.min(seconds[1:]))
    return {
        "memory_mb": {"plan": planned / 1e6, "measured": peak / 1e6, "ratio": planned / peak},
        "seconds": {"plan": predicted, "measured": measured, "ratio": predicted / measured},
    }


def verdict(step: dict[str, Any]) -> str:
    """Whether plan is right on this machine: memory within 15 %, time within a half more or less."""
    memory, seconds = step["memory_mb"]["ratio"], step["seconds"]["ratio"]
    wrong = [
        name for name, off in (("memory", not 0.85 <= memory <= 1.15), ("time", not 2 / 3 <= seconds <= 1.5)) if off
    ]
    return f"plan is inaccurate here ({' and '.join(wrong)}): report it with --json" if wrong else AGREES


def examine() -> dict[str, Any]:
    """Everything that a bug report needs, in bytes, FLOP/s and seconds."""
    info = {k: v for k, v in mx.device_info().items() if isinstance(v, str | int)}
    step = _plan_beside_a_step()
    rates = {"float32": _matmul_rate(mx.float32)}
    if not device.on_cpu():
        rates["bfloat16"] = _matmul_rate(mx.bfloat16)
    notes = [n for n in (blas_remedy(rates["float32"]),) if n]
    if platform.system() == "Darwin" and platform.machine() != "arm64":
        notes.append("this Python is not native: install an arm64 one, MLX needs it")
    elif platform.system() == "Darwin" and device.on_cpu():
        notes.append("MLX runs on the CPU: unset MLX_DEVICE, or use a macOS that Metal runs on")
    machine = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    notes += mac.notes(fit.usable(machine / 2**30))
    return {
        "versions": run_directory.versions(),
        "platform": platform.platform(),
        "device": device.device_name(),
        "metal": bool(mx.metal.is_available()),
        "device_info": info,
        "memory": {
            "machine": machine,
            "usable": fit.machine_memory(),
        },
        "cpus": os.cpu_count(),
        "flops_per_second": rates,
        "models": _caches(),
        "cache": str(files.cache_directory()),
        "environment": {
            k: v
            for k, v in os.environ.items()
            if k in ("LD_PRELOAD", "OPENBLAS_NUM_THREADS", "HF_HUB_OFFLINE", "MLX_DMPO_CACHE", mac.WATCHDOG)
        },
        "plan_beside_a_step": step | {"verdict": verdict(step)},
        "notes": notes,
    }


def format_report(found: dict[str, Any]) -> str:
    step, memory = found["plan_beside_a_step"], found["memory"]
    lines = [
        ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        f"{found['platform']}; {found['cpus']} CPUs",
        f"device: {found['device']} ({'Metal' if found['metal'] else 'no Metal'})",
        f"memory: {memory['machine'] / 1e9:.1f} GB, {memory['usable'] / 1e9:.1f} GB of them for a run",
        "matrix products: "
        + ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in found["flops_per_second"].items()),
        f"models on disk ({found['models']['path']}): {', '.join(found['models']['models']) or 'none'}"
        f"; embedded model {'present' if found['models']['embedded_model'] else 'MISSING: reinstall mlx-dmpo'}",
        f"a small step: {step['memory_mb']['measured']:.0f} MB, plan says {step['memory_mb']['plan']:.0f}; "
        f"{step['seconds']['measured']:.3f} s, plan says {step['seconds']['plan']:.3f}: {step['verdict']}",
    ]
    return "\n".join(
        [
            *lines,
            *(f"to fix: {note}" for note in found["notes"]),
            *([] if found["notes"] or step["verdict"] != AGREES else ["nothing to fix"]),
        ]
    )
