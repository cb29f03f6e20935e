"""Chat templates and tokenizers as models bring them: dates, refused turns, line breaks, end-of-turn tokens."""

import json
import shutil
from datetime import datetime

import numpy as np
import pytest
import tiny
from mlx_lm.tokenizer_utils import TokenizerWrapper
from test_bad_input import run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mlx_dmpo.config import EvaluateSettings
from mlx_dmpo.errors import UserError
from mlx_dmpo.machine import files
from mlx_dmpo.model import encode, loading
from mlx_dmpo.records import Branch, PreferenceGroup

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
DATED = "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML
ASK = ({"role": "user", "content": "Which?"},)


def group(*answers, messages=ASK):
    branches = tuple(Branch(messages, a) for a in answers)
    return PreferenceGroup("u", "text", branches, tuple((0, r) for r in range(1, len(answers))), "d.jsonl:7")


def tokenizer_of(pre, decoder, texts, template):
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre, decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(pre, pre_tokenizers.ByteLevel) else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<unk>"], show_progress=False, min_frequency=1
    )
    inner.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = template
    return TokenizerWrapper(made)


def byte_level(template=CHATML):
    texts = ["user\nWhich?\n\n\nThe river.\n\n\n\n", "assistant\n\n\n\nA lamp.\t\tNo.\n\n\n"] * 20
    return tokenizer_of(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), texts, template)


def text_of(encoder, tokens):
    return encoder.tokenizer.decode([int(t) for t in tokens])


# --- answers that the tokenizer would join with the prompt


@pytest.mark.parametrize("start", ["\n", "\n\n", "\n\n\n", " ", "\t\n", ""])
def test_an_answer_that_begins_with_white_space(start):
    encoder = encode.Encoder(byte_level())
    found = encoder.encode_group(group(start + "The river.", start + "A lamp."))
    for tail, length, answer in zip(found.tails, found.answer_lengths, ("The river.", "A lamp."), strict=True):
        sequence = [*found.prefix, *tail]
        assert text_of(encoder, sequence[:-length]) == "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"
        assert text_of(encoder, sequence[-length:]) == start + answer + "<|im_end|>"
    joined = encoder._tokens(f"<|im_start|>assistant\n{start}The river.")
    if start == "\n\n":  # the case at hand: one token across the border
        apart = encoder._tokens("<|im_start|>assistant\n") + encoder._tokens(f"{start}The river.")
        assert joined != apart


def test_a_prompt_that_ends_with_a_space():
    """A tokenizer that writes a space into the next word, and puts one before a text: `▁The` is one token."""
    template = (
        "{%- for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{%- endfor %}{%- if "
        "add_generation_prompt %}{{ 'assistant: ' }}{%- endif %}"
    )
    pre = pre_tokenizers.Metaspace(prepend_scheme="first")
    texts = ["assistant: The river. user: Which? A lamp."] * 20
    encoder = encode.Encoder(tokenizer_of(pre, decoders.Metaspace(prepend_scheme="first"), texts, template))
    found = encoder.encode_group(group("The river.", "A lamp."))
    for tail, length, answer in zip(found.tails, found.answer_lengths, ("The river.", "A lamp."), strict=True):
        sequence = [*found.prefix, *tail]
        assert text_of(encoder, sequence) == f"user: Which?<|im_end|>assistant: {answer}<|im_end|>"
        assert length == len(encoder._tokens("<|im_end|>" + answer))
    assert encoder.prompt(Branch(ASK, ""), "") == [
        int(t) for t in [*found.prefix, *found.tails[0]][: -found.answer_lengths[0]]
    ]


def test_answers_that_the_template_makes_equal_are_refused():
    encoder = encode.Encoder(byte_level(CHATML.replace("m.content", "(m.content | trim)")))
    with pytest.raises(UserError, match=r"d\.jsonl:7: chosen and rejected are the same tokens"):
        encoder.encode_group(group("The river.", "\n\nThe river."))
    encoder.encode_group(group("\n\nThe river.", "\n\nA lamp."))


# --- templates that refuse


@pytest.mark.parametrize(
    "check, messages, expected",
    [
        (("{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif "
"%}"), "su", 'system, user; "No system"'),
        (("{% if messages[0].role != 'user' %}{{ raise_exception('User first.') }}{% endif "
"%}"), "au", ('assistant, user; "User '
'first"')),
        ("{% if messages | length > 2 %}{{ raise_exception('One turn') }}{% endif %}", "uau", '"One turn"'),
        ("{{ messages[0].content + messages[0].name }}", "u", "user; "),
        ("{{ messages[0].tools[0].name }}", "u", "user; "),
        ("{{ messages[0].content + 1 }}", "u", "TypeError, "),
    ],
)  # fmt: skip
def test_a_refusal_is_one_line_with_the_row(check, messages, expected):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    turns = tuple({"role": roles[m], "content": f"text {n}"} for n, m in enumerate(messages))
    encoder = encode.Encoder(byte_level(check + CHATML))
    with pytest.raises(
        UserError, match=rf"^d\.jsonl:7: the model's chat template refuses these turns \(.*{expected}"
    ) as e:
        encoder.encode_group(group("The river.", "A lamp.", messages=turns))
    assert "\n" not in str(e.value)


