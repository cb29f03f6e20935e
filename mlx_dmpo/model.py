"""mlx-lm in and out: load, quantise, LoRA, adapters. The only room that imports mlx_lm."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from . import assets, rundir
from .config import CommonSettings, Lora, TrainSettings
from .errors import UserError

ADAPTER_WEIGHTS = "adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
REPOSITORY = re.compile(r"[A-Za-z0-9]\w*(?:[.-]\w+)*/\w+(?:[.-]\w+)*", re.ASCII)  # owner/name: no "..", no leading dot or slash


@dataclass
class Loaded:
    """A model ready to score: weights, tokenizer, and what they are, for caches and manifests."""

    model: nn.Module
    tokenizer: Any
    name: str  # as given: a directory, a hub repository, or "embedded"
    path: Path
    vocabulary: int
    fingerprint: str  # of weights, config, tokenizer, template, quantisation and dtype
    config: dict[str, Any]  # config.json, with what quantising at load changed


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


def _is_directory(source: str) -> bool:
    """Whether a model's name is a directory (else a hub repository). Raises UserError for a name that is neither.

    What exists here wins over a repository of the same name, as in mlx-lm, and is told, since either may be meant.
    """
    path = Path(source)
    if path.exists():
        if not (path / "config.json").is_file():
            raise UserError(f"{source}: holds no config.json: name a model directory as mlx-lm loads it")
        if REPOSITORY.fullmatch(source):
            rundir.notice(f"note: {source} is the directory of that name here, not the hub repository")
        return True
    if not REPOSITORY.fullmatch(source):
        raise UserError(f"{source}: no such directory: name a model directory or a hub repository such as mlx-community/Qwen3-0.6B-4bit")
    if path.parent.is_dir():
        rundir.notice(f"note: there is no directory {source} here: it is taken for the hub repository of that name")
    return False


def load(settings: CommonSettings) -> Loaded:
    """A local directory, or a hub repository (fetched only when named as one). Raises UserError for anything mlx-lm cannot load.

    Python files that a model brings are never run.
    """
    from mlx_lm import utils

    name = settings.model or "embedded"
    source = str(assets.model_dir()) if not settings.model else settings.model
    local = _is_directory(source)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            # said outright: where it is left open, transformers asks on stdin whether to run the model's code
            model, tokenizer, config = utils.load(source, lazy=True, return_config=True, tokenizer_config={"trust_remote_code": False})
        path = Path(source) if local else utils.hf_repo_to_path(source)
    except Exception as error:  # mlx-lm, transformers and the hub raise many kinds; each means "this is not a model we can load"
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if re.search(r"custom (code|module)", first):
            raise UserError(
                f"{source}: asks to run Python code of its own, which is never done here: name a model that mlx-lm knows"
            ) from error
        raise UserError(f"{source}: cannot be loaded as a causal language model ({first}): name a model that mlx-lm loads") from error
    if not hasattr(model, "layers") or tokenizer.chat_template is None:
        raise UserError(f"{source}: has no {'chat template' if hasattr(model, 'layers') else 'layers'}: name an instruction-tuned model")
    if settings.quantize is not None:
        if "quantization" in config:
            raise UserError(f"--quantize: {name} is quantised already: leave the flag out")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
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
    return Loaded(model, tokenizer, name, path, config["vocab_size"], fingerprint, config)


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
    odd = {m.bits for m in model.modules() if isinstance(m, nn.QuantizedLinear)} - {2, 4, 8}
    if settings.fine_tune_type == "dora" and odd:  # mlx-lm counts a packed word's weights as 32 // bits
        raise UserError(f"fine_tune_type: mlx-lm has no DoRA on {max(odd)}-bit weights: use lora, or quantise to 2, 4 or 8 bits")
    packed = [name for name, module in model.named_modules() if isinstance(module, nn.QuantizedEmbedding) and name in lora.keys]
    if settings.fine_tune_type == "dora" and packed:
        raise UserError(f"lora_parameters.keys: mlx-lm has no DoRA on a quantised embedding ({packed[0]}): use lora, or leave the key out")
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
    lora = config["lora_parameters"]
    fits = {
        "fine_tune_type": config.get("fine_tune_type", "lora") in ("lora", "dora"),
        "num_layers": type(config["num_layers"]) is int,
        "lora_parameters": isinstance(lora, dict),
    }
    if isinstance(lora, dict):
        keys = lora.get("keys")
        fits |= {
            "rank": type(lora.get("rank")) is int and 1 <= lora["rank"] <= 65536,
            "scale": type(lora.get("scale")) in (int, float) and abs(lora["scale"]) < 1e9,  # false for NaN and infinities too
            "dropout": type(lora.get("dropout")) in (int, float) and 0 <= lora["dropout"] < 1,
            "keys": keys is None or (isinstance(keys, list) and all(isinstance(k, str) for k in keys)),
        }
    for name in (name for name, fit in fits.items() if not fit):
        value = repr({**config, **lora}.get(name) if isinstance(lora, dict) else config.get(name))
        raise UserError(
            f"{path / ADAPTER_CONFIG}: {name} {value[:60]} is not that of a LoRA or DoRA adapter: write what mlx-lm writes there"
        )
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


@contextlib.contextmanager
def mlx_writes() -> Iterator[None]:
    """MLX tells a full disk by a RuntimeError: within the block it is an OSError, as everywhere else."""
    try:
        yield
    except RuntimeError as error:
        if re.match(r"\[(write|save)", str(error)):
            raise OSError(str(error)) from error
        raise


def load_tokenizer(name: str) -> Any:
    """A model's tokenizer without its weights: a local directory, or a hub repository. Raises UserError."""
    from mlx_lm import utils

    source = name or str(assets.model_dir())
    local = Path(source).is_dir() or _is_directory(source)
    if local and not (Path(source) / "tokenizer_config.json").is_file():
        raise UserError(f"{source}: holds no tokenizer_config.json: name a model directory, or one that holds its tokenizer")
    try:
        path = Path(source) if local else utils.hf_repo_to_path(source)
        tokenizer = utils.load_tokenizer(path, {"trust_remote_code": False})
    except Exception as error:  # transformers and the hub raise many kinds; each means "this is not a tokenizer we can load"
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source}: holds no tokenizer that can be loaded ({first}): name a model that mlx-lm loads") from error
    if tokenizer.chat_template is None:
        raise UserError(f"{source}: has no chat template: name an instruction-tuned model")
    return tokenizer


