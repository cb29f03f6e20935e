"""mlx-lm in and out: load, quantise, LoRA, adapters. The only room that imports mlx_lm."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import assets, rundir
from .config import CommonSettings, Lora, TrainSettings
from .errors import UserError

ADAPTER_WEIGHTS = "adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass
class Loaded:
    """A model ready to score: weights, tokenizer, and what they are, for caches and manifests."""

    model: nn.Module
    tokenizer: Any
    name: str  # as given: a directory, a hub repository, or "embedded"
    path: Path
    vocabulary: int
    fingerprint: str  # of weights, config, tokenizer, template, quantisation and dtype


def on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def device_name() -> str:
    info = mx.device_info() if not on_cpu() else {}
    return str(info.get("device_name", mx.default_device().type.name if on_cpu() else "gpu"))


def _fingerprint(path: Path, extra: str) -> str:
    """SHA-256 over the files that decide a log-prob. Hub blobs are links named by their own hash, which is taken as it is."""
    digest = hashlib.sha256(extra.encode())
    patterns = ("*.safetensors", "config.json", "tokenizer*", "*.jinja", "vocab.json", "merges.txt")
    for file in sorted({f for pattern in patterns for f in path.glob(pattern)}):
        blob = os.path.basename(os.path.realpath(file))
        digest.update(f"{file.name}:{blob if re.fullmatch('[0-9a-f]{64}', blob) else rundir.sha256(file)}\n".encode())
    return digest.hexdigest()


def load(settings: CommonSettings) -> Loaded:
    """A local directory, or a hub repository (fetched only when named as one). Raises UserError for anything mlx-lm cannot load."""
    from mlx_lm import utils

    name = settings.model or "embedded"
    source = str(assets.model_dir()) if not settings.model else settings.model
    if Path(source).exists():
        if not (Path(source) / "config.json").is_file():
            raise UserError(f"{source}: holds no config.json: name a model directory as mlx-lm loads it")
    elif not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", source):
        raise UserError(f"{source}: no such directory: name a model directory or a hub repository such as mlx-community/Qwen3-0.6B-4bit")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model, tokenizer, config = utils.load(source, lazy=True, return_config=True)
        path = Path(source) if Path(source).exists() else utils.hf_repo_to_path(source)
    except UserError:
        raise
    except Exception as error:  # mlx-lm, transformers and the hub raise many kinds; each means "this is not a model we can load"
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source}: cannot be loaded as a causal language model ({first}): name a model that mlx-lm loads") from error
    if not hasattr(model, "layers") or tokenizer.chat_template is None:
        raise UserError(f"{source}: has no {'chat template' if hasattr(model, 'layers') else 'layers'}: name an instruction-tuned model")
    if settings.quantize is not None:
        if "quantization" in config:
            raise UserError(f"--quantize: {name} is quantised already: leave the flag out")
        try:
            model, config = utils.quantize_model(model, config, settings.quantize_group_size, settings.quantize, settings.quantize_mode)
        except ValueError as error:
            raise UserError(f"--quantize: {error}: choose other bits, group size or mode") from None
    dtype = settings.dtype if settings.dtype != "auto" else "float32" if on_cpu() else ""
    if dtype:
        model.set_dtype(getattr(mx, dtype))
    model.freeze()
    mx.eval(model.parameters())
    quantised = json.dumps(config.get("quantization"), sort_keys=True)
    fingerprint = _fingerprint(path, f"{quantised} {dtype} {'cpu' if on_cpu() else 'gpu'} {rundir.versions()['mlx']}")
    return Loaded(model, tokenizer, name, path, config["vocab_size"], fingerprint)


def random_qwen3(shape: Any, dtype: mx.Dtype, lora_layers: int = -1, rank: int = 8) -> nn.Module:
    """A Qwen3 of a plan.ModelShape with random weights, quantised where it has few bits, with a LoRA adapter, ready to train."""
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


def load_tokenizer(path: str) -> Any:
    """Raises UserError where the directory holds no tokenizer that mlx-lm loads."""
    from mlx_lm import utils

    if not (Path(path) / "tokenizer_config.json").is_file():
        raise UserError(f"{path}: holds no tokenizer_config.json: name a directory with a tokenizer")
    try:
        return utils.load_tokenizer(Path(path))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: its tokenizer cannot be loaded ({first}): name a directory with a tokenizer that mlx-lm loads") from error


def add_lora(model: nn.Module, settings: TrainSettings) -> None:
    """LoRA (or DoRA) on the linear layers of the last `num_layers`. Raises UserError for a key that matches no layer."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    lora = settings.lora_parameters
    if settings.num_layers == 0 or settings.num_layers > len(model.layers):
        raise UserError(
            f"num_layers: {settings.num_layers} does not fit a model of {len(model.layers)} layers: give 1 to {len(model.layers)}, or -1"
        )
    adaptable = nn.Linear | nn.QuantizedLinear | nn.Embedding | nn.QuantizedEmbedding
    within = {name for layer in model.layers for name, module in layer.named_modules() if isinstance(module, adaptable)}
    whole = {name for name, module in model.named_modules() if isinstance(module, adaptable)}
    for key in lora.keys:
        if key not in within | whole:
            raise UserError(f'lora_parameters.keys: "{key}" matches no layer of the model: choose among {", ".join(sorted(within))}')
    mx.random.seed(settings.seed)
    try:
        linear_to_lora_layers(model, settings.num_layers, _mlx_lm_lora(lora), use_dora=settings.fine_tune_type == "dora")
    except ValueError as error:
        raise UserError(f"lora_parameters: {error}: choose other keys") from None
    model.train()


