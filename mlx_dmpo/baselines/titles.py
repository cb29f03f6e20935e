"""Embeddings of titles from a language model, for sequential models to start from, as GRU-BERT and DROS-BERT do"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..model.loading import Loaded

BATCH = 64


def hidden_states(base: Loaded, titles: Sequence[str]) -> np.ndarray:
    """(N, D) float32: the mean of the last layer's hidden states over a title's tokens."""
    tokens = [base.tokenizer.encode(title, add_special_tokens=False) for title in titles]
    rows = np.zeros((len(titles), int(base.config["hidden_size"])), np.float32)
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        width = max(len(tokens[i]) for i in part)
        batch, real = np.zeros((len(part), width), np.int32), np.zeros((len(part), width, 1), np.float32)
        for row, i in enumerate(part):
            batch[row, : len(tokens[i])], real[row, : len(tokens[i])] = tokens[i], 1
        h = base.model.model(mx.array(batch)).astype(mx.float32)  # causal: padding on the right changes nothing
        rows[part] = np.array((h * mx.array(real)).sum(axis=1) / mx.array(real.sum(axis=1)))
    return rows


def title_embeddings(base: Loaded, titles: Sequence[str], dim: int) -> np.ndarray:
    """(N, dim): the first principal components of the titles' hidden states, as large as random embeddings are.

    Where there are fewer components than `dim`, the others are 0.
    """
    rows = hidden_states(base, titles).astype(np.float64)
    rows -= rows.mean(axis=0)
    left, size, _ = np.linalg.svd(rows, full_matrices=False)
    components = (left * size)[:, :dim]
    components *= np.sign(components[np.abs(components).argmax(axis=0), np.arange(components.shape[1])])
    scale = np.sqrt(1 / dim) / max(float(components.std()), 1e-12)
    return np.pad(components * scale, [(0, 0), (0, dim - components.shape[1])])
