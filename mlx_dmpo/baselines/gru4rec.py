"""GRU4Rec (Hidasi et al., arXiv 1511.06939): a recurrent network over the item sequence."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class Gru4Rec(nn.Module):
    """Item embeddings -> one GRU layer -> a linear layer back to the embeddings' width."""

    def __init__(self, items: int, dim: int, *, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(items + 1, dim)  # the last row is padding
        self.gru = nn.GRU(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def __call__(self, sequences: mx.array, real: mx.array) -> mx.array:
        """What comes after each place.  sequences (B, L) items, real (B, L) 0 for padding at the end -> (B, L, D)."""
        return self.out(self.gru(self.dropout(self.embedding(sequences))))
