"""What a user can get wrong: one clear line, exit code 2, no traceback, nothing that looks finished."""

import json
import os
import shutil

import pytest

from mlx_dmpo.cli import main

GOOD = {"user": "u", "domain": "movie", "history": ["amber"], "positive": "lantern", "negatives": ["river"]}


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    told = capsys.readouterr()
    return stop.value.code, told.out, told.err


def row(**change):
    return json.dumps({k: v for k, v in {**GOOD, **change}.items() if v is not None})


# name: (file name, text, what the line must say)
FILES = {
    "bad JSON at line 2": ("d.jsonl", row() + "\n{oops\n", ["d.jsonl:2", "JSON"]),
    "missing field": ("d.jsonl", row() + "\n" + row(positive=None) + "\n", ["d.jsonl:2", '"positive"']),
    "empty history": ("d.jsonl", row(history=[]), ["d.jsonl:1", '"history"', "empty"]),
    "no negatives": ("d.jsonl", row(negatives=[]), ["d.jsonl:1", '"negatives"']),
    "identical pair": ("d.jsonl", row(negatives=["lantern"]), ["d.jsonl:1", "positive"]),
    "a negative twice": ("d.jsonl", row(negatives=["river", "river"]), ["d.jsonl:1", "twice"]),
    "history is text": ("d.jsonl", row(history="amber"), ["d.jsonl:1", '"history"']),
    "a title is a number": ("d.jsonl", row(history=["amber", 3]), ["d.jsonl:1", '"history"']),
    "unknown field": ("d.jsonl", row(rating=5), ["d.jsonl:1", "rating"]),
    "not an object": ("d.jsonl", row() + "\n[1, 2]\n", ["d.jsonl:2"]),
    "no wording for the domain": ("d.jsonl", row(domain="cheese"), ["d.jsonl:1", "cheese", "domains"]),
    "empty file": ("d.jsonl", "", ["d.jsonl", "empty"]),
    "positive_first does not fit": ("d.jsonl", row(positive_first=[True, False]), ["d.jsonl:1", "positive_first"]),
    "released row with an unknown prompt": (
        "d.json",
        json.dumps([{"instruction": "You are an assistant working on cheese recommendations.", "input": "", "output": ["a", "b"]}]),
        ["d.json:row 1", "domains"],
    ),
    "released row without output": ("d.json", json.dumps([{"instruction": "x", "input": ""}]), ["d.json:row 1", "output"]),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", ["sft", "dmpo", "evaluate"])
def test_files(name, command, model_directory, tmp_path, capsys):
    file, text, expected = FILES[name]
    (tmp_path / file).write_text(text)
    out = tmp_path / "out"
    code, _, err = run(
        capsys, command, "--model", model_directory, "--data", tmp_path / file, "--out" if command == "evaluate" else "--adapter-path", out
    )
    assert code == 2
    line = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(line) == 1 and "Traceback" not in err
    assert all(part in line[0] for part in expected), line
    assert not (out / "manifest.json").exists()


# name: (arguments, what the line must say); {model}, {data}, {tmp} are filled in
FLAGS = {
    "data file is missing": (["sft", "--data", "{tmp}/none.jsonl"], ["none.jsonl"]),
    "data directory without the split": (["evaluate", "--data", "{tmp}"], ["test.jsonl"]),
    "model is missing": (["sft", "--model", "{tmp}/no-model"], ["no-model"]),
    "model directory without config": (["sft", "--model", "{tmp}"], ["config.json"]),
    "no causal language model": (["sft", "--model", "{tmp}/bert"], ["bert", "causal"]),
    "broken config.json": (["sft", "--model", "{tmp}/broken"], ["broken"]),
    "weights of another shape": (["sft", "--model", "{tmp}/shapes"], ["shapes"]),
    "negative beta": (["dmpo", "--beta", "-1"], ["--beta", "-1"]),
    "beta is no number": (["dmpo", "--beta", "much"], ["--beta", "much"]),
    "learning rate 0": (["sft", "--learning-rate", "0"], ["--learning-rate"]),
    "learning rate nan": (["sft", "--learning-rate", "nan"], ["--learning-rate"]),
    "unknown loss": (["dmpo", "--loss", "ppo"], ["--loss", "ppo"]),
    "unknown flag": (["dmpo", "--betta", "1"], ["--betta"]),
    "unknown command": (["trian"], ["trian"]),
    "epochs and iters": (["sft", "--epochs", "1", "--iters", "5"], ["--iters", "epochs"]),
    "too many layers": (["sft", "--num-layers", "99"], ["num_layers", "99"]),
    "LoRA key matches nothing": (["sft", "--lora-keys", "self_attn.qproj"], ["self_attn.qproj", "self_attn.q_proj"]),
    "group size does not divide": (["sft", "--quantize", "4", "--quantize-group-size", "48"], ["quantize"]),
    "start adapter is missing": (["dmpo", "--start-adapter", "{tmp}/none"], ["none"]),
    "start adapter without weights": (["dmpo", "--start-adapter", "{tmp}/bert"], ["adapter"]),
    "unfinished adapter": (["evaluate", "--adapter-path", "{tmp}/unfinished"], ["not finished"]),
    "adapter of another model": (["evaluate", "--adapter-path", "{tmp}/other"], ["other", "no adapter of"]),
    "config is missing": (["sft", "-c", "{tmp}/none.yaml"], ["none.yaml"]),
    "config with an unknown key": (["dmpo", "-c", "{tmp}/typo.yaml"], ["typo.yaml:2", '"betta"', '"beta"']),
    "config with a wrong type": (["dmpo", "-c", "{tmp}/type.yaml"], ["type.yaml:1", "batch_size"]),
    "config that is no YAML": (["dmpo", "-c", "{tmp}/no.yaml"], ["no.yaml:2"]),
    "config that is a list": (["dmpo", "-c", "{tmp}/list.yaml"], ["list.yaml:1", "mapping"]),
    "config with a key twice": (["dmpo", "-c", "{tmp}/twice.yaml"], ["twice.yaml:2", "twice"]),
    "config with half a domain": (["dmpo", "-c", "{tmp}/domain.yaml"], ["domain", "topic"]),
    "sequence does not fit": (["sft", "--max-seq-length", "40"], ["train.jsonl:", "40"]),
    "tracker is not installed": (["sft", "--report-to", "nobody"], ["report_to", "nobody"]),
    "optimizer argument": (["sft", "-c", "{tmp}/optimizer.yaml"], ["optimizer"]),
    "report of nothing": (["report", "{tmp}/bert"], ["bert"]),
    "output is a file": (["sft", "--adapter-path", "{tmp}/typo.yaml"], ["typo.yaml"]),
}


@pytest.fixture
def scene(tmp_path, model_directory):
    import mlx.core as mx

    for name, text in {
        "typo": "loss: dmpo\nbetta: 0.1\n",
        "type": "batch_size: many\n",
        "no": "a: 1\n  b: : 2\n",
        "list": "- 1\n",
        "twice": "beta: 0.1\nbeta: 0.2\n",
        "domain": "domains:\n  song: {topic: music}\n",
        "optimizer": "optimizer_config: {momentums: 3}\n",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    for name, config in {"bert": '{"model_type": "bert"}', "broken": "{"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    shutil.copytree(model_directory, tmp_path / "shapes")
    config = json.loads((model_directory / "config.json").read_text())
    (tmp_path / "shapes" / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    (tmp_path / "unfinished").mkdir()
    for name in ("config.yaml", "adapter_config.json", "adapters.safetensors"):
        (tmp_path / "unfinished" / name).write_text("{}")
    (tmp_path / "other").mkdir()
    lora = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    (tmp_path / "other" / "adapter_config.json").write_text(
        json.dumps({"num_layers": 1, "lora_parameters": lora, "fine_tune_type": "lora"})
    )
    weights = {"model.layers.2.self_attn.q_proj.lora_a": mx.zeros((96, 4)), "model.layers.2.self_attn.q_proj.lora_b": mx.zeros((4, 128))}
    mx.save_safetensors(str(tmp_path / "other" / "adapters.safetensors"), weights)
    return tmp_path


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name, scene, model_directory, data_directory, capsys, monkeypatch):
    monkeypatch.chdir(scene)
    given, expected = FLAGS[name]
    arguments = [a.format(tmp=scene, model=model_directory, data=data_directory) for a in given]
    if arguments[0] in ("sft", "dmpo", "evaluate"):
        for flag, value in (("--model", model_directory), ("--data", data_directory)):
            arguments += [flag, value] if flag not in arguments else []
    code, _, err = run(capsys, *arguments)
    line = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(line) == 1 and "Traceback" not in err, err
    assert all(part in line[0] for part in expected), line
    assert not list(scene.rglob("manifest.json"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_no_write_permission(model_directory, data_directory, tmp_path, capsys):
    tmp_path.chmod(0o500)
    code, _, err = run(capsys, "sft", "--model", model_directory, "--data", data_directory, "--adapter-path", tmp_path / "out")
    tmp_path.chmod(0o700)
    assert code == 2 and "cannot be written" in err


def test_a_directory_that_refuses_files(model_directory, data_directory, capsys):
    """As root too: /proc takes no directories."""
    path = "/proc/mlx-dmpo" if os.path.isdir("/proc") else "/dev/null/mlx-dmpo"
    code, _, err = run(capsys, "sft", "--model", model_directory, "--data", data_directory, "--adapter-path", path)
    assert code == 2 and "cannot be written" in err


def test_a_bad_row_can_be_left_out_but_not_in_silence(model_directory, tmp_path, capsys):
    data = tmp_path / "d.jsonl"
    data.write_text(row() + "\n{oops\n" + row(user="v") + "\n")
    code, _, err = run(capsys, "evaluate", "--model", model_directory, "--data", data, "--out", tmp_path / "out", "--skip-bad-rows")
    assert code == 0 and "d.jsonl:2" in err
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["n"] == 2


def test_terminal_escapes_in_titles_are_not_obeyed(model_directory, tmp_path, capsys):
    data = tmp_path / "d.jsonl"
    data.write_text(row(domain="\x1b[31mred") + "\n")
    code, _, err = run(capsys, "evaluate", "--model", model_directory, "--data", data, "--out", tmp_path / "out")
    assert code == 2 and "\x1b" not in err and "red" in err


def test_a_fault_of_ours_is_exit_1_and_one_line(capsys, monkeypatch):
    from mlx_dmpo import cli

    monkeypatch.setattr(cli, "_settings", lambda *a: 1 / 0)
    code, _, err = run(capsys, "sft")
    assert code == 1 and err.startswith("fault: ZeroDivisionError") and len(err.splitlines()) == 1
    code, _, err = run(capsys, "--verbose", "sft")
    assert code == 1 and "Traceback" in err
