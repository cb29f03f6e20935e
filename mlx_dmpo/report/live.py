"""Training as it runs: a live panel on a terminal, plain lines elsewhere. Both show what metrics.jsonl gets."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from ..machine import console, progress

BARS = "▁▂▃▄▅▆▇█"
CURVES = (("loss", "loss", ".4f"), ("margin", "margin", "+.3f"), ("pair_accuracy", "pair accuracy", ".3f"))
KEPT = 400  # values of a curve that the panel remembers
REFRESH = 4  # a second
EVERY = 30.0  # seconds between two lines without a panel


class View(Protocol):
    """What the training loop reports to. A context manager: it is shown inside."""

    def __enter__(self) -> View: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def stepped(self, step: int) -> None:
        """`step` steps are done."""

    def on_step(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""

    def on_validation(self, line: Mapping[str, Any], best: bool) -> None:
        """A validation's line of metrics.jsonl, and whether it is the best so far."""

    def notice(self, text: str) -> None:
        """One line for the reader."""


def view(
    name: str,
    steps: int,
    start: int = 0,
    *,
    memory: float = 0.0,
    plain: bool = False,
    shown: bool = True,
    history: Sequence[Mapping[str, Any]] = (),
) -> View:
    """The panel where stderr is a terminal that can draw it, else plain lines.

    memory   bytes that the machine has; 0 leaves out the bar
    plain    lines, also on a terminal
    shown    False: nothing at all, for ranks other than the first
    history  lines of metrics.jsonl before a resume
    """
    if not shown:
        return Silent()
    encoding = (getattr(sys.stderr, "encoding", "") or "").lower()
    if plain or not sys.stderr.isatty() or not encoding.startswith("utf"):
        return Plain(name, steps, start)
    return Panel(name, steps, start, memory=memory, history=history)


