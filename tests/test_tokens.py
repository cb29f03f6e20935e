"""Beginnings whose tokens are kept: the tokens are those of the whole text, for every kind of tokenizer."""

import json
import os
import random
import types

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mlx_dmpo.model import encode
from mlx_dmpo.model.encode import Encoder
from mlx_dmpo.model.loading import load_tokenizer
from mlx_dmpo.model.tokens import PATTERNS, Tokens, cuts_between_words
from mlx_dmpo.prompts import template
from mlx_dmpo.records import RankingExample

LETTERS = ["a", "B", "the", "ing", "é", "e\u0301", "Ж", "日本", "ﬁ"]
OTHERS = [
    " ",
    "  ",
    "\n",
    "\t",
    "'s",
    "'ll",
    "7",
    "1999",
    ".",
    ">",
    "<",
    " <Title:",
    "\u00a0",
    "\u200d",
    "🎬",
    "<|im_end|>",
]


def made(steps, normalizer=None, added=(), model=None):
    """A byte-level BPE tokenizer of these pre-tokenizers, wrapped as mlx-lm wraps one."""
    inner = Tokenizer(model or models.BPE())
    inner.normalizer, inner.pre_tokenizer = normalizer, steps
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(["the king of the seas is seeing the thing again and again"] * 9, trainer)
    inner.add_tokens(list(added))
    fast = PreTrainedTokenizerFast(tokenizer_object=inner)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return types.SimpleNamespace(_tokenizer=fast, encode=fast.encode)


