"""One thread that owns the model, and the requests that wait for it"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

from . import rank
from .explain import Explanation
from .ranker import Ranker

TOGETHER = 8  # rankings that share the model's batches


class QueueFull(Exception):
    """No place is free for another request."""


class TooManyTokens(Exception):
    """A request's titles have more tokens than allowed."""


class Cancelled(Exception):
    """The client has gone."""


class Task:
    """One request: a ranking, or anything else that needs the model. `future` gets the result or the error."""

    def __init__(self, texts: list[str], start: Callable[[Ranker], Any]):
        self.texts, self.start = texts, start
        self.future: Future[Any] = Future()
        self.cancelled = False
        self.job: rank.Job | None = None

    def raise_if_cancelled(self) -> None:
        """For work in parts: ends it where the client has gone."""
        if self.cancelled:
            raise Cancelled


class Worker:
    """Loads the ranker and answers tasks, in one thread: MLX work stays where the model was loaded.

    Rankings that wait at the same time advance together, a round of pairs or the items of each at a time, so that the
    scorer batches them. Other tasks run alone, one after another.
    """

    def __init__(self, load: Callable[[], Ranker], max_queue: int = 64, max_tokens: int = 100_000):
        self.load, self.max_queue, self.max_tokens = load, max_queue, max_tokens
        self._waiting: deque[Task] = deque()
        self._active: list[Task] = []
        self._changed = threading.Condition()
        self._closing = False
        self._loaded: Future[Ranker] = Future()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> Ranker:
        """Starts the thread and waits for the model. Raises what loading it raises."""
        self._thread.start()
        try:
            return self._loaded.result()
        except BaseException:
            self._thread.join()  # no thread is left behind
            raise

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def active(self) -> int:
        return len(self._active)

    def submit(self, task: Task) -> Task:
        """Raises QueueFull."""
        with self._changed:
            if len(self._waiting) >= self.max_queue or self._closing:
                raise QueueFull
            self._waiting.append(task)
            self._changed.notify()
        return task

    def cancel(self, task: Task) -> None:
        """Gives up a task whose client has gone: its place in the queue is free at once; one that runs ends after its
        round of pairs, or of sets of history items.
        """
        with self._changed:
            task.cancelled = True
            if task in self._waiting:
                self._waiting.remove(task)

    def close(self) -> None:
        """Answers what waits, then ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            ranker = self.load()
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(ranker)
        while True:
            with self._changed:
                while not (self._waiting or self._active or self._closing):
                    self._changed.wait()
                if not (self._waiting or self._active):
                    return
                self._active = [t for t in self._active if not t.cancelled]
                fresh: list[Task] = []
                while self._waiting and len(self._active) + len(fresh) < TOGETHER:
                    fresh.append(self._waiting.popleft())
                self._active += fresh
            for task in fresh:
                self._begin(task, ranker)
            self._advance(ranker)

    def _begin(self, task: Task, ranker: Ranker) -> None:
        try:
            number = ranker.count_tokens(task.texts)
            if number > self.max_tokens:
                raise TooManyTokens(f"{number:,} tokens, and at most {self.max_tokens:,} are allowed")
            found = task.start(ranker)
            if isinstance(found, rank.Job):
                task.job = found
            else:
                self._end(task, found)
        except Exception as error:
            self._fail(task, error)

    def _advance(self, ranker: Ranker) -> None:
        """One step of all rankings together; where that fails, of each alone, so that one request cannot spoil
        another.
        """
        running = [t for t in self._active if t.job is not None and not t.cancelled]
        try:
            self._step(running, ranker)
        except Exception as error:
            if len(running) == 1:
                self._fail(running[0], error)
                return
            for task in running:
                try:
                    assert task.job is not None
                    self._end(task, rank.run(task.job.again(), ranker.scoring))
                except Exception as alone:
                    self._fail(task, alone)

    def _step(self, running: list[Task], ranker: Ranker) -> None:
        jobs = [t.job for t in running if t.job is not None]
        if not jobs:
            return
        rank.step(jobs, ranker.scoring)
        for task in running:
            assert task.job is not None
            if task.job.finished:
                self._end(task, task.job.ranking())

    def _end(self, task: Task, result: rank.Ranking | Explanation | Any) -> None:
        self._drop(task)
        with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
            task.future.set_result(result)

    def _fail(self, task: Task, error: BaseException) -> None:
        self._drop(task)
        with contextlib.suppress(InvalidStateError):
            task.future.set_exception(error)

    def _drop(self, task: Task) -> None:
        with self._changed:
            self._active = [t for t in self._active if t is not task]
