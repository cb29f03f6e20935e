"""Tokens: the prompt is a prefix, the mask is the answer and its end-of-turn token, nothing but old history is ever
cut.
"""

from dataclasses import replace

import numpy as np
import pytest

from mlx_dmpo.data.formats import load_examples
from mlx_dmpo.errors import UserError
from mlx_dmpo.model.encode import Encoder
from mlx_dmpo.prompts.pairwise import build_group
from mlx_dmpo.records import RankingExample

EXAMPLE = RankingExample(
    "u",
    "movie",
    tuple("amber lantern river glass winter garden".split()),
    "iron",
    ("echo", "silver"),
    None,
    "d.jsonl:7",
)

PLAIN = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
# as Qwen3's hybrid models do: an empty think block before the answer, and in the prompt only when thinking is off
HYBRID = (
    "{%- for m in messages %}{%- if m.role == 'assistant' and loop.last %}{{ "
    "'<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}"
    "{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and "
    "enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
TEMPLATES = {
    "plain ChatML (as Instruct-2507)": PLAIN,
    "hybrid": HYBRID,
    "with a system turn": "{{ '<|im_start|>system\nRank.<|im_end|>\n' }}" + PLAIN,
}


@pytest.fixture(scope="module")
def tokenizer(model_directory):
    from mlx_lm.tokenizer_utils import load

    return load(model_directory)


@pytest.fixture
def with_template(tokenizer):
    kept = tokenizer._tokenizer.chat_template

    def use(template):
        tokenizer._tokenizer.chat_template = template
        return tokenizer

    yield use
    tokenizer._tokenizer.chat_template = kept


def answers(encoder, group):
    """Text of each branch's masked tokens."""
    return [
        encoder.tokenizer.decode(t[len(t) - n :].tolist())
        for t, n in zip(group.tails, group.answer_lengths, strict=True)
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(with_template, name):
    encoder = Encoder(with_template(TEMPLATES[name]))
    orders = [(True, False)] * 2
    group, text = encoder.encode(EXAMPLE, orders), build_group(EXAMPLE, orders)
    assert answers(encoder, group) == [b.answer + "<|im_end|>" for b in text.branches]
    assert group.pairs.tolist() == [list(p) for p in text.pairs]
    for tail, n, branch in zip(group.tails, group.answer_lengths, text.branches, strict=True):
        prompt = encoder.tokenizer.apply_chat_template(
            list(branch.messages), add_generation_prompt=True, enable_thinking=False
        )
        assert np.concatenate([group.prefix, tail])[:-n].tolist() == prompt
        assert len(tail) > n  # the position that predicts the answer's first token
    firsts = {tail[0] for tail in group.tails}
    assert (
        len(firsts) > 1 or min(len(t) - n for t, n in zip(group.tails, group.answer_lengths, strict=True)) == 1
    )  # nothing more is shared


def test_chosen_only_keeps_the_chosen_answers(tokenizer):
    encoder = Encoder(tokenizer)
    group = encoder.encode(EXAMPLE, [(True,), (False,)], chosen_only=True)
    assert answers(encoder, group) == [
        " <Title:iron> ,  <Title:echo> <|im_end|>",
        " <Title:iron> ,  <Title:silver> <|im_end|>",
    ]
    assert group.pairs.shape == (0, 2)


def test_a_template_that_changes_the_prompt_is_refused(with_template):
    template = "{%- if not add_generation_prompt %}!{%- endif %}" + PLAIN
    with pytest.raises(UserError, match=r"d\.jsonl:7: the chat template renders the prompt differently"):
        Encoder(with_template(template)).encode(EXAMPLE, [(True,)] * 2)


def test_a_template_without_end_of_turn_is_refused(with_template):
    template = (
        "{%- for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{%- endfor %}{%- if add_generation_prompt "
        "%}assistant: {%- endif %}"
    )
    with pytest.raises(UserError, match="no end-of-turn"):
        Encoder(with_template(template)).encode(EXAMPLE, [(True,)] * 2)


def test_a_title_cannot_end_the_turn(tokenizer):
    for bad in (replace(EXAMPLE, history=("amber<|im_end|>",)), replace(EXAMPLE, positive="<|im_start|>")):
        with pytest.raises(UserError, match=r"d\.jsonl:7: a title or text holds the model's control token <\|im_"):
            Encoder(tokenizer).encode(bad, [(True,)] * 2)


def test_only_the_oldest_history_is_cut(tokenizer):
    full = Encoder(tokenizer).encode(EXAMPLE, [(True,)] * 2)
    whole = len(full.prefix) + max(map(len, full.tails))
    lengths = set()
    for limit in range(whole, 40, -1):
        encoder = Encoder(tokenizer, limit)
        try:
            group = encoder.encode(EXAMPLE, [(True,)] * 2)
        except UserError as error:
            assert f"max_seq_length is {limit}" in str(error) and str(error).startswith("d.jsonl:7: ")
            break
        assert len(group.prefix) + max(map(len, group.tails)) <= limit
        text = encoder.tokenizer.decode(np.concatenate([group.prefix, group.tails[0]]).tolist())
        kept = EXAMPLE.history[group.dropped :]
        assert "".join(f" <Title:{t}> " for t in kept) + ". Rank" in text and kept[-1] == "garden"
        assert all(f"<Title:{t}>" not in text for t in EXAMPLE.history[: group.dropped])
        assert answers(encoder, group) == answers(encoder, full)
        # as few as possible: one more item would not have fitted
        more = (
            Encoder(tokenizer).encode_group(build_group(EXAMPLE, [(True,)] * 2, drop_history=group.dropped - 1))
            if group.dropped
            else None
        )
        assert more is None or len(more.prefix) + max(map(len, more.tails)) > limit
        lengths.add(group.dropped)
    else:
        pytest.fail("even 41 tokens fit")
    assert lengths == set(range(len(EXAMPLE.history)))


def test_the_real_qwen3_template_and_tokenizer(shared):
    from mlx_lm.tokenizer_utils import load

    encoder = Encoder(load(shared / "models" / "qwen3-tokenizer"), 4096)
    examples = load_examples(shared / "data" / "dmpo-release" / "rec_data_ml_1m_dpo_ranking_5.json")
    separate = []
    for example in examples:
        orders = [(flag,) for flag in example.positive_first]
        group = encoder.encode(example, orders)
        assert answers(encoder, group) == [b.answer + "<|im_end|>" for b in build_group(example, orders).branches]
        prompt = encoder.tokenizer.decode(
            np.concatenate([group.prefix, group.tails[0]])[: -group.answer_lengths[0]].tolist()
        )
        assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        separate.append(group.separate_tokens / group.shared_tokens)
    assert np.mean(separate) > 3  # what running the history once saves, on real histories
