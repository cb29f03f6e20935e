"""metrics.jsonl, the experiment tracker and the view of a running training."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx

from ..machine import console, files
from ..report.live import View
from ..report.read import training_line
from .checkpoint import State
from .overfitting import compared

METRICS = "metrics.jsonl"


class Report:
    """Reports a run's numbers. A context manager: inside, the view is shown.

    path           metrics.jsonl; None on the ranks that write nothing
    rewards        whether margins are reward margins (scaled by beta) rather than nats; they are then written under
                   both names, margin and reward_margin
    every          steps between two lines
    learning_rate  of the step just done
    peak           bytes of memory, so far
    view           makes what is shown meanwhile, from the lines before a resume
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
        view: Callable[[list[dict[str, Any]]], View],
        tracker: Any = None,
        rewards: bool = False,
    ):
        self.rewards = rewards
        self.path, self.state, self.name, self.steps, self.every = path, state, name, steps, every
        self.steps_per_epoch, self.tracker = steps_per_epoch, tracker
        self._learning_rate, self._peak, self._open_view = learning_rate, peak, view
        self.lines: list[dict[str, Any]] = []
        if path and not state.step:
            with files.writing(path):
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
        self.lines = self._whole_lines(path)

    def _whole_lines(self, path: Path) -> list[dict[str, Any]]:
        """What this program wrote there. Damaged lines are taken out of the file, and counted."""
        texts = [line for line in path.read_bytes().decode("utf-8", "replace").split("\n") if line.strip()]
        lines = [value for text in texts if (value := training_line(text)) is not None]
        if len(lines) < len(texts):
            console.notice(f"note: {len(texts) - len(lines)} damaged lines of {path} are taken out")
            files.write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
            self.state.metrics_bytes = path.stat().st_size
        return lines

    def __enter__(self) -> Report:
        self._view = self._open_view(self.lines)
        self._view.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._view.__exit__(kind, error, trace)

    def step_done(self, sums: dict[str, float] | None, seconds: float) -> None:
        """Adds a step's sums (None: it was skipped); writes a line when one is due."""
        window, step = self.state.window, self.state.step
        for name, value in {**(sums or {}), "seconds": seconds}.items():
            window[name] = window.get(name, 0.0) + value
        for name in ("right", "pairs", "loss", "groups") if sums else ():
            self.state.since[name] = self.state.since.get(name, 0.0) + (sums or {})[name]
        self._view.stepped(step)
        if step % self.every == 0 or step == self.steps:
            line = self._line()
            self.state.window = {}
            self._write(line)
            self._view.on_step(line)

    def validated(self, numbers: dict[str, float], best: bool, users: int) -> None:
        """Writes a validation's line. users: validation users, for the test of `overfitting`."""
        if self.rewards and "valid_margin" in numbers:
            numbers = {**numbers, "valid_reward_margin": numbers["valid_margin"]}
        line = self._head() | numbers | compared(numbers, self.state.since, self.lines, users, best)
        self.state.since = {}
        self._write(line)
        self._view.on_validation(line, best)

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
            line |= {"reward_margin": line["margin"]} if self.rewards else {}
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
