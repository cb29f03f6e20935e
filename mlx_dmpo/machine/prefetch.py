"""Items made on a thread while the one before is in use."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made on a thread while the one before is in use. Its errors are raised where
    the item is used.

    A caller that stops early does not wait.
    """
    end: Any = object()

    def start() -> Future[T]:
        coming: Future[T] = Future()

        def make() -> None:
            try:
                coming.set_result(next(items, end))
            except BaseException as error:
                coming.set_exception(error)

        Thread(target=make, daemon=True).start()
        return coming

    coming = start()
    while (item := coming.result()) is not end:
        coming = start()
        yield item
