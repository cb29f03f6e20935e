"""Adapters for other tools: what is written equals what was trained, and differences are reported."""

import json
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import tiny
import yaml
from mlx.utils import tree_flatten, tree_map
from tiny import save_adapter

from mlx_dmpo.config import EvaluateSettings, ExportSettings, SftSettings
from mlx_dmpo.core.scorer import plain_logps
from mlx_dmpo.core.tree import pad_groups
from mlx_dmpo.data import formats
from mlx_dmpo.errors import UserError
from mlx_dmpo.judge import evaluate
from mlx_dmpo.machine import files, run_directory
from mlx_dmpo.model import adapters, loading, saving
from mlx_dmpo.model.encode import Encoder
from mlx_dmpo.prompts.orders import first_negatives
from mlx_dmpo.tools import export, model_card, peft
from mlx_dmpo.train import run as train_run


@pytest.fixture(scope="session")
def quantized_directory(tmp_path_factory):
    """As mlx-community's: 4-bit weights, bfloat16 scales and norms."""
    path = tmp_path_factory.mktemp("models") / "tiny-4bit"
    tiny.save_model(path, bits=4)
    model = tiny.model(bits=4, lora_layers=0)
    model.set_dtype(mx.bfloat16)
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = json.loads((path / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 4}
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text('{"temperature": 0.6}')
    return path


@pytest.fixture
def adapter(model_directory, tmp_path):
    return save_adapter(model_directory, tmp_path / "adapter")


@pytest.fixture
def settings(adapter, data_directory, tmp_path):
    return ExportSettings(adapter_path=str(adapter), data=str(data_directory), out=str(tmp_path / "out"), examples=2)


def answers(model, tokenizer, data_directory):
    """(B,) log-probs of every answer to one pair of two examples, each sequence alone."""
    encoder = Encoder(tokenizer)
    examples = [first_negatives(e, 1) for e in formats.load_examples(data_directory, "test")[:2]]
    batch = pad_groups([encoder.encode(e, [(True, False)]) for e in examples])
    logps = np.array(plain_logps(model.eval(), batch))
    return logps[batch.answer_mask.any(axis=-1)]


def in_mlx_lm(model, data_directory, adapter=None):
    """Log-probs of a directory as mlx-lm itself loads it, in float32."""
    from mlx_lm import load

    loaded, tokenizer = load(str(model), adapter_path=adapter and str(adapter))
    loaded.set_dtype(mx.float32)
    return answers(loaded, tokenizer, data_directory)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_layers": 1},
        {"kind": "dora"},
        {"keys": ("self_attn.q_proj", "model.embed_tokens")},
        {"keys": ("model.layers.0.mlp.up_proj",)},
        {"kind": "dora", "keys": ("mlp.up_proj", "model.embed_tokens")},
    ],
    ids=str,
)
def test_a_fused_model_equals_base_and_adapter_in_mlx_lm(how, model_directory, data_directory, tmp_path):
    adapter = save_adapter(model_directory, tmp_path / "adapter", **how)
    done = export.export(
        ExportSettings(adapter_path=str(adapter), data=str(data_directory), out=str(tmp_path / "out"), examples=2)
    )
    expected = in_mlx_lm(model_directory, data_directory, adapter)
    np.testing.assert_allclose(in_mlx_lm(tmp_path / "out", data_directory), expected, atol=5e-4)
    assert np.abs(in_mlx_lm(model_directory, data_directory) - expected).max() > 1e-2  # the adapter does something
    assert done.difference.largest < 5e-4 and done.difference.answers == 8 and done.difference.pairs == 2


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode, bits, group", [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16), ("affine", 4, 64)])
def test_a_base_in_any_quantization_is_written_in_the_type_asked_for(
    mode, bits, group, dtype, kind, model_directory, data_directory, tmp_path
):
    """MLX dequantizes mxfp4, mxfp8 and nvfp4 to bfloat16 whatever the model computes in."""
    how = {"quantize": bits, "quantize_mode": mode, "quantize_group_size": group, "dtype": dtype}
    settings = SftSettings(model=str(model_directory), fine_tune_type=kind, **how)
    base = loading.load(settings)
    adapters.add_lora(base.model, settings)
    mx.random.seed(1)
    base.model.update(tree_map(lambda p: p + 0.05 * mx.random.normal(p.shape), base.model.trainable_parameters()))
    files.write_json(made(tmp_path / "a") / adapters.ADAPTER_CONFIG, adapters.adapter_config(settings, base))
    adapters.save_adapter(base.model, tmp_path / "a" / adapters.ADAPTER_WEIGHTS)
    done = export.export(
        ExportSettings(
            model=str(model_directory),
            adapter_path=str(tmp_path / "a"),
            data=str(data_directory),
            out=str(tmp_path / "out"),
            examples=2,
            **how,
        )
    )
    written = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert {str(v.dtype) for v in written.values()} == {f"mlx.core.{dtype}"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    if dtype == "float32" and (kind == "lora" or mode == "affine"):
        assert done.difference.largest < 5e-4
    if dtype == "float32" and kind == "lora":  # each adapted weight is the dequantized one and the update, exactly
        name, layer = next(iter(adapters.adapted_layers(base.model).items()))
        q = layer.linear
        plain = mx.dequantize(q.weight, q.scales, q.get("biases"), group_size=group, bits=bits, mode=mode)
        expected = plain.astype(mx.float32) + (layer.scale * layer.lora_b.T) @ layer.lora_a.T
        assert mx.array_equal(written[f"{name}.weight"], expected)


def made(path):
    path.mkdir(parents=True)
    return path


def test_a_fused_directory_holds_what_the_base_holds_but_code(settings, adapter, model_directory, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model_directory, base)
    (base / "generation_config.json").write_text('{"temperature": 0.6}')
    (base / "LICENSE.txt").write_text("terms")
    (base / "tokenizer_helper.py").write_text("raise SystemExit('run')")
    weights = {k: v.astype(mx.bfloat16) for k, v in mx.load(str(base / "model.safetensors")).items()}
    mx.save_safetensors(str(base / "model.safetensors"), weights)
    path = export.export(replace(settings, model=str(base))).path
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE.txt",
    ):
        assert (path / name).read_bytes() == (base / name).read_bytes()
    assert not list(path.rglob("*.py")) and not list(path.rglob(".*"))
    stored = mx.load(str(path / "model.safetensors"))
    assert {v.dtype for v in stored.values()} == {mx.bfloat16}  # as the base, though it was loaded in float32
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["export"]["to"] == "mlx" and manifest["export"]["difference"]["largest"] > 0
    assert {name.rsplit("/", 1)[-1] for name in manifest["inputs"]} == {"adapters.safetensors", "adapter_config.json"}
    wide = export.export(replace(settings, model=str(base), dtype="float32", out=str(tmp_path / "wide")))
    assert {v.dtype for v in mx.load(str(wide.path / "model.safetensors")).values()} == {mx.float32}
    assert wide.difference.largest < manifest["export"]["difference"]["largest"]


