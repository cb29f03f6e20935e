"""metrics.jsonl, the experiment tracker and the progress bar."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from ..machine import console, files
from ..machine.ranks import world
from .checkpoint import State

METRICS = "metrics.jsonl"
IN_BAR = ("loss", "margin", "pair_accuracy", "groups_per_second", "tokens_per_second", "peak_memory_gb")


class Report:
    """Reports a run's numbers. A context manager: inside, the progress bar is shown.

    path           metrics.jsonl; None on the ranks that write nothing
    every          steps between two lines
    learning_rate  of the step just done
    peak           bytes of memory, so far
    """

    def __init__(
        self,
        path: Path | None,
        state: State,
        *,
        name: str,
        steps: int,
        steps_per_epoch: int,
        every: int,
        learning_rate: Callable[[], float],
        peak: Callable[[], int],
        tracker: Any = None,
    ):
        self.path, self.state, self.name, self.steps, self.every = path, state, name, steps, every
        self.steps_per_epoch, self.tracker = steps_per_epoch, tracker
        self._learning_rate, self._peak = learning_rate, peak
        self.lines: list[dict[str, Any]] = []
        if path and not state.step:
            path.unlink(missing_ok=True)
        elif path:
            self._continue(path)

    def _continue(self, path: Path) -> None:
        """Cuts metrics.jsonl back to where it was when the checkpoint was saved."""
        with files.writing(path):
            path.touch()
            if path.stat().st_size < self.state.metrics_bytes:
                console.notice(
                    f"note: {path} is shorter than when step {self.state.step} was saved: some of its lines are lost"
                )
            else:
                os.truncate(path, self.state.metrics_bytes)
        self.lines = files.read_lines(path)

    def __enter__(self) -> Report:
        self._bar = tqdm(total=self.steps, initial=self.state.step, desc=self.name, unit="step", disable=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def step_done(self, sums: dict[str, float] | None, seconds: float) -> None:
        """Adds a step's sums (None: it was skipped); writes a line when one is due."""
        window, step = self.state.window, self.state.step
        for name, value in {**(sums or {}), "seconds": seconds}.items():
            window[name] = window.get(name, 0.0) + value
        self._bar.update()
        if step % self.every == 0 or step == self.steps:
            line = self._line()
            self.state.window = {}
            self._write(line)
            self._bar.set_postfix({name: f"{line[name]:.3g}" for name in IN_BAR if name in line})

    def validated(self, numbers: dict[str, float], best: bool) -> None:
        self._write(self._head() | numbers)
        if world().first:
            text = f"  step {self.state.step:>4}: validation loss {numbers['valid_loss']:.4f}"
            if "valid_margin" in numbers:
                text += f", margin {numbers['valid_margin']:+.3f}, pair accuracy {numbers['valid_pair_accuracy']:.3f}"
            tqdm.write(text + (" (best)" if best else ""))

    def _head(self) -> dict[str, Any]:
        return {"step": self.state.step, "epoch": round(self.state.step / self.steps_per_epoch, 4)}

    def _line(self) -> dict[str, Any]:
        total, line = self.state.window, self._head()
        if self.state.bad_steps:
            line["bad_steps"] = self.state.bad_steps
        if "groups" not in total:  # every step was skipped
            return line
        line["loss"] = total["loss"] / total["groups"]
        if total["pairs"]:
            line |= {"margin": total["margin"] / total["pairs"], "pair_accuracy": total["right"] / total["pairs"]}
        return line | {
            "learning_rate": self._learning_rate(),
            "groups_per_second": total["groups"] / total["seconds"],
            "tokens_per_second": total["tokens"] / total["seconds"],
            "peak_memory_gb": max(self._peak(), mx.get_peak_memory()) / 1e9,
        }

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.path:
            files.append_line(self.path, json.dumps(line, allow_nan=False))
        if self.tracker:
            valid = any(name.startswith("valid_") for name in line)
            report = self.tracker.on_val_loss_report if valid else self.tracker.on_train_loss_report
            report({"iteration": line["step"], **line})
