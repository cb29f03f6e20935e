"""Builds the embedded tiny model and its fictional catalogue, users and data: everything under mlx_dmpo/assets but its
code and settings.

    python scripts/build_assets.py [--seed 0] [--out DIR] [--data-only]

About 10 minutes on two CPU cores, nearly all of it pretraining, with an OpenBLAS in LD_PRELOAD and
OPENBLAS_NUM_THREADS=1 (the BLAS of MLX's Linux CPU wheel is many times slower). Needs no network. The same seed
gives the same titles, users and data, byte for byte, and on the same machine and libraries the same weights.

Titles are an invented name and a common word ("Velmora Lantern"). A title has a genre, which its common word mostly
hints at and which is written nowhere, and a quality, which is written nowhere either; a user has two or three genres
to their taste, and prefers good titles. The model is pretrained on lists of what other users enjoyed and did not
enjoy, drawn by taste alone, so that it knows which titles go together, and on chats that repeat a few titles in
an order drawn by coin, so that it can copy. No document ranks anything; which titles are good, only the ratings of
the training users tell.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dmpo.prompts.pairwise import TITLE, build_group, titles
from mlx_dmpo.records import Message, RankingExample

ASSETS = Path(__file__).resolve().parents[1] / "mlx_dmpo" / "assets"

# a genre's common words; the genre itself is never printed
GENRES: dict[str, tuple[str, ...]] = {
    "heist": ("Ledger", "Vault", "Alibi", "Gambit", "Cipher"),
    "seafaring": ("Harbor", "Tide", "Anchor", "Lagoon", "Compass"),
    "ghost": ("Lantern", "Attic", "Whisper", "Hollow", "Mirror"),
    "space": ("Orbit", "Comet", "Signal", "Nebula", "Capsule"),
    "kitchen": ("Supper", "Saffron", "Orchard", "Bakery", "Pepper"),
    "courtroom": ("Verdict", "Witness", "Motion", "Appeal", "Oath"),
    "mountain": ("Summit", "Ridge", "Avalanche", "Glacier", "Lodge"),
    "dance": ("Waltz", "Rhythm", "Ballroom", "Encore", "Tango"),
}
FIRST = "Arn Bel Cor Dar Fen Gal Hal Jor Kel Lum Mar Nor Or Pel Quil Ros Sel Tam Ul Vel Zan".split()
LAST = "andra bury dell emoor ing ith lume mora ora rick tava vane".split()
TITLES_PER_GENRE = 30
HINT = 0.85  # chance that a title's common word is of its own genre, rather than of any
NOISE = 0.05  # chance that a liked or disliked title is drawn from the whole catalogue, whatever the taste
QUALITY = 0.7  # how much good titles are preferred by the users of the splits; the pretraining users know of no quality
HISTORY = (6, 10)  # liked titles in a prompt, from and to
USERS = {"train": 200, "valid": 80, "test": 450}
NEGATIVES = {"train": 5, "valid": 1, "test": 1}

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen2's
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' "
    "}}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


# --- catalogue and users


@dataclass(frozen=True)
class Catalogue:
    """titles (N,) text; genres (N,) int: the genre of each; quality (N,): how much it is liked for, whatever
    the taste.
    """

    titles: tuple[str, ...]
    genres: np.ndarray
    quality: np.ndarray


@dataclass(frozen=True)
class User:
    """Indices of titles, in the order in which they were rated."""

    name: str
    liked: np.ndarray
    disliked: np.ndarray


def make_catalogue(seed: int) -> Catalogue:
    rng = np.random.default_rng([seed, 0])
    invented = [first + last for first in FIRST for last in LAST if not last.startswith(first.lower())]
    names = rng.permutation(invented)[: TITLES_PER_GENRE * len(GENRES)]
    genres = rng.permutation(np.repeat(np.arange(len(GENRES)), TITLES_PER_GENRE))
    words = list(GENRES.values())
    made = []
    for name, genre in zip(names, genres, strict=True):
        hinted = genre if rng.random() < HINT else rng.integers(len(words))
        made.append(f"{name} {rng.choice(words[hinted])}")
    return Catalogue(tuple(made), genres, np.random.default_rng([seed, 5]).normal(size=len(made)))


def make_user(
    rng: np.random.Generator, catalogue: Catalogue, name: str, liked: int, disliked: int, quality: float = 0.0
) -> User:
    """Two or three genres to the user's taste; the liked titles are of them and the disliked of the others, but for
    NOISE.

    quality  how much more often good titles are liked and poor ones disliked: odds of e**quality a standard deviation
    """
    tastes = rng.choice(len(GENRES), rng.integers(2, 4), replace=False)
    to_taste = np.isin(catalogue.genres, tastes)
    taken: list[int] = []
    for wanted, sign in [(to_taste, 1)] * liked + [(~to_taste, -1)] * disliked:
        free = np.ones(len(to_taste), bool) if rng.random() < NOISE else wanted.copy()
        free[taken] = False
        odds = np.exp(sign * quality * catalogue.quality[free]) if quality else None
        taken.append(int(rng.choice(np.flatnonzero(free), p=odds if odds is None else odds / odds.sum())))
    return User(name, np.array(taken[:liked]), np.array(taken[liked:]))


def make_examples(seed: int, catalogue: Catalogue, split: str) -> list[RankingExample]:
    """A split's users, one example each. Every split and the pretraining users have their own generator and names."""
    rng = np.random.default_rng([seed, 1, list(USERS).index(split)])
    examples = []
    for number in range(USERS[split]):
        length = int(rng.integers(HISTORY[0], HISTORY[1] + 1))
        user = make_user(rng, catalogue, f"{split}-{number:04d}", length + 1, NEGATIVES[split], QUALITY)
        *history, positive = (catalogue.titles[i] for i in user.liked)
        negatives = tuple(catalogue.titles[i] for i in user.disliked)
        examples.append(RankingExample(user.name, "movie", tuple(history), positive, negatives))
    return examples