def test_a_quantized_base_three_ways(quantized_directory, data_directory, tmp_path):
    """Dequantized is near, kept is equal, quantized again is reported to be far."""
    adapter = save_adapter(quantized_directory, tmp_path / "adapter")
    settings = ExportSettings(adapter_path=str(adapter), data=str(data_directory), examples=2)
    expected = in_mlx_lm(quantized_directory, data_directory, adapter)

    fused = export.export(replace(settings, out=str(tmp_path / "fused")))
    config = json.loads((fused.path / "config.json").read_text())
    assert "quantization" not in config and "quantization_config" not in config
    assert not any(k.endswith("scales") for k in mx.load(str(fused.path / "model.safetensors")))
    assert {v.dtype for v in mx.load(str(fused.path / "model.safetensors")).values()} == {mx.bfloat16}

    kept = export.export(replace(settings, out=str(tmp_path / "kept"), keep_quantized=True))
    base = mx.load(str(quantized_directory / "model.safetensors"))
    again = mx.load(str(kept.path / "model" / "model.safetensors"))
    assert base.keys() == again.keys() and all(
        mx.array_equal(base[k], again[k]) and base[k].dtype == again[k].dtype for k in base
    )
    np.testing.assert_array_equal(in_mlx_lm(kept.path / "model", data_directory, kept.path / "adapter"), expected)
    assert not (kept.path / "config.json").exists()  # so that the base alone is not taken for the export
    assert kept.difference.largest == 0

    lossy = export.export(replace(settings, out=str(tmp_path / "lossy"), requantize=True))
    assert json.loads((lossy.path / "config.json").read_text())["quantization"]["bits"] == 4
    for done in (fused, lossy):
        off = np.abs(in_mlx_lm(done.path, data_directory) - expected).max()
        assert 0.3 * off < done.difference.largest < 3 * off  # other pairs of the same examples, the same size
    assert fused.difference.largest < 0.5 * lossy.difference.largest


