"""--frozen-cache: the outputs of the layers below an adapter, kept on disk, change no result."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_dmpo.cli.main import main
from mlx_dmpo.config import EvaluateSettings
from mlx_dmpo.core.scorer import FrozenOutputs, plain_logps, shared_logps
from mlx_dmpo.core.tree import pad_groups
from mlx_dmpo.judge import evaluate
from mlx_dmpo.model.frozen_cache import FrozenCache
from mlx_dmpo.train import run as train_run


@pytest.fixture
def read(monkeypatch):
    """What each look into a cache gave."""
    found, original = [], FrozenCache.get
    monkeypatch.setattr(FrozenCache, "get", lambda self, key: found.append(original(self, key)) or found[-1])
    return found


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("groups", [tiny.ragged_groups, tiny.tree_groups])
def test_what_is_read_from_disk_gives_the_plain_log_probs_and_gradients(groups, bits, tmp_path, read):
    model, groups = tiny.model(bits=bits), groups(np.random.default_rng(5))
    plain = np.array(plain_logps(model, pad_groups(groups)))
    gradient = tiny.leaves(
        mx.grad(lambda p: (model.update(p), plain_logps(model, pad_groups(groups)).sum())[1])(
            model.trainable_parameters()
        )
    )
    for again in range(2):
        disk = FrozenCache(tmp_path / "kept")
        frozen = FrozenOutputs(model, 0, 0, disk)
        batch = pad_groups(groups[::-1] if again else groups)
        h = frozen(batch)
        assert [h is not None for h in read] == [bool(again)] * len(groups)
        assert len(list(disk.directory.iterdir())) == len(groups)
        read.clear()
        found = np.array(shared_logps(model, batch, frozen=h))
        assert np.abs((found[::-1] if again else found) - plain).max() <= 5e-4
        ours = tiny.leaves(
            mx.grad(lambda p, b=batch, h=h: (model.update(p), shared_logps(model, b, frozen=h).sum())[1])(
                model.trainable_parameters()
            )
        )
        assert tiny.relative_error(ours, gradient) <= 1e-4


@pytest.mark.parametrize("damage", [b"", b"not safetensors", "other"])
def test_a_damaged_file_is_computed_again(damage, tmp_path, capsys):
    model, groups = tiny.model(), tiny.ragged_groups(np.random.default_rng(5))
    disk, batch = FrozenCache(tmp_path), pad_groups(groups)
    right = np.array(FrozenOutputs(model, 0, 0, disk)(batch))
    hurt = sorted(tmp_path.iterdir())[0]
    whole = hurt.read_bytes()
    if damage == "other":
        mx.save_safetensors(str(hurt), {"h": mx.zeros((3, 5))})
    else:
        hurt.write_bytes(damage)
    assert np.array_equal(np.array(FrozenOutputs(model, 0, 0, FrozenCache(tmp_path))(batch)), right)
    assert hurt.read_bytes() == whole
    assert ("cannot be read" in capsys.readouterr().err) == (damage != "other")


def test_a_full_disk_is_said_once_and_stops_nothing(tmp_path, capsys):
    model, groups = tiny.model(), tiny.ragged_groups(np.random.default_rng(5))
    (tmp_path / "file").write_text("")
    frozen = FrozenOutputs(model, 0, 0, FrozenCache(tmp_path / "file" / "below"))
    frozen(pad_groups(groups))
    frozen(pad_groups(groups))
    assert capsys.readouterr().err.count("nothing more is kept") == 1


@pytest.fixture
def settings(dmpo_settings):
    return replace(dmpo_settings, num_layers=1)


def test_training_and_evaluation_with_a_cache_are_those_without(settings, tmp_path, read):
    """Two trainings and their evaluations: what the first one computed serves the second."""
    scores = {}
    for name in ("without", "first", "second"):
        more = {} if name == "without" else {"frozen_cache": str(tmp_path / "f")}
        path = train_run.train(replace(settings, adapter_path=str(tmp_path / name), **more), "test")
        shared = {k: getattr(settings, k) for k in ("model", "data")}
        out = tmp_path / f"{name}-eval"
        evaluate.evaluate(EvaluateSettings(**shared, adapter_path=str(path), out=str(out), **more), "test")
        rows = [json.loads(line)["margin"] for line in (out / "scores.jsonl").read_text().splitlines()]
        scores[name] = (
            np.array(rows),
            np.concatenate([np.array(v).ravel() for v in mx.load(str(path / "adapters.safetensors")).values()]),
        )
        if name == "first":
            assert any(h is None for h in read)
            read.clear()
    assert read and all(h is not None for h in read)  # the second run computed nothing below its adapter
    for name in ("first", "second"):
        for ours, plain in zip(scores[name], scores["without"], strict=True):
            assert np.abs(ours - plain).max() <= 1e-4
    assert len(list((tmp_path / "f").iterdir())) == 1


def test_other_layers_and_other_bases_have_directories_of_their_own(settings, tmp_path):
    cache = str(tmp_path / "f")
    for i, more in enumerate([{}, {"num_layers": 2}, {"quantize": 4, "quantize_group_size": 32}]):
        path = tmp_path / f"a{i}"
        train_run.train(replace(settings, frozen_cache=cache, iters=1, adapter_path=str(path), **more), "test")
        assert len(list((tmp_path / "f").iterdir())) == i + 1


def test_the_base_model_fills_and_uses_the_cache_of_an_adapters_layers(settings, tmp_path, read):
    shared = EvaluateSettings(model=settings.model, data=settings.data)
    plain = tmp_path / "plain"
    evaluate.evaluate(replace(shared, out=str(plain)), "test")
    more = {"frozen_cache": str(tmp_path / "f")}
    cached = tmp_path / "cached"
    evaluate.evaluate(replace(shared, out=str(cached), num_layers=1, **more), "test")
    margins = [
        [json.loads(r)["margin"] for r in (p / "scores.jsonl").read_text().splitlines()] for p in (plain, cached)
    ]
    assert np.abs(np.array(margins[0]) - margins[1]).max() <= 1e-4
    path = train_run.train(replace(settings, iters=1), "test")
    read.clear()
    evaluate.evaluate(replace(shared, adapter_path=str(path), out=str(tmp_path / "adapted"), **more), "test")
    assert read and all(h is not None for h in read)


def test_a_cache_is_refused_where_the_adapter_leaves_no_layer(settings, tmp_path, capsys):
    path = train_run.train(replace(settings, num_layers=-1, iters=1, adapter_path=str(tmp_path / "all")), "test")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(f"evaluate --adapter-path {path} --frozen-cache f --model {settings.model} --data {settings.data}".split())
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and error[-1].startswith("error: --frozen-cache: ")
    assert error[-1].endswith("adapts every layer: leave it out, or train with --num-layers")
