"""A split as encoded groups, and its steps as arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..core.tree import EncodedGroup, GroupBatch, by_length
from ..machine.prefetch import prefetch
from ..machine.progress import track
from ..machine.ranks import world
from ..model.encode import Encoder
from ..prompts.orders import printed_orders
from ..records import Example
from .reference import Reference


def epoch_steps(count: int, groups_per_step: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The epoch's steps as arrays of group indices: a fresh permutation, the last step the remainder."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return [order[i : i + groups_per_step] for i in range(0, count, groups_per_step)]


@dataclass
class GroupSource:
    """A split as encoded groups: which negatives, which printed orders, which answers."""

    examples: Sequence[Example]
    encoder: Encoder
    seed: int
    both: bool = False
    redraw: bool = False
    chosen_only: bool = False
    orders: int = 1  # listwise: printed orders of each group

    def __post_init__(self) -> None:
        self._fixed: list[EncodedGroup] | None = None

    def _encode(self, epoch: int, both: bool) -> list[EncodedGroup]:
        """`both`: both printed orders of a pair, or all of a list that --candidate-order epoch draws from."""
        form = self.encoder.template.form
        count = 0 if form == "listwise" and both else self.orders
        draw = partial(
            printed_orders, both=both, redraw=self.redraw, seed=self.seed, epoch=epoch, form=form, count=count
        )
        quiet = epoch > 0 or not world().first  # later epochs are encoded during training, which has its own bar
        rows = track(self.examples, "encode", "example", quiet=quiet)
        return [self.encoder.encode(e, draw(e, i), chosen_only=self.chosen_only) for i, e in enumerate(rows)]

    def epoch(self, epoch: int) -> list[EncodedGroup]:
        if self.redraw and not self.both:
            return self._encode(epoch, False)
        if self._fixed is None:
            self._fixed = self._encode(0, self.both)
        return self._fixed

    def all_orders(self) -> list[EncodedGroup]:
        """Groups that hold every sequence of every epoch."""
        return self._encode(0, True) if self.redraw and not self.both else self.epoch(0)


@dataclass(frozen=True)
class MicroBatch:
    """Groups that are run at once."""

    rows: np.ndarray  # which of the rank's groups in the step
    batch: GroupBatch
    reference: np.ndarray | None  # (G, R)
    seed: int | None = None  # of its dropout
    part: Callable[[np.ndarray], MicroBatch] | None = None  # one of fewer rows; None for what is a half already

    @property
    def tokens(self) -> int:
        return int(self.batch.starts[-1])

    def halves(self) -> list[MicroBatch]:
        """Two micro-batches of half the rows; none where it cannot be split, or has been."""
        if self.part is None or len(self.rows) < 2:
            return []
        half = (len(self.rows) + 1) // 2
        return [self.part(self.rows[:half]), self.part(self.rows[half:])]


@dataclass(frozen=True)
class Step:
    number: int  # from 1
    groups: Sequence[EncodedGroup]  # of all ranks
    micro_batches: list[MicroBatch]  # of this rank


@dataclass(frozen=True)
class Batches:
    """A split's steps: which groups are in a step, this rank's share of them, cut into padded micro-batches."""

    source: GroupSource
    groups_per_step: int
    batch_size: int
    batch_tokens: int
    pad: Callable[[Sequence[EncodedGroup]], GroupBatch]
    reference: Reference | None = None
    dropout: bool = False

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.source.examples) / self.groups_per_step)

    def steps(self, done: int, end: int) -> Iterator[Step]:
        """Steps done + 1 to end. Their host work is prefetched: the next epoch's encoding, the next step's padding."""
        per, seed = self.steps_per_epoch, self.source.seed
        first = done // per

        def prepared() -> Iterator[Step]:
            for epoch, groups in enumerate(prefetch(map(self.source.epoch, range(first, math.ceil(end / per)))), first):
                rows_of_steps = epoch_steps(len(groups), self.groups_per_step, seed, epoch)
                for number, rows in enumerate(rows_of_steps, epoch * per + 1):
                    if done < number <= end:
                        yield self._step(number, [groups[i] for i in rows])

        return prefetch(prepared())

    def _step(self, number: int, groups: Sequence[EncodedGroup]) -> Step:
        mine = groups
        if world().size > 1:  # of every length as many as the other ranks
            mine = [groups[i] for rows in by_length(groups, len(groups)) for i in world().share(rows.tolist())]
        cut = by_length(mine, self.batch_size, self.batch_tokens)
        return Step(number, groups, [self._micro_batch(number, mine, rows, whole=True) for rows in cut])

    def _micro_batch(self, number: int, mine: Sequence[EncodedGroup], rows: np.ndarray, whole: bool) -> MicroBatch:
        picked, seed = [mine[i] for i in rows], None
        if self.dropout:
            first = int(rows[0]) * world().size + world().rank
            seed = int(np.random.default_rng([self.source.seed, number, first]).integers(2**31))
        reference = None if self.reference is None else self.reference.logps(picked)
        part = partial(self._micro_batch, number, mine, whole=False) if whole else None
        return MicroBatch(rows, self.pad(picked), reference, seed, part)