def _mlx_lm_lora(lora: Lora) -> dict[str, Any]:
    return {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout, **({"keys": list(lora.keys)} if lora.keys else {})}


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a quantised weight counts as the weights it stands for."""
    from mlx_lm.utils import get_total_parameters

    return sum(v.size for _, v in tree_flatten(model.trainable_parameters())), get_total_parameters(model)


def adapter_config(settings: TrainSettings, base: Loaded) -> dict[str, Any]:
    """What mlx-lm reads beside the weights (fine_tune_type, num_layers, lora_parameters), and what the adapter belongs to."""
    return {
        "model": base.name,
        "fine_tune_type": settings.fine_tune_type,
        "num_layers": settings.num_layers,
        "lora_parameters": _mlx_lm_lora(settings.lora_parameters),
        "base_fingerprint": base.fingerprint,
    }


def read_adapter_config(path: str | Path) -> dict[str, Any]:
    """Raises UserError for a directory that is no finished adapter."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such adapter directory: name one that sft or dmpo wrote")
    if (path / "config.yaml").exists() and not rundir.is_complete(path):
        raise UserError(f"{path}: the run that writes it has not finished: let it finish, or train it anew")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (path / name).is_file():
            raise UserError(f"{path}: holds no {name}: name an adapter directory that sft, dmpo or mlx-lm wrote")
    config = rundir.read_json(path / ADAPTER_CONFIG)
    if not isinstance(config, dict) or "lora_parameters" not in config or "num_layers" not in config:
        raise UserError(f"{path / ADAPTER_CONFIG}: no LoRA adapter (num_layers or lora_parameters is missing): name a LoRA or DoRA adapter")
    return config


def load_adapter(base: Loaded, path: str | Path) -> dict[str, Any]:
    """Puts an adapter on a freshly loaded base and returns its config. Raises UserError where it belongs to another model."""
    from mlx_lm.tuner.utils import load_adapters

    config = read_adapter_config(path)
    try:
        load_adapters(base.model, str(path))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"{path}: is no adapter of {base.name} ({lines[1] if len(lines) > 1 else lines[0] if lines else error}): "
            f"name the model it was trained on{': ' + config['model'] if isinstance(config.get('model'), str) else ''}"
        ) from None
    stored = set(mx.load(str(Path(path) / ADAPTER_WEIGHTS)))
    missing = {name for name, _ in tree_flatten(base.model.trainable_parameters())} - stored
    if missing:
        raise UserError(f"{path}: is no adapter of {base.name} ({sorted(missing)[0]} is missing): name the model it was trained on")
    if config.get("base_fingerprint", base.fingerprint) != base.fingerprint:
        rundir.notice(f"note: {path} was trained on {config.get('model')}, or in another precision; here it goes on {base.name}")
    mx.eval(base.model.parameters())
    return config


def save_adapter(model: nn.Module, path: Path) -> None:
    with rundir.atomic(path) as temporary:
        mx.save_safetensors(str(temporary), dict(tree_flatten(model.trainable_parameters())))


def schedule_rate(form: dict[str, Any], step: int) -> float:
    """The learning rate of a 0-based step under mlx-lm's own form of a schedule: name, arguments, warmup, warmup_init.

    Raises UserError for a form that mlx-lm does not take.
    """
    from mlx_lm.tuner.utils import build_schedule

    try:
        return float(build_schedule(form)(mx.array(step)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"lr_schedule: {type(error).__name__}: {error}: write name, arguments and warmup as mlx-lm takes them") from None


def tracker(report_to: str, project: str, log_dir: Path, config: dict[str, Any]) -> Any:
    """mlx-lm's callback for wandb or swanlab, or None. Raises UserError where the tracker is not installed or not known."""
    if not report_to:
        return None
    from mlx_lm.tuner.callbacks import get_reporting_callbacks

    try:
        return get_reporting_callbacks(report_to, project or None, str(log_dir), config)
    except (ImportError, ValueError) as error:
        raise UserError(f"report_to: {error}: install the tracker or leave report_to out") from None