def test_the_difference_is_counted_by_hand():
    before = np.array([[[-1.0, -2.0], [-1.0, -2.0]], [[-1.0, -1.5], [-3.0, -2.0]]])
    after = before.copy()
    after[0, 0, 0] -= 0.25
    after[1, 1, 0] += 0.75  # margins 0.5 - 1.0 = -0.5 become 0.5 - 0.25 = 0.25
    found = model_card.difference(before, after)
    assert found == model_card.Difference(8, 2, 0.75, 0.125, 0.75, 1)
    assert "largest difference 0.75 nats, mean 0.12" in str(found) and "1 of 2 pairs ranked otherwise" in str(found)


def test_a_base_quantized_at_load_is_quantized_again(sft_run, data_directory, tmp_path):
    """The run's manifest tells how; without it the fused weights would be of another model."""
    done = export.export(
        ExportSettings(adapter_path=str(sft_run), data=str(data_directory), out=str(tmp_path / "out"), examples=2)
    )
    assert done.difference.largest < 5e-4
    base = loading.load(SftSettings(model=str(json.loads((sft_run / "adapter_config.json").read_text())["model"])))
    plain = np.array(base.model.model.embed_tokens.weight)
    fused = np.array(mx.load(str(done.path / "model.safetensors"))["model.embed_tokens.weight"])
    assert 1e-3 < np.abs(plain - fused).max() < 0.1


@pytest.fixture(scope="module")
def sft_run(model_directory, data_directory, tmp_path_factory):
    settings = SftSettings(
        model=str(model_directory),
        data=str(data_directory),
        adapter_path=str(tmp_path_factory.mktemp("runs") / "sft|<b>"),
        iters=2,
        learning_rate=1e-2,
        quantize=4,
        quantize_group_size=32,
    )
    return train_run.train(settings, "test")


def test_an_adapter_of_mlx_lms_own(settings, adapter, model_directory):
    """mlx_lm.lora writes all its arguments into adapter_config.json, and no manifest."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    lora = {k: config["lora_parameters"][k] for k in ("rank", "scale", "dropout")}
    theirs = {
        "model": str(model_directory),
        "train": True,
        "fine_tune_type": "lora",
        "num_layers": 16,
        "seed": 0,
        "lora_parameters": lora,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(theirs))
    done = export.export(settings)
    assert done.difference.largest < 5e-4
    assert "| num\\_layers | 16 |" in (done.path / "README.md").read_text()


def test_free_text_is_compared_in_its_one_prompt(settings, tmp_path):
    rows = [{"prompt": f"Which {n}?", "chosen": f"amber {n}", "rejected": f"river {n}"} for n in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = export.export(replace(settings, data=str(tmp_path / "pairs.jsonl"), examples=2))
    assert (done.difference.pairs, done.difference.answers) == (2, 4) and done.difference.largest < 5e-4
    assert "Rank the likelihood" not in done.commands[0]
    (tmp_path / "answers.jsonl").write_text(json.dumps({"prompt": "Which?", "completion": "amber"}) + "\n")
    with pytest.raises(UserError, match="one answer per prompt"):
        export.export(replace(settings, data=str(tmp_path / "answers.jsonl"), overwrite=True))


# --- PEFT


def test_peft_tensors_are_ours_turned_round(settings, adapter, model_directory):
    """Worked without torch: W + alpha/r B A of the PEFT file is the fused model's weight."""
    fused = mx.load(str(export.export(settings).path / "model.safetensors"))
    path = export.export(replace(settings, to="peft", out=settings.out + "-peft")).path
    tensors, config = (
        mx.load(str(path / "adapter_model.safetensors")),
        json.loads((path / "adapter_config.json").read_text()),
    )
    base = mx.load(str(model_directory / "model.safetensors"))
    assert (config["r"], config["lora_alpha"]) == (4, 6) and config["layers_to_transform"] is None
    for name, weight in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in tensors:
            update = (
                config["lora_alpha"] / config["r"] * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
            )
            assert np.abs(np.array(weight + update - fused[name])).max() < 1e-6 < np.abs(np.array(update)).max()
    assert len(tensors) == 2 * 7 * 3


