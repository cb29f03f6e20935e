"""Every file in configs/ loads as it stands, and the command that it opens with is one that the command line takes."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from test_bad_input import run

from mlx_dmpo import config
from mlx_dmpo.cli.main import cli
from mlx_dmpo.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"), key=lambda path: path.name)
CLASSES = {"sft": config.SftSettings, "dmpo": config.DmpoSettings, "evaluate": config.EvaluateSettings}
MODELS = {
    f"qwen3-{size.lower()}-4bit-{stage}": (size, stage)
    for size in ("0.6B", "1.7B", "4B", "8B")
    for stage in ("sft", "dmpo")
}

BY_HAND = {"smollm2-135m-sft", "smollm2-135m-dmpo", "released-code", "songs"}

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def commands(path):
    """The commands in the opening comment, as argument lists: ["sft", "-c", ...]; the first is the one that runs the
    file."""
    opening = path.read_text(encoding="utf-8").split("\n\n")[0]
    return [shlex.split(found) for found in re.findall(r"mlx-dmpo (.+)", opening)]


def load(path):
    stage, *arguments = commands(path)[0]
    options = cli.commands[stage].make_context(stage, arguments).params
    flags = {key: value for key, value in options.items() if key != "config_file" and value not in (None, ())}
    return config.resolve(CLASSES[stage], path, flags)


def test_there_is_a_config_for_each_model_and_stage():
    assert {path.stem for path in CONFIGS} == {*MODELS, *BY_HAND}


@each_config
def test_opens_with_the_command_that_runs_it(path):
    assert path.read_text(encoding="utf-8").startswith("# mlx-dmpo ")
    assert commands(path)[0][1:3] == ["-c", f"configs/{path.name}"]
    assert load(path).data == "DATA"


@each_config
def test_every_command_it_names_parses(path):
    for stage, *arguments in commands(path):
        cli.commands[stage].make_context(stage, arguments)  # raises UsageError for an unknown flag or a bad value
        if "-c" in arguments:
            assert (ROOT / arguments[arguments.index("-c") + 1]).exists()


@each_config
def test_every_setting_has_its_comment(path):
    settings = [line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"\s*\w+: \S", line)]
    assert settings
    assert [line for line in settings if "  # " not in line] == []


@each_config
def test_a_step_sees_eight_groups(path):
    settings = load(path)
    assert settings.batch_size * settings.grad_accumulation_steps == 8


@pytest.mark.parametrize("name", MODELS)
def test_model_and_directories_are_those_of_the_name(name):
    size, stage = MODELS[name]
    settings = load(ROOT / "configs" / f"{name}.yaml")
    assert settings.model == f"mlx-community/Qwen3-{size}-4bit"
    assert settings.adapter_path == f"runs/{name.removesuffix('-' + stage)}/{stage}"
    if stage == "dmpo":  # continues from what the sft file writes, with adapter shapes that fit
        sft = load(ROOT / "configs" / f"{name.removesuffix('dmpo')}sft.yaml")
        assert settings.start_adapter == sft.adapter_path
        for shared in ("model", "num_layers", "lora_parameters", "fine_tune_type"):
            assert getattr(settings, shared) == getattr(sft, shared)


def test_the_smollm2_stages_fit_each_other():
    sft, dmpo = (load(ROOT / "configs" / f"smollm2-135m-{stage}.yaml") for stage in ("sft", "dmpo"))
    assert dmpo.start_adapter == sft.adapter_path
    for shared in ("model", "prompt", "num_layers", "lora_parameters", "fine_tune_type"):
        assert getattr(dmpo, shared) == getattr(sft, shared)


def test_released_code_spells_out_its_preset():
    path = ROOT / "configs" / "released-code.yaml"
    written, _ = config.read_yaml(path)
    assert {key: written[key] for key in config.PRESETS["released-code"]} == config.PRESETS["released-code"]
    assert "NOT the paper's loss" in path.read_text(encoding="utf-8")


def test_songs_serves_every_command():
    path = ROOT / "configs" / "songs.yaml"
    for cls in (*CLASSES.values(), config.SampleSettings, config.CheckSettings, config.ConvertSettings):
        assert config.resolve(cls, path, {}).domains["song"]["items"] == "songs"
    written, _ = config.read_yaml(path)
    assert set(written) <= {f.name for f in fields(config.CommonSettings)}


# --- ~ as the home directory


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


PATHS = [
    (config.SftSettings, "model data valid_data adapter_path start_adapter"),
    (config.EvaluateSettings, "model data adapter_path out"),
    (config.ExportSettings, "model data adapter_path out"),
    (config.SampleSettings, "out"),
    (config.ConvertSettings, "out valid_data test_data"),
    (config.TableSettings, "out items"),
    (config.CheckSettings, "model"),
]
EACH = [(cls, name) for cls, names in PATHS for name in names.split()]


@pytest.mark.parametrize("cls, name", EACH, ids=lambda v: getattr(v, "__name__", v))
@pytest.mark.parametrize("where", ["a flag", "a file"])
def test_a_tilde_is_the_home_directory(where, cls, name, home):
    (home.parent / "c.yaml").write_text(f"{name}: ~/a b/x\n")
    flags = {name: "~/a b/x"} if where == "a flag" else {}
    found = config.resolve(cls, None if flags else "c.yaml", flags)
    assert getattr(found, name) == f"{home}/a b/x"


def test_tildes_in_lists_and_behind_a_kind(home):
    assert config.resolve(config.ExportSettings, None, {"eval": ["~/e", "./~"]}).eval == (f"{home}/e", "./~")
    found = config.resolve(config.TableSettings, None, {"negatives": "scores:~/m.jsonl"})
    assert found.negatives == f"scores:{home}/m.jsonl"
    with pytest.raises(UserError, match="--data: ~nobody-of-this-name is nobody's home directory"):
        config.resolve(config.SftSettings, None, {"data": "~nobody-of-this-name/d"})


@pytest.mark.parametrize("spelling", ["--out=~/o.jsonl", "--out ~/o.jsonl"])
def test_a_command_writes_there(spelling, home, capsys):
    """As a shell leaves it behind `=`, or in quotes."""
    code, out, _ = run(capsys, *f"sample --limit 1 --n 1 --max-tokens 1 {spelling}".split())
    assert code == 0 and (home / "o.jsonl").is_file() and not Path("~").exists() and str(home / "o.jsonl") in out


def test_what_is_no_setting_is_expanded_too(home, capsys):
    (home / "d.jsonl").write_text('{"prompt": "Which?", "completion": "That."}\n')
    assert run(capsys, "check", "~/d.jsonl")[0] == 0
    assert str(home / "none") in run(capsys, "plan", "--model=~/none", "--tflops", 1)[2]