def duration(seconds: float) -> str:
    """45 s; 12 min; 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values as bars, lowest to highest; more values than `width` are averaged."""
    if not values or width < 1:
        return ""
    parts = min(width, len(values))
    means = [
        sum(part) / len(part)
        for i in range(parts)
        if (part := values[i * len(values) // parts : (i + 1) * len(values) // parts])
    ]
    low, high = min(means), max(means)
    if high == low:
        return BARS[3] * len(means)
    return "".join(BARS[round((m - low) / (high - low) * (len(BARS) - 1))] for m in means)


def curve_name(line: Mapping[str, Any], key: str, word: str, prefix: str = "") -> str:
    """A curve's name: dmpo's margins are scaled by beta, and are called reward margins."""
    return f"reward {word}" if key == "margin" and f"{prefix}reward_margin" in line else word


def gigabytes(value: float) -> str:
    return f"{value:.1f} GB" if value >= 0.1 else f"{1000 * value:.0f} MB"


def numbers(line: Mapping[str, Any], prefix: str = "") -> str:
    """The numbers of a line of metrics.jsonl, in words."""
    parts = [
        f"{curve_name(line, key, word, prefix)} {line[prefix + key]:{form}}"
        for key, word, form in CURVES
        if prefix + key in line
    ]
    if "groups_per_second" in line:
        parts.append(f"{line['groups_per_second']:.3g} groups/s")
    if "peak_memory_gb" in line:
        parts.append(gigabytes(line["peak_memory_gb"]))
    return ", ".join(parts) or "every step was skipped"


class Clock:
    """Time left, from the steps done since it was started; a resumed run counts its own steps alone."""

    def __init__(self, steps: int, start: int, now: Callable[[], float] = time.monotonic):
        self.steps, self.start, self._now = steps, start, now
        self.began = now()

    def left(self, step: int) -> str:
        done = step - self.start
        if done <= 0:
            return ""
        return duration((self._now() - self.began) / done * (self.steps - step))


def validation_text(line: Mapping[str, Any], best: bool) -> str:
    text = f"  step {line['step']:>4}: validation {numbers(line, 'valid_')}{' (best)' if best else ''}"
    if not line.get("overfitting"):
        return text
    if "train_pair_accuracy" in line:
        return (
            f"{text}; train {line['train_pair_accuracy']:.2f}, held out {line['valid_pair_accuracy']:.2f}: overfitting"
        )
    return f"{text}; training loss {line['train_loss']:.4f}: overfitting"


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def stepped(self, step: int) -> None: ...

    def on_step(self, line: Mapping[str, Any]) -> None: ...

    def on_validation(self, line: Mapping[str, Any], best: bool) -> None: ...

    def notice(self, text: str) -> None: ...


class Plain(Silent):
    """A line every 30 seconds, and for the first and the last report, on stdout."""

    def __init__(self, name: str, steps: int, start: int = 0, now: Callable[[], float] = time.monotonic):
        self.name, self.steps = name, steps
        self.clock = Clock(steps, start, now)
        self._now, self._printed, self._last = now, 0.0, ""

    def stepped(self, step: int) -> None:
        if self._last and step < self.steps and self._now() - self._printed >= EVERY:
            self._say(step)

    def on_step(self, line: Mapping[str, Any]) -> None:
        first, self._last = not self._last, numbers(line)
        if first or line["step"] == self.steps or self._now() - self._printed >= EVERY:
            self._say(line["step"])

    def _say(self, step: int) -> None:
        left = self.clock.left(step)
        self._printed = self._now()
        rest = f", {left} left" if left and step < self.steps else ""
        self._print(f"{self.name} step {step} of {self.steps}: {self._last}{rest}")

    def on_validation(self, line: Mapping[str, Any], best: bool) -> None:
        self._print(validation_text(line, best))

    def notice(self, text: str) -> None:
        console.notice(text)

    def _print(self, text: str) -> None:
        print(console.printable(text), flush=True)


class Panel(Silent):
    """A panel that is redrawn in place: curves as bars of text, progress, speed, memory.

    What is printed meanwhile appears above it. The panel is drawn for the terminal's width at each refresh, so that the
    terminal may be resized. At the end, also of an interrupted run, the last state stays on the screen.
    """

    def __init__(
        self,
        name: str,
        steps: int,
        start: int = 0,
        *,
        memory: float = 0.0,
        history: Sequence[Mapping[str, Any]] = (),
        terminal: Any = None,
        now: Callable[[], float] = time.monotonic,
    ):
        from rich.console import Console

        self.name, self.steps, self.step, self.memory = name, steps, start, memory
        self.console = terminal or Console(stderr=True, highlight=False)
        self.clock = Clock(steps, start, now)
        self.values: dict[str, list[float]] = {key: [] for key, _, _ in CURVES}
        self.last: dict[str, Any] = {}
        self.validated = ""
        for line in history:
            self._remember(line)

    def __enter__(self) -> Panel:
        from rich.live import Live

        self._live = Live(
            console=self.console,
            get_renderable=self.render,
            refresh_per_second=REFRESH,
            redirect_stdout=sys.stdout.isatty(),  # piped output stays where it goes
            vertical_overflow="ellipsis",
        )
        self._live.start()
        self._alone = progress.beside_a_panel()
        self._alone.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._alone.__exit__(None, None, None)
        self._live.stop()

    def _remember(self, line: Mapping[str, Any]) -> None:
        for key, kept in self.values.items():
            if key in line:
                kept.append(float(line[key]))
                del kept[:-KEPT]
        if "loss" in line:
            self.last = dict(line)

    def stepped(self, step: int) -> None:
        self.step = step

    def on_step(self, line: Mapping[str, Any]) -> None:
        self._remember(line)

    def on_validation(self, line: Mapping[str, Any], best: bool) -> None:
        self.validated = f"step {line['step']}: {numbers(line, 'valid_')}{' (best)' if best else ''}"
        self.notice(validation_text(line, best))

    def notice(self, text: str) -> None:
        self.console.print(console.printable(text), markup=False, highlight=False)

    def render(self) -> Any:
        """The panel for the console's present width."""
        from rich.panel import Panel as Box
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        wide = max(8, min(60, self.console.width - 36))
        grid = Table.grid(padding=(0, 2))
        left = self.clock.left(self.step)
        percent = f"{100 * self.step / max(1, self.steps):.0f} %"
        grid.add_row("progress", percent, ProgressBar(self.steps, self.step, width=wide))
        for key, word, form in CURVES:
            if self.values[key]:
                bars = Text(sparkline(self.values[key], wide), style="cyan")
                grid.add_row(curve_name(self.last, key, word), f"{self.values[key][-1]:{form}}", bars)
        if "peak_memory_gb" in self.last:
            used, machine = self.last["peak_memory_gb"], self.memory / 1e9
            bar: Any = ProgressBar(machine, min(used, machine), width=wide) if machine else ""
            grid.add_row("memory", gigabytes(used) + (f" of {machine:.0f} GB" if machine else ""), bar)
        if "groups_per_second" in self.last:
            grid.add_row("speed", f"{self.last['groups_per_second']:.3g}", "groups a second")
        if self.validated:
            grid.add_row("validation", "", Text(self.validated))
        title = Text(f"{console.printable(self.name)}: step {self.step} of {self.steps}")
        return Box(grid, title=title, subtitle=f"{left} left" if left else None, title_align="left", expand=False)
