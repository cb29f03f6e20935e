"""Ctrl-C and SIGTERM: the first ends the run after the step, the second ends the process at once"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from ..errors import Interrupted
from . import console

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Inside the block, `requested` is the number of the signal that arrived, or 0. Outside the main thread it stays 0.

    Before `finish_step` is set there is no step to finish: the first signal raises Interrupted. The second is seen by a
    thread, since the main one may be deep in a computation or a wait for another rank that lets no handler run.
    """

    def __init__(self) -> None:
        self.requested = 0
        self.finish_step = False

    def __enter__(self) -> Stop:
        self._entered = threading.current_thread() is threading.main_thread()
        if self._entered:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._handlers: dict[int, Any] = {number: signal.signal(number, self._handle) for number in SIGNALS}
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self._read,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._entered:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            os.close(self._write)  # ends the thread

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.finish_step:
            raise Interrupted("interrupted before the first step: run the same command again", number)

    def _watch(self, read: int) -> None:
        while data := os.read(read, 1):
            number = data[0]
            if number not in SIGNALS:
                continue
            if self.requested:
                console.notice("stopped at once; everything saved before is intact")
                os._exit(128 + number)
            self.requested = number
            if self.finish_step:
                console.notice("finishing the step, then saving (again to stop at once)")
        os.close(read)
