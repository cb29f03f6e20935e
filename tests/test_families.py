"""Each family of models on the shared-prefix scorer: equal to the plain one, or refused with one line."""

import json
import re
from pathlib import Path

import families
import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.models.gemma3_text import clip_residual
from test_scoring import gradients

from mlx_dmpo.core import family as core_family
from mlx_dmpo.core import layout as core_layout
from mlx_dmpo.core import scorer, selfcheck
from mlx_dmpo.core.scorer import plain_logps, shared_logps
from mlx_dmpo.core.selfcheck import choose_scorer
from mlx_dmpo.core.tree import pad_groups, planned

VOCABULARY = tiny.COMMON["vocab_size"]
each_family = pytest.mark.parametrize("name", families.FAMILIES)


def agree(model, batch, **options):
    plain, plain_gradient = gradients(model, batch, plain_logps)
    shared, shared_gradient = gradients(model, batch, shared_logps, **options)
    assert np.abs(shared - plain).max() <= 5e-4
    assert tiny.relative_error(shared_gradient, plain_gradient) <= 1e-4
    return plain_gradient


@each_family
@pytest.mark.parametrize("bits", [0, 4])
def test_shared_equals_plain(name, bits):
    """On ragged groups, with LoRA on every linear layer, experts included; without and with recomputation."""
    model = families.family(name, bits=bits)
    batch = pad_groups(tiny.ragged_groups(np.random.default_rng(1)))
    gradient = agree(model, batch, checkpoint=bool(bits))
    some = tiny.leaves(gradient)
    assert any("q_proj" in k for k in some) and all(np.abs(v).max() > 0 for k, v in some.items() if "q_proj" in k)


@each_family
def test_trees_padding_and_attention_alone(name):
    """Questions with several answers, planned shapes, LoRA on attention alone."""
    model = families.family(name, keys=["self_attn.q_proj", "self_attn.v_proj"])
    agree(model, pad_groups(tiny.tree_groups(np.random.default_rng(2)), planned), checkpoint=True)


@each_family
def test_the_self_check_keeps_the_shared_scorer(name):
    model = families.family(name)
    before = {n: w for n, w in vars(core_family.decoder(model).model).items() if "window" in n}
    found = choose_scorer(model, VOCABULARY)
    assert found.shared, found.reason
    assert before == {n: w for n, w in vars(core_family.decoder(model).model).items() if "window" in n}
    assert choose_scorer(model.eval(), VOCABULARY).shared


@each_family
def test_which_mlps_are_swiglu(name):
    """Gemma's MLP is of another kind, and a mixture has experts; their MLPs are differentiated automatically."""
    found = [core_family._is_swiglu(layer.mlp) for layer in core_family.decoder(families.family(name)).model.layers]
    mixture = [index in families.EXPERTS["mlp_only_layers"] for index in range(len(found))]
    assert found == (mixture if name == "qwen3_moe" else ["gemma" not in name] * len(found))


@each_family
def test_frozen_outputs(name):
    model = families.family(name, lora_layers=2)
    batch = pad_groups(tiny.ragged_groups(np.random.default_rng(3)))
    assert scorer.frozen_layers(model) == 2
    agree(model, batch, frozen=scorer.FrozenOutputs(model, 1e9, 3)(batch))


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3_text", "ministral3"])
def test_a_compiled_step_is_the_same(name):
    """Lengths are unknown while a step is traced: masks and windows are there whatever they are."""
    model = families.family(name)
    batch = pad_groups(tiny.ragged_groups(np.random.default_rng(4)))
    arrays = {f: mx.array(getattr(batch, f)) for f in batch.__slots__ if f != "groups"}
    traced = type(batch)(**arrays, groups=())
    expected = np.array(plain_logps(model, batch))
    assert np.abs(np.array(shared_logps(model, traced)) - expected).max() <= 5e-4


@pytest.mark.parametrize("chunk", [5, 16, 1000])
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "llama, sliding"])
def test_any_chunk_of_prefix_attention_is_exact(name, chunk):
    model = families.family(name)
    agree(model, pad_groups(tiny.ragged_groups(np.random.default_rng(5))), chunk=chunk)


