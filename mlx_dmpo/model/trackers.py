"""Experiment trackers: wandb and swanlab through mlx-lm, TensorBoard through its own event files."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..machine import extras

KNOWN = ("tensorboard", "wandb", "swanlab")


def _names(report_to: str) -> list[str]:
    return [name for part in report_to.split(",") if (name := part.strip().lower())]


def check(report_to: str) -> None:
    """Raises UserError for a tracker that is not known or not installed."""
    for name in _names(report_to):
        if name not in KNOWN:
            raise UserError(f"report_to: {name} is not a tracker that is known here: give one of {', '.join(KNOWN)}")
        if importlib.util.find_spec(name) is None:
            raise extras.not_installed("report_to", name, (name,))


class TensorBoard:
    """Writes each number of a line of metrics.jsonl as a scalar; the interface is that of mlx-lm's callbacks.

    Training numbers are named train/NAME, those of a validation valid/NAME. The directory is LOG_DIR/tensorboard.
    """

    def __init__(self, log_dir: Path, wrapped: Any = None):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-not-found,unused-ignore]

        self.wrapped = wrapped
        self._writer = EventFileWriter(str(log_dir / "tensorboard"))

    def _write(self, info: dict[str, Any], group: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-not-found,unused-ignore]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-not-found,unused-ignore]

        values = [
            Summary.Value(tag=f"{group}/{name.removeprefix('valid_')}", simple_value=float(value))
            for name, value in info.items()
            if name not in ("iteration", "step")
        ]
        self._writer.add_event(Event(step=info["iteration"], wall_time=time.time(), summary=Summary(value=values)))
        self._writer.flush()  # a run that is killed has lost nothing that it reported

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self._write(info, "train")
        if self.wrapped:
            self.wrapped.on_train_loss_report(info)

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        self._write(info, "valid")
        if self.wrapped:
            self.wrapped.on_val_loss_report(info)


def tracker(report_to: str, project: str, log_dir: Path, config: dict[str, Any]) -> Any:
    """A callback for all trackers that are named, or None. Raises UserError where one does not start."""
    names = _names(report_to)
    if not names:
        return None
    from mlx_lm.tuner.callbacks import get_reporting_callbacks

    others = ",".join(name for name in names if name != "tensorboard")
    try:
        found = get_reporting_callbacks(others or None, project or None, str(log_dir), config)
        return TensorBoard(log_dir, found) if "tensorboard" in names else found
    except (ImportError, ValueError) as error:
        raise UserError(f"report_to: {error}: install the tracker or leave report_to out") from None
