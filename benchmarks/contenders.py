"""One step of each contender on the same groups, weights, adapter and precision: ours, the plain scorer, and the
neighbours' own functions.

A contender is a function that does a step's whole work, optimizer included, and returns nothing; `check` gives its loss
and gradient. What the neighbours do besides (data reading, printing) is left out. `mx.compile`, which they apply to a
step, is left out on a CPU (docs/performance.md says why); ours goes without too. On a GPU all
steps are compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np

from mlx_dmpo.config import DmpoSettings, SftSettings
from mlx_dmpo.core import losses
from mlx_dmpo.core.scorer import plain_logps, shared_logps
from mlx_dmpo.core.selfcheck import GroupScorer
from mlx_dmpo.core.tree import EncodedGroup, pad_groups
from mlx_dmpo.model import device
from mlx_dmpo.model.score import score_groups
from mlx_dmpo.train import objective
from mlx_dmpo.train import step as train_step

BETA = 0.1
SHARED = GroupScorer(shared_logps, True)
PAD = train_step.padding(SHARED)
Step = Callable[[Sequence[EncodedGroup]], Any]


@dataclass
class Contender:
    name: str
    step: Step  # the timed work on some groups
    check: Step  # loss and gradient of the same groups, in the form that all of a kind are compared in


def optimized(model: nn.Module, differentiate: Callable[..., Any], compiled: bool = False) -> Callable[..., None]:
    """compiled: as a whole, where ours compiles its own loss and gradient."""
    optimizer = optimizers.AdamW(learning_rate=0.0)  # so that every repetition meets the same weights

    def update(*batch: Any) -> Any:
        value, gradients = differentiate(*batch)
        optimizer.update(model, gradients)
        return value

    state = [model.state, optimizer.state, mx.random.state]
    run: Any = mx.compile(update, inputs=state, outputs=state) if compiled else update

    def step(*batch: Any) -> None:
        mx.eval(run(*batch), model.trainable_parameters(), optimizer.state)

    return step


class References:
    """Log-probs of groups under the base model, computed once: for ours and for the plain scorer, where they
    are data.
    """

    def __init__(self, base: nn.Module):
        self.base = base
        self.known: dict[int, tuple[np.ndarray, EncodedGroup]] = {}

    def __call__(self, groups: Sequence[EncodedGroup]) -> np.ndarray:
        for group in groups:
            if id(group) not in self.known:
                self.known[id(group)] = np.array(shared_logps(self.base, pad_groups([group])))[0], group
        return np.stack([self.known[id(g)][0] for g in groups])


def ours(model: nn.Module, references: References, checkpoint: bool = False) -> Contender:
    """train's own step. Compared as DPO, the loss that the neighbours have."""
    run = train_step.StepFunction(model, SHARED, objective.objective(DmpoSettings(beta=BETA)), checkpoint)
    compared = train_step.StepFunction(
        model, SHARED, objective.objective(DmpoSettings(beta=BETA, loss="dpo")), checkpoint
    )
    step = optimized(model, lambda groups: run(PAD(groups), references(groups), 1 / len(groups), None))

    def check(groups: Sequence[EncodedGroup]) -> Any:
        (value, *_), gradient = compared(PAD(groups), references(groups), 1 / len(groups), None)
        return value, gradient

    return Contender("mlx-dmpo", step, check)


def pair_sharing(model: nn.Module, references: References) -> Contender:
    """The two answers of a prompt share it, and nothing else is shared: the most that a trainer of pairs can do."""
    inner = ours(model, references)

    def parted(groups: Sequence[EncodedGroup]) -> list[EncodedGroup]:
        return [
            EncodedGroup(
                g.prefix,
                tuple(g.tails[r] for r in pair),
                tuple(g.answer_lengths[r] for r in pair),
                np.array([[0, 1]], np.int32),
            )
            for g in groups
            for pair in g.pairs
        ]

    kept: dict[int, tuple[list[EncodedGroup], Any]] = {}

    def pairs(groups: Sequence[EncodedGroup]) -> list[EncodedGroup]:
        if id(groups[0]) not in kept:
            kept[id(groups[0])] = parted(groups), groups
        return kept[id(groups[0])][0]

    return Contender(
        "pair sharing", lambda groups: inner.step(pairs(groups)), lambda groups: inner.check(pairs(groups))
    )


def _stacked(sequences: Sequence[np.ndarray], answers: Sequence[int]) -> tuple[mx.array, mx.array]:
    width = max(map(len, sequences))
    tokens, mask = np.zeros((len(sequences), width), np.int32), np.zeros((len(sequences), width), np.float32)
    for i, (s, n) in enumerate(zip(sequences, answers, strict=True)):
        tokens[i, : len(s)], mask[i, len(s) - n : len(s)] = s, 1
    return mx.array(tokens), mx.array(mask)


def plain(model: nn.Module, references: References) -> Contender:
    """Each sequence alone, in one batch, through the model's own forward."""

    def arrays(groups: Sequence[EncodedGroup]) -> tuple[mx.array, ...]:
        tokens, mask = _stacked(
            [np.concatenate([g.prefix, t]) for g in groups for t in g.tails],
            [n for g in groups for n in g.answer_lengths],
        )
        return tokens, mask, mx.array(references(groups)), mx.array(np.stack([g.pairs for g in groups]))

    def loss(tokens: mx.array, mask: mx.array, reference: mx.array, pairs: mx.array, reduce: Any) -> mx.array:
        logits = model(tokens[:, :-1]).astype(mx.float32)
        chosen = mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        logps = ((chosen - mx.logsumexp(logits, axis=-1)) * mask[:, 1:]).sum(axis=-1).reshape(len(reference), -1)
        margins = losses.margins(logps, reference, pairs, BETA)
        return reduce(margins, mx.ones(margins.shape)).mean()

    differentiate = nn.value_and_grad(model, partial(loss, reduce=losses.dmpo))
    compared = nn.value_and_grad(model, partial(loss, reduce=losses.dpo))
    inner = optimized(model, differentiate, compiled=not device.on_cpu())
    return Contender("plain scorer", lambda groups: inner(*arrays(groups)), lambda groups: compared(*arrays(groups)))


