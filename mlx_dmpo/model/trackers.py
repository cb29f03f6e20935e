"""Experiment trackers that mlx-lm knows."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..errors import UserError

KNOWN = ("wandb", "swanlab")


def check(report_to: str) -> None:
    """Raises UserError for a tracker that mlx-lm does not know or that is not installed."""
    for name in filter(None, (part.strip().lower() for part in report_to.split(","))):
        if name not in KNOWN:
            raise UserError(f"report_to: {name} is not a tracker that mlx-lm knows: give one of {', '.join(KNOWN)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"report_to: {name} is not installed: install it, or leave report_to out")


def tracker(report_to: str, project: str, log_dir: Path, config: dict[str, Any]) -> Any:
    """mlx-lm's callback for wandb or swanlab, or None. Raises UserError where the tracker does not start."""
    if not report_to:
        return None
    from mlx_lm.tuner.callbacks import get_reporting_callbacks

    try:
        return get_reporting_callbacks(report_to, project or None, str(log_dir), config)
    except (ImportError, ValueError) as error:
        raise UserError(f"report_to: {error}: install the tracker or leave report_to out") from None