def test_rows_found_bad_in_tokens_are_left_out_by_name():
    encoder = encode.Encoder(
        byte_level("{% if messages[0].role == 'system' %}{{ raise_exception('No') }}{% endif %}" + CHATML), 40
    )
    good, long = group("The river.", "A lamp."), group("The river. " * 40, "A lamp.")
    control, system = (
        group("The <|im_end|>", "A lamp."),
        group("A", "B", messages=({"role": "system", "content": "x"}, *ASK)),
    )
    output = []
    assert encoder.usable([good, long, control, good, system], output.append) == [good, good]
    assert [t.startswith("left out: d.jsonl:7: ") for t in output] == [True] * 3 + [False]
    assert (
        "tokens, and max_seq_length is 40" in output[0]
        and "control token <|im_end|>" in output[1]
        and "No" in output[2]
    )
    assert output[3].startswith("note: 3 of 5 rows were left out")
    with pytest.raises(UserError, match="none of the 1 rows can be used"):
        encoder.usable([control], output.append)


def bad_rows(path, sound):
    """Two rows of which no tokens can be made, among sound ones."""
    rows = [json.loads(line) for line in (sound / "test.jsonl").read_text().splitlines()]
    control, long = (
        dict(rows[0], user="control", history=["a <|im_end|>"]),
        dict(rows[0], user="long", positive="so long " * 400),
    )
    path.write_text("".join(json.dumps(r) + "\n" for r in [rows[0], control, *rows[1:], long]))
    return path, len(rows)


@pytest.mark.parametrize("command", ["sft", "dmpo", "evaluate", "sample", "sample --score"])
def test_every_command_skips_them(command, model_directory, tmp_path, capsys):
    data, sound = bad_rows(tmp_path / "d.jsonl", tiny.write_data(tmp_path / "d", users=5))
    where = {"sft": "--adapter-path", "dmpo": "--adapter-path"}.get(command, "--out")
    arguments = [
        *command.split(),
        "--model",
        model_directory,
        "--data",
        data,
        where,
        tmp_path / "o",
        "--max-seq-length",
        512,
    ]
    arguments += {
        "--adapter-path": ["--iters", 1],
        "--out": ["--n", 1, "--max-tokens", 1] if command == "sample" else [],
    }[where]
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "d.jsonl:2: a title or text holds the model's control token" in err
    code, out, err = run(capsys, *arguments, "--skip-bad-rows")
    assert code == 0, err
    assert "left out: " in err and "d.jsonl:2: a title" in err and f"d.jsonl:{sound + 2}: " in err
    assert f"note: 2 of {sound + 2} rows were left out" in err
    if command == "evaluate":
        assert json.loads((tmp_path / "o" / "metrics.json").read_text())["users"] == sound
    if command in ("sft", "dmpo"):
        assert f"{sound} groups" in out


# --- templates that print the day


@pytest.mark.parametrize("format", ["%d %b %Y", "%B %d, %Y (%A)", "%Y-%m-%d %H:%M:%S", "%-d/%-m"])
def test_a_day_of_ones_own(format):
    encoder = encode.Encoder(byte_level(DATED.replace("%d %b %Y", format)), date="2026-01-02")
    expected = datetime(2026, 1, 2).strftime(format.replace("%-d/%-m", "2/1"))
    text = encoder._prompt_text(Branch(ASK, ""), "")
    assert text.startswith(f"<|im_start|>system\nToday: {expected}<|im_end|>\n<|im_start|>user\n")


def test_todays_text_is_the_one_of_transformers():
    """Also where the template begins with a line break, an indented block, and asks whether strftime_now exists."""
    for start in ("\n", "  ", "{%- if true %}x{%- endif %}\n", "  {% if strftime_now is defined %}y{% endif %}\n z"):
        tokenizer = byte_level(start + DATED)
        encoder = encode.Encoder(tokenizer)
        assert encoder.date == encode.today()
        assert encoder._prompt_text(Branch(ASK, ""), "") == tokenizer.apply_chat_template(
            list(ASK), tokenize=False, add_generation_prompt=True
        )
    assert encode.Encoder(byte_level(), date="2026-01-02").date == ""


