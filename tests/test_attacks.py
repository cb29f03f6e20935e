"""What breaks in by hand: damaged files, hostile titles, impossible outputs. One line, exit code 2, nothing lost."""

import json
import os
import random
import stat
import subprocess
import sys
import types

import numpy as np
import pytest
from test_rank import base, command  # noqa: F401  (base is a fixture)
from test_resume import small_data, unfinished  # noqa: F401  (fixtures)

from mlx_dmpo.cli.main import main
from mlx_dmpo.errors import UserError, WriteError
from mlx_dmpo.machine import files
from mlx_dmpo.machine import progress as machine_progress
from mlx_dmpo.report import read
from mlx_dmpo.report.page import write_report
from mlx_dmpo.tools import reproduce
from mlx_dmpo.train import checkpoint
from mlx_dmpo.train import run as train_run
from mlx_dmpo.use import flip, requests, serve
from mlx_dmpo.use.explain import explain
from mlx_dmpo.use.ranker import Ranker
from mlx_dmpo.use.worker import Cancelled, Task

LIKED = ["--history", "river", "--candidates", "amber", "--candidates", "iron"]


def one_line(code, err):
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in err, err
    assert len(errors[0].split(": ")) >= 4 and not errors[0].startswith("error: :"), errors[0]
    return errors[0]


# --- rank and explain


@pytest.mark.parametrize("invisible", ["\x07", "\u200b", "\u202e"])
def test_a_title_of_invisible_characters_is_no_title(invisible, base):  # noqa: F811
    """What cleaning leaves of it is nothing; it was scored as an empty title."""
    for arguments in (
        ["--history", invisible, "--candidates", "amber", "--candidates", "iron"],
        ["--history", "river", "--candidates", invisible, "--candidates", "iron"],
    ):
        code, out, err = command(*base, *arguments, "--json")
        assert "a title is empty" in one_line(code, err) and not out


def test_the_python_api_refuses_an_empty_title_everywhere(model_directory):
    ranker = Ranker.load(model_directory)
    for call in (
        lambda: ranker.rank(["river", " "], ["amber", "iron"]),
        lambda: ranker.rank(["river"], ["amber", ""]),
        lambda: ranker.score([""], [("amber", "iron")]),
        lambda: ranker.score(["river"], [("amber", " ")]),
        lambda: ranker.explain(["river", ""], "amber", "iron"),
        lambda: ranker.explain(["river"], "", "iron"),
    ):
        with pytest.raises(UserError, match="a title is empty"):
            call()
    assert ranker.score(["river"], []).shape == (0,)


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])  # in the first, Python reads any bytes
def test_standard_input_in_another_encoding(locale, base):  # noqa: F811
    arguments = [sys.executable, "-m", "mlx_dmpo", "rank", *map(str, base)]
    given = '{"history": ["Café"]}'.encode("latin-1")
    done = subprocess.run(arguments, input=given, capture_output=True, env={**os.environ, "LC_ALL": locale})
    assert "standard input: cannot be read" in one_line(done.returncode, done.stderr.decode())


@pytest.mark.parametrize("broken", ["Caf\udce9", "\ud800", "x\udfff"])
def test_half_a_character_is_refused_not_dropped(broken, base):  # noqa: F811
    for arguments, stdin in (
        (["--history", broken, "--candidates", "amber", "--candidates", "iron"], ""),
        (["--history", "river", "--candidates", broken, "--candidates", "iron"], ""),
        ([], json.dumps({"history": [broken], "candidates": ["amber", "iron"]})),
    ):
        code, out, err = command(*base, *arguments, stdin=stdin)
        assert "is not valid Unicode" in one_line(code, err) and not out


@pytest.mark.parametrize("adapted", [[], ["--prompt", "direct"]])
def test_messages_about_titles_say_where(base, adapted):  # noqa: F811
    code, _, err = command(*base, *adapted, *LIKED, "--max-seq-length", "16")
    assert "candidates: " in one_line(code, err) and "--max-seq-length" in err
    code, _, err = command(*base[:2], *adapted, *LIKED, "--domain", "cheese")
    assert '--domain: no wording for domain "cheese"' in one_line(code, err)


def test_a_data_directory_that_holds_nothing_is_named_as_such(base, tmp_path):  # noqa: F811
    code, _, err = command(*base[:2], "--data", tmp_path, *LIKED)
    assert "a prepared directory holds" in one_line(code, err)


def test_ctrl_c_before_the_first_score_is_an_interrupt(base, monkeypatch):  # noqa: F811
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_dmpo.use.rank.step", interrupted)
    for adapted in ([], ["--prompt", "direct"]):
        code, out, err = command(*base, *adapted, *LIKED)
        assert (code, out) == (130, "") and "interrupted" in err and "error" not in err


