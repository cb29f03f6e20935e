"""What the shared-prefix scorer reads off a decoder of mlx-lm: its parts, by name, and each layer's attention window.

No list of model types: a decoder is understood when all it has is named here. A name that is not, such as a multiplier
of the residual stream, means arithmetic that the scorer would leave out. What names cannot tell, the self-check finds.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .recompute import recomputed

# Submodules and other attributes that are computed with, or that change nothing; those in NEEDED must be there.
KNOWN = {
    "attention": "q_proj k_proj v_proj o_proj q_norm k_norm rope n_heads n_kv_heads scale head_dim repeats layer_idx "
    "is_sliding scaling_beta original_max_position_embeddings args",
    "layer": "self_attn mlp input_layernorm post_attention_layernorm pre_feedforward_layernorm "
    "post_feedforward_layernorm use_sliding num_attention_heads hidden_size args",
    "body": "embed_tokens layers norm window_size sliding_window sliding_window_pattern layer_types fa_idx swa_idx "
    "vocab_size num_hidden_layers pipeline_rank pipeline_size start_idx end_idx args",
    "model": "model lm_head model_type tie_word_embeddings args",
}
NEEDED = {
    "attention": "q_proj k_proj v_proj o_proj rope n_heads n_kv_heads scale",
    "layer": "self_attn mlp input_layernorm post_attention_layernorm",
    "body": "embed_tokens layers norm",
    "model": "model args",
}


def decoder(model: nn.Module) -> nn.Module:
    """The language model of a model that also reads pictures (gemma3, mistral3), or the model itself."""
    inner: Any = getattr(model, "language_model", model)
    return inner


def unsupported(model: nn.Module) -> str:
    """Why the shared-prefix scorer does not understand this model, or an empty string."""
    inner = decoder(model)
    body = getattr(inner, "model", None)
    layers = list(getattr(body, "layers", ()))
    parts = [("model", inner), ("body", body), *(("layer", layer) for layer in layers)]
    parts += [("attention", getattr(layer, "self_attn", None)) for layer in layers]
    kind = getattr(model, "model_type", "?")
    for name, part in parts:
        if part is None:
            return f"model type {kind} has no {name} that the shared-prefix scorer knows"
        has = {n for n in (*part, *vars(part)) if not n.startswith("_")}
        if odd := sorted(has - set(KNOWN[name].split())) or sorted(set(NEEDED[name].split()) - has):
            verb = "has" if odd[0] in has else "lacks"
            return f"model type {kind} {verb} {odd[0]} in its {name}, which the shared-prefix scorer does not know"
    return ""


def _sandwiched(layer: nn.Module) -> bool:
    """Gemma 3: the outputs of attention and MLP pass a norm too."""
    return "pre_feedforward_layernorm" in layer


def embed(model: nn.Module, tokens: mx.array) -> mx.array:
    """(N,) -> (N, D): what enters the first layer. Gemma multiplies by sqrt(D), rounded to bfloat16."""
    h = model.model.embed_tokens(tokens)
    if _sandwiched(model.model.layers[0]):
        h = h * mx.array(h.shape[-1] ** 0.5, mx.bfloat16).astype(h.dtype)
    return h


def window_name(model: nn.Module) -> str:
    """The attribute of the model's body that holds the length of its attention windows."""
    return "window_size" if hasattr(model.model, "window_size") else "sliding_window"


def windows(model: nn.Module) -> list[int | None]:
    """Of each layer: how many tokens back its attention reaches, the token itself counted; None for all of them."""
    width = getattr(model.model, window_name(model), None)
    slides = [
        getattr(layer, "use_sliding", False) or getattr(layer.self_attn, "is_sliding", False)
        for layer in model.model.layers
    ]
    return [width if s else None for s in slides]


def heads(model: nn.Module) -> list[tuple[int, int]]:
    """Of each layer: how many heads of queries, and of keys and values."""
    return [(layer.self_attn.n_heads, layer.self_attn.n_kv_heads) for layer in model.model.layers]


def scale_queries(attention: nn.Module, q: mx.array, positions: mx.array) -> mx.array:
    """Ministral 3: queries far beyond the trained length count more, as in Llama 4.  (M, H, d), (M,) -> (M, H, d)."""
    beta = getattr(attention, "scaling_beta", 0)
    if not beta:
        return q
    periods = mx.floor(positions / attention.original_max_position_embeddings)
    return q * (1 + beta * mx.log(1 + periods)).astype(q.dtype)[:, None, None]


