"""What load_examples makes of files: one kind a file, every bad row named, rows of one user one group."""

import json

import pytest

from mlx_dmpo.data import formats
from mlx_dmpo.errors import UserError
from mlx_dmpo.prompts import pairwise
from mlx_dmpo.records import RankingExample

EXAMPLE = RankingExample("u", "movie", ("Heat", "Ronin"), "Collateral", ("Bambi", "Dumbo", "Gigi"), (True, False, True))


def released(example, kind="pair"):
    rows = []
    for negative, first in zip(example.negatives, example.positive_first, strict=True):
        one = RankingExample(example.user, example.domain, example.history, example.positive, (negative,))
        chosen, rejected = pairwise.build_group(one, [(first,)]).branches
        output = [chosen.answer, rejected.answer] if kind == "pair" else chosen.answer
        rows.append({"instruction": chosen.messages[0]["content"], "input": "", "output": output})
    return rows


def same(found, expected):
    return (found.history, found.positive, found.negatives, found.positive_first, found.domain) == (
        expected.history,
        expected.positive,
        expected.negatives,
        expected.positive_first,
        expected.domain,
    )


@pytest.mark.parametrize("kind", ["pair", "chosen"])
def test_rows_of_one_user_become_one_group(tmp_path, kind):
    other = RankingExample("v", "movie", ("Heat", "Ronin"), "Alien", ("Bambi",), (False,))
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(released(EXAMPLE, kind) + released(other, kind)))
    found = formats.load_examples(file)
    assert len(found) == 2 and same(found[0], EXAMPLE) and same(found[1], other)
    assert found[0].source == f"{file}:row 1" and found[1].source == f"{file}:row 4"


def test_the_same_pair_again_begins_a_new_group(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(released(EXAMPLE)[:1] * 2))
    assert [e.negatives for e in formats.load_examples(file)] == [("Bambi",), ("Bambi",)]


@pytest.mark.parametrize("between", ["", " ", "\n", ",\n"])
def test_objects_one_after_another(tmp_path, between):
    file = tmp_path / "rows.json"
    file.write_text(between.join(map(json.dumps, released(EXAMPLE))))
    assert same(formats.load_examples(file)[0], EXAMPLE)


def test_own_format_round_trip(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text(
        json.dumps(EXAMPLE.to_json()) + "\r\n\n" + json.dumps(EXAMPLE.to_json()) + "\n", encoding="utf-8-sig"
    )
    found = formats.load_examples(file)
    assert [e.source for e in found] == [f"{file}:1", f"{file}:3"]
    assert all(e.user == "u" and same(e, EXAMPLE) for e in found)
    (tmp_path / "array.json").write_text(json.dumps([EXAMPLE.to_json()] * 2))
    assert [e.source.rsplit(":")[-1] for e in formats.load_examples(tmp_path / "array.json")] == ["row 1", "row 2"]


BAD_OUTPUTS = {
    "swapped with itself": ([" <Title:Collateral> ,  <Title:Bambi> "] * 2, "identical"),
    "a title of neither": ([" <Title:Heat> ,  <Title:Bambi> ", " <Title:Bambi> ,  <Title:Heat> "], "does not rank"),
    "three answers": ([" <Title:Collateral> ,  <Title:Bambi> "] * 3, "neither"),
    "a number": (3, "neither"),
    "another sentence": ("I like Collateral", "does not rank"),
}


@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_bad_released_output(tmp_path, name):
    output, expected = BAD_OUTPUTS[name]
    rows = released(EXAMPLE)
    rows[1]["output"] = output
    rows[1]["instruction"] = rows[0]["instruction"]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=expected) as error:
        formats.load_examples(file)
    assert str(error.value).startswith(f"{file}:row 2: ")
    reported = []
    kept = formats.load_examples(file, skip_bad_rows=True, notice=reported.append)
    assert kept[0].negatives == ("Bambi", "Gigi")
    assert len(reported) == 2 and f"{file}:row 2" in reported[0] and "1 of 3 rows" in reported[1]


def test_a_mixed_file_names_the_first_row_that_differs(tmp_path):
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in [EXAMPLE.to_json(), EXAMPLE.to_json(), *released(EXAMPLE)]))
    with pytest.raises(UserError, match=r"mixed\.jsonl:3: a row of released DMPO JSON in a file of ranking examples"):
        formats.load_examples(file)


@pytest.mark.parametrize(
    "text", ["[", "[{]", '{"user": ', "\x00\x01", "[]", "null", "3", '"text"', "[[[[", "{" * 5000, "[" * 100_000]
)
def test_what_is_no_data_is_one_line(tmp_path, text):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        formats.load_examples(file)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        formats.load_examples(tmp_path / "d.jsonl")


def test_nothing_left_is_an_error(tmp_path):
    (tmp_path / "d.jsonl").write_text("{oops\n")
    with pytest.raises(UserError, match="none of its 1 rows"):
        formats.load_examples(tmp_path / "d.jsonl", skip_bad_rows=True)


COUNTS = {  # rows, groups, largest k
    "rec_data_ml_1m_dpo_ranking_5.json": (500, 100, 5),
    "rec_data_ml_1m_dpo_ranking_1.json": (100, 100, 1),
    "rec_data_ml_1m_sft_ranking.json": (100, 100, 1),
    "rec_data_ml_1m_eval_ranking.json": (1000, 1000, 1),
    "rec_data_ml_1m_eval_ranking_old.json": (1000, 1000, 1),  # objects one after another
    "rec_Amazon_Movie_dpo_ranking_1.json": (200, 200, 1),
    "rec_Amazon_Movie_dpo_ranking_3.json": (300, 100, 3),
    "rec_Amazon_Movie_eval_ranking.json": (1000, 1000, 1),
}


@pytest.mark.parametrize("name", COUNTS)
def test_released_files(shared, name):
    rows, groups, k = COUNTS[name]
    found = formats.load_examples(shared / "data" / "dmpo-release" / name)
    assert (sum(len(e.negatives) for e in found), len(found), max(len(e.negatives) for e in found)) == (rows, groups, k)