@dataclass(frozen=True)
class Answer:
    """A sampled answer. logp is the policy's, in nats, of the tokens and the end-of-turn token, before temperature, top-p and top-k."""

    tokens: tuple[int, ...]  # without the end-of-turn token
    logp: float
    finished: bool  # the model ended it; else it was cut at max_tokens


def sample_answers(
    base: Loaded, prompts: Sequence[Sequence[int]], n: int, *, temperature: float, top_p: float, top_k: int, max_tokens: int, seed: int
) -> list[list[Answer]]:
    """n answers to each prompt (of at least two tokens), through mlx-lm's batch generator, all at once; each prompt is read once.

    Raises UserError for a model whose caches mlx-lm cannot batch.
    """
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.sample_utils import make_sampler

    if on_cpu():  # compiling for the CPU calls a C++ compiler, which need not be there
        mx.disable_compile()
    try:
        mx.random.seed(seed)
        caches = []
        for prompt in prompts:
            cache = make_prompt_cache(base.model)
            base.model(mx.array(list(prompt[:-1]))[None], cache=cache)
            mx.eval([c.state for c in cache])
            caches += [cache] * n  # the generator merges them into its own
        generator = BatchGenerator(
            base.model,
            stop_tokens=[[t] for t in base.tokenizer.eos_token_ids],
            sampler=make_sampler(temperature, top_p, top_k=top_k),
            completion_batch_size=len(prompts) * n,
            prefill_batch_size=len(prompts) * n,
        )
        try:
            places = generator.insert([[p[-1]] for p in prompts for _ in range(n)], [max_tokens] * (len(prompts) * n), caches=caches)
            tokens: dict[int, list[int]] = {uid: [] for uid in places}
            logps, finished = dict.fromkeys(places, 0.0), dict.fromkeys(places, False)
            while responses := generator.next_generated():
                for r in responses:
                    logps[r.uid] += float(r.logprobs[r.token].astype(mx.float32))
                    finished[r.uid] = r.finish_reason == "stop"
                    if not finished[r.uid]:
                        tokens[r.uid].append(r.token)
        except ValueError as error:
            raise UserError(f"{base.name}: mlx-lm cannot answer several prompts at once with it ({error}): name another model") from error
        finally:
            generator.close()
    finally:
        if on_cpu():
            mx.enable_compile()
    answers = [Answer(tuple(tokens[u]), logps[u], finished[u]) for u in places]
    return [answers[i : i + n] for i in range(0, len(answers), n)]


