"""The embedded model and data: what PROVENANCE.md promises of them."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_dmpo import assets, config
from mlx_dmpo.prompts.pairwise import build_group, parse_prompt
from mlx_dmpo.records import RankingExample

SPLITS = {"train": 200, "valid": 80, "test": 450}
LONGEST_PREFIX, LONGEST_TAIL = 100, 32


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[1] / "scripts" / "build_assets.py"
    spec = importlib.util.spec_from_file_location("build_assets", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def loaded():
    from mlx_lm import load

    return load(str(assets.model_dir()))


@pytest.fixture(scope="module")
def splits():
    read = {}
    for split in SPLITS:
        lines = (assets.data_dir() / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        read[split] = [
            RankingExample.from_json(json.loads(line), f"{split}.jsonl:{n}") for n, line in enumerate(lines, 1)
        ]
    return read


def branches(example):
    return build_group(example, [(True, False)] * len(example.negatives)).branches


def test_all_assets_fit_in_three_megabytes():
    files = [f for f in assets.model_dir().parent.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) <= 3_000_000


def test_model_is_a_small_tied_qwen3(loaded):
    model, tokenizer = loaded
    assert model.model_type == "qwen3" and "lm_head" not in model
    sizes = {name: value.size for name, value in tree_flatten(model.parameters())}
    assert sum(size for name, size in sizes.items() if "embed_tokens" not in name) <= 500_000
    assert all(mx.isfinite(value).all() for _, value in tree_flatten(model.parameters()))
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_splits_have_their_counts_and_share_no_user(splits, script):
    assert {split: len(examples) for split, examples in splits.items()} == SPLITS == script.USERS
    users = [e.user for examples in splits.values() for e in examples]
    assert len(set(users)) == sum(SPLITS.values())
    assert not any(user.startswith("pretrain-") for user in users)


def test_no_user_of_a_split_is_a_pretraining_user(splits, script):
    catalogue = script.make_catalogue(0)
    pretraining = [
        {catalogue.titles[i] for i in u.liked} for u in itertools.islice(script.pretraining_users(0, catalogue), 500)
    ]
    for examples in splits.values():
        assert not any({*e.history, e.positive} <= liked for e in examples for liked in pretraining)


def test_examples_are_sound(splits, script):
    titles = set(script.make_catalogue(0).titles)
    assert len(titles) == len(script.GENRES) * script.TITLES_PER_GENRE
    for split, examples in splits.items():
        for e in examples:
            named = (*e.history, e.positive, *e.negatives)
            assert len(set(named)) == len(named) and set(named) <= titles
            assert (
                script.HISTORY[0] <= len(e.history) <= script.HISTORY[1] and len(e.negatives) == script.NEGATIVES[split]
            )
            assert e.domain == "movie"


def test_prompts_parse_back(splits):
    for e in [e for examples in splits.values() for e in examples[:50]]:
        for k, negative in enumerate(e.negatives):
            for order, (first, second) in enumerate([(e.positive, negative), (negative, e.positive)]):
                parsed = parse_prompt(branches(e)[4 * k + 2 * order].messages[0]["content"])
                assert parsed is not None
                assert (parsed.domain, parsed.history, parsed.first, parsed.second) == (
                    "movie",
                    e.history,
                    first,
                    second,
                )


def test_every_title_is_two_tokens_and_decodes_to_itself(loaded, script):
    _, tokenizer = loaded
    for title in script.make_catalogue(0).titles:
        ids = tokenizer.encode(f" <Title:{title}> ", add_special_tokens=False)
        assert tokenizer.decode(ids) == f" <Title:{title}> "
        assert len(ids) == 6  # " <", "Title", ":Velmora", " Lantern", ">", " "


def test_prompt_is_a_token_prefix_and_lengths_are_as_promised(loaded, splits):
    _, tokenizer = loaded
    for e in splits["test"][:100] + splits["train"][:20]:
        rows = []
        for branch in branches(e):
            prompt = tokenizer.apply_chat_template(list(branch.messages), add_generation_prompt=True)
            full = tokenizer.apply_chat_template([*branch.messages, {"role": "assistant", "content": branch.answer}])
            assert full[: len(prompt)] == prompt
            assert full[-2] == tokenizer.eos_token_id and tokenizer.decode(full[-1:]) == "\n"
            assert tokenizer.decode(full[len(prompt) : -2]) == branch.answer
            rows.append(full[:-1])
        shared = next(i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)
        assert shared <= LONGEST_PREFIX
        assert max(len(row) for row in rows) - shared <= LONGEST_TAIL


def test_script_writes_the_committed_data(script, tmp_path):
    script.write_data(0, tmp_path)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (assets.data_dir() / f"{split}.jsonl").read_bytes()


def test_script_rebuilds_the_committed_tokenizer(script, tmp_path):
    catalogue = script.make_catalogue(0)
    script.write_tokenizer(script.train_tokenizer(catalogue), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (assets.model_dir() / name).read_bytes()


def test_no_pretraining_document_is_a_ranking_prompt(script):
    documents = script.documents(0, script.make_catalogue(0))
    for _ in range(200):
        text = next(documents)
        assert "Rank" not in text and "likelihood" not in text and "recommend" not in text


def test_settings_are_settings():
    stages = config.read_yaml(assets.settings_file())[0]
    assert set(stages) == {"sft", "dmpo", "evaluate"}
    for cls, stage in (
        (config.SftSettings, "sft"),
        (config.DmpoSettings, "dmpo"),
        (config.EvaluateSettings, "evaluate"),
    ):
        config.resolve(cls, None, {}, stages[stage])
