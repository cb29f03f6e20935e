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
_panels = 0  # live displays of others; two on one terminal overwrite each other's lines


@contextlib.contextmanager
def beside_a_panel() -> Iterator[None]:
    """No bar is shown inside: another live display has the terminal."""
    global _panels
    _panels += 1
    try:
        yield
    finally:
        _panels -= 1


class Progress:
    """`with Progress(steps, "dmpo", "step") as bar: ...; bar.update(loss=0.3)`

    total  how many units there are; None where that is not known
    done   units that were done before
    quiet  show nothing, as all ranks but the first do
    keep   leave the bar on the terminal at the end
    first  seconds before the first line without a terminal
    The rate counts neither the time inside `paused` nor that of a Progress within this one.
    """

    def __init__(
        self,
        total: int | None,
        what: str,
        unit: str,
        *,
        done: int = 0,
        quiet: bool = False,
        keep: bool = False,
        first: float | None = None,
    ):
        self._wait = EVERY if first is None else first
        self.total, self.what, self.unit, self.done, self.keep = total, what, unit, done, keep
        self.numbers: dict[str, float] = {}
        self.quiet = quiet or threading.current_thread() is not threading.main_thread()
        self._live: Any = None
        self._part: tuple[int, int] | None = None  # (done before it, units in it)
        self._whole: Progress | None = None

    def __enter__(self) -> Progress:
        self._begun = self._reported = time.monotonic()
        self._idle = 0.0
        self._recent = deque([(0.0, self.done)], maxlen=RECENT)
        if not self.quiet and _open and _open[-1]._part:
            self.quiet, self._whole = True, _open[-1]
        self.quiet = self.quiet or _panels > 0
        self._console = None if self.quiet else _terminal()
        if not self.quiet:
            if _open:
                _open[-1]._stop()
                self._wait = min(self._wait, _open[-1]._wait)
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
        """Time that does not count for the rate. A Progress inside counts once."""
        since, before = time.monotonic(), self._idle
        try:
            yield
        finally:
            self._idle = before + time.monotonic() - since

    @contextlib.contextmanager
    def part(self, n: int) -> Iterator[None]:
        """The next `n` units. A Progress inside is not shown; its share advances this one instead."""
        before = self.done
        self._part = (before, n)
        try:
            yield
        finally:
            self._part = None
        self.update(before + n - self.done)

    def update(self, n: int = 1, **numbers: float) -> None:
        """`n` more units are done; the latest value of each number is shown."""
        self.done += n
        self.numbers.update(numbers)
        if self._whole and self._whole._part and self.total:
            before, units = self._whole._part
            self._whole.update(before + units * self.done // self.total - self._whole.done)
        self._recent.append((self.seconds, self.done))
        if self.quiet or not _open or _open[-1] is not self:
            return
        now = time.monotonic()
        if self._console is not None:
            if self._live is None and now - self._begun > DELAY:
                self._start()
        elif now - self._reported > self._wait:
            self._reported, self._wait = now, EVERY
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
        text = f"{rate / 1e6:.3g} MB/s" if each == "byte" else text
        return text if self.total is None else f"{text}, {clock((self.total - self.done) / rate)} left"

    def amount(self, of: str) -> str:
        """`120 of 390 steps`, with " of " as `of`; bytes in MB."""
        done, total, unit = self.done, self.total, f" {self.unit}s"
        if self.unit == "byte":
            done, total, unit = round(done / 1e6), None if total is None else round(total / 1e6), " MB"
        return f"{done:,}{'' if total is None else f'{of}{total:,}'}{unit}"

    def line(self) -> str:
        """`dmpo: 120 of 390 steps, loss 0.512, margin 1.2, 3.1 steps/s, 1:27 left`"""
        return ", ".join(p for p in (f"{self.what}: {self.amount(' of ')}", self.figures(), self.speed()) if p)

    def __rich__(self) -> Any:
        """A bar with counts and time left; under it the numbers."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None, None):
            grid.add_column(ratio=ratio, no_wrap=True)
        grid.add_row(
            self.what,
            ProgressBar(self.total, self.done, pulse=self.total is None),
            self.amount("/"),
            Text(self.speed(), style="cyan"),
        )
        return (
            Group(grid, Text(f"  {self.figures()}", style="dim", no_wrap=True, overflow="ellipsis"))
            if self.numbers
            else grid
        )

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


class Reading:
    """A file whose `read` advances a Progress that counts bytes."""

    def __init__(self, file: Any, bar: Progress):
        self._file, self._bar = file, bar

    def read(self, *size: int) -> bytes:
        data: bytes = self._file.read(*size)
        self._bar.update(len(data))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


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
