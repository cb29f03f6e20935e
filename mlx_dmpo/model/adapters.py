"""LoRA and DoRA adapters: attach, read, load, save."""

from __future__ import annotations

import contextlib
import re
from datetime import date
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..config import Lora, TrainSettings
from ..errors import UserError
from ..machine import console, files, run_directory
from .loading import Loaded

ADAPTER_WEIGHTS = "adapters.safetensors"


ADAPTER_CONFIG = "adapter_config.json"


def add_lora(model: nn.Module, settings: TrainSettings) -> None:
    """LoRA (or DoRA) on the linear layers of the last `num_layers`.

    Raises UserError for a key that matches no layer.
    """
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
    from mlx_lm.tuner.utils import linear_to_lora_layers

    lora = settings.lora_parameters
    check_layers(settings, len(model.layers))
    adaptable = (
        nn.Linear,
        nn.QuantizedLinear,
        nn.Embedding,
        nn.QuantizedEmbedding,
        SwitchLinear,
        QuantizedSwitchLinear,
    )
    within = {name for layer in model.layers for name, module in layer.named_modules() if isinstance(module, adaptable)}
    whole = {name for name, module in model.named_modules() if isinstance(module, adaptable)}
    for key in lora.keys:
        if key not in within | whole:
            raise UserError(
                f'lora_parameters.keys: "{key}" matches no layer of the model: choose among {", ".join(sorted(within))}'
            )
    odd = {m.bits for m in model.modules() if isinstance(m, nn.QuantizedLinear)} - {2, 4, 8}
    if settings.fine_tune_type == "dora" and odd:  # mlx-lm counts a packed word's weights as 32 // bits
        raise UserError(no_dora(max(odd)))
    packed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.QuantizedEmbedding) and name in lora.keys
    ]
    if settings.fine_tune_type == "dora" and packed:
        raise UserError(
            f"lora_parameters.keys: mlx-lm has no DoRA on a quantized embedding ({packed[0]}): use lora, or leave the "
            "key out"
        )
    mx.random.seed(settings.seed)
    try:
        linear_to_lora_layers(
            model, settings.num_layers, _mlx_lm_lora(lora), use_dora=settings.fine_tune_type == "dora"
        )
    except ValueError as error:
        raise UserError(f"lora_parameters: {error}: choose other keys") from None
    model.train()


def check_layers(settings: TrainSettings, layers: int) -> None:
    """Raises UserError where `num_layers` does not fit a model of so many layers."""
    if settings.num_layers == 0 or settings.num_layers > layers:
        raise UserError(
            f"num_layers: {settings.num_layers} does not fit a model of {layers} layers: give 1 to {layers}, or -1"
        )


def no_dora(bits: int) -> str:
    return f"fine_tune_type: mlx-lm has no DoRA on {bits}-bit weights: use lora, or quantize to 2, 4 or 8 bits"


def _mlx_lm_lora(lora: Lora) -> dict[str, Any]:
    return {
        "rank": lora.rank,
        "scale": lora.scale,
        "dropout": lora.dropout,
        **({"keys": list(lora.keys)} if lora.keys else {}),
    }


def adapter_config(settings: TrainSettings, base: Loaded) -> dict[str, Any]:
    """What mlx-lm reads beside the weights (fine_tune_type, num_layers, lora_parameters), what the adapter belongs to,
    and the day that its prompts show, where the chat template prints one."""
    return {
        "model": base.name,
        "fine_tune_type": settings.fine_tune_type,
        "num_layers": settings.num_layers,
        "lora_parameters": _mlx_lm_lora(settings.lora_parameters),
        "base_fingerprint": base.fingerprint,
        **({"template_date": base.date} if base.date else {}),
        **({"prompt": base.prompt} if base.prompt else {}),
    }


