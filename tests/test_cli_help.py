"""Flags: their help in groups, none of them without effect in silence, completion, and what a bar and a log line
show."""

import io
import os
import re
import stat
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import click
import pytest
import tiny

from mlx_dmpo import config
from mlx_dmpo.cli import options
from mlx_dmpo.cli.main import cli, main
from mlx_dmpo.errors import UserError
from mlx_dmpo.machine import files, progress, run_directory

CLASSES = {
    "sft": config.SftSettings,
    "dmpo": config.DmpoSettings,
    "evaluate": config.EvaluateSettings,
    "sample": config.SampleSettings,
    "export": config.ExportSettings,
    "plan": config.PlanSettings,
    "check": config.CheckSettings,
}


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    output = capsys.readouterr()
    return stop.value.code, output.out, output.err


def every_command(group=cli, path=()):
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))


COMMANDS = dict(every_command())
each_command = pytest.mark.parametrize("path", COMMANDS, ids=" ".join)


# --- help


@each_command
def test_a_summary_fits_one_line_of_80_columns(path):
    names = [p for p in COMMANDS if p[:-1] == path[:-1]]
    limit = 80 - 4 - max(len(p[-1]) for p in names)
    assert 0 < len(COMMANDS[path].get_short_help_str(limit)) <= limit
    assert not COMMANDS[path].get_short_help_str(limit).endswith("...")


@each_command
def test_help_shows_ten_flags_and_help_all_every_one(path, capsys):
    command = COMMANDS[path]
    if not isinstance(command, options.SettingsCommand):
        return
    own = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    flags = lambda text: set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE)) - {"--help"}  # noqa: E731
    code, out, _ = run(capsys, *path, "--help")
    assert code == 0 and flags(out) - {"--help-all"} <= {max(o.opts, key=len) for o in own}
    listed = out[re.search(r"^[A-Z][\w ]*:$", out, re.MULTILINE).start() :]
    assert len(re.findall(r"^  -", listed, re.MULTILINE)) <= options.AT_MOST + 2  # and --help, --help-all
    code, everything, _ = run(capsys, *path, "--help-all")
    assert code == 0 and flags(everything) >= {max(o.opts, key=len) for o in own}
    if len(own) > options.AT_MOST:
        assert f"Show {len(own) - len(command.shown(False))} more options" in out


def test_help_is_in_groups(capsys):
    _, out, _ = run(capsys, "dmpo", "--help-all")
    titles = re.findall(r"^([A-Z][\w ]+):$", out, re.MULTILINE)
    assert titles == [*(t for t in options.GROUPS if t not in ("Ranking", "Server")), "Help"]
    section = out[out.index("Memory and speed:") : out.index("Output:")]
    assert "--batch-size" in section and "--beta" not in section


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell, capsys):
    code, out, _ = run(capsys, "completion", shell)
    assert code == 0 and "_MLX_DMPO_COMPLETE" in out and out.startswith("# To install: ")
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=out, text=True, check=True)
    words = {"COMP_WORDS": "mlx-dmpo dmpo --be", "COMP_CWORD": "2", "_MLX_DMPO_COMPLETE": f"{shell}_complete"}
    done = subprocess.run(
        [sys.executable, "-m", "mlx_dmpo"], env={**os.environ, **words}, capture_output=True, text=True, timeout=60
    )
    assert "--beta" in done.stdout or shell == "fish"


# --- flags without effect

