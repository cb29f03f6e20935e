"""Memory limits that leave the machine usable, advice after a failed allocation, micro-batches in halves"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..config import CommonSettings, TrainSettings
from ..errors import UserError

R = TypeVar("R")


# Shares of what Metal recommends as a working set. Wiring all of it freezes the desktop.
WIRED, CACHE = 0.75, 0.25


_FAILURE = re.compile(r"malloc|allocat|out of memory|insufficient memory", re.IGNORECASE)


def is_allocation_failure(error: BaseException) -> bool:
    """MLX raises a plain RuntimeError for one."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_FAILURE.search(str(error))))


@contextlib.contextmanager
def limits(gigabytes: float = 0.0) -> Iterator[None]:
    """MLX's limits inside the block, what they were before after it, also on an error.

    On Metal: wired memory and the cache of freed buffers, below the recommended working set. Everywhere:
    `gigabytes`, unless 0.
    """
    before: list[tuple[Callable[[int], int], int]] = []

    def put(limit: Callable[[int], int], value: float) -> None:
        before.append((limit, limit(int(value))))

    try:
        if mx.metal.is_available():
            recommended = float(mx.device_info()["max_recommended_working_set_size"])
            working_set = min(recommended, gigabytes * 1e9 or recommended)
            put(mx.set_wired_limit, WIRED * working_set)
            put(mx.set_cache_limit, CACHE * working_set)
        if gigabytes:
            put(mx.set_memory_limit, gigabytes * 1e9)
        yield
    finally:
        if before:
            mx.synchronize()  # work in flight may still use wired buffers
        for limit, value in reversed(before):
            limit(value)


@contextlib.contextmanager
def waiting_at(size: float) -> Iterator[None]:
    """MLX waits for work in flight before it allocates more than `size` bytes, or its limit if that is lower; 0
    changes nothing."""
    before = mx.set_memory_limit(int(size)) if size > 0 else 0
    if before:
        mx.set_memory_limit(min(before, int(size)))
    try:
        yield
    finally:
        if before:
            mx.set_memory_limit(before)


def check(gigabytes: float) -> None:
    """Raises MemoryError where more than `gigabytes` were in use since the peak was reset: MLX's own limit is a
    guideline."""
    if gigabytes and mx.get_peak_memory() > gigabytes * 1e9:
        raise MemoryError(f"{mx.get_peak_memory() / 1e9:.2f} GB in use, and --memory-limit is {gigabytes:g}")


def in_halves(run: Callable[[np.ndarray], R], rows: np.ndarray, at_once: bool = False) -> list[R]:
    """[run(rows)], or where memory does not suffice for that, once, [run(first half), run(second half)].

    at_once  do not try all of the rows
    """
    if not at_once or len(rows) < 2:
        try:
            return [run(rows)]
        except (MemoryError, RuntimeError) as error:
            if not is_allocation_failure(error) or len(rows) < 2:
                raise
        mx.clear_cache()  # here the failed attempt's arrays are gone, with the exception that held them
        mx.reset_peak_memory()
    half = (len(rows) + 1) // 2
    return [run(rows[:half]), run(rows[half:])]


def advice(settings: CommonSettings) -> str:
    """The flags that still help, the cheapest first."""
    tried = []
    if settings.batch_size > 1:
        more = (
            f" --grad-accumulation-steps {2 * settings.grad_accumulation_steps}"
            if isinstance(settings, TrainSettings)
            else ""
        )
        tried.append(f"--batch-size {settings.batch_size // 2}{more}")
    if settings.num_negatives not in (-1, 1):
        tried.append(f"--num-negatives {settings.num_negatives // 2 or 1}")
    if isinstance(settings, TrainSettings):
        if not settings.grad_checkpoint:
            tried.append("--grad-checkpoint")
        if settings.num_layers != 1:
            tried.append(f"--num-layers {settings.num_layers // 2 if settings.num_layers > 1 else 8}")
    return ", ".join([*tried, f"--max-seq-length {settings.max_seq_length // 2}"])


@contextlib.contextmanager
def memory_limits(settings: CommonSettings) -> Iterator[None]:
    """`limits`, and an allocation failure as a UserError that says what to try."""
    try:
        with limits(settings.memory_limit):
            yield
    except (MemoryError, RuntimeError) as error:
        if not is_allocation_failure(error):
            raise
        asked = re.search(r"allocate (\d+) bytes", str(error))
        needed = (mx.get_active_memory() + int(asked[1]) if asked else mx.get_peak_memory()) / 1e9
        raise UserError(
            f"memory: this needs about {needed:.1f} GB ({_first_line(error)}): try, in this order, {advice(settings)}"
        ) from None


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