def split(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
CUT = {
    "gpt2": made(GPT2),
    "digits": made(DIGITS),
    **{f"pattern {i}": made(split(p)) for i, p in enumerate(PATTERNS)},
    "nfc": made(split(PATTERNS[0]), normalizers.NFC()),
    "a harmless added token": made(GPT2, added=[AddedToken("king", normalized=False)]),
}
WHOLE = {  # their tokens may reach over a space, or depend on where a text begins
    "no pre-tokenizer": made(None),
    "metaspace": made(pre_tokenizers.Metaspace()),
    "a space before the text": made(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "another pattern": made(split(r"\p{L}+ \p{L}+|.")),
    "lower case": made(GPT2, normalizers.Lowercase()),
    "an added token with a space": made(GPT2, added=["the king"]),
    "an added token that eats a space": made(GPT2, added=[AddedToken("king", rstrip=True, normalized=False)]),
    "an added whole word": made(GPT2, added=[AddedToken("king", single_word=True, normalized=False)]),
    "dropout": made(GPT2, model=models.BPE(dropout=0.5)),
    "no fast tokenizer": types.SimpleNamespace(_tokenizer=object(), encode=lambda text, **_: list(text.encode())),
}


def texts(seed, families=20, each=6):
    """Families of texts that begin alike, one family after another."""
    draw = random.Random(seed)

    def words(n):
        return "".join(
            draw.choice(LETTERS) + draw.choice([" ", " ", " ", *OTHERS]) if draw.random() < 0.8 else draw.choice(OTHERS)
            for _ in range(n)
        )

    for _ in range(families):
        begin = words(60)
        for _ in range(each):
            yield begin + draw.choice(["", " word and ", "x", "."]) + words(draw.randrange(30))


@pytest.mark.parametrize("name", CUT)
def test_kept_beginnings_give_the_tokens_of_the_whole_text(name):
    tokenizer = CUT[name]
    assert cuts_between_words(tokenizer)
    tokens, kept = Tokens(tokenizer), 0
    for text in texts(name):
        before = tokens._begin
        assert tokens(text) == tokenizer.encode(text, add_special_tokens=False), text
        kept += bool(before) and text.startswith(before)
    assert kept > 20, "hardly any beginning was kept, so nothing was tested"


@pytest.mark.parametrize("name", WHOLE)
def test_other_tokenizers_make_the_tokens_of_whole_texts(name):
    assert not cuts_between_words(WHOLE[name])
    tokens = Tokens(WHOLE[name])
    if name != "dropout":
        for text in texts(name, families=3):
            assert tokens(text) == list(WHOLE[name].encode(text, add_special_tokens=False))


def test_what_reaches_over_a_space_would_go_wrong():
    """The tokenizers that are left out are left out for a reason: cutting changes their tokens."""
    tokenizer = WHOLE["an added token with a space"]
    whole = tokenizer.encode("so the king", add_special_tokens=False)
    parts = [tokenizer.encode(text, add_special_tokens=False) for text in ("so the", " king")]
    assert whole != parts[0] + parts[1]


def real_tokenizers():
    from mlx_dmpo import assets

    found = [str(assets.model_dir())]
    shared = os.environ.get("MLX_DMPO_SHARED", "")
    return found + [p for name in ("ml1m-qwen3", "qwen3-tokenizer") if os.path.isdir(p := f"{shared}/models/{name}")]


@pytest.mark.parametrize("path", real_tokenizers(), ids=os.path.basename)
@pytest.mark.parametrize("form", ["pairwise", "listwise", "direct", "pointwise"])
def test_groups_are_the_same_byte_by_byte(path, form, monkeypatch):
    """Every form's group, with kept beginnings and without."""
    tokenizer = load_tokenizer(path)
    history = tuple(f"The Long Film of {n} Men, Part {n} ({1950 + n})" for n in range(20))
    titles = [f"{w} {n}: a 'Tale' of the Sea" for n in range(12) for w in ("Night", "Night of", "日本 no yoru")]
    examples = [RankingExample("u", "movie", history[:n], titles[n], tuple(titles[n + 1 :])) for n in (20, 19, 3)]
    orders = {
        "pairwise": lambda e: [(True, False)] * len(e.negatives),
        "listwise": lambda e: [range(len(e.negatives) + 1)],
    }
    assert cuts_between_words(tokenizer), "the models that are tested with are ones that it is made for"

    def encoded():
        encoder = Encoder(tokenizer, 4096, template.built_in(form))
        for e in examples:
            if form == "pointwise":
                yield encoder.encode_spellings(e, [[1], [2, 3]])
            yield encoder.encode(e, orders.get(form, lambda e: [])(e))

    fast = list(encoded())
    monkeypatch.setattr(encode, "Tokens", lambda t: lambda text: list(t.encode(text, add_special_tokens=False)))
    for a, b in zip(fast, encoded(), strict=True):
        assert a.prefix.tobytes() == b.prefix.tobytes() and a.answer_lengths == b.answer_lengths
        assert [t.tobytes() for t in a.tails] == [t.tobytes() for t in b.tails]


def test_few_characters_are_tokenized_for_each_title():
    """Of 200 prompts with a history of 900 characters, the history goes through the tokenizer twice."""
    tokenizer, seen = CUT["gpt2"], []
    counting = types.SimpleNamespace(
        _tokenizer=tokenizer._tokenizer,
        encode=lambda text, **how: seen.append(len(text)) or tokenizer.encode(text, **how),
    )
    tokens = Tokens(counting)
    for n in range(200):
        tokens("liked the film " * 60 + f"and now the film <{n}>")
    assert sum(seen) < 200 * 30 + 3 * 1000


# --- how many titles are left out


def fewest(encoder, example):
    """By trying one after another."""
    longest = encoder.max_seq_length
    encoder.max_seq_length = 10**9
    sizes = []
    for n in range(len(example.history)):
        group = encoder.encode(RankingExample("", "movie", example.history[n:], "amber", ("iron",)), [(True,)])
        sizes.append(encode.longest(group))
    encoder.max_seq_length = longest
    return next(n for n, size in enumerate(sizes) if size <= longest)


@pytest.mark.parametrize("few", [0, 5, 500])
def test_the_fewest_titles_are_left_out_wherever_the_search_begins(few, model_directory, monkeypatch):
    monkeypatch.setattr(encode, "FEW", few)
    tokenizer = load_tokenizer(str(model_directory))
    encoder = Encoder(tokenizer, 180)
    rng = np.random.default_rng(0)
    for n in (1, 2, 9, 40, 40, 41, 12, 40):
        history = tuple("river glass"[: int(rng.integers(1, 11))] for _ in range(n))
        example = RankingExample("", "movie", history, "amber", ("iron",))
        for _ in range(2):  # the second time begins where the first one ended
            assert encoder.encode(example, [(True,)]).dropped == fewest(encoder, example)


def test_ten_thousand_titles_make_no_prompt_much_longer_than_what_fits(model_directory, monkeypatch):
    tokenizer = load_tokenizer(str(model_directory))
    encoder = Encoder(tokenizer, 200)
    lengths = []
    tokens = encoder._tokens
    monkeypatch.setattr(encoder, "_tokens", lambda text: lengths.append(len(text)) or tokens(text))
    history = tuple(f"river {n}" for n in range(10_000))
    for other in ("iron", "salt"):
        group = encoder.encode(RankingExample("", "movie", history, "amber", (other,)), [(True, False)])
        assert encode.longest(group) <= 200 and group.dropped > 9_900
    assert max(lengths) < 5_000, json.dumps(sorted(lengths)[-5:])