# command, flags that are given, the one that has no effect
IDLE = [
    ("sft", ["--both-orders", "--candidate-order", "epoch"], "--candidate-order"),
    ("dmpo", ["--both-orders", "--candidate-order", "fixed"], "--candidate-order"),
    ("sft", ["-c", "{mapping}", "--learning-rate", "1e-3"], "--learning-rate"),
    ("dmpo", ["-c", "{mapping}", "--warmup", "3"], "--warmup"),
    ("sft", ["--frozen-cache-gb", "2"], "--frozen-cache-gb"),
    ("dmpo", ["--frozen-cache", "d"], "--frozen-cache"),
    ("evaluate", ["--frozen-cache", "d"], "--frozen-cache"),
    ("evaluate", ["--num-layers", "2"], "--num-layers"),
    ("evaluate", ["--frozen-cache", "d", "--num-layers", "2", "--adapter-path", "a"], "--num-layers"),
    ("sft", ["--frozen-cache", "d", "--num-layers", "2", "--scoring", "plain"], "--frozen-cache"),
    ("sft", ["--project-name", "x"], "--project-name"),
    ("dmpo", ["--gamma", "0.3"], "--gamma"),
    ("sft", ["--holdout", "0.2"], "--holdout"),
    ("dmpo", ["--no-holdout", "--valid-data", "x.jsonl"], "--holdout"),
    ("dmpo", ["--holdout", "0.2", "--data", "x.jsonl", "--val-batches", "0"], "--holdout"),
    ("dmpo", ["--gamma", "0.5", "--loss", "s-dpo"], "--gamma"),
    ("dmpo", ["--loss", "simpo", "--reference-free"], "--reference-free"),
    ("dmpo", ["--loss", "simpo", "--no-reference-free"], "--reference-free"),
    ("dmpo", ["--preset", "released-code", "--gamma", "1"], "--gamma"),
    ("dmpo", ["--loss", "mppo", "--beta", "0.2"], "--beta"),
    ("dmpo", ["--dynamic-beta"], "--dynamic-beta"),
    ("sft", ["--quantize-group-size", "32"], "--quantize-group-size"),
    ("evaluate", ["--quantize-mode", "mxfp4"], "--quantize-mode"),
    ("evaluate", ["--data", "{file}", "--split", "valid"], "--split"),
    ("evaluate", ["--data", "who/what@train", "--split", "test"], "--split"),
    ("sample", ["--data", "{file}", "--split", "train"], "--split"),
    ("sample", ["--score", "--temperature", "0.5"], "--temperature"),
    ("sample", ["--score", "--max-tokens", "5"], "--max-tokens"),
    ("sample", ["--score", "--seed", "5"], "--seed"),
    ("sample", ["--scoring", "plain"], "--scoring"),
    ("sample", ["--temperature", "0", "--top-k", "5"], "--top-k"),
    ("export", ["--examples", "0", "--num-negatives", "2"], "--num-negatives"),
    ("export", ["--examples", "0", "--split", "valid"], "--split"),
    ("export", ["--data", "{file}", "--split", "valid"], "--split"),
    ("plan", ["--data", "d", "--history", "4"], "--history"),
    ("plan", ["--max-seq-length", "512"], "--max-seq-length"),
    ("plan", ["--tokenizer", "t"], "--tokenizer"),
    ("check", ["{file}", "--num-negatives", "2"], "--num-negatives"),
    ("check", ["{file}", "--max-seq-length", "99"], "--max-seq-length"),
    ("check", ["{file}", "--prompt", "listwise"], "--prompt"),
]


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("{}")
    Path("mapping.yaml").write_text("lr_schedule: {name: cosine_decay, arguments: [1e-4, 4]}\n")
    return {"file": "rows.jsonl", "mapping": "mapping.yaml"}


@pytest.mark.parametrize(("command", "flags", "idle"), IDLE, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_a_flag_without_effect_is_an_error(command, flags, idle, scene, capsys):
    code, _, err = run(capsys, command, *(f.format(**scene) for f in flags))
    assert code == 2 and err.startswith(f"error: {idle}: has no effect "), err
    assert err.strip().endswith(": leave it out") and len(err.splitlines()) == 1


def test_every_rule_is_in_the_table():
    """A rule that is added to config/effects.py needs its row."""
    shown = {idle.removeprefix("--").replace("-", "_") for _, _, idle in IDLE} | set(config.effects.COMPARED)
    for name in re.findall(r'"(\w+)", "(?:with|beside|without|at|for)', Path(config.effects.__file__).read_text()):
        assert name in shown | {"epochs"}, name


@pytest.mark.parametrize("command", CLASSES)
def test_config_yaml_of_a_run_is_read_back_without_a_word(command, tmp_path, scene):
    """Whatever was set: settings that have no effect are not in it."""
    said = []
    changes = {
        "sft": {"iters": 3, "both_orders": True, "candidate_order": "epoch", "epochs": 2.0, "warmup": 2.0},
        "dmpo": {"gamma": 0.9, "lr_schedule": {"name": "exponential_decay"}, "learning_rate": 3e-5, "loss": "dpo"},
        "evaluate": {"data": "rows.jsonl", "split": "valid", "quantize_mode": "mxfp4"},
        "sample": {"score": True, "n": 3, "temperature": 0.1},
        "export": {"examples": 0, "split": "train"},
    }
    settings = replace(CLASSES[command](), **changes.get(command, {}))
    run_directory.RunDirectory(tmp_path / "r", "x", settings).close()
    found = config.resolve(CLASSES[command], tmp_path / "r" / "config.yaml", {}, None, said.append)
    assert said == []
    idle = config.without_effect(settings)
    for field in fields(settings):
        if field.name not in {*idle, "overwrite", "resume"}:
            assert getattr(found, field.name) == getattr(settings, field.name), field.name


def test_a_line_of_a_file_without_effect_is_reported(scene):
    said = []
    Path("c.yaml").write_text("batch_size: 2\ngamma: 0.7\nepochs: 9\n")
    config.resolve(config.DmpoSettings, "c.yaml", {"iters": 3}, None, said.append)
    assert said == [
        'note: c.yaml:3: "epochs": has no effect with iters',
        'note: c.yaml:2: "gamma": has no effect with loss dmpo: only simpo and recpo have a target margin',
    ]


def test_defaults_follow_the_loss():
    def beta(**flags):
        return config.resolve(config.DmpoSettings, None, flags).beta

    assert (beta(), beta(loss="s-dpo"), beta(loss="simpo"), beta(loss="simpo", beta=0.1)) == (0.1, 0.1, 2.0, 0.1)
    assert config.DmpoSettings(loss="simpo").beta == 2.0
    assert beta(preset="released-code") == 0.1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "pairwise DPO without a reference + 1.0 x SFT: what the DMPO release's trainer computes"),
        ({"loss": "dmpo"}, "with loss dmpo: dmpo without a reference + 1 x SFT: no longer"),
        ({"loss": "dmpo", "reference_free": False}, "with loss dmpo, reference_free False: dmpo with a reference"),
        ({"sft_weight": 0.0}, "with sft_weight 0.0: dpo without a reference: no longer"),
    ],
)
def test_a_preset_is_announced_as_what_it_is(flags, expected):
    settings = config.resolve(config.DmpoSettings, None, {"preset": "released-code", **flags})
    assert expected in config.describe_preset(settings)