def test_peft_config_names_the_layers(model_directory, data_directory, tmp_path):
    def config(**how):
        name = str(len(list(tmp_path.iterdir())))
        adapter = save_adapter(model_directory, tmp_path / name, **how)
        made = export.export(ExportSettings(adapter_path=str(adapter), to="peft", examples=0)).path
        return json.loads((made / "adapter_config.json").read_text())

    last = config(num_layers=2, keys=("self_attn.q_proj", "mlp.up_proj"))
    assert last["target_modules"] == ["mlp.up_proj", "self_attn.q_proj"] and last["layers_to_transform"] == [1, 2]
    assert last["layers_pattern"] == "layers" and not last["use_dora"]
    single = config(keys=("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"))
    assert single["target_modules"] == ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    assert single["layers_to_transform"] is None
    assert config(kind="dora")["use_dora"]
    assert config(scale=0.3)["lora_alpha"] == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"keys": ("model.embed_tokens", "self_attn.q_proj")}, "tied embeddings"),
        ({"keys": ("model.embed_tokens",), "kind": "dora"}, "DoRA on embeddings"),
    ],
)
def test_what_peft_cannot_express_is_refused(how, message, model_directory, tmp_path):
    adapter = save_adapter(model_directory, tmp_path / "adapter", **how)
    with pytest.raises(UserError, match=message):
        export.export(ExportSettings(adapter_path=str(adapter), to="peft", examples=0))
    assert not (adapter / "peft").exists()


def test_another_family_is_refused_for_peft(settings, monkeypatch):
    monkeypatch.setattr(peft, "PEFT_FAMILIES", ("llama",))
    with pytest.raises(UserError, match="layers of qwen3"):
        export.export(replace(settings, to="peft"))


