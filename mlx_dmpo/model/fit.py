"""Whether a run fits in memory, what makes it fit, and how much is run at once so that it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..core.tree import BATCH_TOKENS, EncodedGroup, GroupBatch, pad_groups, part, pieces
from ..errors import UserError
from .cost import AS_COUNTED, Scale, Training, Work, heaviest, memory, scoring_memory
from .shape import ModelShape

MACS = (8, 16, 24, 32, 36, 48, 64, 96, 128)

ROOM = 1.12  # so much is left free: about the largest error of docs/plan.md


def usable(gigabytes: float) -> float:
    """Bytes that Metal recommends as a working set on a Mac of so many GB: two thirds up to 36 GB, three quarters
    above."""
    return gigabytes * 2**30 * (2 / 3 if gigabytes <= 36 else 3 / 4)


def machine_memory() -> float:
    """Bytes that a run can have here: Metal's recommended working set, a CUDA device's memory, or the machine's."""
    import os

    import mlx.core as mx

    from .device import on_cpu

    if mx.metal.is_available():
        return float(mx.device_info()["max_recommended_working_set_size"])
    if mx.cuda.is_available() and not on_cpu():
        return float(mx.device_info()["total_memory"])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def limit(gigabytes: float) -> float:
    """Bytes that a run can have here under --memory-limit; 0 sets none."""
    return min(machine_memory(), gigabytes * 1e9 or machine_memory())


@dataclass(frozen=True)
class Case:
    """A run to be planned.

    pad    how its groups are padded
    scale  of the activations, on the device that it is for
    other  bytes in use beside what is counted: weights that the shape does not count
    """

    shape: ModelShape
    training: Training
    groups: Sequence[EncodedGroup]
    batch_size: int
    batch_tokens: int = BATCH_TOKENS
    pad: Callable[[Sequence[EncodedGroup]], GroupBatch] = field(default=pad_groups, repr=False)
    scale: Scale = AS_COUNTED
    other: float = 0.0

    @property
    def heaviest(self) -> list[Work]:
        return heaviest(self.groups, self.batch_size, self.batch_tokens, self.pad)

    @property
    def largest(self) -> Work:
        """The micro-batch that takes the most memory."""
        return max(self.heaviest, key=lambda work: memory(self.shape, work, self.training, self.scale)["peak"])

    def memory(self) -> dict[str, float]:
        """Bytes by what holds them, and their `peak`."""
        found = memory(self.shape, self.largest, self.training, self.scale)
        return found | {"weights": found["weights"] + self.other, "peak": found["peak"] + self.other}

    def peak(self) -> float:
        return self.memory()["peak"]

    def wait_at(self, limit: float) -> float:
        """Bytes in use above which MLX has to wait before it allocates more, to stay in `limit`; 0 where it need not.

        It allocates for up to a hundred operations ahead, and so for all chunks of the head's logits at once.
        """
        from ..core.head import chunk_bytes

        rows = max(work.rows for work in self.heaviest)
        chunk = chunk_bytes(rows, self.shape.vocabulary)
        return limit - chunk if 4 * rows * self.shape.vocabulary > chunk else 0.0


