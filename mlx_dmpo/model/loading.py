"""mlx-lm in and out: load, quantize, LoRA, adapters. The only room that imports mlx_lm."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jinja2 import TemplateSyntaxError
from mlx.utils import tree_flatten

from .. import assets
from ..config import CommonSettings
from ..errors import UserError
from ..machine import console, files, hub
from .device import on_cpu
from .encode import prints_date, today


@dataclass
class Loaded:
    """A model ready to score: weights, tokenizer, and what they are, for caches and manifests."""

    model: nn.Module
    tokenizer: Any
    name: str  # as given: a directory, a hub repository, or "embedded"
    path: Path
    vocabulary: int
    fingerprint: str  # of weights, config, tokenizer, template, quantization and dtype
    config: dict[str, Any]  # config.json, with what quantizing at load changed
    date: str = ""  # day (YYYY-MM-DD) that the chat template prints, where it prints one: an adapter's own, else today
    prompt: dict[str, Any] = field(default_factory=dict)  # the prompt template in use, for the adapter's config

    @property
    def dtype(self) -> mx.Dtype:
        """Of the activations: that of the base's first weight which is neither quantized nor an adapter's."""
        weights = tree_flatten(self.model.parameters())
        return next(w.dtype for name, w in weights if "lora" not in name and mx.issubdtype(w.dtype, mx.floating))


def _fingerprint(path: Path, extra: str) -> str:
    """SHA-256 over the files that decide a log-prob.

    Hub blobs are links named by their own hash, which is taken as it is.
    """
    digest = hashlib.sha256(extra.encode())
    patterns = ("*.safetensors", "config.json", "tokenizer*", "*.jinja", "vocab.json", "merges.txt")
    for file in sorted({f for pattern in patterns for f in path.glob(pattern)}):
        blob = os.path.basename(os.path.realpath(file))
        digest.update(f"{file.name}:{blob if re.fullmatch('[0-9a-f]{64}', blob) else files.sha256(file)}\n".encode())
    return digest.hexdigest()


def _is_directory(source: str) -> bool:
    """Whether a model's name is a directory (else a hub repository). Raises UserError for a name that is neither.

    What exists here wins over a repository of the same name, as in mlx-lm, with a note, since either may be meant.
    """
    path = Path(source)
    if path.exists():
        if not (path / "config.json").is_file():
            raise UserError(f"{source}: holds no config.json: name a model directory as mlx-lm loads it")
        if hub.REPOSITORY.fullmatch(source):
            console.notice(f"note: {source} is the directory of that name here, not the hub repository")
        return True
    if not hub.is_repository(source):
        raise hub.missing(source, "name a model directory or a hub repository such as mlx-community/Qwen3-0.6B-4bit")
    return False


def load(settings: CommonSettings) -> Loaded:
    """A local directory, or a hub repository (fetched only when named as one). Raises UserError for anything mlx-lm
    cannot load.

    Python files that a model brings are never run.
    """
    from mlx_lm import utils

    name = settings.model or "embedded"
    source = str(assets.model_dir()) if not settings.model else settings.model
    local = _is_directory(source)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            # explicit: otherwise transformers asks on stdin whether to run the model's code
            model, tokenizer, config = utils.load(
                source, lazy=True, return_config=True, tokenizer_config={"trust_remote_code": False}
            )
        path = Path(source) if local else utils.hf_repo_to_path(source)
    except (
        Exception
    ) as error:  # mlx-lm, transformers and the hub raise many kinds; each means "this is not a model we can load"
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if re.search(r"custom (code|module)", first):
            raise UserError(
                f"{source}: asks to run Python code of its own, which is never done here: name a model that mlx-lm "
                "knows"
            ) from error
        raise UserError(
            f"{source}: cannot be loaded as a causal language model ({first}): name a model that mlx-lm loads"
        ) from error
    if not hasattr(model, "layers"):
        raise UserError(f"{source}: has no layers: name an instruction-tuned model")
    check_chat_template(tokenizer, source)
    if settings.quantize is not None:
        if "quantization" in config:
            raise UserError(f"--quantize: {name} is quantized already: leave the flag out")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                model, config = utils.quantize_model(
                    model, config, settings.quantize_group_size, settings.quantize, settings.quantize_mode
                )
        except ValueError as error:
            raise UserError(f"--quantize: {error}: choose other bits, group size or mode") from None
    dtype = settings.dtype if settings.dtype != "auto" else "float32" if on_cpu() else ""
    if dtype:
        model.set_dtype(getattr(mx, dtype))
    model.freeze()
    mx.eval(model.parameters())
    quantized = json.dumps(config.get("quantization"), sort_keys=True)
    fingerprint = _fingerprint(path, f"{quantized} {dtype}")
    date = today() if prints_date(tokenizer) else ""
    vocabulary = int({**config.get("text_config", {}), **config}.get("vocab_size", len(tokenizer.get_vocab())))
    return Loaded(model, tokenizer, name, path, vocabulary, fingerprint, config, date)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a quantized weight counts as the weights it stands for."""
    from mlx_lm.utils import get_total_parameters

    return sum(v.size for _, v in tree_flatten(model.trainable_parameters())), get_total_parameters(model)


def load_tokenizer(name: str) -> Any:
    """A model's tokenizer without its weights: a local directory, or a hub repository. Raises UserError."""
    from mlx_lm import utils

    source = name or str(assets.model_dir())
    local = Path(source).is_dir() or _is_directory(source)
    if local and not (Path(source) / "tokenizer_config.json").is_file():
        raise UserError(
            f"{source}: holds no tokenizer_config.json: name a model directory, or one that holds its tokenizer"
        )
    try:
        path = Path(source) if local else utils.hf_repo_to_path(source)
        # the end-of-turn token may be in config.json or generation_config.json only
        config = utils.load_config(path) if (path / "config.json").is_file() else {}
        tokenizer = utils.load_tokenizer(path, {"trust_remote_code": False}, config.get("eos_token_id"))
    except (
        Exception
    ) as error:  # transformers and the hub raise many kinds; each means "this is not a tokenizer we can load"
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{source}: holds no tokenizer that can be loaded ({first}): name a model that mlx-lm loads"
        ) from error
    check_chat_template(tokenizer, source)
    return tokenizer


def check_chat_template(tokenizer: Any, source: str) -> None:
    """Raises UserError for a model without a chat template, without a default among several, or with one that is not
    Jinja. What a template refuses of a row's turns is the row's affair (`Encoder`)."""
    if tokenizer.chat_template is None:
        raise UserError(f"{source}: has no chat template: name an instruction-tuned model")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(
            f"{source}: chat template, line {error.lineno}: is not Jinja ({error.message}): correct it there, "
            "or use another model"
        ) from None
    except ValueError as error:
        if "multiple chat templates" in str(error):
            names = ", ".join(tokenizer.chat_template)
            raise UserError(
                f"{source}: has several chat templates ({names}) and none named default: name one of them default in "
                "the model's directory, or use another model"
            ) from None
    except Exception:  # a template may raise anything of these turns
        return


def import_mlx_lm() -> None:
    """Imports mlx-lm in the thread that calls it. To be called in the main thread before another one opens a model:
    its generation stream, made in a thread that ends first, aborts the process while Python ends.
    """
    import mlx_lm  # noqa: F401
