"""Models and groups that benchmarks run: shapes with random weights, and real groups or generated ones of the same lengths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import qwen3
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_dmpo import assets
from mlx_dmpo.batches import first_negatives, printed_orders
from mlx_dmpo.data import formats, prompts
from mlx_dmpo.encode import Encoder
from mlx_dmpo.plan import BUILT_IN, ModelShape
from mlx_dmpo.records import EncodedGroup
from mlx_dmpo.rundir import notice

# Body and head weigh in 2 layers and 10,880 columns as in the real model's 28 and 151,936
PROPORTIONAL = replace(BUILT_IN["qwen3-0.6b"], layers=2, vocabulary=10_880)

SHAPES: dict[str, ModelShape] = {
    "qwen3-0.6b-proportional": PROPORTIONAL,
    "qwen3-0.6b-2l": replace(PROPORTIONAL, vocabulary=BUILT_IN["qwen3-0.6b"].vocabulary),
    "qwen3-0.6b-proportional-4bit": replace(PROPORTIONAL, bits=4),
    **BUILT_IN,
    **{f"{name}-4bit": replace(shape, bits=4) for name, shape in BUILT_IN.items()},
}


def build(shape: ModelShape, *, lora_layers: int = -1, rank: int = 8, dtype: mx.Dtype | None = None, seed: int = 0) -> nn.Module:
    """A random Qwen3 of the shape with a non-zero LoRA adapter on all linear layers. Without `dtype` float32 on a CPU, bfloat16 on a GPU."""
    mx.random.seed(seed)
    model = qwen3.Model(
        qwen3.ModelArgs(
            model_type="qwen3",
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            rms_norm_eps=1e-6,
            vocab_size=shape.vocabulary,
            max_position_embeddings=40960,
            rope_theta=1e6,
            tie_word_embeddings=shape.tied,
        )
    )
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    model.set_dtype(dtype or (mx.float32 if on_cpu else mx.bfloat16))
    if shape.bits < 16:
        nn.quantize(model, group_size=64, bits=shape.bits)
    model.freeze()
    if lora_layers:
        linear_to_lora_layers(model, lora_layers, {"rank": rank, "scale": 2.0, "dropout": 0.0})
        model.update(tree_map(lambda p: p + 0.01 * mx.random.normal(p.shape).astype(p.dtype), model.trainable_parameters()))
    mx.eval(model.parameters())
    return model.train()


def without_adapter(model: nn.Module, shape: ModelShape) -> nn.Module:
    """A second model of the same base weights, copied, as a peer's reference is."""
    base = build(shape, lora_layers=0)
    weights = [(name.replace(".linear.", "."), value) for name, value in tree_flatten(model.parameters()) if ".lora_" not in name]
    base.load_weights([(name, value + 0 if mx.issubdtype(value.dtype, mx.floating) else value) for name, value in weights])
    mx.eval(base.parameters())
    return base.eval()


@dataclass(frozen=True)
class Lengths:
    """Token counts of a data set, for groups made up to its measure (default: the released ML-1M groups, Qwen3 tokenizer)."""

    prefix: tuple[float, float] = (228, 90)  # mean, standard deviation
    title: int = 5
    after: int = 20  # of a question, after its two titles


def made_up(
    count: int, k: int, vocabulary: int, *, both: bool = False, prefix: int = 0, seed: int = 0, lengths: Lengths | None = None
) -> list[EncodedGroup]:
    """Random tokens in the form of ranking prompts: k questions that name two titles, each answered in both orders."""
    rng, lengths = np.random.default_rng(seed), lengths or Lengths()

    def draw(n: int) -> np.ndarray:
        return rng.integers(0, vocabulary, n).astype(np.int32)

    groups = []
    for _ in range(count):
        between, after, start, end, positive = draw(3), draw(lengths.after), draw(3), draw(2), draw(lengths.title)
        tails = []
        for _ in range(k):
            negative = draw(lengths.title)
            orders = [(positive, negative), (negative, positive)]
            for first, second in orders if both else [orders[rng.integers(2)]]:
                for a, b in orders:
                    tails.append(np.concatenate([first, between, second, after, start, a, between, b, end]))
        answer = len(start) + 2 * lengths.title + len(between) + len(end)
        length = prefix or int(np.clip(rng.normal(*lengths.prefix), 60, 600))
        pairs = np.arange(len(tails), dtype=np.int32).reshape(-1, 2)
        groups.append(EncodedGroup(draw(length), tuple(tails), (answer,) * len(tails), pairs))
    return groups


@dataclass
class Source:
    """Groups of one data file, cut to a vocabulary by taking ids modulo its size; or made up."""

    data: str
    tokenizer: Any
    vocabulary: int

    def groups(self, count: int, k: int, *, both: bool = False, chosen_only: bool = False) -> list[EncodedGroup]:
        if not self.data:
            made = made_up(count, k, self.vocabulary, both)
            return [chosen(g) for g in made] if chosen_only else made
        domains = prompts.with_domains({})
        examples = formats.load_examples(Path(self.data), "train", domains, True, notice)
        examples = [first_negatives(e, k) for e in examples if len(e.negatives) >= k][:count]
        encoder = Encoder(self.tokenizer, 2048, domains)
        found = [
            encoder.encode(e, printed_orders(e, i, both=both, redraw=False, seed=0), chosen_only=chosen_only)
            for i, e in enumerate(examples)
        ]
        return [replace(g, prefix=g.prefix % self.vocabulary, tails=tuple(t % self.vocabulary for t in g.tails)) for g in found]


def chosen(group: EncodedGroup) -> EncodedGroup:
    rows = group.pairs[:, 0]
    return replace(
        group,
        tails=tuple(group.tails[r] for r in rows),
        answer_lengths=tuple(group.answer_lengths[r] for r in rows),
        pairs=np.zeros((0, 2), np.int32),
    )


def tokenizer(path: str) -> Any:
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(Path(path)) if path else None


def embedded_shape() -> ModelShape:
    return ModelShape.of(assets.model_dir())
