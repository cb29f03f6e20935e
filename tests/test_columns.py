"""Other people's tables: columns of other names, CSV, what pandas writes, ratings given for training rows."""

import gzip
import json
import re
import shlex

import invented
import pandas
import pytest
from test_bad_input import run

from mlx_dmpo.cli.data import prepare
from mlx_dmpo.data import formats
from mlx_dmpo.data.formats import columns
from mlx_dmpo.errors import UserError

ANSWERS = {"chosen": "The river is Amber.", "rejected": "The river is Brass."}


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def loaded(tmp_path, *rows, **how):
    reported = []
    found = formats.load(write(tmp_path / "d.jsonl", rows), notice=reported.append, **how)
    return found, reported


def prompts(group):
    return [(m["role"], m["content"]) for m in group.branches[0].messages]


# --- prompts in columns of other names


@pytest.mark.parametrize("name", [*columns.PROMPTS[:3], *columns.PROMPTS[4:], "Question", "User Prompt", "PROMPT"])
def test_a_prompt_of_another_name_is_the_prompt(name, tmp_path):
    found, reported = loaded(tmp_path, {name: "Which river?", **ANSWERS, "source": "a b"})
    assert prompts(found.examples[0]) == [("user", "Which river?")]
    assert [b.answer for b in found.examples[0].branches] == list(ANSWERS.values())
    assert name == "PROMPT" or any("is read as the prompt" in t for t in reported)
    assert any(t.endswith("that are not used: source") for t in reported)


@pytest.mark.parametrize("name", ["system", "system_prompt", "System Message"])
@pytest.mark.parametrize("answers", [ANSWERS, {"completion": "Amber."}, {"response": "Amber."}])
def test_a_system_text_is_part_of_the_prompt(name, answers, tmp_path):
    found, _ = loaded(tmp_path, {name: "Be brief.", "prompt": "Which river?", **answers})
    assert prompts(found.examples[0]) == [("system", "Be brief."), ("user", "Which river?")]


def test_a_system_column_beside_conversations(tmp_path):
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    found, _ = loaded(tmp_path, {"messages": turns, "system": "Be brief."})
    assert prompts(found.examples[0]) == [("system", "Be brief."), ("user", "Hello.")]
    whole = [{"role": "system", "content": "Be brief."}, *turns]
    found, _ = loaded(tmp_path, {"messages": whole, "system": "Be brief."})
    assert prompts(found.examples[0]) == [("system", "Be brief."), ("user", "Hello.")]
    with pytest.raises(UserError, match=r"d.jsonl:1: \"system\" and the first message are two system texts"):
        loaded(tmp_path, {"messages": whole, "system": "Sing."})


@pytest.mark.parametrize(
    "name, case",
    {
        "another language": ({"frage": "Welcher Fluss?", **ANSWERS}, 'no column "prompt", and "frage" may hold it'),
        "no spaces": ({"问题": "首都是哪里？", **ANSWERS}, "may hold it"),
        "messages": ({"turns": [{"role": "user", "content": "Which?"}], **ANSWERS}, '"turns" may hold it'),
        "two": ({"question": "Which?", "input": "A map.", **ANSWERS}, "question and input may both be the prompt"),
        "context": ({"question": "Which?", "context": "A map of it.", **ANSWERS}, '"context" is not part of'),
        "beside a prompt": ({"prompt": "Which?", "question": "And where?", **ANSWERS}, '"question" is not part of'),
        "beside alpaca": (
            {"instruction": "Answer.", "question": "Which?", "output": "Amber."},
            '"question" is not part',
        ),
        "dolly's context": (
            {"instruction": "Which?", "context": "A map.", "response": "Amber."},
            '"context" is not part',
        ),
        "history": ({"prompt": "Which?", "history": [["Hello?", "Hi."]], **ANSWERS}, '"history" is not part'),
    }.items(),
)
def test_no_text_is_thrown_away(name, case, tmp_path):
    row, expected = case
    sound = {k: "Which river?" if k == "prompt" else v for k, v in {"prompt": "", **ANSWERS}.items()}
    with pytest.raises(UserError, match=rf"d\.jsonl:1: .*{expected}"):
        loaded(tmp_path, row)
    if "instruction" not in row:
        found, reported = loaded(tmp_path, sound, row, sound, skip_bad_rows=True)
        assert found.bad == 1 and any(t.startswith("left out") and "d.jsonl:2" in t for t in reported)


def test_columns_that_repeat_or_describe_are_no_prompt(tmp_path):
    about = {"source": "a set", "id": "x 1", "score_chosen": 4, "model": "some model", "prompt_id": "a b"}
    whole = {
        "messages": [{"role": "user", "content": "Which river?"}, {"role": "assistant", "content": ANSWERS["chosen"]}]
    }
    found, _ = loaded(tmp_path, {"prompt": "Which river?", **ANSWERS, **about, **whole, "question": "Which river?"})
    assert prompts(found.examples[0]) == [("user", "Which river?")]
    found, _ = loaded(tmp_path, {**ANSWERS, **about})  # TRL's implicit prompt
    assert prompts(found.examples[0]) == [("user", "The river is")]


@pytest.mark.parametrize("answer", columns.COMPLETIONS)
@pytest.mark.parametrize("asked", ["prompt", "question", "problem"])
def test_one_answer_under_another_name(asked, answer, tmp_path):
    found, _ = loaded(tmp_path, {asked: "Which river?", answer: "Amber."})
    group = found.examples[0]
    assert prompts(group) == [("user", "Which river?")] and group.branches[0].answer == "Amber." and not group.pairs


