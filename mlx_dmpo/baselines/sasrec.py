"""SASRec (Kang and McAuley, arXiv 1808.09781): a causal transformer over the item sequence."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn


class Block(nn.Module):
    """Self-attention and a two-layer network, each with a norm before and a residual around it (the paper's order)."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.network_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.first, self.second = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def attend(self, h: mx.array, masked: mx.array) -> mx.array:
        """h (B, L, D), masked (L, L) additive -> (B, L, D). Only queries are normed, as in the paper's code."""
        B, L, D = h.shape

        def split(x: mx.array) -> mx.array:
            return x.reshape(B, L, self.heads, -1).swapaxes(1, 2)

        q, k, v = split(self.query(self.attention_norm(h))), split(self.key(h)), split(self.value(h))
        weights = mx.softmax(q @ k.swapaxes(-1, -2) / math.sqrt(D // self.heads) + masked, axis=-1)
        return (self.dropout(weights) @ v).swapaxes(1, 2).reshape(B, L, D)

    def __call__(self, h: mx.array, masked: mx.array) -> mx.array:
        h = self.attention_norm(h) + self.attend(h, masked)
        normed = self.network_norm(h)
        return normed + self.dropout(self.second(self.dropout(nn.relu(self.first(normed)))))


class SasRec(nn.Module):
    def __init__(self, items: int, dim: int, *, dropout: float, length: int, blocks: int = 2, heads: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(items + 1, dim)  # the last row is padding
        self.positions = nn.Embedding(length, dim)
        self.blocks = [Block(dim, heads, dropout) for _ in range(blocks)]
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def __call__(self, sequences: mx.array, real: mx.array) -> mx.array:
        """What comes after each place.  sequences (B, L) items, real (B, L) 0 for padding at the end -> (B, L, D).

        Position 0 is the oldest item kept. Padding is on the right, so that the causal mask also hides it.
        """
        L = sequences.shape[1]
        h = self.embedding(sequences) * math.sqrt(self.embedding.weight.shape[1]) + self.positions(mx.arange(L))
        h = self.dropout(h) * real[..., None]
        masked = mx.triu(mx.full((L, L), -1e9), k=1)
        for block in self.blocks:
            h = block(h, masked) * real[..., None]
        return self.norm(h)