def write_data(seed: int, directory: Path) -> dict[str, list[RankingExample]]:
    """Writes DIRECTORY/{train,valid,test}.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    catalogue = make_catalogue(seed)
    splits = {split: make_examples(seed, catalogue, split) for split in USERS}
    for split, examples in splits.items():
        lines = "".join(json.dumps(example.to_json(), ensure_ascii=False) + "\n" for example in examples)
        (directory / f"{split}.jsonl").write_bytes(lines.encode())
    return splits


# --- documents


def render(messages: Sequence[Message]) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def listed(catalogue: Catalogue, items: Sequence[int] | np.ndarray) -> str:
    return titles([catalogue.titles[i] for i in items])


def taste_document(rng: np.random.Generator, catalogue: Catalogue, user: User) -> str:
    """What a user enjoyed and did not enjoy, as two lists."""
    enjoyed, not_enjoyed = user.liked[: rng.integers(6, 15)], user.disliked[: rng.integers(2, 5)]
    return (
        f"A viewer enjoyed these movies: {listed(catalogue, enjoyed)}. "
        f"The viewer did not enjoy: {listed(catalogue, not_enjoyed)}.<|endoftext|>"
    )


def verdict_document(rng: np.random.Generator, catalogue: Catalogue, user: User) -> str:
    """What a user enjoyed as a list, then further titles one by one, each with whether the user enjoyed it."""
    liked, disliked = user.liked[6:], user.disliked
    verdicts = [
        (TITLE.format(catalogue.titles[i]), i in liked) for i in rng.permutation(np.concatenate([liked, disliked]))[:8]
    ]
    logged = "".join(title + ("yes." if enjoyed else "no.") for title, enjoyed in verdicts)
    return (
        f"A viewer enjoyed these movies: {listed(catalogue, user.liked[:6])}. Further verdicts: {logged}<|endoftext|>"
    )


COPY_PROMPTS = (
    "Write down the movies {some}.",
    "Here is the user's history of movies they have watched: {history}. Write down the movies {some}.",
    "Here is the user's history of movies they have watched: {history}. Name the movies {some}.",
)


def copy_document(rng: np.random.Generator, catalogue: Catalogue, user: User) -> str:
    """A chat that repeats two to four titles, drawn from the whole catalogue, in a random order: copying without
    ranking.
    """
    history = user.liked[: rng.integers(4, 11)]
    others = np.setdiff1d(np.arange(len(catalogue.titles)), history)
    some = [TITLE.format(catalogue.titles[i]) for i in rng.choice(others, rng.choice((2, 2, 3, 4)), replace=False)]
    prompt = COPY_PROMPTS[rng.integers(len(COPY_PROMPTS))].format(
        history=listed(catalogue, history), some=" and ".join(some)
    )
    answer = ", ".join(rng.permutation(some))
    return render(({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})).rstrip("\n")


def pretraining_users(seed: int, catalogue: Catalogue) -> Iterator[User]:
    """Endless. None is a user of a split: another generator, other names."""
    rng = np.random.default_rng([seed, 2])
    for number in itertools.count():
        yield make_user(rng, catalogue, f"pretrain-{number:06d}", 14, 8)


def documents(seed: int, catalogue: Catalogue) -> Iterator[str]:
    """Endless; a new user each. Lists and verdicts in turn, a copy chat between each."""
    rng = np.random.default_rng([seed, 3])
    kinds = itertools.cycle((taste_document, copy_document, verdict_document, copy_document))
    for kind, user in zip(kinds, pretraining_users(seed, catalogue), strict=False):
        yield kind(rng, catalogue, user)


ANSWER = "<|im_start|>assistant\n"


def tokenize(tokenizer: Any, text: str) -> tuple[list[int], int]:
    """A document's tokens, and the first of them that is learned: a chat's answer, as its prompt is drawn by chance."""
    tokens = tokenizer.encode(text).ids
    return tokens, len(tokenizer.encode(text[: text.index(ANSWER) + len(ANSWER)]).ids) if ANSWER in text else 1


def batches(seed: int, rows: Iterator[tuple[list[int], int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless padded (BATCH, T) tokens and masks of what is learned, rows of like length, in a random order: little is
    padding.
    """
    rng = np.random.default_rng([seed, 4])
    while True:
        pool = sorted(itertools.islice(rows, 16 * BATCH), key=lambda row: len(row[0]))
        for start in rng.permutation(16) * BATCH:
            batch = pool[start : start + BATCH]
            width = len(batch[-1][0])
            place = np.arange(width)
            mask = np.stack([(place >= first) & (place < len(tokens)) for tokens, first in batch])
            yield np.array([tokens + [0] * (width - len(tokens)) for tokens, _ in batch]), mask