def save_arrays(path: Path, tree: Any) -> None:
    """A tree of arrays as safetensors under exactly this name. Raises OSError with its number, which mlx itself does not."""
    with open(path, "wb") as file:
        mx.save_safetensors(file, dict(tree_flatten(tree)))


def save_adapter(model: nn.Module, path: Path) -> None:
    with rundir.atomic(path) as temporary:
        save_arrays(temporary, model.trainable_parameters())


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that an adapter sits on, by name."""
    return {name: module for name, module in model.named_modules() if "lora_a" in module}


def fuse(base: Loaded, *, requantize: bool = False) -> None:
    """Puts the adapter's update into the weights, in place; a quantised base is dequantised whole, or quantised again as it was."""
    from mlx_lm.utils import dequantize_model

    how = {"dequantize": not requantize} if "quantization" in base.config else {}
    base.model.update_modules(tree_unflatten([(name, layer.fuse(**how)) for name, layer in adapted_layers(base.model).items()]))
    if not requantize:
        dequantize_model(base.model)
        base.config.pop("quantization", None)
        base.config.pop("quantization_config", None)


# what a model directory holds beside config and weights; never a Python file
COMPANIONS = tuple(
    "tokenizer* vocab* merges.txt special_tokens_map.json added_tokens.json chat_template* *.tiktoken generation_config.json LICENSE* NOTICE*".split()
)


def _companions(base: Loaded) -> list[Path]:
    """Raises UserError for a link to something that is no part of the model: its contents would be given away with the copy."""
    files = sorted({f for pattern in COMPANIONS for f in base.path.glob(pattern) if f.is_file() and f.suffix != ".py"})
    root = base.path.resolve()
    if root.parent.name == "snapshots":  # the hub's cache: snapshots/REVISION/file links to blobs/HASH
        root = root.parent.parent
    for file in files:
        if not file.resolve().is_relative_to(root):
            raise UserError(f"{file}: links to a file outside the model's directory: put the file itself there")
    return files


def _dtypes(path: Path) -> dict[str, mx.Dtype]:
    """Floating-point type of each weight as stored; a quantised weight has that of its scales."""
    weights: list[Any] = [mx.load(str(file)) for file in path.glob("model*.safetensors")]
    stored = {name: value.dtype for part in weights for name, value in part.items()}
    floating = {name: dtype for name, dtype in stored.items() if mx.issubdtype(dtype, mx.floating)}
    return {re.sub(r"scales$", "weight", name): dtype for name, dtype in floating.items()} | floating


def save_model(base: Loaded, path: Path, *, keep_dtypes: bool) -> None:
    """A model directory that mlx-lm loads: weights, config.json, tokenizer, chat template, generation config.

    keep_dtypes  weights take the types that the base has on disk, not those it was loaded in

    The weights are given away as they are written, so that one file's worth is in memory at a time: `base.model` is spent.
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
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(types.most_common(1)[0][0]).removeprefix("mlx.core.")
    with mlx_writes():
        utils.save_model(path, base.model, donate_model=True)
    utils.save_config(config, path / "config.json")
    for file in files:
        shutil.copyfile(file, path / file.name)


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
