"""A split as encoded groups, and its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from tqdm import tqdm

from ..core.tree import EncodedGroup
from ..model.encode import Encoder
from ..prompts.orders import printed_orders
from ..records import Example


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
        beside = True if epoch else None  # later epochs are encoded beside the training, which has a bar
        rows = tqdm(self.examples, desc="encode", unit="example", disable=beside, leave=False, delay=2)
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