@pytest.mark.parametrize("window", [1, 7, 39, 40, 41, 60])
def test_windows_around_the_prefix_of_40(window):
    model = families.build("llama", families.SLIDING | {"sliding_window": window})
    agree(model, pad_groups(tiny.equal_groups(np.random.default_rng(6))))


def test_a_window_matters():
    """The toy groups are longer than the window: without it the scores are others."""
    batch = pad_groups(tiny.ragged_groups(np.random.default_rng(7)))
    near = families.family("llama, sliding")
    expected = np.array(shared_logps(near, batch))
    near.model.sliding_window = 500
    assert np.abs(np.array(shared_logps(near, batch)) - expected).max() > 0.01


@pytest.mark.parametrize("change", [-1, 1])
def test_the_self_check_finds_a_window_that_is_off_by_one(monkeypatch, change):
    """With a real window of 512, which no probe is longer than."""
    model, original = families.build("gemma3_text", families.GEMMA | {"sliding_window": 512}), core_family.windows
    assert choose_scorer(model, VOCABULARY).shared and model.model.window_size == 512
    wrong = lambda m: [w and w + change for w in original(m)]  # noqa: E731
    monkeypatch.setattr(core_family, "windows", wrong)
    found = choose_scorer(model, VOCABULARY)
    assert not found.shared and "differs from the plain one" in found.reason and model.model.window_size == 512


def test_the_self_check_finds_a_layer_that_has_no_window(monkeypatch):
    model = families.build("gemma3_text", families.GEMMA | {"sliding_window": 512})
    monkeypatch.setattr(core_family, "windows", lambda m: [None, m.model.window_size, None, m.model.window_size])
    assert "differs" in choose_scorer(model, VOCABULARY).reason


@pytest.mark.parametrize("family", families.REFUSED)
def test_others_are_run_by_the_plain_scorer_and_one_line_says_why(family):
    reason, given = families.REFUSED[family]
    model = families.build(family, given, lora_layers=1)
    found = choose_scorer(model, VOCABULARY)
    assert found.logps is plain_logps and not found.shared
    assert re.search(reason, found.reason) and "\n" not in found.reason
    batch = pad_groups(tiny.ragged_groups(np.random.default_rng(8))[1:2])
    assert np.isfinite(np.array(plain_logps(model, batch))).all()


def test_a_scale_of_the_residual_is_refused_by_its_name():
    model = tiny.model()
    model.model.layers[1].residual_multiplier = 0.5
    assert "qwen3 has residual_multiplier in its layer" in choose_scorer(model, VOCABULARY).reason


def test_float16_gemma_clips_as_mlx_lm_does():
    x = mx.array([60000.0, -60000.0, 3.0], mx.float16)
    for dtype in (mx.float16, mx.float32):
        found, expected = (add(x.astype(dtype), x.astype(dtype)) for add in (core_family._add, clip_residual))
        np.testing.assert_array_equal(np.array(found), np.array(expected))
    assert core_family._add(x, x).tolist() == [65504, -65504, 6]


def test_a_window_longer_than_every_sequence_masks_nothing():
    batch = pad_groups(tiny.equal_groups(np.random.default_rng(9)))
    assert core_layout.layout(batch, mx.float32, (4, 2), 52).every.far is None
    assert core_layout.layout(batch, mx.float32, (4, 2), 20).every.far is not None
    assert selfcheck.NARROW < selfcheck.SHORT


def test_the_table_of_families_is_that_of_the_tests():
    """docs/results/families.json, written by benchmarks/families.py: these families, within these limits."""
    path = Path(__file__).resolve().parents[1] / "docs" / "results" / "families.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert set(found["families"]) == set(families.FAMILIES)
    for row in found["families"].values():
        for part in (row["float32"], row["4-bit"]):
            assert part["nats"] <= 5e-4 and part["gradient"] <= 1e-4
        assert row["seconds"]["plain"] > row["seconds"]["shared"]
