"""Caser (Tang and Wang, WSDM 2018, arXiv 1809.07426): convolutions over the last items, as over a picture."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class Caser(nn.Module):
    """The last `window` embeddings as a (window, D) picture: horizontal filters of every height, max-pooled over time,
    beside vertical filters, one weight per place; then a linear layer. The paper's user embedding is left out, since
    tested users are new.
    """

    def __init__(
        self, items: int, dim: int, *, dropout: float, window: int = 5, horizontal: int = 16, vertical: int = 4
    ):
        super().__init__()
        self.window = window
        self.embedding = nn.Embedding(items + 1, dim)  # the last row is padding
        self.rows = [nn.Conv1d(dim, horizontal, height) for height in range(1, window + 1)]
        self.columns = nn.Linear(window, vertical, bias=False)
        self.out = nn.Linear(horizontal * window + vertical * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def __call__(self, sequences: mx.array, real: mx.array) -> mx.array:
        """What comes after each place.  sequences (B, L) items, real (B, L) 0 for padding at the end -> (B, L, D)."""
        B, L = sequences.shape
        h = self.embedding(sequences) * real[..., None]
        h = mx.pad(h, [(0, 0), (self.window - 1, 0), (0, 0)])  # a window that begins before the history
        windows = mx.stack([h[:, i : i + L] for i in range(self.window)], axis=2)  # (B, L, window, D)
        pictures = windows.reshape(B * L, self.window, -1)
        across = [nn.relu(convolve(pictures)).max(axis=1) for convolve in self.rows]  # each (B * L, horizontal)
        down = self.columns(pictures.swapaxes(1, 2)).reshape(B * L, -1)  # (B * L, D * vertical)
        out = nn.relu(self.out(self.dropout(mx.concatenate([*across, down], axis=-1))))
        return out.reshape(B, L, -1)
