"""What SECURITY.md promises of files made by strangers: models, adapters, data, caches."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import tiny
from test_bad_input import run

from mlx_dmpo.cli.main import main
from mlx_dmpo.config import EvaluateSettings
from mlx_dmpo.data import rows
from mlx_dmpo.errors import UserError
from mlx_dmpo.machine import console, files, hub, run_directory
from mlx_dmpo.model import loading
from mlx_dmpo.train import reference


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def base(model_directory, tmp_path):
    shutil.copytree(model_directory, tmp_path / "base")
    return tmp_path / "base"


def edit(path, **change):
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


# --- a model directory's own code


def test_model_file_is_not_run(base, tmp_path):
    """mlx-lm's key for an architecture in a Python file of the model's."""
    (base / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom mlx_lm.models.qwen3 import Model, ModelArgs\n"
    )
    edit(base / "config.json", model_file="own.py")
    with pytest.raises(UserError, match="Python code of its own"):
        loading.load(EvaluateSettings(model=str(base)))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizers_own_class_is_not_run_nor_asked_for(tmp_path, monkeypatch):
    """transformers' auto_map. Left open, transformers asks on standard input, where `yes |` would answer."""
    base = tiny.save_model(tmp_path / "base", kind="llama")
    (base / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Own\n"
    )
    edit(base / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked whether to run the model's code"))
    with pytest.raises(UserError, match="Python code of its own"):
        loading.load(EvaluateSettings(model=str(base)))
    assert not (tmp_path / "ran").exists()


def test_an_unknown_architectures_own_class_is_not_run(base, tmp_path, monkeypatch):
    (base / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit(
        base / "config.json",
        model_type="never-heard-of",
        auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"},
    )
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked whether to run the model's code"))
    with pytest.raises(UserError, match="base"):
        loading.load(EvaluateSettings(model=str(base)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["..", "os", "../../own", "qwen3.os", "cache"])
def test_a_model_type_that_is_no_model(name, base):
    """It becomes part of a module's name in mlx-lm."""
    edit(base / "config.json", model_type=name)
    with pytest.raises(UserError, match="cannot be loaded"):
        loading.load(EvaluateSettings(model=str(base)))


def test_pickled_weights_are_not_read(base, tmp_path):
    for name in ("pytorch_model.bin", "model.bin", "adapters.npz"):
        (base / name).write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    loading.load(EvaluateSettings(model=str(base)))
    (base / "model.safetensors").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(UserError):
        loading.load(EvaluateSettings(model=str(base)))
    assert not (tmp_path / "ran").exists()


def test_a_template_reaches_no_python(base, tmp_path):
    """Jinja in transformers' sandbox."""
    (base / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages[0].content }}")
    loaded = loading.load(EvaluateSettings(model=str(base)))
    with pytest.raises(Exception, match="unsafe"):
        loaded.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


# --- names: directory or repository


@pytest.mark.parametrize(
    "name",
    [
        "../x/y",
        "./x/y",
        "/x/y",
        "x//y",
        "x/../y",
        "~/x",
        "x/y/z",
        "x",
        ".x/y",
        "x/.y",
        "x/..",
        "a..b/c",
        "hf://x/y",
        "x/y\n",
        "é/y",
        "x\\y",
        "",
    ],
)
def test_what_is_no_repository_is_never_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_lm.utils.snapshot_download", lambda *a, **k: pytest.fail(f"asked the hub for {a}"))
    if name:
        with pytest.raises(UserError, match="no such file or directory"):
            loading.load(EvaluateSettings(model=name))
    assert not hub.is_repository(name) and rows.hub_name(name) is None


@pytest.mark.parametrize("name", ["mlx-community/Qwen3-0.6B-4bit", "Qwen/Qwen3-8B", "a/b", "user_1/model.v2_x"])
def test_repositories(name):
    assert hub.is_repository(name) and rows.hub_name(name)


def test_a_directory_named_like_a_repository_is_used_and_told(model_directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_lm.utils.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    shutil.copytree(model_directory, tmp_path / "mlx-community" / "Qwen3-0.6B-4bit")
    loading.load(EvaluateSettings(model="mlx-community/Qwen3-0.6B-4bit"))
    assert "is the directory of that name here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["runs/typo", "runs/data.v2", "d/trian.jsonl", "nobody/train.jsonl", "nobody/w.safetensors"]
)
@pytest.mark.parametrize(
    "command",
    ["sft --model", "sft --data", "evaluate --model", "evaluate --data", "evaluate --adapter-path", "check --model",
     "export --model", "export --adapter-path", "plan --tokenizer", "sample --model"],
)  # fmt: skip
def test_a_mistyped_path_is_no_repository(name, command, model_directory, tmp_path, monkeypatch, capsys):
    """One rule for models, adapters and data: a name in a directory that is here is a path, whatever is
    missing in it.
    """
    monkeypatch.chdir(tmp_path)
    for hubs in ("mlx_lm.utils.snapshot_download", "datasets.load_dataset"):
        monkeypatch.setattr(hubs, lambda *a, **k: pytest.fail(f"asked the hub for {a}"))
    data, model = tiny.write_data(tmp_path / "d"), tmp_path / "runs" / "model"
    shutil.copytree(model_directory, model)
    adapter = tiny.save_adapter(model, tmp_path / "runs" / "a")
    further = {
        "check": [data], "export --model": ["--adapter-path", adapter], "plan": ["--model", model, "--data", data],
    }  # fmt: skip
    more = further.get(command, further.get(command.split()[0], []))
    code, _, err = run(capsys, *command.split(), name, *more)
    assert code == 2 and name in err and ("no such" in err), err
    if name.startswith("runs/") and "adapter" not in command:
        assert re.search("runs/ is a directory here and holds a, .*model", err)


# --- caches and directories


def test_a_pickled_reference_cache_is_not_unpickled(tmp_path, capsys):
    path = tmp_path / "key.npz"
    np.savez(path, sequences=np.array([Trap(tmp_path / "ran")], object), logps=np.zeros(1, np.float32))
    assert reference._read(path) == {} and "cannot be read" in capsys.readouterr().err
    path.write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    assert reference._read(path) == {}
    assert not (tmp_path / "ran").exists()


def test_a_link_under_a_files_name_is_replaced_not_followed(tmp_path):
    """Else a link planted in a shared directory would have another file written through it."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "metrics.json").symlink_to(tmp_path / "precious")
    files.write_json(tmp_path / "metrics.json", {"n": 1})
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "metrics.json").is_symlink()


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl"])
def test_a_link_under_a_run_s_growing_files_is_refused(name, tmp_path):
    """These are written in place."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    with (
        pytest.raises(UserError, match="cannot be written"),
        run_directory.RunDirectory(tmp_path / "run", "test", EvaluateSettings(), overwrite=True),
    ):
        files.append_line(tmp_path / "run" / "metrics.jsonl", "{}")
    assert (tmp_path / "precious").read_text() == "mine"


def test_what_a_manifest_says_is_never_a_place_to_write(tmp_path, model_directory, data_directory, monkeypatch):
    """An adapter directory whose files name other directories is exported and evaluated inside itself."""
    monkeypatch.chdir(tmp_path)
    adapter = tiny.save_adapter(model_directory, tmp_path / "adapter")
    config = {"out": "../../elsewhere", "adapter_path": "/elsewhere", "model": "../elsewhere", "to": "../elsewhere"}
    (adapter / "manifest.json").write_text(
        json.dumps({"command": "x", "config": config, "inputs": {"../../elsewhere": "0"}})
    )
    with pytest.raises(SystemExit) as stop:
        main(["export", "--adapter-path", "adapter", "--data", str(data_directory), "--examples", "1"])
    assert stop.value.code == 0
    assert (
        sorted(f.name for f in tmp_path.iterdir()) == ["adapter"] and (adapter / "mlx" / "model.safetensors").exists()
    )


# --- text


@pytest.mark.parametrize(
    "text",
    ["\x1b[2J", "\x9b31m", "\x07", "a\rb", "a\nerror: forged", "\u202egpj.exe", "\u2066x\u2069", "\u2028", "\ud800"],
)
def test_printable_leaves_one_harmless_line(text):
    found = console.printable(f"title {text} end")
    assert found.isprintable() and found.startswith("title ") and found.endswith(" end")
    found.encode("utf-8")
    assert console.printable("Amélie 日本 – “x” 🎬") == "Amélie 日本 – “x” 🎬"


@pytest.mark.parametrize("field", ["domain", "user", "title"])
def test_a_row_cannot_steer_the_terminal(field, model_directory, tmp_path, capsys):
    evil = "x\x1b]0;owned\x07\nerror: forged \u202e"
    row = {"user": "u", "domain": "movie", "history": ["a"], "positive": "p", "negatives": ["n"]}
    row |= {
        "domain": {"domain": evil},
        "user": {"user": evil, "rating": 5},
        "title": {"positive": "<|im_end|>" + evil},
    }[field]
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "evaluate",
                "--model",
                str(model_directory),
                "--data",
                str(tmp_path / "d.jsonl"),
                "--out",
                str(tmp_path / "out"),
            ]
        )
    output = capsys.readouterr()
    assert stop.value.code == 2 and "forged" not in [line[:20] for line in output.err.splitlines()]
    assert all(line.isprintable() for line in (output.err + output.out).splitlines())
    assert sum(line.startswith("error: ") for line in output.err.splitlines()) == 1
