"""The training loop of the sequential models: next-item cross-entropy over the whole catalogue, and DROS if wanted"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from tqdm import tqdm

from .caser import Caser
from .corpus import Corpus
from .gru4rec import Gru4Rec
from .sasrec import SasRec

DROS_TEMPERATURE = 1.0


@dataclass(frozen=True)
class Training:
    """How a sequential model is trained. length: items of a history that it looks at. dros: weight of that loss."""

    dim: int
    length: int
    epochs: int
    batch_size: int
    learning_rate: float
    dropout: float
    seed: int
    dros: float = 0.0


def build(name: str, items: int, how: Training) -> nn.Module:
    """An untrained "gru4rec", "caser" or "sasrec" for this many items."""
    mx.random.seed(how.seed)
    if name == "sasrec":
        return SasRec(items, how.dim, dropout=how.dropout, length=how.length)
    model: nn.Module = {"gru4rec": Gru4Rec, "caser": Caser}[name](items, how.dim, dropout=how.dropout)
    return model


def logits(model: nn.Module, h: mx.array) -> mx.array:
    """Scores of all items.  h (..., D) -> (..., I); the padding row is left out."""
    return h @ model.embedding.weight[:-1].T


def dros(scores: mx.array, targets: mx.array, frequency: mx.array, temperature: float = DROS_TEMPERATURE) -> mx.array:
    """log E_{i ~ p} exp((s_i - y_i)² / temperature): distributionally robust (Yang et al., arXiv 2304.09388).

    y is 1 for the target and 0 for the other items; p is the items' share of the interactions.
    scores (..., I), targets (...), frequency (I,) -> (...)
    """
    aim = targets[..., None] == mx.arange(scores.shape[-1])
    error = (scores - aim.astype(scores.dtype)) ** 2 / temperature
    return mx.logsumexp(error + mx.log(mx.maximum(frequency, 1e-12)), axis=-1)


def windows(corpus: Corpus, length: int) -> list[np.ndarray]:
    """Sequences cut from their ends into parts of at most length + 1 items, which overlap by one: no target twice."""
    parts = []
    for sequence in corpus.sequences:
        end = len(sequence)
        while end >= 2:
            parts.append(sequence[max(0, end - length - 1) : end])
            end -= length
    return parts


def batches(parts: list[np.ndarray], how: Training, padding: int, epoch: int) -> Iterator[tuple[np.ndarray, ...]]:
    """(sequences, targets, real), each (B, L): a sequence without its last item, without its first, and 0 for padding.

    part 5 3 8 with L = 4:   sequences 5 3 . .   targets 3 8 . .   real 1 1 0 0
    """
    order = np.random.default_rng([how.seed, epoch]).permutation(len(parts))
    for start in range(0, len(order), how.batch_size):
        chosen = [parts[i] for i in order[start : start + how.batch_size]]
        sequences, targets = (np.full((len(chosen), how.length), padding, np.int32) for _ in range(2))
        real = np.zeros((len(chosen), how.length), np.float32)
        for row, part in enumerate(chosen):
            sequences[row, : len(part) - 1], targets[row, : len(part) - 1] = part[:-1], part[1:]
            real[row, : len(part) - 1] = 1
        yield sequences, targets, real


def fit(model: nn.Module, corpus: Corpus, how: Training) -> list[float]:
    """Trains in place; the mean loss of each epoch. A fixed seed repeats bit for bit on a CPU."""
    items = len(corpus.keys)
    frequency = mx.array(corpus.likes / max(corpus.likes.sum(), 1), mx.float32)
    parts, optimizer = windows(corpus, how.length), optim.Adam(how.learning_rate)

    def loss(model: nn.Module, sequences: mx.array, targets: mx.array, real: mx.array) -> mx.array:
        scores = logits(model, model(sequences, real))
        targets = mx.minimum(targets, items - 1)  # padding, which `real` leaves out
        each = nn.losses.cross_entropy(scores, targets)
        if how.dros:
            each = each + how.dros * dros(scores, targets, frequency)
        return (each * real).sum() / real.sum()

    step = nn.value_and_grad(model, loss)
    mx.random.seed(how.seed + 1)
    model.train()
    means = []
    for epoch in tqdm(range(how.epochs), desc="fit", unit="epoch", disable=None, leave=False):
        total = count = 0.0
        for batch in batches(parts, how, items, epoch):
            value, gradients = step(model, *map(mx.array, batch))
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state)
            total, count = total + float(value) * float(batch[2].sum()), count + float(batch[2].sum())
        means.append(total / max(count, 1.0))
    model.eval()
    return means


class Sequential:
    """A `Ranker`: a sequential model, trained on the corpus."""

    def __init__(self, name: str, corpus: Corpus, how: Training, embeddings: np.ndarray | None = None):
        """embeddings: (I, D) that the items start from, else random ones."""
        self.how, self.padding = how, len(corpus.keys)
        self.model = build(name, len(corpus.keys), how)
        if embeddings is not None:
            padded = np.concatenate([embeddings, np.zeros((1, how.dim))]).astype(np.float32)
            self.model.embedding.weight = mx.array(padded)
        self.losses = fit(self.model, corpus, how)

    def scores(self, history: np.ndarray) -> np.ndarray:
        kept = history[-self.how.length :]
        if not len(kept):
            return np.zeros(self.padding)
        sequence, real = (
            np.full((1, self.how.length), self.padding, np.int32),
            np.zeros((1, self.how.length), np.float32),
        )
        sequence[0, : len(kept)], real[0, : len(kept)] = kept, 1
        h = self.model(mx.array(sequence), mx.array(real))[:, len(kept) - 1]
        return np.array(logits(self.model, h)[0], np.float64)
