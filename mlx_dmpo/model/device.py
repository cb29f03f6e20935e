"""The device MLX runs on."""

from __future__ import annotations

import mlx.core as mx


def on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def device_name() -> str:
    info = mx.device_info() if not on_cpu() else {}
    return str(info.get("device_name", mx.default_device().type.name if on_cpu() else "gpu"))