def mlx_lm_lora(model: nn.Module, base: nn.Module) -> Contender:
    """mlx-lm-lora's DPO step by its own functions, as `train_dpo` puts them together: policy and reference, chosen and
    rejected.

    Its data set gives it no prompt lengths, so that it scores prompts too; here it is given them, so that the work and
    the loss are ours.
    """
    from mlx_lm_lora.trainer import dpo_trainer as peer

    def batch(groups: Sequence[EncodedGroup]) -> Any:
        rows = []
        for g in groups:
            for c, r in g.pairs:
                row = {}
                for name, branch in (("chosen", c), ("rejected", r)):
                    row[name] = np.concatenate([g.prefix, g.tails[branch]]).tolist()
                    row[f"{name}_prompt_length"] = len(row[name]) - g.answer_lengths[branch]
                rows.append(row)
        return next(peer.iterate_dpo_batches(rows, len(rows), 4096))

    def loss(chosen: mx.array, rejected: mx.array, chosen_masks: mx.array, rejected_masks: mx.array) -> Any:
        scores = [
            peer.compute_score(peer.get_token_scores(m, tokens, mask), mask, "sigmoid")
            for m in (model, base)
            for tokens, mask in ((chosen, chosen_masks), (rejected, rejected_masks))
        ]
        return peer.dpo_loss(
            scores[0],
            scores[1],
            mx.stop_gradient(scores[2]),
            mx.stop_gradient(scores[3]),
            chosen_masks,
            rejected_masks,
            beta=BETA,
            delta=50.0,
            loss_type="sigmoid",
        )

    differentiate = nn.value_and_grad(model, loss)

    @contextlib.contextmanager
    def as_compiled() -> Any:
        """Compiled, its loss clears MLX's cache when traced and never again; not compiled, it would at every step."""
        clear, mx.clear_cache = mx.clear_cache, lambda: None
        try:
            yield
        finally:
            mx.clear_cache = clear

    inner = optimized(model, differentiate, compiled=not device.on_cpu())

    def step(groups: Sequence[EncodedGroup]) -> None:
        with as_compiled():
            inner(*batch(groups))

    def check(groups: Sequence[EncodedGroup]) -> Any:
        (value, *_), gradient = differentiate(*batch(groups))
        return value, gradient

    return Contender("mlx-lm-lora", step, check)


def our_sft(model: nn.Module) -> Contender:
    """train's own step. Compared as the mean over all answer tokens, the loss that mlx-lm has."""
    run = train_step.StepFunction(model, SHARED, objective.objective(SftSettings()), False)

    def token_mean(policy: mx.array, reference: Any, batch: Any) -> Any:
        tokens = batch.answer_mask.sum()
        return -policy.sum(axis=-1) / float(tokens), mx.zeros((len(policy), 1))

    compared = train_step.StepFunction(model, SHARED, token_mean, False)

    def check(groups: Sequence[EncodedGroup]) -> Any:
        (value, *_), gradient = compared(PAD(groups), None, 1.0, None)
        return value, gradient

    return Contender("mlx-dmpo", optimized(model, lambda groups: run(PAD(groups), None, 1 / len(groups), None)), check)


def mlx_lm_sft(model: nn.Module) -> Contender:
    """mlx-lm's LoRA step with --mask-prompt.

    It trains one token of padding in every padded row; only what is compared is corrected.
    """
    from mlx_lm.tuner.trainer import default_loss, iterate_batches

    def batch(groups: Sequence[EncodedGroup]) -> Any:
        rows = [
            (np.concatenate([g.prefix, t]).tolist(), len(g.prefix) + len(t) - n)
            for g in groups
            for t, n in zip(g.tails, g.answer_lengths, strict=True)
        ]
        return next(iterate_batches(rows, len(rows), 4096))

    def corrected(model: nn.Module, tokens: mx.array, lengths: mx.array) -> mx.array:
        steps = mx.arange(1, tokens.shape[1])
        mask = mx.logical_and(steps >= lengths[:, 0:1], steps < lengths[:, 1:])
        return (nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]) * mask).sum() / mask.sum()

    differentiate, compared = nn.value_and_grad(model, default_loss), nn.value_and_grad(model, corrected)
    inner = optimized(model, lambda *arrays: differentiate(model, *arrays), compiled=not device.on_cpu())
    return Contender("mlx-lm", lambda groups: inner(*batch(groups)), lambda groups: compared(model, *batch(groups)))


def our_scores(model: nn.Module, batch_size: int = 8) -> Contender:
    def step(groups: Sequence[EncodedGroup]) -> np.ndarray:
        found = {id(g): row for g, row in score_groups(model, SHARED, groups, batch_size, "")}
        return np.concatenate([found[id(g)] for g in groups])

    return Contender("mlx-dmpo", step, step)


def one_by_one(model: nn.Module) -> Contender:
    """Every prompt with every answer through the model's own forward, one after another."""

    def step(groups: Sequence[EncodedGroup]) -> np.ndarray:
        out = []
        for g in groups:
            for tail, n in zip(g.tails, g.answer_lengths, strict=True):
                alone = EncodedGroup(g.prefix, (tail,), (n,), np.zeros((0, 2), np.int32))
                out.append(np.array(plain_logps(model, pad_groups([alone])))[0, 0])
        return np.array(out)

    return Contender("one by one", step, step)
