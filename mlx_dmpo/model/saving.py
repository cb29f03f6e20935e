"""Model directories that mlx-lm loads."""

from __future__ import annotations

import contextlib
import copy
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from ..errors import UserError
from .adapters import adapted_layers
from .loading import Loaded


@contextlib.contextmanager
def mlx_writes() -> Iterator[None]:
    """MLX raises RuntimeError for a full disk: within the block it is an OSError, as everywhere else."""
    try:
        yield
    except RuntimeError as error:
        if re.match(r"\[(write|save)", str(error)):
            raise OSError(str(error)) from error
        raise


def _floating(base: Loaded) -> mx.Dtype:
    """The type that the base computes in: that of most of its floating-point parameters, scales and adapter
    left out.
    """
    names = re.compile(r"(^|\.)(scales|biases|lora_[ab]|m)$")
    found = [v.dtype for name, v in tree_flatten(base.model.parameters()) if not names.search(name)]
    return Counter(d for d in found if mx.issubdtype(d, mx.floating)).most_common(1)[0][0]


def fuse(base: Loaded, *, requantize: bool = False) -> None:
    """Puts the adapter's update into the weights, in place; a quantized base is dequantized whole, or quantized again.

    Dequantized weights take the base's floating-point type before anything is added to them: MLX returns bfloat16 for
    mxfp4, mxfp8 and nvfp4 whatever the base computes in, which holds these weights exactly but not an adapter's update.
    """
    from mlx_lm.utils import dequantize_model

    layers = adapted_layers(base.model)
    if requantize:
        base.model.update_modules(tree_unflatten([(name, layer.fuse()) for name, layer in layers.items()]))
        return
    dtype = _floating(base)
    quantized = {name for name, module in base.model.named_modules() if "scales" in module}
    dequantize_model(base.model)  # the layers inside the adapter's, too
    for name, module in base.model.named_modules():
        if name in quantized:
            module.weight = module.weight.astype(dtype)
    fused = [(name, layer.fuse()) for name, layer in layers.items()]
    for _, layer in fused:
        layer.weight = layer.weight.astype(dtype)
    base.model.update_modules(tree_unflatten(fused))
    base.config.pop("quantization", None)
    base.config.pop("quantization_config", None)


# what a model directory holds beside config and weights; never a Python file
COMPANIONS = tuple(
    "tokenizer* vocab* merges.txt special_tokens_map.json added_tokens.json chat_template* *.tiktoken "
    "generation_config.json LICENSE* NOTICE*".split()
)


def _companions(base: Loaded) -> list[Path]:
    """Raises UserError for a link to something that is not part of the model: its contents would be given away with the
    copy.
    """
    files = sorted({f for pattern in COMPANIONS for f in base.path.glob(pattern) if f.is_file() and f.suffix != ".py"})
    root = base.path.resolve()
    if root.parent.name == "snapshots":  # the hub's cache: snapshots/REVISION/file links to blobs/HASH
        root = root.parent.parent
    for file in files:
        if not file.resolve().is_relative_to(root):
            raise UserError(f"{file}: links to a file outside the model's directory: put the file itself there")
    return files


def _dtypes(path: Path) -> dict[str, mx.Dtype]:
    """Floating-point type of each weight as stored; a quantized weight has that of its scales."""
    weights: list[Any] = [mx.load(str(file)) for file in path.glob("model*.safetensors")]
    stored = {name: value.dtype for part in weights for name, value in part.items()}
    floating = {name: dtype for name, dtype in stored.items() if mx.issubdtype(dtype, mx.floating)}
    return {re.sub(r"scales$", "weight", name): dtype for name, dtype in floating.items()} | floating


def save_model(base: Loaded, path: Path, *, keep_dtypes: bool) -> None:
    """A model directory that mlx-lm loads: weights, config.json, tokenizer, chat template, generation config.

    keep_dtypes  weights take the types that the base has on disk, not those it was loaded in

    Weights are released as they are written, so that only one file's worth is in memory at a time: `base.model`
    cannot be used afterwards.
    """
    from mlx_lm import utils

    files = _companions(base)
    config = copy.deepcopy({k: v for k, v in base.config.items() if k != "auto_map"})
    if keep_dtypes:
        stored = _dtypes(base.path)
        usual = Counter(stored.values()).most_common(1)[0][0] if stored else mx.float32

        def cast(name: str, value: mx.array) -> mx.array:
            return value.astype(stored.get(name, usual)) if mx.issubdtype(value.dtype, mx.floating) else value

        base.model.update(tree_map_with_path(cast, base.model.parameters()))
    types = Counter(v.dtype for _, v in tree_flatten(base.model.parameters()) if mx.issubdtype(v.dtype, mx.floating))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(types.most_common(1)[0][0]).removeprefix(
        "mlx.core."
    )
    with mlx_writes():
        utils.save_model(path, base.model, donate_model=True)
    utils.save_config(config, path / "config.json")
    for file in files:
        shutil.copyfile(file, path / file.name)
