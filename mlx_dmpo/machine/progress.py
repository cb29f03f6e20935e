"""Progress: a bar on a terminal, otherwise a line every 30 seconds; both on stderr"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

EVERY = 30.0  # seconds between two lines without a terminal
DELAY = 1.0  # seconds before a bar appears
RECENT = 64  # updates that the rate is taken over

_open: list[Progress] = []  # the innermost is the one that is shown


class Progress:
    """`with Progress(steps, "dmpo", "step") as bar: ...; bar.update(loss=0.3)`

    total  how many units there are; None where that is not known
    done   units that were done before
    quiet  show nothing, as all ranks but the first do
    keep   leave the bar on the terminal at the end
    The rate counts neither the time inside `paused` nor that of a Progress within this one.
    """

    def __init__(
        self, total: int | None, what: str, unit: str, *, done: int = 0, quiet: bool = False, keep: bool = False
    ):
        self.total, self.what, self.unit, self.done, self.keep = total, what, unit, done, keep
        self.numbers: dict[str, float] = {}
        self.quiet = quiet or threading.current_thread() is not threading.main_thread()
        self._live: Any = None

    def __enter__(self) -> Progress:
        self._begun = self._told = time.monotonic()
        self._idle = 0.0
        self._recent = deque([(0.0, self.done)], maxlen=RECENT)
        self._console = None if self.quiet else _terminal()
        if not self.quiet:
            if _open:
                _open[-1]._stop()
            _open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.quiet:
            return
        self._stop(last=True)
        if self in _open:
            _open.remove(self)
        if _open:
            _open[-1]._idle += time.monotonic() - self._begun

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun - self._idle

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is no part of the rate. A Progress inside counts once."""
        since, before = time.monotonic(), self._idle
        try:
            yield
        finally:
            self._idle = before + time.monotonic() - since

    def update(self, n: int = 1, **numbers: float) -> None:
        """`n` more units are done; the latest value of each number is shown."""
        self.done += n
        self.numbers.update(numbers)
        self._recent.append((self.seconds, self.done))
        if self.quiet or not _open or _open[-1] is not self:
            return
        now = time.monotonic()
        if self._console is not None:
            if self._live is None and now - self._begun > DELAY:
                self._start()
        elif now - self._told > EVERY:
            self._told = now
            print(self.line(), file=sys.stderr, flush=True)

    # --- what is shown

    @property
    def rate(self) -> float:
        """Units per second."""
        (since, before), (now, done) = self._recent[0], self._recent[-1]
        return (done - before) / (now - since) if now > since else 0.0

    def figures(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in self.numbers.items())

    def speed(self) -> str:
        rate, each = self.rate, self.unit
        if not rate:
            return ""
        text = f"{rate:.3g} {each}s/s" if rate >= 1 else f"{1 / rate:.3g} s/{each}"
        return text if self.total is None else f"{text}, {clock((self.total - self.done) / rate)} left"

    def line(self) -> str:
        """`dmpo: 120 of 390 steps, loss 0.512, margin 1.2, 3.1 steps/s, 1:27 left`"""
        of = "" if self.total is None else f" of {self.total:,}"
        return ", ".join(
            part for part in (f"{self.what}: {self.done:,}{of} {self.unit}s", self.figures(), self.speed()) if part
        )

    def __rich__(self) -> Any:
        """A bar with counts and time left; under it the numbers."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        of = "" if self.total is None else f"/{self.total:,}"
        grid = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None, None):
            grid.add_column(ratio=ratio, no_wrap=True)
        grid.add_row(
            self.what,
            ProgressBar(self.total, self.done, pulse=self.total is None),
            f"{self.done:,}{of} {self.unit}s",
            Text(self.speed(), style="cyan"),
        )
        return Group(grid, Text(f"  {self.figures()}", style="dim")) if self.numbers else grid

    def _start(self) -> None:
        from rich.live import Live

        self._live = Live(
            get_renderable=lambda: self, console=self._console, refresh_per_second=4, transient=True,
            redirect_stdout=sys.stdout.isatty(), redirect_stderr=True,
        )  # fmt: skip
        self._live.start()

    def _stop(self, last: bool = False) -> None:
        if self._live is None:
            return
        self._live.transient = not (last and self.keep)
        self._live.stop()
        self._live = None


def track(items: Iterable[T], what: str, unit: str, total: int | None = None, *, quiet: bool = False) -> Iterator[T]:
    """The same items, with a Progress that each of them advances."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(total, what, unit, quiet=quiet) as bar:
        for item in items:
            yield item
            bar.update()


def clock(seconds: float) -> str:
    """75 -> 1:15, 3700 -> 1:01:40"""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _terminal() -> Any:
    """rich's console for stderr, where that is a terminal which can move its cursor."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    return None if console.is_dumb_terminal else console
