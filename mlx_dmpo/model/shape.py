"""Sizes of a decoder."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError


def layer_count(directory: Path) -> int | None:
    """The layers of a model directory, from its config.json; None where that does not say."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        layers = {**config, **config.get("text_config", {})}.get("num_hidden_layers")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return layers if type(layers) is int else None


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder of the Qwen3 kind.

    `bits` is 16 or 32 for plain weights, fewer for quantized ones (groups of 64).
    """

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
                f"{source}: no such directory or config.json: name one, or one of {', '.join(BUILT_IN)} (with "
                "-4bit, -8bit at the end for a quantized one)"
            )
        path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
        try:
            return cls.of_config(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror or error}): name a model directory or its config.json"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: not the config.json of a decoder model ({error}): name a model directory or its config.json"
            ) from None

    @classmethod
    def of_config(cls, config: dict[str, Any]) -> ModelShape:
        """What config.json holds. Raises KeyError, TypeError or AttributeError for that of no decoder."""
        config = {**config, **config.get("text_config", {})}  # of a model that reads pictures too
        heads, quantization = config["num_attention_heads"], config.get("quantization") or {}
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
            bits=quantization.get("bits", 16),
            group_size=quantization.get("group_size", 64),
        )

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
        """In memory. Quantized linear and embedding weights carry a scale and a bias of the activations' type a
        group."""
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
