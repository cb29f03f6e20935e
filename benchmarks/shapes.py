"""Models and groups that benchmarks run: shapes with random weights, and real groups or generated ones of the same
lengths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_dmpo import assets
from mlx_dmpo.core.tree import EncodedGroup
from mlx_dmpo.data import formats
from mlx_dmpo.machine.console import notice
from mlx_dmpo.model.cost import assumed_groups
from mlx_dmpo.model.encode import Encoder
from mlx_dmpo.model.random import random_qwen3
from mlx_dmpo.model.shape import BUILT_IN, ModelShape
from mlx_dmpo.prompts import pairwise
from mlx_dmpo.prompts.orders import first_negatives, printed_orders
from mlx_dmpo.prompts.template import built_in
from mlx_dmpo.tools import plan

# Body and head weigh in 2 layers and 10,880 columns as in the real model's 28 and 151,936
PROPORTIONAL = replace(BUILT_IN["qwen3-0.6b"], layers=2, vocabulary=10_880)

SHAPES: dict[str, ModelShape] = {
    "qwen3-0.6b-proportional": PROPORTIONAL,
    "qwen3-0.6b-2l": replace(PROPORTIONAL, vocabulary=BUILT_IN["qwen3-0.6b"].vocabulary),
    "qwen3-0.6b-proportional-4bit": replace(PROPORTIONAL, bits=4),
    **BUILT_IN,
    **{f"{name}-4bit": replace(shape, bits=4) for name, shape in BUILT_IN.items()},
}


# of a small model of each family; mlx-lm's names
FAMILY = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "moe_intermediate_size": 256,
}


def family_sizes(given: dict[str, Any]) -> dict[str, Any]:
    """given: a family's own arguments. Its windows, if it has any, are shorter than a history."""
    return FAMILY | ({"sliding_window": 128} if "sliding_window" in given else {})


def build(
    shape: ModelShape, *, lora_layers: int = -1, rank: int = 8, dtype: mx.Dtype | None = None, seed: int = 0
) -> nn.Module:
    """A random Qwen3 of the shape with a non-zero LoRA adapter on all linear layers.

    Without `dtype` float32 on a CPU, bfloat16 on a GPU.
    """
    mx.random.seed(seed)
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    model = random_qwen3(shape, dtype or (mx.float32 if on_cpu else mx.bfloat16), lora_layers, rank)
    model.update(tree_map(lambda p: p + 0.01 * mx.random.normal(p.shape).astype(p.dtype), model.trainable_parameters()))
    mx.eval(model.parameters())
    return model


def without_adapter(model: nn.Module, shape: ModelShape) -> nn.Module:
    """A second model of the same base weights, copied, as a peer's reference is."""
    base = build(shape, lora_layers=0)
    weights = [
        (name.replace(".linear.", "."), value)
        for name, value in tree_flatten(model.parameters())
        if ".lora_" not in name
    ]
    base.load_weights([(name, value + 0) for name, value in weights])
    mx.eval(base.parameters())
    return base.eval()


@dataclass
class Source:
    """Groups of one data file, cut to a vocabulary by taking ids modulo its size; or made up."""

    data: str
    tokenizer: Any
    vocabulary: int

    def groups(
        self,
        count: int,
        k: int,
        *,
        both: bool = False,
        chosen_only: bool = False,
        form: str = "pairwise",
        orders: int = 1,
    ) -> list[EncodedGroup]:
        if not self.data:
            made = assumed_groups(count, k, both=both, vocabulary=self.vocabulary, form=form)
            return [plan.chosen_only(g) for g in made] if chosen_only else made
        domains = pairwise.with_domains({})
        examples = formats.load_examples(Path(self.data), "train", domains, True, notice)
        examples = [first_negatives(e, k) for e in examples if len(e.negatives) >= k][:count]
        encoder = Encoder(self.tokenizer, 2048, built_in(form))
        order = partial(printed_orders, both=both, redraw=False, seed=0, form=form, count=orders)
        found = [encoder.encode(e, order(e, i), chosen_only=chosen_only) for i, e in enumerate(examples)]
        return [
            replace(g, prefix=g.prefix % self.vocabulary, tails=tuple(t % self.vocabulary for t in g.tails))
            for g in found
        ]


def tokenizer(path: str) -> Any:
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(Path(path)) if path else None


def embedded_shape() -> ModelShape:
    return ModelShape.of(assets.model_dir())