def reading(settings, run_it):
    """Names of the settings that the package reads in `run_it(settings)`, copies of all of them (asdict) not
    counted."""
    seen = set()
    names = {f.name for f in fields(settings)}

    def look(self, name):
        if name in names:
            caller = sys._getframe(1).f_code
            if not re.search(r"dataclasses\.py|mlx_dmpo/config/|machine/commands", caller.co_filename):
                seen.add(name)
        return object.__getattribute__(self, name)

    kind = type(settings)
    run_it(replace(type(kind.__name__, (kind,), {"__getattribute__": look, "__module__": kind.__module__})(), **{
        f.name: getattr(settings, f.name) for f in fields(settings)
    }))  # fmt: skip
    return seen


def test_every_setting_is_read(model_directory, data_directory, tmp_path):
    """No flag is accepted and ignored: each is read by the command, beyond being copied into config.yaml."""
    from mlx_dmpo.judge.evaluate import evaluate
    from mlx_dmpo.tools.export import export
    from mlx_dmpo.tools.plan import run as plan
    from mlx_dmpo.tools.sample import sample
    from mlx_dmpo.train.run import train

    adapter = tiny.save_adapter(model_directory, tmp_path / "a", quantize=4)
    common = {"model": str(model_directory), "data": str(data_directory)}
    quantized = {**common, "quantize": 4, "quantize_group_size": 32}
    short = {"iters": 1, "val_batches": 1, "report_to": ""}
    cases = [
        (train, config.SftSettings(**quantized, **short, adapter_path=str(tmp_path / "s")), ("x",)),
        (train, config.DmpoSettings(**quantized, **short, adapter_path=str(tmp_path / "d")), ("x",)),
        (evaluate, config.EvaluateSettings(**quantized, limit=2, out=str(tmp_path / "e")), ()),
        (sample, config.SampleSettings(**quantized, limit=1, n=1, max_tokens=2, out=str(tmp_path / "x")), ()),
        (sample, config.SampleSettings(**common, limit=1, score=True, out=str(tmp_path / "y")), ()),
        (export, config.ExportSettings(**quantized, adapter_path=str(adapter), examples=2), ()),
        (plan, config.PlanSettings(tflops=1.0), ()),
        (plan, config.PlanSettings(tflops=1.0, **common), ()),
    ]
    # read in a branch that these runs do not take, or decided in the command itself
    elsewhere = {
        "optimizer_config", "best_metric", "patience", "debug_nan", "max_bad_steps", "project_name", "preset", "gamma",
        "resume", "epochs", "holdout", "frozen_cache_gb", "weight_decay", "save_every", "domains", "warmup", "overwrite",
        "num_positives",
    }  # fmt: skip
    seen: dict[type, set[str]] = {}
    for call, settings, more in cases:
        if call is plan and settings.data:
            settings = replace(settings, model=str(model_directory))
        seen.setdefault(type(settings), set()).update(reading(settings, lambda s, c=call, m=more: c(s, *m)))
    for kind, found in seen.items():
        assert {f.name for f in fields(kind)} - found - elsewhere == set(), kind


# --- files


