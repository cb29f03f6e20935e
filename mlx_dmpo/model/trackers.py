"""Experiment trackers that mlx-lm knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError


def tracker(report_to: str, project: str, log_dir: Path, config: dict[str, Any]) -> Any:
    """mlx-lm's callback for wandb or swanlab, or None.

    Raises UserError where the tracker is not installed or not known.
    """
    if not report_to:
        return None
    from mlx_lm.tuner.callbacks import get_reporting_callbacks

    try:
        return get_reporting_callbacks(report_to, project or None, str(log_dir), config)
    except (ImportError, ValueError) as error:
        raise UserError(f"report_to: {error}: install the tracker or leave report_to out") from None