def test_an_output_that_cannot_be_is_refused_before_the_model_is_loaded(base, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Ranker, "open", lambda *a: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("x")
    for out, said in (
        (tmp_path, "it is a directory"),
        (tmp_path / "file" / "x.json", "something else is in its place"),
    ):
        code, _, err = command(*base, *LIKED, "--out", out)
        assert said in one_line(code, err)
    assert (tmp_path / "file").read_text() == "x"


def test_an_output_directory_is_made_and_home_is_home(base, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HOME", str(tmp_path))
    code, printed, _ = command(*base, *LIKED, "--json", "--out=~/new/order.json")
    assert code == 0 and json.loads((tmp_path / "new" / "order.json").read_text()) == json.loads(printed)


def test_explain_refuses_what_changes_nothing(base, capsys):  # noqa: F811
    pair = ["--history", "river", "--chosen", "amber", "--rejected", "iron"]
    for arguments, said in (
        ([*pair, "--start", "items"], "--start: --chosen and --rejected name the pair"),
        ([*LIKED, "--start", "items"], "--start: every pair of these candidates is compared"),
        ([*LIKED, "--chosen", "\u200b"], "--chosen: the title is empty"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["explain", *map(str, base), *arguments])
        assert said in one_line(stop.value.code, capsys.readouterr().err)


# --- how far explain searches


def test_affordable_sizes():
    assert [flip.affordable(n, 1000) for n in (1, 2, 3, 19, 20, 45, 46, 1000, 1001)] == [3, 3, 3, 3, 2, 2, 1, 1, 0]
    assert flip.sets(4, 3) == 4 + 6 + 4 and flip.sets(3, 3) == 3 + 3 and flip.sets(1, 3) == 0


class Flat:
    """A scoring whose margin no set of history items turns."""

    domain, form = "movie", "pairwise"

    def __init__(self):
        self.scored = 0
        encoder = types.SimpleNamespace(encode=lambda example, orders: types.SimpleNamespace(dropped=0))
        self.model = types.SimpleNamespace(encoder=encoder, name="flat")

    def fresh_margins(self, tasks):
        self.scored += len(tasks)
        return np.ones(len(tasks))


def test_a_long_history_is_searched_as_far_as_is_affordable(monkeypatch, capsys):
    monkeypatch.setattr("mlx_dmpo.use.explain._tokens", lambda *a: ())
    monkeypatch.setattr(flip, "MOST", 200)
    history, scoring = tuple(map(str, range(18))), Flat()
    monkeypatch.setattr("mlx_dmpo.use.explain.affordable", lambda n: flip.affordable(n, 200))
    found = explain(scoring, history, "a", "b")
    assert (found.searched, found.flip) == (2, None) and scoring.scored == 1 + 18 + 153
    assert "sets of up to 2 are searched; --max-flip 3" in capsys.readouterr().err
    assert explain(Flat(), history, "a", "b", 1).searched == 1 and not capsys.readouterr().err


def test_a_search_prints_how_far_it_is_and_can_be_ended(monkeypatch, capsys):
    monkeypatch.setattr("mlx_dmpo.use.explain._tokens", lambda *a: ())
    monkeypatch.setattr("mlx_dmpo.use.explain.FIRST_LINE", -1.0)
    explain(Flat(), tuple(map(str, range(10))), "a", "b")
    (line,) = capsys.readouterr().err.splitlines()  # the second one is not due yet
    assert line.startswith("explain: at most: 10 of 175 sets")
    task = Task([], lambda ranker: None)
    task.cancelled = True
    with pytest.raises(Cancelled):
        explain(Flat(), ("x", "y"), "a", "b", between=task.raise_if_cancelled)


def test_a_bar_inside_another_waits_no_longer_than_that(capsys):
    with (
        machine_progress.Progress(9, "outer", "step", first=-1.0),
        machine_progress.Progress(3, "inner", "step") as bar,
    ):
        bar.update()
    assert capsys.readouterr().err.startswith("inner: 1 of 3 steps")


# --- files that are no files


@pytest.mark.parametrize("how", ["device", "link to a device", "pipe", "directory"])
def test_nothing_but_a_file_is_replaced(how, tmp_path):
    path = tmp_path / "out.json"
    if how == "device":
        path = type(path)(os.devnull)
    elif how == "link to a device":
        path.symlink_to(os.devnull)
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    before = os.lstat(path)
    with pytest.raises(WriteError, match="name a file"):
        files.write_json(path, {})
    after = os.lstat(path)
    assert (before.st_ino, stat.S_IFMT(before.st_mode)) == (after.st_ino, stat.S_IFMT(after.st_mode))


# --- what a server is sent


def test_titles_are_counted_before_any_is_looked_for():
    looked = []

    def match(title):
        looked.append(title)
        return title

    many = [f"t{n}" for n in range(60)]
    for call, body in (
        (requests.rerank_request, {"query": many, "documents": ["a"]}),
        (requests.rerank_request, {"query": ["a"], "documents": many}),
        (requests.rerank_request, {"query": "\n".join(many), "documents": ["a"]}),
        (requests.explain_request, {"query": many, "chosen": "a", "rejected": "b"}),
    ):
        with pytest.raises(requests.Refused) as refused:
            call(body, 50, match)
        assert refused.value.status == 413 and not looked
    for body in ({"query": ["\u200b"], "documents": ["a"]}, {"query": ["x"], "documents": ["\u200b"]}):
        with pytest.raises(requests.Refused, match="invisible characters only"):
            requests.rerank_request(body, 50, lambda title: "" if title == "\u200b" else title)


@pytest.mark.parametrize(
    ("text", "number"),
    [("5", 5), ("007", 7), ("9" * 5000, 50), ("0" * 5000, 0), ("²", -1), ("٣", -1), ("", -1), ("-1", -1)],
)
def test_numbers_of_a_request(text, number):
    assert serve._whole_number(text, 50) == number


# --- checkpoints whose manifest is JSON of another kind


def places(value, at=()):
    yield at
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*at, key))


def changed(value, draw):
    """A copy with one value taken out, or replaced by one of another kind."""
    found = json.loads(json.dumps(value))
    *way, last = draw.choice([p for p in places(found) if p])
    inner = found
    for key in way:
        inner = inner[key]
    if draw.random() < 0.3 and isinstance(inner, dict):
        del inner[last]
    else:
        inner[last] = draw.choice([None, True, -1, 10**400, float("nan"), float("inf"), "x", [], {}, [[]], {"a": {}}])
    return found


def test_every_spoilt_manifest_is_refused_or_whole(unfinished, tmp_path):  # noqa: F811
    """400 of them: reading one gives a checkpoint with sound numbers, or a UserError."""
    path = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    whole, draw, refused = json.loads((path / "manifest.json").read_text()), random.Random(0), 0
    for _ in range(400):
        (path / "manifest.json").write_text(json.dumps(changed(whole, draw)))
        try:
            state = checkpoint.read(path).state
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
            continue
        assert state.step == 4 and all(np.isfinite([state.seconds, *state.window.values()])), state
        json.dumps(vars(state), allow_nan=False)
    assert refused > 80


def test_damaged_lines_of_metrics_do_not_end_a_resume(unfinished, tmp_path, capsys):  # noqa: F811
    metrics = tmp_path / "run" / "metrics.jsonl"
    kept = metrics.read_bytes().splitlines(keepends=True)
    assert len(kept) >= 2
    # of the same length: the checkpoint knows how long the file was
    metrics.write_bytes(b"\xff" * (len(kept[0]) - 1) + b"\n" + b"".join(kept[1:]))
    train_run.train(unfinished, "test")
    assert "1 damaged lines of" in capsys.readouterr().err
    steps = [line["step"] for line in read.read_training(metrics)]
    assert steps == sorted(steps) and steps[-1] == 5


# --- reports


@pytest.mark.parametrize(
    "text", ["5", "[1]", '{"loss": 1}', '{"step": 1, "loss": NaN}', '{"step": 1, "x": 1e400}', "{", "[" * 9999]
)
def test_lines_that_are_no_training(text):
    assert read.training_line(text) is None
    assert read.training_line('{"step": 1, "loss": 0.5, "valid_loss": 0.25}') == {
        "step": 1,
        "loss": 0.5,
        "valid_loss": 0.25,
    }


def test_the_report_is_not_written_over_its_own_markdown(tmp_path):
    with pytest.raises(UserError, match="name the HTML file"):
        write_report([tmp_path], tmp_path / "report.md")


# --- reproduce and plan


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("out: 5", '"out": is not text'),
        ("out:", '"out": is not text'),
        ("name: [a]", '"name": is not text'),
        ("systems: [[popularity]]", "\"systems\": ['popularity'] is not a system"),
        ("systems: [5]", '"systems": 5 is not a system'),
    ],
)
def test_a_comparison_of_other_kinds_of_values(change, said, tmp_path, capsys):
    wanted = {"data": "data: {d: {test: a, train: b}}", "systems": "systems: [popularity]"}
    wanted[change.split(":")[0]] = change
    (tmp_path / "c.yaml").write_text("\n".join(wanted.values()))
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", str(tmp_path / "c.yaml"), "--dry-run", "--no-hours"])
    assert said in one_line(stop.value.code, capsys.readouterr().err)


@pytest.mark.parametrize("text", ["[]", '{"sft": 5}', '{"sft": {"seconds": "1", "peak_bytes": 2}}', "{"])
def test_a_damaged_note_of_a_cell(text, tmp_path):
    (tmp_path / "cell.json").write_text(text)
    cell = reproduce.Cell(tmp_path, "d", "sft", ())
    with pytest.raises(UserError, match=r"cell\.json"):
        reproduce.read_notes(cell)
    (tmp_path / "cell.json").unlink()
    assert reproduce.read_notes(cell) == {}


@pytest.mark.parametrize("flag", ["--history", "--title-tokens", "--groups", "--num-negatives"])
def test_a_plan_of_more_than_any_machine_holds(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--model", "qwen3-0.6b", flag, str(10**12)])
    assert f"{flag}: " in one_line(stop.value.code, capsys.readouterr().err)