def test_the_umask_is_respected_by_every_writer(model_directory, data_directory, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o077)
    try:
        flags = ["--model", model_directory, "--data", data_directory]
        run(capsys, "sft", *flags, "--adapter-path", "runs/s", "--iters", "2", "--save-every", "1")
        run(capsys, "evaluate", *flags, "--adapter-path", "runs/s", "--limit", "2")
        run(capsys, "export", *flags, "--adapter-path", "runs/s", "--examples", "1")
        run(capsys, "sample", *flags, "--adapter-path", "runs/s", "--limit", "1", "--n", "1", "--out", "s.jsonl")
        run(capsys, "report", "runs/s", "--out", "r.html")
    finally:
        os.umask(before)
    made = [p for p in tmp_path.rglob("*")]
    assert {"manifest.json", "s.jsonl", "r.html", "checkpoints", "eval", "mlx", "metrics.jsonl"} <= {
        p.name for p in made
    }
    wrong = {str(p): oct(stat.S_IMODE(p.stat().st_mode)) for p in made if stat.S_IMODE(p.stat().st_mode) & 0o077}
    assert wrong == {}
    files.write_text(tmp_path / "shared.txt", "x")
    assert stat.S_IMODE((tmp_path / "shared.txt").stat().st_mode) == 0o666 & ~before


# --- progress


def test_without_a_terminal_a_line_every_30_seconds(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert progress.EVERY == 30
    with progress.Progress(390, "dmpo", "step", done=20) as bar:
        for step in range(1, 101):
            now[0] += 0.5
            bar.update(loss=1 / step, margin=1.25)
        with bar.paused():
            now[0] += 600  # a validation
            with progress.Progress(2, "validate", "group") as inner:
                now[0] += 31
                inner.update()
        now[0] += 0.5
        bar.update(loss=0.01)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "dmpo: 81 of 390 steps, loss 0.01639, margin 1.25, 2 steps/s, 2:34 left"
    assert lines[1] == "validate: 1 of 2 groups, 31 s/group, 0:31 left"
    assert lines[2] == "dmpo: 121 of 390 steps, loss 0.01, margin 1.25, 2 steps/s, 2:14 left"
    assert len(lines) == 3


def test_a_nested_progress_is_not_in_the_rate_of_the_outer_one(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.Progress(10, "a", "step") as outer:
        now[0] += 1
        outer.update()
        with progress.Progress(None, "b", "row") as inner:
            now[0] += 500
            inner.update(7)
            assert inner.line() == "b: 7 rows, 71.4 s/row"
        now[0] += 1
        outer.update()
        assert outer.rate == 1.0 and outer.seconds == 2.0


def test_a_progress_inside_a_part_advances_the_whole(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.Progress(100, "evaluate", "example", done=20) as bar:
        for _ in range(2):
            with bar.part(40), progress.Progress(4, "chunk", "group") as inner:
                for _ in range(4):
                    now[0] += 20
                    inner.update()
        assert bar.done == 100
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "evaluate: 40 of 100 examples, 2 s/example, 2:00 left"
    assert len(lines) == 4 and all(line.startswith("evaluate: ") for line in lines)


@pytest.mark.parametrize("width", [80, 50])
def test_on_a_terminal_the_bar_is_a_bar(width, monkeypatch):
    from rich.console import Console

    bar = progress.Progress(390, "dmpo", "step", done=0)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with bar:
        for _ in range(120):
            now[0] += 0.4
            bar.update(loss=0.51234, margin=1.2345, accuracy=0.8125, groups_per_second=41.7)
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system="truecolor").print(bar)
    shown = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).splitlines()
    first, second = shown[:2]
    assert len(shown) == 2 and max(map(len, shown)) <= width
    assert first.startswith("dmpo ") and "120/390 steps" in first and "1:48 left" in first
    assert first.count("━") + first.count("╸") + first.count("╺") >= width // 6
    assert second.startswith("  loss 0.5123, margin 1.234, accuracy 0.8125")


def test_quiet_and_other_threads_show_nothing(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", -1.0)
    with progress.Progress(1, "a", "step", quiet=True) as bar:
        bar.update()
    assert list(progress.track([1, 2], "read", "row", quiet=True)) == [1, 2]
    assert capsys.readouterr().err == ""
    assert list(progress.track(iter([1, 2]), "read", "row")) == [1, 2]
    assert capsys.readouterr().err.splitlines()[-1].startswith("read: 2 rows")


def test_an_iteration_that_is_left_early_leaves_nothing_open():
    for item in progress.track(range(3), "read", "row"):
        if item == 1:
            break
    with pytest.raises(UserError), progress.Progress(1, "a", "step"):
        raise UserError("x")
    import gc

    gc.collect()
    assert progress._open == []