@pytest.mark.parametrize("chosen, rejected", [*zip(columns.CHOSEN, columns.REJECTED_TOO, strict=True)])
def test_answers_under_other_names(chosen, rejected, tmp_path):
    found, _ = loaded(tmp_path, {"prompt": "Which?", chosen: "Amber.", rejected: "Brass."})
    assert [b.answer for b in found.examples[0].branches] == ["Amber.", "Brass."]


# --- tables in other files

ROWS = [{"prompt": f'Which river, "{i}"?', "chosen": f"Amber,\n{i}.", "rejected": f"Brass; {i}."} for i in range(12)]


def same(path):
    found = formats.load(path)
    return [[*map(lambda m: m[1], prompts(e)), *(b.answer for b in e.branches)] for e in found.examples] == [
        list(r.values()) for r in ROWS
    ]


@pytest.mark.parametrize("orient", ["columns", "index", "split", "table", "records"])
def test_what_pandas_writes_as_json(orient, tmp_path):
    pandas.DataFrame(ROWS).to_json(tmp_path / "d.json", orient=orient)
    assert same(tmp_path / "d.json")


def test_columns_of_lists_and_one_list_of_rows(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(pandas.DataFrame(ROWS).to_dict("list"), indent=1))
    (tmp_path / "b.json").write_text(json.dumps({"train": ROWS}))
    assert same(tmp_path / "a.json") and same(tmp_path / "b.json")


@pytest.mark.parametrize("by", [",", ";", "\t", "|"])
@pytest.mark.parametrize("start", ["", "sep=X\n", "\ufeff"])
def test_csv(by, start, tmp_path):
    table = pandas.DataFrame(ROWS).to_csv(index=False, sep=by)
    (tmp_path / "d.csv").write_text(start.replace("X", by) + table, newline="")
    assert same(tmp_path / "d.csv")


@pytest.mark.parametrize(
    "name, case",
    {
        "too few cells": ("prompt,chosen,rejected\na,b,c\na,b\n", r":3: 2 cells, and the header has 3"),
        "a name twice": ("prompt,chosen,chosen\na,b,c\n", r':1: the header names "chosen" twice'),
        "no rows": ("prompt,chosen,rejected\n", "has a header and no rows"),
        "an open quote": ('prompt,chosen,rejected\na,"b,c\n', r":2: not valid CSV"),
        "an empty cell": ("prompt,chosen,rejected\na,b,c\na,,c\n", r":3: .*its columns: prompt, rejected"),
        "no row of data": ("apples,pears\n1,2\n", r":2: .*its columns: apples, pears"),
    }.items(),
)
def test_bad_csv(name, case, tmp_path, capsys):
    text, expected = case
    (tmp_path / "d.csv").write_text(text)
    code, _, err = run(capsys, "evaluate", "--data", tmp_path / "d.csv", "--out", tmp_path / "o")
    assert code == 2 and "Traceback" not in err
    assert re.search(r"d\.csv.*" + expected, err), err


def test_bytes_that_are_no_text_name_their_line(tmp_path):
    (tmp_path / "d.csv").write_bytes(b"prompt,chosen,rejected\na,b,c\ncaf\xe9,b,c\n")
    with pytest.raises(UserError, match=r"d\.csv:3: is not UTF-8 text \(byte 0xe9\): save the file as UTF-8"):
        formats.load(tmp_path / "d.csv")
    (tmp_path / "d.csv").write_bytes("prompt,chosen,rejected\n".encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16"):
        formats.load(tmp_path / "d.csv")


def test_a_spreadsheet_is_called_one(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["prompt", "chosen", "rejected"])
    book.save(tmp_path / "d.xlsx")
    with pytest.raises(UserError, match="is a spreadsheet: save it as CSV"):
        formats.load(tmp_path / "d.xlsx")


# --- ratings


@pytest.mark.parametrize("name", invented.FORMS)
def test_ratings_lead_to_prepare(name, tmp_path, capsys):
    """The command that the message names works as printed."""
    source, path, items = invented.form(name, tmp_path / "raw")
    code, _, err = run(capsys, "sft", "--data", path, "--adapter-path", tmp_path / "a")
    assert code == 2 and "holds ratings" in err and not (tmp_path / "a").exists(), err
    command = shlex.split(err.split("`")[1])
    assert command[1] == "prepare" and command[2] in prepare.commands
    if not name.startswith("table"):
        assert command[2] == source
    command[command.index("--out") + 1] = str(tmp_path / "out")
    few = "--train-users 2 --valid-users 1 --test-users 1 --min-liked 4 --min-disliked 4".split()
    code, out, err = run(capsys, *command[1:], *items, *few)
    assert code == 0, err


def test_ratings_in_one_file_of_a_folder(tmp_path, capsys):
    invented.movielens_100k(tmp_path / "ml")
    assert "prepare movielens" in run(capsys, "sft", "--data", tmp_path / "ml" / "u.data")[2]
    (tmp_path / "r.csv.gz").write_bytes(gzip.compress(b"userId,movieId,rating\n1,2,3\n"))
    assert "prepare table" in run(capsys, "check", tmp_path / "r.csv.gz")[1]


@pytest.mark.parametrize(
    "row", [{"prompt": "Which?", **ANSWERS, "user_id": "7", "rating": 5}, {"user": "u", **ANSWERS}]
)
def test_training_rows_are_no_ratings(row, tmp_path):
    assert loaded(tmp_path, row)[0].examples