def rest_of_layer(layer: nn.Module, h: mx.array, attended: mx.array, lean: bool, seed: int | None) -> mx.array:
    """A layer after its attention.  h (M, D) what entered it, attended (M, D) attention's output -> (M, D)."""
    if not _sandwiched(layer):
        h = h + attended
        return h + _mlp(layer.mlp, layer.post_attention_layernorm, h, lean, seed)
    h = _add(h, layer.post_attention_layernorm(attended))
    return _add(h, layer.post_feedforward_layernorm(_mlp(layer.mlp, layer.pre_feedforward_layernorm, h, lean, seed)))


def project(modules: Sequence[nn.Module], x: mx.array) -> list[mx.array]:
    """[m(x) for m in modules]: projections of the same input.  (N, D) -> (N, out) each

    Of LoRA (y = W x + scale B A x), the small products with x are one, here and in the backward pass, and the scale is
    in their result instead of in the wide one. Other modules are called.
    """
    if not all(_is_lora(m) and (m.dropout._p_1 == 1 or not m.dropout.training) for m in modules):
        return [m(x) for m in modules]
    low = x @ mx.concatenate([m.scale * m.lora_a for m in modules], axis=1)  # (N, all ranks)
    parts = mx.split(low, list(itertools.accumulate(m.lora_a.shape[1] for m in modules[:-1])), axis=1)
    return [_plus_product(m.linear(x), part, m.lora_b) for m, part in zip(modules, parts, strict=True)]


def _is_lora(m: nn.Module) -> bool:
    """Whether it is mlx-lm's LoRA of a linear layer, not DoRA; the self-check compares what comes out."""
    return set(m) == {"linear", "dropout", "lora_a", "lora_b"} and type(m.linear) in (nn.Linear, nn.QuantizedLinear)


def _plus_product(y: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """y + a @ b in y's type, the product in a's and b's."""
    return mx.addmm(y, a, b) if y.dtype == a.dtype == b.dtype else y + (a @ b).astype(y.dtype)


def _mlp(mlp: nn.Module, norm: nn.Module, h: mx.array, lean: bool, seed: int | None) -> mx.array:
    """MLP of the norm of h.  (M, D) -> (M, D)

    lean  of a SwiGLU MLP, h, gate and up alone are kept for the backward pass: norm and activation are run again
          there, products are not
    seed  draws the dropout masks of both halves, so that they are the same when run again
    """
    if not (lean and _is_swiglu(mlp)):
        return mlp(norm(h))
    first = {"norm": norm, "gate": mlp.gate_proj, "up": mlp.up_proj}

    def gate_and_up(parameters: Any, h: mx.array) -> tuple[mx.array, mx.array]:
        if seed is not None:
            mx.random.seed(seed + 1_000_003)
        for name, part in first.items():
            part.update(parameters.get(name, {}))
        x = norm(h)
        gate, up = project([mlp.gate_proj, mlp.up_proj], x)
        return gate, up

    def down(parameters: Any, gate: mx.array, up: mx.array) -> mx.array:
        if seed is not None:
            mx.random.seed(seed + 2_000_003)
        mlp.down_proj.update(parameters)
        return project([mlp.down_proj], _swiglu(gate, up)[0])[0]

    gate, up = recomputed(gate_and_up, {name: part.trainable_parameters() for name, part in first.items()}, h)
    return recomputed(down, mlp.down_proj.trainable_parameters(), gate, up)


def _swiglu_forward(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
    sigmoid = mx.sigmoid(gate)
    return gate * sigmoid * up, sigmoid


def _swiglu_backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
    """Fewer arrays at once than automatic differentiation holds: they are the highest point of a short step."""
    (gate, up), sigmoid = primals, outputs[1]
    scaled = cotangents[0] * sigmoid
    return scaled * up * (1 + gate * (1 - sigmoid)), scaled * gate


_swiglu: Any = mx.custom_function(_swiglu_forward)
_swiglu.vjp(_swiglu_backward)


def _is_swiglu(mlp: nn.Module) -> bool:
    """Whether down(silu(gate) * up) is all that it computes; the self-check compares what comes out."""
    whole = set(mlp.children()) == {"gate_proj", "up_proj", "down_proj"}
    return whole and hasattr(sys.modules[type(mlp).__module__], "swiglu")


def _add(x: mx.array, y: mx.array) -> mx.array:
    """x + y; in float16, whose range Gemma leaves, clipped to it."""
    if x.dtype != mx.float16:
        return x + y
    bound = mx.finfo(mx.float16).max
    return mx.clip(x.astype(mx.float32) + y.astype(mx.float32), -bound, bound).astype(mx.float16)
