"""What a run will need before it starts: memory, floating-point operations, time. Arithmetic on shapes; nothing is loaded or allocated.

Memory is counted tensor by tensor as MLX keeps them for the backward pass (docs/plan.md has the account and how far it was measured).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .batches import by_length, pad_groups
from .errors import UserError
from .records import EncodedGroup, GroupBatch


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder of the Qwen3 kind. `bits` is 16 or 32 for plain weights, fewer for quantised ones (groups of 64)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    bits: int = 16
    group_size: int = 64

    @classmethod
    def of(cls, source: str | Path) -> ModelShape:
        """A built-in name, a model directory, or a config.json. Raises UserError for what is none of them."""
        key = str(source).rsplit("/", 1)[-1].lower()
        if not Path(source).exists():
            name, bits = key, 16
            for suffix, value in (("-bf16", 16), ("-3bit", 3), ("-4bit", 4), ("-5bit", 5), ("-6bit", 6), ("-8bit", 8)):
                if name.endswith(suffix):
                    name, bits = name.removesuffix(suffix), value
            if name in BUILT_IN:
                return replace(BUILT_IN[name], bits=bits)
            raise UserError(
                f"{source}: no such directory or config.json: name one, or one of {', '.join(BUILT_IN)} (with -4bit, -8bit at the end for a quantised one)"
            )
        path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            heads = config["num_attention_heads"]
            quantisation = config.get("quantization") or {}
            return cls(
                layers=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                intermediate=config["intermediate_size"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                vocabulary=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings")),
                bits=quantisation.get("bits", 16),
                group_size=quantisation.get("group_size", 64),
            )
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}): name a model directory or its config.json") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: is no config.json of a decoder model ({error}): name a model directory or its config.json") from None

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's linear modules."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, wide),
            "k_proj": (self.hidden, narrow),
            "v_proj": (self.hidden, narrow),
            "o_proj": (wide, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Of one layer."""
        return sum(i * o for i, o in self.projections.values())

    @property
    def parameters(self) -> int:
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * (self.linear_parameters + 2 * self.hidden + 2 * self.head_dim) + embeddings + self.hidden

    def weight_bytes(self, activation_bytes: int = 2) -> float:
        """In memory. Quantised linear and embedding weights carry a scale and a bias of the activations' type a group."""
        plain = self.layers * (2 * self.hidden + 2 * self.head_dim) + self.hidden
        matrices = self.parameters - plain
        if self.bits < 16:
            return plain * activation_bytes + matrices * (self.bits / 8 + 2 * activation_bytes / self.group_size)
        return self.parameters * activation_bytes


def _qwen3(layers: int, hidden: int, intermediate: int, heads: int, tied: bool) -> ModelShape:
    return ModelShape(layers, hidden, intermediate, heads, 8, 128, 151_936, tied)


BUILT_IN = {
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32, False),
    "qwen3-14b": _qwen3(40, 5120, 17408, 40, False),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64, False),
}


@dataclass(frozen=True)
class Work:
    """What a batch makes the model do: see GroupBatch for the sizes."""

    tokens: int  # N
    rows: int  # M
    prefix_scores: int  # query-key pairs of the prefixes, as computed
    block_scores: int  # of blocks with prefixes and themselves
    row_scores: int  # of the answer rows
    branches: int
    block_tokens: int  # G*C*T
    query_tokens: int  # G*C*Q

    @classmethod
    def of(cls, batch: GroupBatch) -> Work:
        from .scoring import PREFIX_CHUNK

        (G, P), (_, C, T), Q = batch.prefix_index.shape, batch.block_index.shape, batch.query_at.shape[2]
        chunks = [(min(PREFIX_CHUNK, P - a), min(P, a + PREFIX_CHUNK)) for a in range(0, P, PREFIX_CHUNK)]
        return cls(
            len(batch.tokens),
            len(batch.rows),
            G * sum(q * k for q, k in chunks),
            G * C * T * (P + T),
            G * C * Q * (P + T),
            sum(len(g.tails) for g in batch.groups),
            G * C * T,
            G * C * Q,
        )


@dataclass(frozen=True)
class Training:
    """What of a run's settings memory and time depend on."""

    adapted_layers: int
    rank: int = 8
    keys: tuple[str, ...] = ()  # of the projections; none means all
    checkpoint: bool = False
    activation_bytes: int = 2
    optimizer_states: int = 2  # arrays of the adapter's size: 2 for Adam, 1 for Lion, 0 for plain SGD

    def adapter_parameters(self, shape: ModelShape) -> int:
        named = {k.rsplit(".", 1)[-1] for k in self.keys}
        return self.adapted_layers * sum(self.rank * (i + o) for k, (i, o) in shape.projections.items() if not named or k in named)


def forward_flops(shape: ModelShape, work: Work) -> float:
    """2 per multiplication and addition; the last layer and the head at the answer rows alone."""
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    keys_values = 2 * shape.hidden * narrow
    rest = shape.linear_parameters - keys_values
    per_score = 4 * wide
    full = 2 * shape.linear_parameters * work.tokens + per_score * (work.prefix_scores + work.block_scores)
    last = 2 * (keys_values * work.tokens + rest * work.rows) + per_score * work.row_scores
    return (shape.layers - 1) * full + last + 2 * shape.hidden * shape.vocabulary * work.rows


def step_flops(shape: ModelShape, work: Work, training: Training) -> float:
    """Forward and backward: what each frozen matrix passes back costs what it cost forward; the first adapted layer's input needs none."""
    head = 2 * shape.hidden * shape.vocabulary * work.rows
    layers = (forward_flops(shape, work) - head) / shape.layers  # the last layer's saving spread evenly: exact for all layers adapted
    first = 2 * shape.hidden * (shape.heads + 2 * shape.kv_heads) * shape.head_dim * work.tokens
    attention_again = 4 * shape.heads * shape.head_dim * (work.prefix_scores + work.block_scores) * (training.adapted_layers - 1)
    attention_again += 4 * shape.heads * shape.head_dim * work.row_scores  # two products forward, four backward
    backward = layers * training.adapted_layers - first + attention_again + head
    adapter = 6 * training.adapter_parameters(shape) * work.tokens
    again = layers * training.adapted_layers if training.checkpoint else 0
    return forward_flops(shape, work) + backward + adapter + again


def separate_flops(shape: ModelShape, groups: Sequence[EncodedGroup]) -> float:
    """Forward of every sequence alone, with the vocabulary at every position."""
    total = 0.0
    for group in groups:
        for tail in group.tails:
            n = len(group.prefix) + len(tail) - 1
            total += shape.layers * (2 * shape.linear_parameters * n + 4 * shape.heads * shape.head_dim * n * n)
            total += 2 * shape.hidden * shape.vocabulary * n
    return total


def micro_batches(groups: Sequence[EncodedGroup], batch_size: int) -> list[Work]:
    return [Work.of(pad_groups([groups[i] for i in rows])) for rows in by_length(groups, batch_size)]


def mean_work(works: Sequence[Work]) -> Work:
    return Work(*(round(float(np.mean([getattr(w, f) for w in works]))) for f in Work.__dataclass_fields__))