def deciding(groups: Sequence[EncodedGroup], count: int) -> list[EncodedGroup]:
    """The shortest and the longest groups and some between, enough to decide a plan."""
    order = sorted(groups, key=lambda g: g.shared_tokens)
    rest = order[count:]
    return [*order[:count], *rest[: -count : len(rest) // 64 + 1], *rest[-count:]]


def _smaller(tokens: int, least: int) -> Iterator[int]:
    """tokens, three quarters and half of it, ... down to the first below `least`.  8192, 6144, 4096, 3072, ..."""
    while tokens >= 4:
        for size in (tokens, tokens * 3 // 4):
            yield size
            if size < least:
                return
        tokens //= 2


def plans(case: Case, batch_tokens: int | None = None, checkpoint: bool | None = None) -> Iterator[Case]:
    """What --memory auto chooses among, the fastest first: smaller micro-batches, then recomputation, then both.

    The last one runs one group at a time. `batch_tokens` and `checkpoint` are what the user gave, None is free.
    """
    case = replace(case, groups=deciding(case.groups, case.batch_size))
    two = sum(sorted(g.shared_tokens for g in case.groups)[:2])  # below this every micro-batch is one group
    sizes = [batch_tokens] if batch_tokens else list(_smaller(BATCH_TOKENS, two if case.batch_size > 1 else 2**62))
    for recompute in (False, True) if checkpoint is None else (checkpoint,):
        for size in sizes:
            yield replace(case, batch_tokens=size, training=replace(case.training, checkpoint=recompute))


def choose(case: Case, limit: float, batch_tokens: int | None = None, checkpoint: bool | None = None) -> Case:
    """The first of `plans` that leaves room to spare in `limit` bytes; else the leanest, which may exceed them."""
    leanest, least = case, float("inf")
    for planned in plans(case, batch_tokens, checkpoint):
        peak = planned.peak()
        if ROOM * peak <= limit:
            return planned
        if peak < least:
            leanest, least = planned, peak
    return leanest


def describe(case: Case) -> str:
    """A choice in words."""
    again = "each layer recomputed in the backward pass" if case.training.checkpoint else "nothing recomputed"
    return f"micro-batches of at most {case.batch_tokens:,} tokens (always one group), {again}"


def remedies(case: Case) -> list[tuple[str, Case]]:
    """Changes that save memory, the cheapest first; each on top of those before it."""
    out: list[tuple[str, Case]] = []

    def then(what: str, **change: Any) -> None:
        nonlocal case
        case = replace(case, **change)
        out.append((", ".join([*([out[-1][0]] if out else []), what]), case))

    while case.batch_size > 1:
        then(f"--batch-size {case.batch_size // 2}", batch_size=case.batch_size // 2)
        if len(out) > 1:  # halved again: one flag says it
            out[-1] = (out[-1][0].split(", ")[-1], case)
    if not case.training.checkpoint:
        then("--grad-checkpoint", training=replace(case.training, checkpoint=True))
    if case.training.adapted_layers > 8:
        then("--num-layers 8", training=replace(case.training, adapted_layers=8))
    if case.shape.bits > 4:
        then("--quantize 4", shape=replace(case.shape, bits=4))
    return out


def cheapest(case: Case, limit: float) -> str | None:
    """ "" where the case fits in `limit` bytes, the flags that make it fit, or None."""
    if case.peak() <= limit:
        return ""
    return next((what for what, changed in remedies(case) if changed.peak() <= limit), None)


def check(case: Case, limit: float) -> None:
    """Raises UserError where a run cannot fit in `limit` bytes, with the cheapest flags that make it fit."""
    peak = case.peak()
    if peak <= limit:
        return
    change = cheapest(case, limit)
    raise UserError(
        f"memory: about {peak / 1e9:.2g} GB will be needed, and this machine has {limit / 1e9:.2g} GB: "
        f"{f'add {change}' if change else LESS}, or run it anyway with --no-memory-check"
    )


LESS = "take a smaller model, a shorter --max-seq-length or fewer --num-negatives"


def refuse(leanest: Case, limit: float) -> None:
    """Raises UserError where even the leanest plan does not fit, with what it is and what to lower."""
    peak = leanest.peak()
    if peak <= limit:
        return
    change = cheapest(replace(leanest, batch_size=1), limit)
    raise UserError(
        f"memory: the leanest plan, {describe(leanest)}, needs about {peak / 1e9:.3g} GB, and there are "
        f"{limit / 1e9:.3g} GB: {f'add {change}' if change else LESS}, or run it anyway with --no-memory-check"
    )


def tokens_at_once(
    shape: ModelShape,
    groups: Sequence[EncodedGroup],
    batch_size: int,
    free: float,
    activation_bytes: int,
    scale: Scale = AS_COUNTED,
) -> tuple[int, float]:
    """Most tokens that scoring runs at once so that it fits in `free` bytes above the model, and the bytes it needs.

    At most BATCH_TOKENS; where nothing fits, the fewest.
    """
    some, needed = deciding(groups, batch_size), 0.0
    for tokens in _smaller(BATCH_TOKENS, 256):
        split = [part(g, pieces(g, tokens)[0]) if g.shared_tokens > tokens else g for g in some]
        works = heaviest(split, batch_size, tokens)
        needed = max(scoring_memory(shape, work, activation_bytes, scale) for work in works)
        if needed <= free:
            break
    return tokens, needed


def prompts_at_once(
    shape: ModelShape, tokens: int, vocabulary: int, answers: int, most: int, free: float, activation_bytes: int
) -> int:
    """Most prompts, at most `most`, whose answers are drawn at once in `free` bytes above the model; at least one.

    tokens   of the longest prompt with its longest answer
    answers  drawn to each prompt
    A token's keys and values are counted twice, since mlx-lm's caches are merged and grow by copying, and an answer
    has three arrays of float32 over the vocabulary.
    """
    cache = 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim * activation_bytes * tokens
    reading = activation_bytes * tokens * (4 * shape.hidden + 3 * shape.intermediate)
    while most > 1 and reading + most * answers * (cache + 12.0 * vocabulary) > free:
        most //= 2
    return most