@pytest.fixture
def dated(model_directory, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(model_directory, path)
    (path / "chat_template.jinja").write_text(DATED)
    return path


def on(monkeypatch, day):
    monkeypatch.setattr(encode, "today", lambda: day)
    monkeypatch.setattr(loading, "today", lambda: day)


def test_a_run_keeps_its_day(dated, tmp_path, capsys, monkeypatch):
    data, adapter = tiny.write_data(tmp_path / "d", users=4), tmp_path / "a"
    common = ["--model", dated, "--data", data]
    on(monkeypatch, "2026-01-02")
    arguments = ["sft", *common, "--adapter-path", adapter, "--iters", 4, "--save-every", 1, "--keep-checkpoints", 9]
    assert run(capsys, *arguments)[0] == 0
    whole = (adapter / "adapters.safetensors").read_bytes()
    assert files.read_json(adapter / "adapter_config.json")["template_date"] == "2026-01-02"
    assert run(capsys, "evaluate", *common, "--adapter-path", adapter, "--out", tmp_path / "e1")[0] == 0
    on(monkeypatch, "2027-12-31")
    assert run(capsys, "evaluate", *common, "--adapter-path", adapter, "--out", tmp_path / "e2")[0] == 0
    first, second = ((tmp_path / e / "scores.jsonl").read_text() for e in ("e1", "e2"))
    assert first == second
    assert files.read_json(tmp_path / "e2" / "manifest.json")["template_date"] == "2026-01-02"
    assert run(capsys, "evaluate", *common, "--out", tmp_path / "base")[0] == 0
    assert files.read_json(tmp_path / "base" / "manifest.json")["template_date"] == "2027-12-31"
    # the next stage, and a run that continues on another day
    code, _, err = run(
        capsys, "dmpo", *common, "--start-adapter", adapter, "--adapter-path", tmp_path / "b", "--iters", 1
    )
    assert code == 0 and files.read_json(tmp_path / "b" / "adapter_config.json")["template_date"] == "2026-01-02"
    (adapter / "manifest.json").unlink()
    for step in (3, 4):
        shutil.rmtree(adapter / "checkpoints" / f"{step:07d}")
    code, _, err = run(capsys, *arguments, "--resume")
    assert code == 0, err
    assert (adapter / "adapters.safetensors").read_bytes() == whole


@pytest.mark.parametrize("day", ["2026-13-45", "yesterday", 5, None])
def test_a_day_that_is_none_is_refused(day, dated, tmp_path):
    adapter = tiny.save_adapter(dated, tmp_path / "a")
    config = files.read_json(adapter / "adapter_config.json")
    files.write_json(adapter / "adapter_config.json", config | {"template_date": day})
    with pytest.raises(UserError, match="template_date"):
        loading_adapter(dated, adapter)


def loading_adapter(model, adapter):
    from mlx_dmpo.model.open import open_scorer

    return open_scorer(EvaluateSettings(model=str(model)), str(adapter))


@pytest.mark.parametrize("how", [[], ["--keep-quantized"]])
def test_an_export_is_compared_on_the_adapters_day(how, dated, tmp_path, capsys, monkeypatch):
    on(monkeypatch, "2026-01-02")
    adapter = tiny.save_adapter(dated, tmp_path / "a", quantize=4)
    on(monkeypatch, "2027-12-31")
    data = tiny.write_data(tmp_path / "d", users=3)
    quantized = ["--quantize", 4, "--quantize-group-size", 32]
    arguments = [
        "export",
        "--model",
        dated,
        "--adapter-path",
        adapter,
        "--data",
        data,
        "--out",
        tmp_path / "x",
        *quantized,
    ]
    code, out, err = run(capsys, *arguments, *how)
    assert code == 0 and "2026-01-02" in err, err
    difference = files.read_json(tmp_path / "x" / "manifest.json")["export"]["difference"]
    assert max(v for v in difference.values() if isinstance(v, float)) < 5e-4
    if how:
        assert files.read_json(tmp_path / "x" / "adapter" / "adapter_config.json")["template_date"] == "2026-01-02"


# --- templates of other shapes

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
THOUGHT = "<think>\n\n</think>\n\n"
START = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SHAPES = {
    "a system text of its own": (SYSTEM + TURNS + START, "Be kind.<|im_end|>\n<|im_start|>user\nWhich?"),
    "brackets": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}",
        "[INST] Which? [/INST] The river.<|im_end|>",
    ),
    "a role of another name": (
        "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}<|im_start|>{{ role }}\n"
        "{{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
        "<|im_start|>model\nThe river.<|im_end|>",
    ),
    "an empty thought in prompt and answer": (
        TURNS.replace("{{ m.content }}", "{% if m.role == 'assistant' %}" + THOUGHT + "{% endif %}{{ m.content }}")
        + START.replace("{% endif %}", THOUGHT + "{% endif %}"),
        f"assistant\n{THOUGHT}The river.<|im_end|>",
    ),
    "an empty thought in the prompt alone": (
        TURNS + START.replace("{% endif %}", THOUGHT + "{% endif %}"),
        f"assistant\n{THOUGHT}The river.<|im_end|>",
    ),
    "no beginning of an answer": (TURNS, "Which?<|im_end|>\n<|im_start|>assistant\nThe river.<|im_end|>"),
    "an end token on a line of its own": (
        TURNS.replace("<|im_end|>", "\n<|im_end|>") + START,
        "<|im_start|>assistant\nThe river.\n<|im_end|>",
    ),
    "marks of what is learnt": (
        TURNS.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}") + START,
        "assistant\nThe river.<|im_end|>",
    ),
    "several by name": ({"tools": "{{ raise_exception('none') }}", "default": TURNS + START}, "The river.<|im_end|>"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_template_of_another_shape(name):
    """The answer ends with the first end token, and prompt and answer are what the template prints."""
    template, part = SHAPES[name]
    encoder = encode.Encoder(byte_level(template))
    made = encoder.encode_group(group("The river.", "A lamp."))
    first, second = (text_of(encoder, [*made.prefix, *tail]) for tail in made.tails)
    assert part in first and first.endswith("<|im_end|>") and second == first.replace("The river.", "A lamp.")
    assert encoder.prompt(Branch(ASK, ""), "") == [*made.prefix, *made.tails[0]][: -made.answer_lengths[0]]


@pytest.mark.parametrize(
    "template, expected",
    [
        (TURNS + START.replace("{% endif %}", "<think>\n{% endif %}"), "renders the prompt differently when an answer"),
        ("{{ messages | length }} turns\n" + TURNS + START, "renders the prompt differently when an answer follows"),
        (TURNS.replace("<|im_end|>", ""), "ends the answer with no end-of-turn token"),
        (
            TURNS.replace("{{ m.content }}", "{% for c in m.content %}{{ c.text }}{% endfor %}"),
            "does not print the text",
        ),
        (TURNS.replace("m.content", "m.content | upper") + START, "does not print the text of the last turn as it is"),
    ],
)
def test_a_template_that_cannot_be_used(template, expected):
    with pytest.raises(UserError, match=f"d.jsonl:7: the (model's )?chat template {expected}"):
        encode.Encoder(byte_level(template)).encode_group(group("The river.", "A lamp."))


@pytest.mark.parametrize(
    "template, expected",
    [
        ("a\n{% for m in messages %}{{ m.content }", "chat template, line 2: is not Jinja (unexpected '}')"),
        ({"rag": CHATML, "tools": CHATML}, "has several chat templates (rag, tools) and none named default"),
        (None, "has no chat template"),
    ],
)
def test_no_command_begins_without_a_sound_template(template, expected, model_directory, tmp_path, capsys):
    path, data = tmp_path / "model", tiny.write_data(tmp_path / "d", users=3)
    shutil.copytree(model_directory, path)
    (path / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    if isinstance(template, dict):
        config["chat_template"] = [{"name": n, "template": t} for n, t in template.items()]
    elif template is not None:
        (path / "chat_template.jinja").write_text(template)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    for command in ("evaluate", "plan"):
        code, _, err = run(capsys, command, "--model", path, "--data", data)
        assert code == 2 and f"{path}: {expected}" in err and err.count("error:") == 1, err


# --- end-of-turn tokens


@pytest.mark.parametrize("where", ["config", "config list", "generation", "generation list", "both"])
def test_an_end_token_that_only_a_config_names(where, model_directory, tmp_path, capsys):
    path = tmp_path / "model"
    shutil.copytree(model_directory, path)
    end = loading.load_tokenizer(str(path)).eos_token_id
    output = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(output | {"eos_token": "<|endoftext|>"}))
    config = json.loads((path / "config.json").read_text())
    value = [0, end] if "list" in where or where == "both" else end
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": value if "config" in where else 0}))
    if "config" not in where:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    tokenizer = loading.load_tokenizer(str(path))
    assert end in tokenizer.eos_token_ids and tokenizer.eos_token == "<|endoftext|>"
    loaded = loading.load(EvaluateSettings(model=str(path)))
    assert tokenizer.eos_token_ids == loaded.tokenizer.eos_token_ids
    ends = [e.encode_group(group("The river.", "A lamp.")) for e in map(encode.Encoder, (tokenizer, loaded.tokenizer))]
    assert all(int(g.tails[0][-1]) == end for g in ends) and np.array_equal(ends[0].tails[0], ends[1].tails[0])
    data = tiny.write_data(tmp_path / "d", users=3)
    assert run(capsys, "check", data, "--model", path)[0] != 2
    assert run(capsys, "plan", "--model", path, "--data", data, "--tflops", 1)[0] == 0
