"""Models with random weights, for measuring."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


def random_qwen3(shape: Any, dtype: mx.Dtype, lora_layers: int = -1, rank: int = 8) -> nn.Module:
    """A Qwen3 of a plan.ModelShape with random weights, quantized where it has few bits, with a LoRA adapter, ready
    to train."""
    from mlx_lm.models import qwen3
    from mlx_lm.tuner.utils import linear_to_lora_layers

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
    model.set_dtype(dtype)
    if shape.bits < 16:
        nn.quantize(model, group_size=shape.group_size, bits=shape.bits)
    model.freeze()
    if lora_layers:
        linear_to_lora_layers(model, lora_layers, {"rank": rank, "scale": 2.0, "dropout": 0.0})
    mx.eval(model.parameters())
    return model.train()
