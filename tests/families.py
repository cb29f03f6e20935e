"""A small random model of each family that the shared-prefix scorer serves, and of some that it must refuse."""

import importlib
from dataclasses import fields

import mlx.core as mx
import mlx.nn as nn
import tiny

WINDOW = 24  # shorter than the sequences of tiny's groups
SIZES = tiny.COMMON | {"num_hidden_layers": 4, "tie_word_embeddings": False}
LAYERS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
SLIDING = {"layer_types": LAYERS, "sliding_window": WINDOW}
# transformers writes these for Ministral 3; positions beyond 16 scale their queries
FAR = {
    "type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": WINDOW, "sliding_window_pattern": 3}

# name -> (mlx-lm's module, its arguments beside SIZES)
FAMILIES = {
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 32, **EXPERTS}),
    "qwen2": ("qwen2", {}),
    "llama": ("llama", {"rope_scaling": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama, sliding": ("llama", SLIDING),
    "mistral": ("llama", {"model_type": "mistral", "head_dim": 32}),
    "ministral3": ("ministral3", {"rope_parameters": FAR, **SLIDING}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "gemma3_text": ("gemma3_text", GEMMA),
    "gemma3": ("gemma3", GEMMA),
    "mistral3": ("mistral3", {"rope_parameters": FAR, **SLIDING}),
}
GRANITE = {"logits_scaling": 4.0, "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
GPT2 = {"n_ctx": 512, "n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 512, "layer_norm_epsilon": 1e-5}
# family -> what the one line names, and the arguments
REFUSED = {
    "granite": ("granite has logits_scaling in its model", {**GRANITE, "attention_bias": False, "mlp_bias": False}),
    "gemma2": ("softcapping", {"head_dim": 32}),
    "gemma": ("differs from the plain one", {"head_dim": 32}),  # which scales its embeddings, and no name tells
    "cohere2": ("cohere2 has n_heads in its layer", {"head_dim": 16, "sliding_window": WINDOW}),
    "olmo2": ("olmo2 lacks input_layernorm", {}),
    "phi3": ("phi3 has num_hidden_layers in its attention", {"head_dim": 16}),
    "gpt2": ("gpt2 has h in its body", GPT2),
}


def build(module, given, *, bits=0, lora_layers=3, seed=0, keys=None, **sizes):
    """A random model with a non-zero adapter on the last layers; `bits` quantizes it first."""
    mx.random.seed(seed)
    arch = importlib.import_module(f"mlx_lm.models.{module}")
    given = SIZES | {"model_type": module} | given | sizes
    if "text_config" in {f.name for f in fields(arch.ModelArgs)}:  # a model that reads pictures too
        inner = {"gemma3": "gemma3_text", "mistral3": "ministral3"}[module]
        given = {"model_type": module, "text_config": given | {"model_type": inner}, "vocab_size": given["vocab_size"]}
    made = arch.Model(arch.ModelArgs.from_dict(given))
    if bits:
        nn.quantize(made, group_size=32, bits=bits)
    made.freeze()
    if lora_layers:
        tiny.adapt(made, {"keys": keys} if keys else {}, lora_layers)
    mx.eval(made.parameters())
    return made.train()


def family(name, **options):
    module, given = FAMILIES[name]
    return build(module, given, **options)
