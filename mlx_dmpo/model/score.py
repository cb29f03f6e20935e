"""Log-probabilities of many groups, in batches of similar length, shared among ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..core.scorer import FrozenOutputs
from ..core.selfcheck import GroupScorer
from ..core.tree import BATCH_TOKENS, EncodedGroup, GroupBatch, by_length, pad_groups, part, pieces
from ..machine import console
from ..machine.memory import in_halves
from ..machine.prefetch import prefetch
from ..machine.progress import Progress
from ..machine.ranks import world
from .device import tokens_per_product


def score_groups(
    model: nn.Module,
    scorer: GroupScorer,
    groups: Sequence[EncodedGroup],
    batch_size: int,
    describe: str,
    tokens: int = BATCH_TOKENS,
    unsplit: bool = False,
    frozen: FrozenOutputs | None = None,
) -> Iterator[tuple[EncodedGroup, np.ndarray]]:
    """Each group with its (R,) log-probs, outside gradient tracing, in batches of similar length, shared by the ranks.

    tokens  run at once, shared ones counted once; fewer where the device takes fewer of a large model
    frozen  keeps what the layers below the adapter give

    A group of more than `tokens` is scored in parts of its branches, which gives the same log-probs, unless `unsplit`.
    From the first batch that does not fit in memory, batches of its size are run in halves.
    """
    tokens = min(tokens, tokens_per_product(model))
    parts = [pieces(g, tokens) if g.shared_tokens > tokens and not unsplit else [] for g in groups]
    if any(len(p) > 1 for p in parts):
        small = [part(g, rows) for g, ps in zip(groups, parts, strict=True) for rows in ps] + [
            g for g, ps in zip(groups, parts, strict=True) if not ps
        ]
        found = {
            id(g): row for g, row in score_groups(model, scorer, small, batch_size, describe, tokens, True, frozen)
        }
        rest = iter(small)
        for g, ps in zip(groups, parts, strict=True):
            whole = np.zeros(len(g.tails), np.float32)
            for rows in ps:
                whole[rows] = found[id(next(rest))]
            yield g, whole if ps else found[id(g)]
        return
    training = model.training
    model.eval()

    def pad(rows: np.ndarray) -> GroupBatch:
        return pad_groups([groups[i] for i in rows])

    def run(whole: GroupBatch, rows: np.ndarray) -> list[tuple[int, np.ndarray]]:
        batch = whole if len(whole.groups) == len(rows) else pad(rows)
        logps = np.array(scorer.logps(model, batch, **({"frozen": frozen(batch)} if frozen else {})))
        return [(int(i), row[: len(groups[i].tails)]) for i, row in zip(rows, logps, strict=True)]

    def scored() -> Iterator[tuple[int, np.ndarray]]:
        too_many: float = math.inf  # tokens
        with Progress(len(groups), describe, "group", quiet=not describe or not world().first) as bar:
            for rows, batch in prefetch(
                (rows, pad(rows)) for rows in world().share(list(by_length(groups, batch_size, tokens)))
            ):
                size = len(batch.tokens)
                found = in_halves(partial(run, batch), rows, at_once=size >= too_many)
                if len(found) > 1 and size < too_many:
                    too_many = size
                    console.notice(f"note: {size:,} tokens at once do not fit in memory: they are run in halves")
                for part in found:
                    yield from part
                bar.update(len(rows) * world().size)

    try:
        if world().size == 1:
            for i, row in scored():
                yield groups[i], row
            return
        table = np.zeros((len(groups), max((len(g.tails) for g in groups), default=0)), np.float32)
        for i, row in scored():
            table[i, : len(row)] = row
        for group, row in zip(groups, np.array(world().sum({"logps": mx.array(table)})["logps"]), strict=True):
            yield group, row[: len(group.tails)]
    finally:
        model.train(training)
