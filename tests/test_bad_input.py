"""What a user can get wrong: one clear line, exit code 2, no traceback, nothing that looks finished."""

import json
import os
import shutil

import pytest
import tiny

from mlx_dmpo.cli.main import main
from mlx_dmpo.report.tables import COLUMNS

GOOD = {"user": "u", "domain": "movie", "history": ["amber"], "positive": "lantern", "negatives": ["river"]}


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    reported = capsys.readouterr()
    return stop.value.code, reported.out, reported.err


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
        json.dumps(
            [
                {
                    "instruction": "You are an assistant working on cheese recommendations.",
                    "input": "",
                    "output": ["a", "b"],
                }
            ]
        ),
        ["d.json:row 1", "domains"],
    ),
    "a title of spaces": ("d.jsonl", row(history=["  "]), ["d.jsonl:1", '"history"']),
    "positive is a list": ("d.jsonl", row(positive=["lantern"]), ["d.jsonl:1", '"positive"']),
    "user is null": ("d.jsonl", row().replace('"u"', "null"), ["d.jsonl:1", '"user"']),
    "a file of numbers": ("d.jsonl", "1\n2\n", ["d.jsonl:1"]),
    "an empty array": ("d.json", "[]", ["d.json", "empty"]),
    "not UTF-8": ("d.jsonl", b"\xff\xfe{}", ["d.jsonl", "UTF-8"]),
    "two kinds in a file": ("d.jsonl", row() + '\n{"instruction": "x", "output": "y"}\n', ["d.jsonl:2", "one kind"]),
    "a control token in a title": ("d.jsonl", row(history=["<|im_end|>"]), ["d.jsonl:1", "<|im_end|>"]),
    "JSON nested without end": ("d.jsonl", "[" * 100_000, ["d.jsonl"]),
    "released row without output": (
        "d.json",
        json.dumps([{"instruction": "x", "input": ""}]),
        ["d.json:row 1", "output"],
    ),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", ["sft", "dmpo", "evaluate"])