# --- tokenizer


def train_tokenizer(catalogue: Catalogue) -> Any:
    """Byte-level BPE which has every word of the catalogue, the documents and the ranking prompt as one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    first, second, third, *_ = catalogue.titles
    branch = build_group(RankingExample("", "movie", (first,), second, (third,)), [(True,)]).branches[0]
    texts = [
        titles(catalogue.titles),
        *COPY_PROMPTS,
        branch.messages[0]["content"],
        branch.answer,
        "user\nassistant\nsystem\n",
    ]
    texts.append("A viewer enjoyed these movies: . The viewer did not enjoy: . Further verdicts: yes. no.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # more than there is to merge: training ends when every word is one token
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(tokenizer: Any, directory: Path) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": 1024,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


# --- model


def model_config(vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 192,
        "max_position_embeddings": 1024,
        "model_type": "qwen3",
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": vocabulary,
    }


STEPS, BATCH, PEAK_RATE, WARMUP = 3000, 20, 4e-3, 100


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    return PEAK_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))))


def pretrain(seed: int, catalogue: Catalogue, tokenizer: Any, config: dict[str, Any]) -> tuple[Any, float]:
    """A float32 model trained on STEPS x BATCH documents, and its last loss in nats a token."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.optimizers import AdamW, clip_grad_norm
    from mlx.utils import tree_map_with_path
    from mlx_lm.models.qwen3 import Model, ModelArgs
    from tqdm import tqdm

    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(config))
    model.update(
        tree_map_with_path(
            lambda path, p: p if "norm" in path else 0.05 * mx.random.normal(p.shape), model.parameters()
        )
    )
    optimizer = AdamW(PEAK_RATE, betas=[0.9, 0.98], weight_decay=0.01)

    def loss(model: nn.Module, tokens: mx.array, mask: mx.array) -> mx.array:
        losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        return (losses * mask[:, 1:]).sum() / mask[:, 1:].sum()

    step_function = nn.value_and_grad(model, loss)
    source = batches(seed, (tokenize(tokenizer, text) for text in documents(seed, catalogue)))
    smooth = 0.0
    with tqdm(range(STEPS), desc="pretrain", unit="step") as bar:
        for step in bar:
            value, gradients = step_function(model, *map(mx.array, next(source)))
            gradients, _ = clip_grad_norm(gradients, 1.0)
            optimizer.learning_rate = learning_rate(step)
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state)
            smooth = value.item() if not step else 0.98 * smooth + 0.02 * value.item()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{smooth:.3f}")
    return model, smooth


def write_model(model: Any, config: dict[str, Any], directory: Path) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    weights = {name: value.astype(mx.bfloat16) for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", {"eos_token_id": 2, "pad_token_id": 0})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ASSETS, help="directory to write model/ and data/ in")
    parser.add_argument("--data-only", action="store_true", help="write the data and leave the model as it is")
    args = parser.parse_args()

    started = time.perf_counter()
    splits = write_data(args.seed, args.out / "data")
    print(", ".join(f"{split} {len(examples)} users" for split, examples in splits.items()))
    if args.data_only:
        return
    catalogue = make_catalogue(args.seed)
    directory = args.out / "model"
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(catalogue)
    write_tokenizer(tokenizer, directory)
    config = model_config(vocabulary=math.ceil(tokenizer.get_vocab_size() / 64) * 64)
    model, loss = pretrain(args.seed, catalogue, tokenizer, config)
    write_model(model, config, directory)
    seconds = time.perf_counter() - started
    print(f"{STEPS * BATCH:,} pretraining users, last loss {loss:.3f} nats a token, {seconds:.0f} s in all")


if __name__ == "__main__":
    main()
