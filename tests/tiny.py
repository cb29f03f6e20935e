"""Small random models and groups for tests."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama, qwen2, qwen3
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_dmpo.core.tree import EncodedGroup
from mlx_dmpo.prompts.pairwise import build_group
from mlx_dmpo.records import RankingExample

COMMON = dict(
    hidden_size=64,
    num_hidden_layers=3,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    vocab_size=512,
    max_position_embeddings=512,
    rope_theta=1e6,
)


def model(kind="qwen3", *, bits=0, tied=True, lora_layers=2, dropout=0.0, dora=False, seed=0, **sizes):
    """A random model with a non-zero adapter, so that every LoRA leaf has a gradient."""
    mx.random.seed(seed)
    sizes = COMMON | sizes
    if kind == "qwen3":
        made = qwen3.Model(qwen3.ModelArgs(model_type="qwen3", head_dim=32, tie_word_embeddings=tied, **sizes))
    elif kind == "qwen2":
        made = qwen2.Model(qwen2.ModelArgs(model_type="qwen2", tie_word_embeddings=tied, **sizes))
    else:
        made = llama.Model(llama.ModelArgs(model_type="llama", tie_word_embeddings=tied, **sizes))
    if bits:
        nn.quantize(made, group_size=32, bits=bits)
    made.freeze()
    if lora_layers:
        adapt(made, {"dropout": dropout}, lora_layers, dora)
    mx.eval(made.parameters())
    return made.train()


def adapt(made, options, layers=2, dora=False):
    linear_to_lora_layers(made, layers, {"rank": 4, "scale": 2.0, "dropout": 0.0} | options, use_dora=dora)
    made.update(tree_map(lambda p: p + 0.05 * mx.random.normal(p.shape), made.trainable_parameters()))


def group(rng, prefix, tails, answers):
    """Random tokens of the given lengths; the branches pair up in order."""
    draw = lambda n: rng.integers(0, COMMON["vocab_size"], n).astype(np.int32)  # noqa: E731
    pairs = np.arange(len(tails) // 2 * 2, dtype=np.int32).reshape(-1, 2)
    return EncodedGroup(draw(prefix), tuple(draw(n) for n in tails), tuple(answers), pairs)


def equal_groups(rng):
    return [group(rng, 40, [12] * 4, [5] * 4) for _ in range(2)]


def ragged_groups(rng):
    return [
        group(rng, 40, [12, 9, 15, 7], [5, 4, 8, 3]),
        group(rng, 17, [8, 8], [2, 6]),
        group(rng, 33, [10, 11, 6, 9, 14, 5], [4, 5, 2, 1, 9, 3]),
    ]


def tree_groups(rng):
    """Questions that begin alike, each with answers that begin alike; one answer begins another."""
    out = []
    for prefix, questions in ((21, 3), (35, 2)):
        draw = lambda n: rng.integers(0, COMMON["vocab_size"], n).astype(np.int32)  # noqa: E731
        begin, tails, answers = draw(4), [], []
        for _ in range(questions):
            question, answer = np.concatenate([begin, draw(6)]), draw(3)
            for n in rng.integers(2, 6, 2):
                end = draw(int(n))
                tails += [np.concatenate([question, answer, end]), np.concatenate([question, answer, end, draw(2)])]
                answers += [3 + len(end), 5 + len(end)]
        pairs = np.arange(len(tails), dtype=np.int32).reshape(-1, 2)
        order = rng.permutation(len(tails))
        out.append(EncodedGroup(draw(prefix), tuple(tails[i] for i in order), tuple(answers[i] for i in order), pairs))
    return out


def leaves(tree):
    return {name: np.array(value) for name, value in tree_flatten(tree)}


def relative_error(found, expected):
    """Of two trees of gradients, over all leaves together."""
    found, expected = leaves(found), leaves(expected)
    assert found.keys() == expected.keys()
    difference = sum(((found[k] - expected[k]) ** 2).sum() for k in expected)
    return float(np.sqrt(difference / sum((v**2).sum() for v in expected.values())))


WORDS = "amber lantern river glass winter garden iron echo silver harbour paper moon copper orchard salt tower".split()


def save_model(directory, **options):
    """A random model in an mlx-lm directory: config, weights, byte-level BPE tokenizer, ChatML template."""
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = model(lora_layers=0, **options)
    directory.mkdir(parents=True)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    example = RankingExample("u", "movie", tuple(WORDS[:-2]), WORDS[-2], (WORDS[-1],))
    texts = [m["content"] for branch in build_group(example, [(True,)]).branches for m in branch.messages]
    trainer = trainers.BpeTrainer(
        vocab_size=COMMON["vocab_size"] - 3, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = (
        "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
    )
    tokenizer.save_pretrained(directory)
    config = {k: v for k, v in vars(made.args).items() if v is not None} | {"eos_token_id": tokenizer.eos_token_id}
    (directory / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(made.parameters())))
    return directory


def write_data(directory, users=12, negatives=3, seed=0, splits=("train", "valid", "test")):
    """A prepared directory of short invented examples with histories and negatives of different lengths."""
    import json

    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for split in splits:
        rows = []
        for user in range(users):
            picked = [str(WORDS[i]) for i in rng.permutation(len(WORDS))]
            history, k = int(rng.integers(2, 6)), int(rng.integers(1, negatives + 1))
            rows.append(
                {
                    "user": f"{split}-{user}",
                    "domain": "movie",
                    "history": picked[:history],
                    "positive": picked[history],
                    "negatives": picked[history + 1 : history + 1 + k],
                }
            )
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return directory


def save_adapter(model_directory, path, *, num_layers=-1, kind="lora", quantize=None, size=0.05, **lora):
    """A random adapter on a model directory, as sft would leave it but for its manifest."""
    from mlx_dmpo.config import Lora, SftSettings
    from mlx_dmpo.machine import files
    from mlx_dmpo.model import adapters, loading

    settings = SftSettings(
        model=str(model_directory),
        num_layers=num_layers,
        fine_tune_type=kind,
        lora_parameters=Lora(**{"rank": 4, "scale": 1.5, **lora}),
        quantize=quantize,
        quantize_group_size=32,
    )
    base = loading.load(settings)
    adapters.add_lora(base.model, settings)
    mx.random.seed(1)
    base.model.update(tree_map(lambda p: p + size * mx.random.normal(p.shape), base.model.trainable_parameters()))
    path.mkdir(parents=True)
    adapters.save_adapter(base.model, path / adapters.ADAPTER_WEIGHTS)
    files.write_json(path / adapters.ADAPTER_CONFIG, adapters.adapter_config(settings, base))
    return path