def test_untied_embeddings_and_head_reach_peft(tmp_path, data_directory):
    base = tiny.save_model(tmp_path / "untied", tied=False)
    adapter = save_adapter(
        base, tmp_path / "adapter", num_layers=1, keys=("model.embed_tokens", "lm_head", "self_attn.q_proj")
    )
    done = export.export(ExportSettings(adapter_path=str(adapter), data=str(data_directory), to="peft", examples=2))
    config = json.loads((done.path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["lm_head", "model.embed_tokens", "self_attn.q_proj"] and config[
        "layers_to_transform"
    ] == [2]
    assert done.difference.largest < 1e-4
    tensors = mx.load(str(done.path / "adapter_model.safetensors"))
    assert tensors["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (4, tiny.COMMON["vocab_size"])
    assert tensors["base_model.model.model.embed_tokens.lora_embedding_B"].shape == (64, 4)


def test_reading_peft_back_sees_a_wrong_file(settings, adapter, monkeypatch):
    """The comparison is with what the file says, not with what is in memory."""
    monkeypatch.setattr(
        export, "peft_tensors", lambda model, made=peft.peft_tensors: {k: 1.5 * v for k, v in made(model).items()}
    )
    assert export.export(replace(settings, to="peft")).difference.largest > 0.05


def test_peft_of_a_quantized_base_needs_its_original(quantized_directory, tmp_path):
    adapter = save_adapter(quantized_directory, tmp_path / "adapter")
    settings = ExportSettings(adapter_path=str(adapter), to="peft", examples=0)
    with pytest.raises(UserError, match="--base-name"):
        export.export(settings)
    path = export.export(replace(settings, base_name="Qwen/Qwen3-0.6B")).path
    assert json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"] == "Qwen/Qwen3-0.6B"
    card = (path / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "Qwen/Qwen3-0.6B" and "unquantized" in card


# --- the card


def test_the_card_tells_results_with_intervals_and_no_paths(sft_run, model_directory, data_directory, tmp_path):
    evaluations = []
    for name, chosen in (("own", str(sft_run)), ("base", "")):
        out = tmp_path / f"eval <script>|{name}"
        made = EvaluateSettings(
            model=str(model_directory), data=str(data_directory), adapter_path=chosen, out=str(out), resamples=100
        )
        evaluations.append((str(out), evaluate.evaluate(made)))
    done = export.export(
        ExportSettings(
            adapter_path=str(sft_run),
            out=str(tmp_path / "out"),
            examples=0,
            eval=tuple(path for path, _ in evaluations),
        )
    )
    card = (done.path / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "mlx" and "base_model" not in front  # a directory is no hub name
    own, base = (result["pair_accuracy"] for _, result in evaluations)
    line = next(line for line in card.splitlines() if line.startswith("| pair accuracy |"))
    assert line.replace(
        "\\", ""
    ) == f"| pair accuracy | {own['value']:.3f} [{own['low']:.3f}, {own['high']:.3f}] | " + (
        f"{base['value']:.3f} [{base['low']:.3f}, {base['high']:.3f}] |"
    )
    assert "| this model | base (tiny) |" in card
    assert files.sha256(data_directory / "train.jsonl") in card and "| learning\\_rate | 0.01 |" in card
    assert "not compared." in card
    assert "<b>" not in card and "sft\\|&lt;b&gt;" in card
    assert str(tmp_path) not in card and str(model_directory) not in card and str(sft_run.parent) not in card


# --- whole or not at all


def test_an_export_that_fails_leaves_no_trace(settings, monkeypatch, tmp_path):
    def broken(*arguments, **how):
        raise RuntimeError("broken")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(export, "model_card", broken)
    with pytest.raises(RuntimeError):
        export.export(settings)
    assert sorted(tmp_path.iterdir()) == before


def test_an_earlier_export_stands_until_the_new_one_is_whole(settings, tmp_path, monkeypatch):
    first = export.export(settings).path
    kept = {f.name: f.read_bytes() for f in first.iterdir()}
    with pytest.raises(UserError, match="holds an export"):
        export.export(settings)
    with monkeypatch.context() as patched:
        patched.setattr(saving, "save_model", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export.export(replace(settings, overwrite=True))
    assert {f.name: f.read_bytes() for f in first.iterdir()} == kept
    again = export.export(replace(settings, overwrite=True, to="peft")).path
    assert (
        again == first and not (again / "model.safetensors").exists() and (again / "adapter_model.safetensors").exists()
    )
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_nothing_else_is_ever_replaced(settings, adapter, sft_run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    for out in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt", sft_run, adapter):
        with pytest.raises(UserError, match=r"not an export|a run or an evaluation"):
            export.export(replace(settings, out=str(out), overwrite=True))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it" and (sft_run / "adapters.safetensors").exists()


def test_a_link_is_followed_and_stays(settings, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export.export(replace(settings, out=str(tmp_path / "link"), examples=0))
    assert (tmp_path / "link").is_symlink() and run_directory.is_complete(tmp_path / "real")


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from mlx_dmpo.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs file-size limits")
def test_a_full_disk_leaves_no_half_export(adapter, data_directory, tmp_path):
    """A file-size limit stands for it: the weights (600 kB) do not fit, the rest does."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    out = tmp_path / "out"
    arguments = ["export", "--adapter-path", adapter, "--data", data_directory, "--out", out]
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 2 and "cannot be written" in run.stderr and "Traceback" not in run.stderr, run.stderr
    assert not out.exists() and not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


# --- which base


def test_the_base_is_the_one_that_the_adapter_names(settings, adapter, model_directory):
    def rename(name):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "model": name}))

    rename("mlx-community/Qwen3-0.6B-4bit")
    with pytest.raises(
        UserError, match=r"add --model mlx-community/Qwen3-0\.6B-4bit"
    ):  # a stranger's adapter fetches nothing
        export.export(settings)
    rename(["a list"])
    with pytest.raises(UserError, match="add --model MODEL"):
        export.export(settings)
    assert export.export(replace(settings, model=str(model_directory))).difference.largest < 5e-4


def test_a_companion_that_links_away_is_not_given_away(settings, adapter, model_directory, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model_directory, base)
    (tmp_path / "private").write_text("secret")
    (base / "special_tokens_map.json").unlink(missing_ok=True)
    (base / "merges.txt").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="links to a file outside"):
        export.export(replace(settings, model=str(base)))
    assert not (tmp_path / "out").exists()


def test_the_hubs_own_links_are_followed(settings, model_directory, tmp_path):
    """As the hub's cache lays a repository out: snapshots/REVISION/name -> blobs/HASH."""
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in model_directory.iterdir():
        shutil.copyfile(file, repository / "blobs" / files.sha256(file))
        (snapshot / file.name).symlink_to(repository / "blobs" / files.sha256(file))
    path = export.export(replace(settings, model=str(snapshot))).path
    assert not any(f.is_symlink() for f in path.iterdir()) and (path / "tokenizer.json").is_file()


# --- the printed commands, run


@pytest.fixture(scope="module")
def thinking_export(tmp_path_factory, data_directory):
    """A model whose template, as hybrid Qwen3's, thinks unless thinking is turned off."""
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("thinking")
    base = tiny.save_model(directory / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<think>", "</think>"]}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = (
        "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{%- "
        "endif %}{%- endif %}"
    )
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m.content +", "('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') + m.content +"
    )
    tokenizer.save_pretrained(base)
    adapter = save_adapter(base, directory / "adapter")
    done = export.export(ExportSettings(adapter_path=str(adapter), data=str(data_directory), examples=2))
    from mlx_lm import load

    _, wrapped = load(str(done.path))
    assert wrapped.has_thinking
    message = [{"role": "user", "content": export._placeholder_prompt([], export.pairwise.PAIRWISE)}]
    lengths = [
        len(wrapped.apply_chat_template(message, add_generation_prompt=True, enable_thinking=on))
        for on in (False, True)
    ]
    assert lengths[0] > lengths[1]
    return done, lengths[0], message


def test_the_generate_command_runs_as_trained(thinking_export):
    done, length, _ = thinking_export
    program, *arguments = shlex.split(done.commands[0])
    assert (
        program == "mlx_lm.generate"
        and arguments[arguments.index("--chat-template-config") + 1] == '{"enable_thinking": false}'
    )
    run = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "generate", *arguments, "--verbose", "True"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert int(re.search(r"Prompt: (\d+) tokens", run.stdout)[1]) == length


def test_the_server_command_runs_as_trained(thinking_export):
    import socket

    done, length, message = thinking_export
    program, *arguments = shlex.split(done.commands[1])
    assert (
        program == "mlx_lm.server"
        and arguments[arguments.index("--chat-template-args") + 1] == '{"enable_thinking": false}'
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments[arguments.index("--port") + 1] = str(port)
    server = subprocess.Popen(
        [sys.executable, "-m", "mlx_lm", "server", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps({"messages": message, "max_tokens": 2}).encode(),
            {"Content-Type": "application/json"},
        )
        for _ in range(120):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    output = json.load(answer)
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.5)
        assert output["usage"]["prompt_tokens"] == length
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_a_template_without_thinking_needs_no_setting(settings):
    assert not any("enable_thinking" in line for line in export.export(settings).commands)
