"""An adapter under PEFT's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import UserError
from ..machine import files
from ..model import adapters, loading

PEFT_FAMILIES = ("llama", "qwen2", "qwen3")  # whose layers have the same names in transformers


PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


_LINEAR = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}


_EMBEDDING = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}


def peft_tensors(model: Any) -> dict[str, mx.array]:
    """An adapter under PEFT's names: lora_a (in, r) -> lora_A (r, in), lora_b (r, out) -> lora_B (out, r), m (out,)
    as it is."""
    return {
        f"base_model.model.{name}.{theirs}": mx.contiguous(layer[ours].T)
        for name, layer in adapters.adapted_layers(model).items()
        for ours, theirs in (_EMBEDDING if "embedding" in layer else _LINEAR).items()
        if ours in layer
    }


def peft_config(base: loading.Loaded, stored: Mapping[str, Any], base_name: str) -> dict[str, Any]:
    """PEFT's adapter_config.json. Raises UserError for an adapter that PEFT cannot express."""
    family = base.config.get("model_type")
    if family not in PEFT_FAMILIES:
        raise UserError(
            f"--to peft: layers of {family} are named otherwise in transformers (known: "
            f"{', '.join(PEFT_FAMILIES)}): export --to mlx"
        )
    dora = stored.get("fine_tune_type", "lora") == "dora"
    layers = adapters.adapted_layers(base.model)
    embeddings = [name for name, layer in layers.items() if "embedding" in layer]
    if embeddings and (dora or "lm_head" not in base.model):
        why = (
            "DoRA on embeddings has other norms in PEFT" if dora else "tied embeddings: PEFT adapts the input side only"
        )
        raise UserError(f"--to peft: the adapter sits on {embeddings[0]} ({why}): export --to mlx")
    places = {name: re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name) for name in layers}
    numbers = sorted({int(m[1]) for m in places.values() if m})
    within = {m[2] for m in places.values() if m}
    regular = len(numbers) * len(within) == sum(m is not None for m in places.values())
    lora = stored["lora_parameters"]
    alpha = lora["scale"] * lora["rank"]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora["rank"],
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # mlx-lm's scale is alpha / r
        "lora_dropout": lora["dropout"],
        "use_dora": dora,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        # names within a layer, or whole names of what stands outside the layers (or in single ones)
        "target_modules": sorted(within | {n for n, m in places.items() if not m}) if regular else sorted(places),
        "layers_to_transform": numbers if regular and 0 < len(numbers) < len(base.model.layers) else None,
        "layers_pattern": "layers" if regular and 0 < len(numbers) < len(base.model.layers) else None,
        "inference_mode": True,
    }


def read_peft(model: Any, path: Path) -> None:
    """Puts the tensors and the scale of a PEFT directory on a model's adapted layers, in place: the way back of
    `peft_tensors`."""
    stored: Any = mx.load(str(path / PEFT_WEIGHTS))
    config = files.read_json(path / PEFT_CONFIG)
    for name, layer in adapters.adapted_layers(model).items():
        for ours, theirs in (_EMBEDDING if "embedding" in layer else _LINEAR).items():
            if ours in layer:
                layer[ours] = stored[f"base_model.model.{name}.{theirs}"].T
        layer.scale = config["lora_alpha"] / config["r"]