def read_adapter_config(path: str | Path) -> dict[str, Any]:
    """Raises UserError for a directory that is not a finished adapter."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such adapter directory: name one that sft or dmpo wrote")
    if (path / "config.yaml").exists() and not run_directory.is_complete(path):
        raise UserError(f"{path}: the run that writes it has not finished: let it finish, or train it again")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (path / name).is_file():
            raise UserError(f"{path}: holds no {name}: name an adapter directory that sft, dmpo or mlx-lm wrote")
    config = files.read_json(path / ADAPTER_CONFIG)
    if not isinstance(config, dict) or "lora_parameters" not in config or "num_layers" not in config:
        raise UserError(
            f"{path / ADAPTER_CONFIG}: not a LoRA adapter (num_layers or lora_parameters is missing): name a LoRA or "
            "DoRA adapter"
        )
    lora = config["lora_parameters"]
    day = config.get("template_date", "2000-01-01")
    fits = {
        "template_date": isinstance(day, str) and bool(re.fullmatch(r"\d{4}-\d\d-\d\d", day)) and _is_day(day),
        "fine_tune_type": config.get("fine_tune_type", "lora") in ("lora", "dora"),
        "num_layers": type(config["num_layers"]) is int,
        "lora_parameters": isinstance(lora, dict),
    }
    if isinstance(lora, dict):
        keys = lora.get("keys")
        fits |= {
            "rank": type(lora.get("rank")) is int and 1 <= lora["rank"] <= 65536,
            "scale": type(lora.get("scale")) in (int, float)
            and abs(lora["scale"]) < 1e9,  # false for NaN and infinities too
            "dropout": type(lora.get("dropout")) in (int, float) and 0 <= lora["dropout"] < 1,
            "keys": keys is None or (isinstance(keys, list) and all(isinstance(k, str) for k in keys)),
        }
    for name in (name for name, fit in fits.items() if not fit):
        value = repr({**config, **lora}.get(name) if isinstance(lora, dict) else config.get(name))
        raise UserError(
            f"{path / ADAPTER_CONFIG}: {name} {value[:60]} is not that of a LoRA or DoRA adapter: write what mlx-lm "
            "writes there"
        )
    return config


def _is_day(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(date.fromisoformat(text))
    return False


def load_adapter(base: Loaded, path: str | Path) -> dict[str, Any]:
    """Puts an adapter on a freshly loaded base and returns its config.

    Raises UserError where it belongs to another model.
    """
    from mlx_lm.tuner.utils import load_adapters

    config = read_adapter_config(path)
    try:
        load_adapters(base.model, str(path))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"{path}: not an adapter of {base.name} ({lines[1] if len(lines) > 1 else lines[0] if lines else error}): "
            f"name the model it was trained on{': ' + config['model'] if isinstance(config.get('model'), str) else ''}"
        ) from None
    stored = set(mx.load(str(Path(path) / ADAPTER_WEIGHTS)))
    missing = {name for name, _ in tree_flatten(base.model.trainable_parameters())} - stored
    if missing:
        raise UserError(
            f"{path}: not an adapter of {base.name} ({sorted(missing)[0]} is missing): name the model it was trained on"
        )
    if config.get("base_fingerprint", base.fingerprint) != base.fingerprint:
        console.notice(
            f"note: {path} was trained on {config.get('model')}, or in another precision; "
            f"here it is loaded on {base.name}"
        )
    base.date = base.date and str(config.get("template_date", base.date))
    mx.eval(base.model.parameters())
    return config


def template_date(run: str | Path) -> str:
    """The day that the prompts of an unfinished run show, from its newest checkpoint; "" where none says."""
    for path in sorted(Path(run).glob(f"{run_directory.CHECKPOINTS}/[0-9]*/{ADAPTER_CONFIG}"), reverse=True):
        with contextlib.suppress(UserError):
            config = files.read_json(path)
            day = config.get("template_date") if isinstance(config, dict) else None
            if isinstance(day, str) and _is_day(day):
                return day
    return ""


def save_arrays(path: Path, tree: Any) -> None:
    """A tree of arrays as safetensors under exactly this name.

    Raises OSError with its number, which mlx itself does not.
    """
    with open(path, "wb") as file:
        mx.save_safetensors(file, dict(tree_flatten(tree)))


def save_adapter(model: nn.Module, path: Path) -> None:
    with files.atomic(path) as temporary:
        save_arrays(temporary, model.trainable_parameters())


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that an adapter sits on, by name."""
    return {name: module for name, module in model.named_modules() if "lora_a" in module}
