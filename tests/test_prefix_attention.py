"""Prefix attention in chunks or whole: chosen by a measurement that is kept, and exact either way."""

import json
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_dmpo.config import EvaluateSettings
from mlx_dmpo.core import attention
from mlx_dmpo.core.layout import PREFIX_CHUNK, WHOLE
from mlx_dmpo.core.scorer import plain_logps, shared_logps
from mlx_dmpo.core.selfcheck import choose_scorer
from mlx_dmpo.core.tree import pad_groups
from mlx_dmpo.machine import files
from mlx_dmpo.model import prefix_attention
from mlx_dmpo.model.open import open_scorer

VOCABULARY = tiny.COMMON["vocab_size"]


@pytest.fixture
def device(monkeypatch):
    """A GPU on which all at once is faster; -> the sizes that were measured."""
    asked = []

    def measure(*sizes):
        asked.append(sizes)
        return {"whole": True, "seconds": {"chunks": 2.0, "whole": 1.0}}

    monkeypatch.setattr(prefix_attention, "on_cpu", lambda: False)
    monkeypatch.setattr(prefix_attention, "device_name", lambda: "Apple M9")
    monkeypatch.setattr(prefix_attention, "measure", measure)
    prefix_attention._chosen.cache_clear()
    yield asked
    prefix_attention._chosen.cache_clear()


def test_a_cpu_keeps_chunks_and_measures_nothing(device, monkeypatch):
    monkeypatch.setattr(prefix_attention, "on_cpu", lambda: True)
    assert prefix_attention.chunk_for(tiny.model()) == PREFIX_CHUNK and not device


def test_a_gpu_is_measured_once_for_each_size(device):
    assert [prefix_attention.chunk_for(tiny.model(bits=bits)) for bits in (0, 4)] == [WHOLE, WHOLE]
    assert device == [(4, 2, 32, mx.float32)]
    prefix_attention._chosen.cache_clear()  # another process
    assert prefix_attention.chunk_for(tiny.model()) == WHOLE and len(device) == 1
    assert prefix_attention.chunk_for(tiny.model("llama")) == WHOLE and device[1:] == [(4, 2, 16, mx.float32)]
    kept = json.loads((files.cache_directory() / "attention.json").read_text())
    assert len(kept) == 2 and all("Apple M9" in key and mx.__version__ in key for key in kept)
    assert prefix_attention.chunk_for(tiny.model().model) == PREFIX_CHUNK  # no decoder that is understood


@pytest.mark.parametrize("content", ["", "[1]", "{", "null", "{KEY: 5}", '{KEY: {"whole": "yes"}}'])
def test_a_damaged_file_is_measured_again(device, content):
    prefix_attention.chunk_for(tiny.model())
    path = files.cache_directory() / "attention.json"
    key = next(iter(json.loads(path.read_text())))
    path.write_text(content.replace("KEY", json.dumps(key)))
    prefix_attention._chosen.cache_clear()
    assert prefix_attention.chunk_for(tiny.model()) == WHOLE and len(device) == 2
    assert json.loads(path.read_text())[key]["whole"] is True


def test_a_cache_that_cannot_be_written_is_no_matter(device, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_DMPO_CACHE", str(tmp_path / "file"))
    assert prefix_attention.chunk_for(tiny.model()) == WHOLE


def test_the_chosen_way_is_the_one_that_scores(device, model_directory):
    scorer = open_scorer(EvaluateSettings(model=str(model_directory)))
    found = scorer.groups
    assert found.shared and isinstance(found.logps, partial) and found.logps.keywords == {"chunk": WHOLE}
    batch = pad_groups([tiny.group(np.random.default_rng(0), 300, [8, 6], [3, 2])])
    expected = np.array(plain_logps(scorer.base.model, batch))
    np.testing.assert_allclose(np.array(found.logps(scorer.base.model, batch)), expected, atol=5e-4)
    assert open_scorer(EvaluateSettings(model=str(model_directory), scoring="plain")).groups.logps is plain_logps


@pytest.mark.parametrize("wrong", ["value", "gradient"])
def test_where_the_chosen_way_is_wrong_chunks_are_taken(monkeypatch, wrong):
    """A device whose fused attention is broken beyond 128 tokens, or whose backward pass is."""
    original = attention.attend_prefix

    def broken(q, k, v, scale, chunks):
        out = original(q, k, v, scale, chunks)
        if len(chunks) > 1 or q.shape[2] <= PREFIX_CHUNK:
            return out
        return 1.1 * out if wrong == "value" else mx.stop_gradient(out)

    monkeypatch.setattr(attention, "attend_prefix", broken)
    found = choose_scorer(tiny.model(), VOCABULARY, chunk=WHOLE)
    assert found.shared and found.logps is shared_logps
    monkeypatch.setattr(attention, "attend_prefix", original)
    assert choose_scorer(tiny.model(), VOCABULARY, chunk=WHOLE).logps.keywords == {"chunk": WHOLE}


def test_a_measurement_has_its_figures():
    found = prefix_attention.measure(2, 1, 8, mx.float32, tokens=256, repeats=2)
    assert isinstance(found["whole"], bool)
    assert min(*found["seconds"].values(), *found["bytes"].values()) > 0


def test_a_device_that_fails_gets_chunks(monkeypatch):
    def fails(*given):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(prefix_attention, "attend_prefix", fails)
    assert prefix_attention.measure(2, 1, 8, mx.float32, tokens=64, repeats=1)["whole"] is False