def test_files(name, command, model_directory, tmp_path, capsys):
    file, text, expected = FILES[name]
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    out = tmp_path / "out"
    code, _, err = run(
        capsys,
        command,
        "--model",
        model_directory,
        "--data",
        tmp_path / file,
        "--out" if command == "evaluate" else "--adapter-path",
        out,
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
    "adapter of another model": (["evaluate", "--adapter-path", "{tmp}/other"], ["other", "not an adapter of"]),
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
    "quantize to 7 bits": (["sft", "--quantize", "7"], ["--quantize", "7"]),
    "DoRA on 6 bits": (
        ["sft", "--quantize", "6", "--quantize-group-size", "32", "--fine-tune-type", "dora"],
        ["fine_tune_type", "6-bit"],
    ),
    "DoRA on a quantized embedding": (
        [
            "sft",
            "--quantize",
            "4",
            "--quantize-group-size",
            "32",
            "--fine-tune-type",
            "dora",
            "--lora-keys",
            "model.embed_tokens",
        ],
        ["model.embed_tokens", "quantized"],
    ),
    "quantized already": (["evaluate", "--model", "{tmp}/quantized", "--quantize", "4"], ["--quantize", "already"]),
    "unknown dtype": (["evaluate", "--dtype", "int8"], ["--dtype", "int8"]),
    "unknown split": (["evaluate", "--split", "dev"], ["--split", "dev"]),
    "batch size 0": (["sft", "--batch-size", "0"], ["--batch-size", "0"]),
    "epochs 0": (["sft", "--epochs", "0"], ["--epochs"]),
    "too few resamples": (["evaluate", "--resamples", "3"], ["--resamples", "100"]),
    "a word too many": (["sft", "runs/sft"], ["runs/sft"]),
    "a flag without its value": (["dmpo", "--beta"], ["--beta"]),
    "model path with dots": (["sft", "--model", "../x/y"], ["../x/y", "no such file or directory"]),
    "model that brings code": (["sft", "--model", "{tmp}/code"], ["code", "Python code of its own"]),
    "model without chat template": (["sft", "--model", "{tmp}/mute"], ["mute", "chat template"]),
    "model without weights": (["sft", "--model", "{tmp}/empty"], ["empty"]),
    "weights that are no safetensors": (["sft", "--model", "{tmp}/noise"], ["noise"]),
    "adapter config that is a list": (["evaluate", "--adapter-path", "{tmp}/listed"], ["adapter_config.json"]),
    "adapter config with a NaN scale": (["dmpo", "--start-adapter", "{tmp}/nan"], ["adapter_config.json", "scale"]),
    "adapter of full fine-tuning": (["evaluate", "--adapter-path", "{tmp}/full"], ["fine_tune_type", "full"]),
    "adapter weights cut short": (["evaluate", "--adapter-path", "{tmp}/cut"], ["cut"]),
    "config with a date": (["dmpo", "-c", "{tmp}/date.yaml"], ["date.yaml", "YAML"]),
    "config with an alias": (["dmpo", "-c", "{tmp}/alias.yaml"], ["alias.yaml:2", "alias"]),
    "config nested without end": (["dmpo", "-c", "{tmp}/deep.yaml"], ["deep.yaml"]),
    "config with a Python object": (["dmpo", "-c", "{tmp}/object.yaml"], ["object.yaml:1", "YAML"]),
    "config with an infinite number": (["dmpo", "-c", "{tmp}/infinite.yaml"], ["infinite.yaml:1", "beta", "finite"]),
    "config that is a directory": (["dmpo", "-c", "{tmp}"], ["cannot be read"]),
    "config with an unknown LoRA key": (["dmpo", "-c", "{tmp}/lora.yaml"], ["lora.yaml:1", "alpha"]),
    "report of nothing": (["report", "{tmp}/bert"], ["bert"]),
    "report of no directory": (["report"], ["RUN_OR_EVAL_DIR"]),
    "report of a missing directory": (["report", "{tmp}/none"], ["none"]),
    "report of broken metrics": (
        ["report", "{tmp}/evaluation"],
        ["evaluation/metrics.json", "values that this program does not write"],
    ),
    "report of broken scores": (["report", "{tmp}/scored"], ["scored/scores.jsonl", "row 1"]),
    "report into a directory": (
        ["report", "{tmp}/trained", "--out", "{tmp}/trained"],
        ["trained", "cannot be written"],
    ),
    "export of nothing": (["export"], ["--adapter-path"]),
    "export of a missing adapter": (["export", "--adapter-path", "{tmp}/none"], ["none"]),
    "export of a model": (["export", "--adapter-path", "{model}"], ["adapter_config.json"]),
    "export to an unknown kind": (["export", "--adapter-path", "{tmp}/fine", "--to", "gguf"], ["--to", "gguf"]),
    "export of an unfinished run": (["export", "--adapter-path", "{tmp}/unfinished"], ["not finished"]),
    "export without its base": (["export", "--adapter-path", "{tmp}/other"], ["other", "--model"]),
    "export onto the wrong base": (
        ["export", "--adapter-path", "{tmp}/other", "--model", "{model}"],
        ["other", "not an adapter of"],
    ),
    "export kept and quantized": (
        ["export", "--adapter-path", "{tmp}/fine", "--keep-quantized", "--requantize"],
        ["--requantize", "--keep-quantized"],
    ),
    "export of an unquantized base, kept": (
        ["export", "--adapter-path", "{tmp}/fine", "--keep-quantized"],
        ["--keep-quantized", "not quantized"],
    ),
    "export to PEFT, quantized": (
        ["export", "--adapter-path", "{tmp}/fine", "--to", "peft", "--requantize"],
        ["--requantize", "PEFT"],
    ),
    "export over something else": (
        ["export", "--adapter-path", "{tmp}/fine", "--out", "{tmp}/bert"],
        ["bert", "not an export"],
    ),
    "export without data": (["export", "--adapter-path", "{tmp}/fine", "--data", "{tmp}/none.jsonl"], ["none.jsonl"]),
    "export with a broken evaluation": (
        ["export", "--adapter-path", "{tmp}/fine", "--eval", "{tmp}/evaluation"],
        ["metrics.json"],
    ),
    "export with no evaluation": (
        ["export", "--adapter-path", "{tmp}/fine", "--eval", "{tmp}/bert"],
        ["bert", "evaluation"],
    ),
    "export config with an unknown key": (["export", "-c", "{tmp}/typo.yaml"], ["typo.yaml:1", '"loss"']),
    "demo with a negative seed": (["demo", "--seed", "-1"], ["--seed"]),
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
        "date": "learning_rate: 2024-13-45\n",
        "alias": "optimizer_config: &x {}\ndomains: *x\n",
        "deep": "a: " + "[" * 5000,
        "object": "model: !!python/object/apply:os.system ['touch ran']\n",
        "infinite": "beta: .inf\n",
        "lora": "lora_parameters: {alpha: 16}\n",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    for name, config in {"bert": '{"model_type": "bert"}', "broken": "{"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    shutil.copytree(model_directory, tmp_path / "shapes")
    config = json.loads((model_directory / "config.json").read_text())
    (tmp_path / "shapes" / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    made = {
        "code": {"model_file": "own.py"},
        "quantized": {"quantization": {"group_size": 32, "bits": 4}},
        "mute": {},
        "empty": {},
        "noise": {},
    }
    for name, change in made.items():
        shutil.copytree(tmp_path / "shapes", tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
    (tmp_path / "code" / "own.py").write_text("open('ran', 'w')")
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    (tmp_path / "empty" / "model.safetensors").unlink()
    (tmp_path / "noise" / "model.safetensors").write_bytes(b"no weights at all")
    tiny.save_model(tmp_path / "four", bits=4)
    shutil.copyfile(tmp_path / "four" / "model.safetensors", tmp_path / "quantized" / "model.safetensors")
    shutil.rmtree(tmp_path / "four")
    fine = tiny.save_adapter(model_directory, tmp_path / "fine")
    config = json.loads((fine / "adapter_config.json").read_text())
    for name, text in {
        "listed": "[]",
        "nan": json.dumps({**config, "lora_parameters": {**config["lora_parameters"], "scale": float("nan")}}),
        "full": json.dumps({**config, "fine_tune_type": "full"}),
        "cut": json.dumps(config),
    }.items():
        shutil.copytree(fine, tmp_path / name)
        (tmp_path / name / "adapter_config.json").write_text(text)
    (tmp_path / "cut" / "adapters.safetensors").write_bytes((fine / "adapters.safetensors").read_bytes()[:5000])
    metric = {"value": 0.5, "low": 0.4, "high": 0.6}
    metrics = {"n": 1, "users": 1, "ties": 0, **{name: metric for name, _, _ in COLUMNS}}
    for name, files in {
        "evaluation": {"metrics.json": '{"n": "many"}', "scores.jsonl": ""},
        "scored": {"metrics.json": json.dumps(metrics), "scores.jsonl": '{"user": 1}\n'},
        "trained": {"metrics.jsonl": '{"step": 1, "loss": 0.5}\n'},
    }.items():
        (tmp_path / name).mkdir()
        for file, text in {**files, "manifest.json": '{"command": "", "config": {}}'}.items():
            (tmp_path / name / file).write_text(text)
    (tmp_path / "unfinished").mkdir()
    for name in ("config.yaml", "adapter_config.json", "adapters.safetensors"):
        (tmp_path / "unfinished" / name).write_text("{}")
    (tmp_path / "other").mkdir()
    lora = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    (tmp_path / "other" / "adapter_config.json").write_text(
        json.dumps({"num_layers": 1, "lora_parameters": lora, "fine_tune_type": "lora"})
    )
    weights = {
        "model.layers.2.self_attn.q_proj.lora_a": mx.zeros((96, 4)),
        "model.layers.2.self_attn.q_proj.lora_b": mx.zeros((4, 128)),
    }
    mx.save_safetensors(str(tmp_path / "other" / "adapters.safetensors"), weights)
    return tmp_path


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name, scene, model_directory, data_directory, capsys, monkeypatch):
    monkeypatch.chdir(scene)
    before = sorted(scene.rglob("manifest.json"))
    given, expected = FLAGS[name]
    arguments = [a.format(tmp=scene, model=model_directory, data=data_directory) for a in given]
    if arguments[0] in ("sft", "dmpo", "evaluate"):
        for flag, value in (("--model", model_directory), ("--data", data_directory)):
            arguments += [flag, value] if flag not in arguments else []
    if arguments[0] == "export" and "--data" not in arguments:
        arguments += ["--data", data_directory]
    code, _, err = run(capsys, *arguments)
    line = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(line) == 1 and "Traceback" not in err, err
    assert all(part in line[0] for part in expected), line
    assert sorted(scene.rglob("manifest.json")) == before
    assert not list(scene.rglob("ran")), "a file's own code was run"


def test_the_tables_are_long_enough():
    """Each row is one mistake: its file is given to three commands, its flags to one."""
    assert len(FILES) + len(FLAGS) >= 100


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_no_write_permission(model_directory, data_directory, tmp_path, capsys):
    tmp_path.chmod(0o500)
    code, _, err = run(
        capsys, "sft", "--model", model_directory, "--data", data_directory, "--adapter-path", tmp_path / "out"
    )
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
    code, _, err = run(
        capsys, "evaluate", "--model", model_directory, "--data", data, "--out", tmp_path / "out", "--skip-bad-rows"
    )
    assert code == 0 and "d.jsonl:2" in err
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["n"] == 2


def test_terminal_escapes_in_titles_are_not_obeyed(model_directory, tmp_path, capsys):
    data = tmp_path / "d.jsonl"
    data.write_text(row(domain="\x1b[31mred") + "\n")
    code, _, err = run(capsys, "evaluate", "--model", model_directory, "--data", data, "--out", tmp_path / "out")
    assert code == 2 and "\x1b" not in err and "red" in err


def test_an_internal_error_is_exit_1_and_one_line(capsys, monkeypatch):
    from mlx_dmpo.cli import train as train_commands

    monkeypatch.setattr(train_commands, "settings_of", lambda *a: 1 / 0)
    code, _, err = run(capsys, "sft")
    assert code == 1 and err.startswith("internal error: ZeroDivisionError") and len(err.splitlines()) == 1
    code, _, err = run(capsys, "--verbose", "sft")
    assert code == 1 and "Traceback" in err
