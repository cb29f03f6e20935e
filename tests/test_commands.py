"""Every command that is printed to be run next works as it is printed: pasted into a shell, with any path."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from hooks import before_steps

from mlx_dmpo.cli.main import main
from mlx_dmpo.config import DmpoSettings, EvaluateSettings, SftSettings
from mlx_dmpo.config.baseline import BaselineSettings
from mlx_dmpo.machine import commands, files, trained_on
from mlx_dmpo.records import RankingExample
from mlx_dmpo.train import run as train_run

NAMES = {"plain": "plain", "spaces": "two words", "quotes": """it's a "name" $HOME""", "letters": "Élan 映画"}
FAST = ["--iters", "1", "--batch-size", "2", "--grad-accumulation-steps", "1"]


def pasted(line):
    """The words that a shell makes of a line."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    output = capsys.readouterr()
    assert stop.value.code == 0, output.err
    return output.out, output.err


def following(capsys, line):
    """Runs a printed `next: COMMAND` as it is, and returns the next one."""
    words = pasted(line.removeprefix("next: "))
    assert words[0] == "mlx-dmpo"
    out, _ = run(capsys, *words[1:])
    return next((found for found in out.splitlines() if found.startswith("next: ")), out)


@pytest.mark.parametrize(
    "word", ["a b", "it's", 'a "b" $x `y`', "映画", "a\tb\x1b", "a\udcff'\\b", "-x", "~/x", "", "a!b*"]
)
def test_a_shell_reads_a_quoted_word_as_it_was(word):
    done = subprocess.run(["bash", "-c", f"printf %s {commands.quote(word)}"], capture_output=True, check=True)
    assert done.stdout == word.encode("utf-8", "surrogateescape")
    assert commands.quote(word).isprintable()


@pytest.mark.parametrize("name", [n if n == "quotes" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_the_chain_of_next_lines_runs_as_printed(name, model_directory, tmp_path, capsys, monkeypatch):
    home = tmp_path / NAMES[name]
    data = tiny.write_data(home / "ratings", users=3)
    shutil.copytree(model_directory, home / "model")
    monkeypatch.chdir(tmp_path)
    here = Path(NAMES[name])
    given = ["--model", here / "model", "--data", here / "ratings", "--adapter-path", here / "sft", *FAST]
    out, _ = run(capsys, "sft", *given)
    line = out.splitlines()[-1]
    assert pasted(line)[2:4] == ["dmpo", "--model"]
    line = following(capsys, line + " " + " ".join(FAST))
    assert (home / "dmpo" / "manifest.json").exists()
    words = pasted(line)
    assert words[2] == "evaluate" and words[words.index("--data") + 1] == str(here / "ratings")
    line = following(capsys, line)
    metrics = json.loads((home / "dmpo" / "eval" / "metrics.json").read_text())
    assert metrics["trained_on"] == 0 and metrics["users"] == 3
    following(capsys, line)
    assert Path("report.html").exists()
    assert data.exists()


@pytest.mark.parametrize("name", [n if n == "quotes" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
@pytest.mark.parametrize(
    "flags",
    [["--iters", "4"], pytest.param(["--epochs", "2"], marks=pytest.mark.slow), ["-c", "c.yaml"]],
    ids=["iters", "epochs", "schedule"],
)
def test_the_printed_resume_command_continues_the_run(name, flags, model_directory, tmp_path, capsys, monkeypatch):
    if name != "quotes" and flags[0] == "-c":
        pytest.skip("one name suffices for the schedule")
    home = tmp_path / NAMES[name]
    tiny.write_data(home / "ratings", users=4)
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(
        "iters: 4\nlr_schedule: {name: cosine_decay, arguments: [1e-4, 4]}\nepochs: 2\nreport_to: ''\nproject_name: x\n"
    )

    def interrupt(model, step):
        if step.number == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # the thread that watches takes note

    given = ["--model", model_directory, "--data", home / "ratings", "--adapter-path", f"{NAMES[name]}/sft"]
    given += ["--batch-size", "2", "--grad-accumulation-steps", "1", *flags]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        before_steps(patch, interrupt)
        main(["sft", *map(str, given)])
    assert stop.value.code == 130
    line = capsys.readouterr().err.splitlines()[-1]
    words = pasted(line[line.index("mlx-dmpo ") :])
    out, _ = run(capsys, *words[1:])
    assert "resumed at step 2 of 4" in out
    again = [*given, "--adapter-path", "whole"]
    run(capsys, "sft", *again)
    whole, resumed = Path("whole/adapters.safetensors"), home / "sft" / "adapters.safetensors"
    assert whole.read_bytes() == resumed.read_bytes()


# (data, valid_data, files that exist, whether the data set has a test split) -> the file that evaluate is given
@pytest.mark.parametrize(
    ("data", "valid", "exist", "has_test", "expected"),
    [
        ("d", "", [], True, "d"),
        ("train.jsonl", "", [], False, "TEST"),
        ("train.jsonl", "", ["test.jsonl"], False, "test.jsonl"),
        ("my_train_set.json", "", ["my_test_set.json"], False, "my_test_set.json"),
        ("rows.jsonl", "held.jsonl", [], False, "held.jsonl"),
        ("who/what@train", "", [], False, "TEST"),
        ("d", "", [], False, "TEST"),
    ],
)
def test_the_next_line_never_evaluates_on_training_data(data, valid, exist, has_test, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in [*exist, *([data] if "." in data else [])]:
        Path(file).write_text("{}")
    settings = DmpoSettings(model="m", data=data, valid_data=valid)
    words = pasted(commands.after_training(settings, "runs/dmpo", has_test=has_test))
    assert words[words.index("--data") + 1] == expected
    assert words[words.index("--adapter-path") + 1] == "runs/dmpo"


def test_the_next_line_carries_what_the_model_and_rows_depend_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = SftSettings(
        model="m", data="d", valid_data="v", quantize=4, dtype="bfloat16", domain="song", skip_bad_rows=True
    )
    line = commands.after_training(settings, "runs/sft", has_test=True)
    assert line == (
        "mlx-dmpo dmpo --model m --quantize 4 --dtype bfloat16 --domain song --skip-bad-rows --data d --valid-data v "
        "--start-adapter runs/sft --adapter-path runs/dmpo"
    )
    for taken in ("runs/dmpo", "runs/dmpo-2"):
        Path(taken).mkdir(parents=True)
        Path(taken, "config.yaml").write_text("data: other\n")
    assert commands.after_training(settings, "runs/sft", has_test=True).endswith(" --adapter-path runs/dmpo-3")
    assert [str(commands.dmpo_directory(p)) for p in ("a/sft-x", "songs", ".", "..")] == [
        "a/dmpo-x", "songs-dmpo", "dmpo", "../dmpo",
    ]  # fmt: skip


def test_wordings_of_further_domains_travel_with_the_next_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worded = {"song": {"topic": "music", "items": "songs", "consumed": "played", "consuming": "playing"}}
    shared, own = Path("songs.yaml"), Path("sft.yaml")
    shared.write_text(f"domains: {json.dumps(worded)}\n")
    own.write_text(f"epochs: 1\ndomains: {json.dumps(worded)}\n")
    settings = DmpoSettings(model="m", data="d", domains=worded)
    for file, expected in ((shared, "songs.yaml"), (own, "runs/dmpo/domains.yaml"), (None, "runs/dmpo/domains.yaml")):
        words = pasted(commands.after_training(settings, "runs/dmpo", has_test=True, config_file=file and str(file)))
        assert words[words.index("-c") + 1] == expected


def test_a_second_data_set_gets_a_directory_of_its_own(model_directory, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("films", "books"):
        tiny.write_data(tmp_path / name, users=2, splits=("train", "test"))
    out, _ = run(capsys, "sft", "--model", model_directory, "--data", "films", *FAST)
    assert "done: runs/sft " in out
    out, err = run(capsys, "sft", "--model", model_directory, "--data", "books", *FAST)
    assert "runs/sft holds a run on other data: writing runs/books/sft" in err
    assert out.splitlines()[-1].endswith("--start-adapter runs/books/sft --adapter-path runs/books/dmpo")
    with pytest.raises(SystemExit) as stop:  # the same data again: that run is not replaced
        main(["sft", "--model", str(model_directory), "--data", "books", *FAST])
    assert stop.value.code == 2 and "runs/books/sft: holds a finished run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:  # a directory that the user names is never another one
        main(["sft", "--model", str(model_directory), "--data", "books", "--adapter-path", "runs/sft", *FAST])
    assert stop.value.code == 2
    capsys.readouterr()
    for data, out in (("films", "runs/sft/eval"), ("books", "runs/sft/eval-books")):
        output, _ = run(capsys, "evaluate", "--model", model_directory, "--data", data, "--adapter-path", "runs/sft")
        assert f"done: {out} " in output and f"next: mlx-dmpo report {out} --out report.html" in output


def test_evaluate_says_what_was_trained_on_whatever_the_file_is_called(model_directory, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_data(tmp_path / "d", users=4)
    flags = ["--model", model_directory]
    run(capsys, "sft", *flags, "--data", "d/train.jsonl", "--adapter-path", "sft", *FAST)
    other = tiny.write_data(tmp_path / "e", users=3, seed=5, splits=("train",))
    run(
        capsys, "dmpo", *flags, "--data", other / "train.jsonl", "--start-adapter", "sft", "--adapter-path", "dmpo",
        "--save-every", "1", *FAST,
    )  # fmt: skip
    lines = Path("d/train.jsonl").read_text().splitlines()[:2] + Path("d/test.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"user": f"renamed {n}"} for n, line in enumerate(lines)]
    Path("mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for adapter in ("sft", "dmpo", "dmpo/checkpoints/0000001"):  # dmpo: by way of the adapter that it started from
        _, err = run(
            capsys, "evaluate", *flags, "--data", "mixed.jsonl", "--adapter-path", adapter, "--out", f"{adapter}-eval"
        )
        assert f"warning: 2 of the 6 examples were in the training data of {adapter}:" in err
        assert json.loads(Path(f"{adapter}-eval/metrics.json").read_text())["trained_on"] == 2
    _, err = run(capsys, "evaluate", *flags, "--data", "mixed.jsonl", "--out", "base")
    assert "warning" not in err and "trained_on" not in json.loads(Path("base/metrics.json").read_text())


def test_examples_are_the_same_by_what_is_learnt_from_them():
    example = RankingExample("u", "movie", ("a", "b"), "c", ("d",))
    same = replace(example, user="v", negatives=("e", "f"), source="x:1")
    assert trained_on.example_key(example) == trained_on.example_key(same)
    for change in ({"history": ("b", "a")}, {"positive": "d", "negatives": ("c",)}, {"history": ("a", "b", "c")}):
        assert trained_on.example_key(example) != trained_on.example_key(replace(example, **change))


@pytest.mark.parametrize("command", ["sft", "dmpo", "evaluate"])
def test_a_bad_model_leaves_no_directory(command, data_directory, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad").mkdir()
    Path("bad/config.json").write_text('{"model_type": "bert"}')
    flag = "--out" if command == "evaluate" else "--adapter-path"
    for model in ("bad", "nowhere/at/all"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--model", model, "--data", str(data_directory), flag, "new/runs/x"])
        assert stop.value.code == 2
        assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"], capsys.readouterr().err


def test_files_with_one_name_are_kept_apart_in_the_manifest(model_directory, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("d1", "d2")):
        tiny.write_data(Path(name), users=2, seed=seed, splits=("train",))
    flags = ["--data", "d1/train.jsonl", "--valid-data", "d2/train.jsonl"]
    run(capsys, "sft", "--model", model_directory, *flags, "--adapter-path", "r", *FAST)
    inputs = files.read_json(Path("r/manifest.json"))["inputs"]
    assert inputs == {f"{d}/train.jsonl": files.sha256(Path(d, "train.jsonl")) for d in ("d1", "d2")}


def test_a_note_on_the_toy_model(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_data(tmp_path / "d", users=2)
    monkeypatch.setattr(train_run, "train", lambda *a: Path("r"))
    _, err = run(capsys, "sft", "--data", "d/train.jsonl")
    assert "embedded toy model" in err
    for more in (["--data", "d"], ["--data", "d/train.jsonl", "--valid-data", "d/valid.jsonl"]):
        _, err = run(capsys, "sft", "--model", "m", *more)
        assert err == ""
    _, err = run(capsys, "sft")
    assert err == ""


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (["--lora-rank", "8"], "lora_parameters.rank: the adapter in s has 4"),
        (["--lora-scale", "2"], "lora_parameters.scale: the adapter in s has 6.0"),
        (["--lora-dropout", "0"], "lora_parameters.dropout: the adapter in s has 0.1"),
        (["--num-layers", "-1"], "num_layers: the adapter in s has 1"),
        (["--fine-tune-type", "lora"], "fine_tune_type: the adapter in s has dora"),
        (["-c", "rank.yaml"], "lora_parameters.rank: the adapter in s has 4"),
    ],
)
def test_a_default_that_was_given_is_refused_beside_an_adapter_of_another_shape(
    given, what, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "adapters.safetensors").touch()
    files.write_json(
        tmp_path / "s" / "adapter_config.json",
        {"fine_tune_type": "dora", "num_layers": 1, "lora_parameters": {"rank": 4, "scale": 6.0, "dropout": 0.1}},
    )
    (tmp_path / "rank.yaml").write_text("lora_parameters: {rank: 8}\n")
    monkeypatch.setattr(train_run, "train", lambda *a: Path("r"))
    with pytest.raises(SystemExit) as stop:
        main(["dmpo", "--start-adapter", "s", *given])
    assert stop.value.code == 2 and what in capsys.readouterr().err
    run(capsys, "dmpo", "--start-adapter", "s", "--lora-rank", "4", "--num-layers", "1")
    run(capsys, "dmpo", "--start-adapter", "s")


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (["baseline", "popularity", "--shots", str(BaselineSettings().shots)], "--shots: has no effect on popularity"),
        (["baseline", "in-context", "--fit", "train"], "--fit: has no effect on in-context"),
        (
            ["prepare", "movielens", "ml", "--recipe", "dmpo-release", "--out", "o", "--min-liked", "5"],
            "--min-liked: recipe dmpo-release fixes every rule",
        ),
    ],
)
def test_a_flag_without_effect_is_refused_also_with_the_defaults_value(command, what, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2 and what in capsys.readouterr().err


def test_an_evaluation_of_a_replaced_adapter_is_replaced_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (Path("r") / "eval").mkdir(parents=True)
    settings = DmpoSettings(model="m", data="d")
    assert "--overwrite" not in commands.after_training(settings, "r", has_test=True)
    Path("r/eval/manifest.json").write_text("{}")
    assert commands.after_training(settings, "r", has_test=True).endswith(" --overwrite")


def test_the_command_of_a_manifest_can_be_pasted(model_directory, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_data(tmp_path / "a b", users=2)
    arguments = ["evaluate", "--model", str(model_directory), "--data", "a b", "--out", "it's"]
    monkeypatch.setattr("sys.argv", ["mlx-dmpo", *arguments])
    run(capsys, *arguments)
    assert pasted(files.read_json(Path("it's/manifest.json"))["command"]) == ["mlx-dmpo", *arguments]
    assert shlex.split(files.read_json(Path("it's/manifest.json"))["command"])[-1] == "it's"
    assert commands.own_directory(Path("it's"), EvaluateSettings(data="a b", model=str(model_directory))) == Path(
        "it's"
    )


def test_home_is_home_in_yaml_behind_an_equals_sign_and_in_a_path(model_directory, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    tiny.write_data(tmp_path / "home" / "d", users=2)
    Path("c.yaml").write_text(f"model: {model_directory}\ndata: ~/d\nadapter_path: ~/r\niters: 1\n")
    out, _ = run(capsys, "sft", "-c", "c.yaml")
    assert f"done: {tmp_path}/home/r " in out and not Path("~").exists()
    run(capsys, "evaluate", f"--model={model_directory}", "--data=~/d", "--adapter-path=~/r", "--out=~/e")
    run(capsys, "report", "~/e", "--out=~/report.html")
    with pytest.raises(SystemExit):
        main(["check", "~/d"])
    assert "errors" in capsys.readouterr().out
    assert (tmp_path / "home" / "report.html").exists() and not Path("~").exists()
