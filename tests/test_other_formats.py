"""Every format of docs/data.md: read, recognized on the whole file, converted, refused where it is broken.
All samples are invented.
"""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bad_input import run

from mlx_dmpo.data import formats
from mlx_dmpo.data.convert import split_users
from mlx_dmpo.data.formats import known
from mlx_dmpo.errors import UserError
from mlx_dmpo.prompts import pairwise
from mlx_dmpo.prompts.orders import first_negatives
from mlx_dmpo.records import PreferenceGroup, RankingExample

SONGS = pairwise.with_domains(
    {"song": {"topic": "music", "items": "songs", "consumed": "listened to", "consuming": "listening to"}}
)
ASKED = {"role": "user", "content": "Name a river."}
AMBER, LAMP, NO = "The Amber flows north.", "A lantern.", "No."


def said(text, role="assistant"):
    return {"role": role, "content": text}


def gpt(text, who="gpt"):
    return {"from": who, "value": text}


def prompt(first, second, history=("amber", "iron"), domain="movie"):
    example = RankingExample("u", domain, history, first, (second,))
    return pairwise.pair_prompt(example, second, True, SONGS[domain])


def released(positive, negative, positive_first=True, history=("amber", "iron"), chosen_only=False):
    pair = (positive, negative) if positive_first else (negative, positive)
    answers = [pairwise.ranking_answer(positive, negative), pairwise.ranking_answer(negative, positive)]
    return {
        "instruction": prompt(*pair, history=history),
        "input": "",
        "output": answers[0] if chosen_only else answers,
    }


def tallrec(liked, disliked, target, answer, kind="movie"):
    quoted = lambda titles: ", ".join(f'"{t}"' for t in titles)  # noqa: E731
    return {
        "instruction": "Given the user's preference and unpreference, say Yes. or No.",
        "input": f'User Preference: {quoted(liked)}\nUser Unpreference: {quoted(disliked)}\nWhether the user will like the target {kind} "{target}"?',
        "output": answer,
    }


SDPO = {"historyList": "amber::iron", "itemList": ["river", "moon", "salt"], "trueSelection": "moon"}
TOPIC = {"role": "system", "content": "Be brief."}

# name: (rows, format, messages of the first group's prompt, its answers, K)
TEXT = {
    "alpaca, chosen and rejected": (
        [{"instruction": "Name", "input": "a river.", "chosen": AMBER, "rejected": LAMP, "system": "Be brief.", "history": [["Hello.", "Hi."]]}] * 2,
        "LLaMA-Factory alpaca preferences",
        [TOPIC, said("Hello.", "user"), said("Hi."), said("Name\na river.", "user")],
        [AMBER, LAMP],
    ),
    "alpaca, output a list": (
        [{"instruction": "Name a river.", "input": "", "output": [AMBER, LAMP, NO]}],
        "LLaMA-Factory alpaca preferences",
        [ASKED],
        [AMBER, LAMP, NO],
    ),
    "alpaca, one answer": ([{"instruction": "Name a river.", "output": AMBER}], "alpaca rows (SFT)", [ASKED], [AMBER]),
    "sharegpt": (
        [{"system": "Be brief.", "conversations": [gpt("Name a river.", "human")], "chosen": gpt(AMBER), "rejected": gpt(LAMP)}],
        "ShareGPT preferences",
        [TOPIC, ASKED],
        [AMBER, LAMP],
    ),
    "sharegpt, several turns, texts": (
        [{"conversations": [gpt("Hello.", "human"), gpt("Hi."), gpt("Name a river.", "human")], "chosen": AMBER, "rejected": [LAMP, NO]}],
        "ShareGPT preferences",
        [said("Hello.", "user"), said("Hi."), ASKED],
        [AMBER, LAMP, NO],
    ),
    "sharegpt, one answer": (
        [{"conversations": [gpt("Name a river.", "human"), gpt(AMBER)]}],
        "ShareGPT conversations (SFT)",
        [ASKED],
        [AMBER],
    ),
    "trl, standard, explicit": (
        [{"prompt": "Name a river.", "chosen": AMBER, "rejected": LAMP}],
        "TRL preferences (standard, prompt given)",
        [ASKED],
        [AMBER, LAMP],
    ),
    "trl, a list of rejected": (
        [{"prompt": "Name a river.", "chosen": AMBER, "rejected": [LAMP, NO]}],
        "TRL preferences (standard, prompt given)",
        [ASKED],
        [AMBER, LAMP, NO],
    ),
    "s-dpo's rejected1..n": (
        [{"prompt": "Name a river.", "chosen": AMBER, "rejected2": NO, "rejected1": LAMP, "rejected10": "What?"}],
        "TRL preferences (standard, prompt given)",
        [ASKED],
        [AMBER, LAMP, NO, "What?"],
    ),
    "trl, standard, implicit": (
        [{"chosen": "Name a river. " + AMBER, "rejected": "Name a river. " + LAMP}],
        "TRL preferences (standard, implicit prompt)",
        [ASKED],
        [" " + AMBER, " " + LAMP],
    ),
    "trl, conversational, explicit": (
        [{"prompt": [TOPIC, ASKED], "chosen": [said(AMBER)], "rejected": [said(LAMP)]}],
        "TRL preferences (conversational, prompt given)",
        [TOPIC, ASKED],
        [AMBER, LAMP],
    ),
    "trl, conversational, many rejected": (
        [{"prompt": [ASKED], "chosen": [said(AMBER)], "rejected": [[said(LAMP)], [said(NO)]]}],
        "TRL preferences (conversational, prompt given)",
        [ASKED],
        [AMBER, LAMP, NO],
    ),
    "trl, conversational, implicit": (
        [{"chosen": [TOPIC, ASKED, said(AMBER)], "rejected": [TOPIC, ASKED, said(LAMP)]}],
        "TRL preferences (conversational, implicit prompt)",
        [TOPIC, ASKED],
        [AMBER, LAMP],
    ),
    "trl, whole conversations beside the prompt": (
        [{"prompt": "Name a river.", "chosen": [ASKED, said(AMBER)], "rejected": [ASKED, said(LAMP)]}],
        "TRL preferences (conversational, prompt given)",
        [ASKED],
        [AMBER, LAMP],
    ),
    "chat": ([{"messages": [TOPIC, ASKED, said(AMBER)]}], "chat rows (SFT)", [TOPIC, ASKED], [AMBER]),
    "completions": ([{"prompt": "Name a river.", "completion": AMBER}], "completion rows (SFT)", [ASKED], [AMBER]),
    "completions, conversational": ([{"prompt": [ASKED], "completion": [said(AMBER)]}], "completion rows (SFT)", [ASKED], [AMBER]),
    "content in parts": (
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "Name a river."}]}, said(AMBER)]}],
        "chat rows (SFT)",
        [ASKED],
        [AMBER],
    ),
}  # fmt: skip


def write(path, rows):
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows)
    path.write_text(text, encoding="utf-8")
    return path


def check_text(loaded, form, messages, answers):
    assert loaded.format == form and not loaded.ranking
    group = loaded.examples[0]
    assert isinstance(group, PreferenceGroup)
    assert [list(b.messages) for b in group.branches] == [messages] * len(answers)
    assert [b.answer for b in group.branches] == answers
    assert group.pairs == tuple((0, k) for k in range(1, len(answers)))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("name", TEXT)
def test_free_text(name, suffix, tmp_path):
    rows, *expected = TEXT[name]
    reported = []
    loaded = formats.load(write(tmp_path / f"d.{suffix}", rows), notice=reported.append)
    check_text(loaded, *expected)
    assert len(loaded.examples) == loaded.rows == len(rows)
    assert expected[0] in reported[0] and f"{len(rows)} rows" in reported[0]
    where = loaded.examples[0].source.rsplit("/", 1)[1]
    assert where == ("d.json:row 1" if suffix == "json" else "d.jsonl:1")


TABLES = [name for name in TEXT if name != "content in parts"]  # a column of a table is of one type


@pytest.mark.parametrize("name", TABLES)
def test_free_text_from_parquet(name, tmp_path):
    rows, *expected = TEXT[name]
    rows = [{k: v for k, v in row.items() if v != ""} for row in rows]
    table = pyarrow.Table.from_pylist([row | {"score": 0.5} for row in rows])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    reported = []
    check_text(formats.load(tmp_path / "d.parquet", notice=reported.append), *expected)
    assert any("not used: score" in line for line in reported)


@pytest.mark.parametrize("name", TABLES)
def test_free_text_from_the_hub(name, monkeypatch):
    """A data set named owner/name, through `datasets`: its splits, and one that is named."""
    import datasets

    rows, *expected = TEXT[name]
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        return datasets.DatasetDict(
            {"train": datasets.Dataset.from_list(rows), "validation": datasets.Dataset.from_list(rows * 3)}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check_text(formats.load("who/what", "train"), *expected)
    assert formats.load("who/what:half", "valid").rows == 3 * len(rows)
    assert formats.load("who/what:half@validation", "train").rows == 3 * len(rows)
    assert asked == [("who/what", None), ("who/what", "half"), ("who/what", "half")]
    with pytest.raises(
        UserError, match=r"who/what: has no split test: name one as who/what@SPLIT, of train, validation"
    ):
        formats.load("who/what", "test")


def test_nothing_is_fetched_for_a_mistyped_path(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("data/movies", "who/what.jsonl", "./who/what"):
        with pytest.raises(UserError, match="no such file"):
            formats.load(name, "train")


@pytest.mark.slow
def test_a_data_set_that_is_not_here_is_one_line(capsys, tmp_path):
    code, _, err = run(capsys, "prepare", "convert", "nobody-here/nothing-there", "--out", tmp_path / "out")
    assert code == 2 and "nobody-here/nothing-there: no such path, and no data set" in err and "Traceback" not in err


# --- docs/data.md


DOCS = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^## (.*?)$|^```json\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)


def documented():
    section = ""
    for heading, block in BLOCKS:
        section = heading or section
        if block:
            yield section, block


DOCUMENTED = {  # section: the formats of its examples, in order
    "Ranking examples (the project's own)": ["ranking examples"],
    "The released DMPO JSON": [None],  # abbreviated
    "TALLRec": ["TALLRec JSON"],
    "S-DPO": ["S-DPO candidate lists"],
    "LLaMA-Factory": ["LLaMA-Factory alpaca preferences", "LLaMA-Factory alpaca preferences", "ShareGPT preferences"],
    "TRL": [
        "TRL preferences (standard, prompt given)",
        "TRL preferences (standard, implicit prompt)",
        "TRL preferences (conversational, prompt given)",
        "TRL preferences (conversational, implicit prompt)",
    ],
    "One answer a prompt (SFT)": [
        "chat rows (SFT)",
        "completion rows (SFT)",
        "alpaca rows (SFT)",
        "ShareGPT conversations (SFT)",
    ],
}


def test_the_documented_examples_are_read_as_documented(tmp_path):
    found = {}
    for section, block in documented():
        (tmp_path / "d.json").write_text(block)
        domain = "movie" if section == "S-DPO" else ""
        name = (
            None
            if "..." in block and section.startswith("The released")
            else formats.load(tmp_path / "d.json", domain=domain).format
        )
        found.setdefault(section, []).append(name)
    assert found == DOCUMENTED
    assert {name for names in DOCUMENTED.values() for name in names if name} | {"released DMPO JSON"} == {
        f.name for f in known.FORMATS
    }


# --- rows whose titles can be recovered


def test_released_json_becomes_groups_of_k(tmp_path):
    rows = [released("moon", n, flag) for n, flag in (("river", True), ("salt", False))] + [
        released("moon", "salt", history=("echo",))
    ]
    loaded = formats.load(write(tmp_path / "d.json", rows))
    assert loaded.format == "released DMPO JSON" and loaded.rows == 3
    first, second = loaded.examples
    assert (first.history, first.positive, first.negatives, first.positive_first) == (
        ("amber", "iron"),
        "moon",
        ("river", "salt"),
        (True, False),
    )
    assert (second.history, second.negatives) == (("echo",), ("salt",)) and second.user != first.user
    alone = formats.load(write(tmp_path / "e.json", [released("moon", "river", False, chosen_only=True)])).examples[0]
    assert (alone.positive, alone.negatives, alone.positive_first) == ("moon", ("river",), (False,))


def other_spellings(row):
    """The same ranking row as other formats write it."""
    ask, (chosen, rejected) = row["instruction"], row["output"]
    yield {"instruction": ask, "chosen": chosen, "rejected": rejected}
    yield {"conversations": [gpt(ask, "human")], "chosen": gpt(chosen), "rejected": gpt(rejected)}
    yield {"prompt": ask, "chosen": chosen, "rejected": rejected}
    yield {"prompt": [said(ask, "user")], "chosen": [said(chosen)], "rejected": [said(rejected)]}
    yield {"chosen": [said(ask, "user"), said(chosen)], "rejected": [said(ask, "user"), said(rejected)]}
    yield {"messages": [said(ask, "user"), said(chosen)]}
    yield {"prompt": ask, "completion": chosen}


@pytest.mark.parametrize("which", range(7))
def test_the_ranking_prompt_is_understood_in_every_format(which, tmp_path):
    rows = [
        released("moon", "river"),
        released("moon", "salt", False),
        released("tower", "salt", history=("echo", "iron")),
    ]
    plain = formats.load(write(tmp_path / "a.json", rows))
    other = formats.load(write(tmp_path / "b.json", [list(other_spellings(r))[which] for r in rows]))
    bare = lambda examples: [e.to_json() for e in examples]  # noqa: E731
    assert bare(other.examples) == bare(plain.examples) and len(plain.examples) == 2
    assert other.format.endswith("in the release's ranking prompt")


def test_tallrec(tmp_path):
    rows = [
        tallrec(["amber", "iron"], ["salt", "moon"], "river", "Yes."),
        tallrec(["amber", "iron", "river"], ["moon"], "paper", "No."),  # the window moved on: the same user
        tallrec(["iron", "river"], ["moon", "paper"], "glass", "No."),
        tallrec(["echo"], ["salt"], "moon", "Yes."),  # another window: another user
        tallrec([], ["salt"], "moon", "Yes."),
        tallrec(["echo"], [], "moon", "Yes."),
        tallrec(["echo"], ["salt"], "moon", "No."),
        tallrec([], ["salt"], "moon", "No."),
        tallrec(["echo", "moon"], ["salt"], "moon", "Yes."),
    ]
    reported = []
    loaded = formats.load(write(tmp_path / "d.json", rows), notice=reported.append)
    assert loaded.format == "TALLRec JSON"
    found = [(e.history, e.positive, e.negatives) for e in loaded.examples]
    assert found == [
        (("amber", "iron"), "river", ("salt", "moon", "paper")),  # of one history and positive: one group
        (("iron",), "river", ("glass",)),
        (("echo",), "moon", ("salt",)),
    ]
    users = [e.user for e in loaded.examples]
    assert users[0] == users[1] != users[2]
    assert loaded.unconvertible == {
        "no liked title to be the history": 2,
        "no disliked title to be a negative": 1,
        "no liked title to be the positive": 1,
        "the target is already in the window": 1,
    }
    assert sum("hold no ranking pair" in line for line in reported) == 4
    assert (
        formats.load(write(tmp_path / "e.json", [tallrec(["a"], ["b"], "c", "Yes.", "book")]), domain="game")
        .examples[0]
        .domain
        == "game"
    )


def book(title, author):
    return f'"{title}" written by {author}'


def books(liked, disliked, target, answer):
    """TALLRec's book rows: the target has a second pair of marks around title and author."""
    lists = f"User Preference: {', '.join(liked)}\nUser Unpreference: {', '.join(disliked)}\n"
    row = {"instruction": "Given the user's preference and unpreference, say Yes. or No.", "output": answer}
    return row | {"input": f'{lists}Whether the user will like the target book "{target}"?'}


def test_tallrec_books(tmp_path):
    """Commas, marks and brackets in titles and names are no borders."""
    odd = [
        book("Fishing, a Guide", "Jules, McClane"), book('Say "Hi"', "A. B."), book("Ends? (Vol, 2)", "O'Neil, Ph.D. X"),
        book("Amber", ""), book("River", "nan"),
    ]  # fmt: skip
    rows = [books(odd[:2], odd[2:3], odd[3], "Yes."), books([odd[4], odd[1]], [], odd[0], "No.")]
    found = formats.load(write(tmp_path / "d.json", rows)).examples
    assert [(e.domain, e.history, e.positive, e.negatives, e.disliked) for e in found] == [
        ("book", tuple(odd[:2]), odd[3], (odd[2],), (odd[2],)),
        ("book", (odd[4],), odd[1], (odd[0],), None),
    ]
    movies = tallrec(["amber", "iron"], ["salt"], 'The "Lamp", The', "Yes.")
    assert formats.load(write(tmp_path / "m.json", [movies])).examples[0].positive == 'The "Lamp", The'


@pytest.mark.parametrize(
    "change, expected",
    [
        (('User Preference: "', "User Preference: x "), "the titles in .* cannot be separated"),
        (('"river"?', '"river" and more?'), "is not one title"),
        (("will like", "may like"), "not worded as in TALLRec"),
    ],
)
def test_a_tallrec_row_that_cannot_be_split_says_so(change, expected, tmp_path):
    row = tallrec(["amber", "iron"], ["salt"], "river", "Yes.")
    row["input"] = row["input"].replace(*change)
    with pytest.raises(UserError, match=rf"d\.json:row 1: .*{expected}"):
        formats.load(write(tmp_path / "d.json", [row]))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text("abc ,'()&:", min_size=1).map(str.strip).filter(bool), min_size=4, max_size=7, unique=True),
    st.data(),
)
def test_tallrec_books_round_trip(titles, data):
    from mlx_dmpo.data.formats.common import Context
    from mlx_dmpo.data.formats.tallrec import read_tallrec

    items = [book(t, data.draw(st.text("xyz,. ", min_size=1).map(str.strip))) for t in titles]
    row = books(items[:-2], items[-2:-1], items[-1], "Yes.")
    example = read_tallrec(row, "d:1", Context(pairwise.DOMAINS))
    assert (*example.history, *example.negatives, example.positive) == tuple(items)


def test_s_dpo_keeps_its_candidates_where_fewer_are_trained_on(tmp_path):
    example = formats.load(write(tmp_path / "d.json", [SDPO]), domains=SONGS, domain="song").examples[0]
    assert example.candidates == ("river", "salt") == example.negatives
    first = first_negatives(example, 1)
    assert first.negatives == ("river",) and first.candidates == ("river", "salt")
    assert RankingExample.from_json(first.to_json()).candidates == ("river", "salt")


def test_s_dpo(tmp_path):
    loaded = formats.load(
        write(tmp_path / "d.json", [SDPO, SDPO | {"historyList": ["echo"]}]), domains=SONGS, domain="song"
    )
    assert loaded.format == "S-DPO candidate lists"
    first, second = loaded.examples
    assert (first.domain, first.history, first.positive, first.negatives) == (
        "song",
        ("amber", "iron"),
        "moon",
        ("river", "salt"),
    )
    assert second.history == ("echo",) and first.user != second.user


def test_dataset_info_maps_columns_and_tags(tmp_path):
    info = {
        "mine": {"file_name": "a.json", "ranking": True, "columns": {"prompt": "question", "chosen": "good", "rejected": "bad", "system": "who"}},
        "talk": {
            "file_name": "b.json",
            "formatting": "sharegpt",
            "columns": {"messages": "talk", "chosen": "good", "rejected": "bad"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "asker", "assistant_tag": "bot"},
        },
        "plain": {"file_name": "c.json"},
    }  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    a = formats.load(
        write(tmp_path / "a.json", [{"question": "Name a river.", "good": AMBER, "bad": LAMP, "who": "Be brief."}])
    )
    check_text(a, "LLaMA-Factory alpaca preferences", [TOPIC, ASKED], [AMBER, LAMP])
    row = {"talk": [said("Name a river.", "asker")], "good": said(AMBER, "bot"), "bad": said(LAMP, "bot")}
    check_text(formats.load(write(tmp_path / "b.json", [row])), "ShareGPT preferences", [ASKED], [AMBER, LAMP])
    check_text(
        formats.load(write(tmp_path / "c.json", [TEXT["trl, standard, explicit"][0][0]])),
        *TEXT["trl, standard, explicit"][1:],
    )
    with pytest.raises(
        UserError, match=r'a.json:row 1: column "bad" is missing: dataset_info.json names it as the rejected of mine'
    ):
        formats.load(write(tmp_path / "a.json", [{"question": "Name a river.", "good": AMBER, "who": "Be brief."}]))
    info["mine"]["columns"]["tools"] = "tools"
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r'columns of mine: "tools" is not supported'):
        formats.load(tmp_path / "a.json")


# --- one kind a file

KINDS = {name: rows[0] for name, (rows, *_) in TEXT.items()} | {
    "released": released("moon", "river"),
    "tallrec": tallrec(["a"], ["b"], "c", "Yes."),
    "own": RankingExample("u", "movie", ("amber",), "moon", ("river",)).to_json(),
    "trl in the ranking prompt": list(other_spellings(released("moon", "river")))[2],
}


@pytest.mark.parametrize("seed", range(40))
def test_a_mixed_file_names_the_first_row_that_differs(seed, tmp_path):
    rng = random.Random(seed)
    names = rng.sample(sorted(KINDS), 2)
    count = rng.randint(1, 5)
    alike = []
    for name in names:
        loaded = formats.load(write(tmp_path / f"{name}.json", [KINDS[name]]))
        alike.append((loaded.format, loaded.ranking))
    rows = [KINDS[names[0]]] * count + [KINDS[names[1]]]
    path = write(tmp_path / "d.json", rows)
    if alike[0] == alike[1]:
        assert formats.load(path).rows == count + 1
    else:
        with pytest.raises(UserError, match=rf"d\.json:row {count + 1}: a row of .* in a file of "):
            formats.load(path)


# --- convert


def converted(capsys, path, out, *flags):
    code, reported, err = run(capsys, "prepare", "convert", path, "--out", out, *flags)
    assert code == 0, err
    return (
        {s: (out / f"{s}.jsonl").read_bytes() for s in ("train", "valid", "test") if (out / f"{s}.jsonl").exists()},
        reported,
        err,
    )


def test_convert_keeps_every_example_and_splits_users(tmp_path, capsys):
    rows = [
        released("moon", n, flag, (f"title {u}",)) for u in range(20) for n, flag in (("river", True), ("salt", False))
    ]
    path = write(tmp_path / "d.json", rows)
    files, reported, err = converted(capsys, path, tmp_path / "out", "--valid", "0.2", "--test", "0.1")
    splits = {s: formats.load(tmp_path / "out", s).examples for s in files}
    assert {s: len(e) for s, e in splits.items()} == {"train": 14, "valid": 4, "test": 2}
    users = [{e.user for e in examples} for examples in splits.values()]
    assert len(set.union(*users)) == 20 == sum(map(len, users))
    bare = lambda examples: sorted(json.dumps(e.to_json()) for e in examples)  # noqa: E731
    assert bare(e for s in splits.values() for e in s) == bare(formats.load(path).examples)
    assert splits["train"][0].positive_first == (True, False)
    assert "released DMPO JSON, 40 rows, 20 ranking examples" in err and "14 examples, 14 users, 28 pairs" in reported
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["splits"]["test"] == {"examples": 2, "users": 2, "pairs": 4} and str(path) in manifest["inputs"]
    again, *_ = converted(capsys, path, tmp_path / "again", "--valid", "0.2", "--test", "0.1")
    other, *_ = converted(capsys, path, tmp_path / "other", "--valid", "0.2", "--test", "0.1", "--seed", "1")
    assert again == files != other


def test_convert_takes_whole_files_as_splits(tmp_path, capsys):
    for n, name in enumerate(("a", "b", "c")):
        write(tmp_path / f"{name}.json", [released("moon", "river", history=(f"{name} {i}",)) for i in range(n + 2)])
    files, *_ = converted(
        capsys,
        tmp_path / "a.json",
        tmp_path / "out",
        "--valid-data",
        tmp_path / "b.json",
        "--test-data",
        tmp_path / "c.json",
    )
    assert {s: text.count(b"\n") for s, text in files.items()} == {"train": 2, "valid": 3, "test": 4}
    files, *_ = converted(capsys, tmp_path / "a.json", tmp_path / "out", "--valid", "0", "--test", "0", "--overwrite")
    assert set(files) == {"train"}


@given(st.integers(1, 60), st.floats(0, 0.9), st.floats(0, 0.9), st.integers(0, 5))
def test_split_users_properties(count, valid, test, seed):
    examples = [RankingExample(f"u{i % max(1, count // 2)}", "movie", ("a",), "b", (str(i),)) for i in range(count)]
    users = len({e.user for e in examples})
    try:
        splits = split_users(examples, valid, test, seed)
    except UserError as error:
        assert "smaller shares" in str(error)
        assert sum(max(1, round(s * users)) if s else 0 for s in (valid, test)) >= users
        return
    assert Counter(e.negatives for s in splits.values() for e in s) == Counter(e.negatives for e in examples)
    assert splits["train"] and bool(splits["valid"]) == bool(valid) and bool(splits["test"]) == bool(test)
    seen = [{e.user for e in s} for s in splits.values()]
    assert sum(map(len, seen)) == len(set.union(*seen))


# --- what a user can get wrong: (file name, content, flags, what the line must say)

L = json.dumps
BROKEN = {
    "unpaired, TRL": ("d.jsonl", L({"prompt": "q", "completion": "a", "label": True}), [], ["d.jsonl:1", "KTO", "pair"]),
    "unpaired, LLaMA-Factory": ("d.jsonl", L({"instruction": "q", "output": "a", "kto_tag": False}), [], ["d.jsonl:1", "KTO"]),
    "plain text rows": ("d.jsonl", L({"text": "a"}), [], ["d.jsonl:1", "docs/data.md"]),
    "identical answers": ("d.jsonl", L({"prompt": "q", "chosen": "a", "rejected": "a"}), [], ["d.jsonl:1", "identical"]),
    "rejected twice": ("d.jsonl", L({"prompt": "q", "chosen": "a", "rejected": ["b", "b"]}), [], ["d.jsonl:1", "twice"]),
    "no rejected": ("d.jsonl", L({"prompt": "q", "chosen": "a", "rejected": []}), [], ["d.jsonl:1", "rejected"]),
    "no rejected, ShareGPT": ("d.jsonl", L({"conversations": [gpt("q", "human")], "chosen": "a", "rejected": []}), [], ["d.jsonl:1", "rejected"]),
    "no rejected, alpaca": ("d.jsonl", L({"instruction": "q", "chosen": "a", "rejected": []}), [], ["d.jsonl:1", "rejected"]),
    "released row that ranks other titles": ("d.json", L([released("moon", "river") | {"output": "Moon first."}]), [], ["d.json:row 1", "does not rank"]),
    "released row of three answers": ("d.json", L([released("moon", "river") | {"output": ["a", "b", "c"]}]), [], ["d.json:row 1", "nor [chosen, rejected]"]),
    "released row of one title twice": ("d.json", L([{"instruction": prompt("moon", "moon"), "output": "x"}]), [], ["d.json:row 1", "two different"]),
    "released row with an input": ("d.json", L([released("moon", "river") | {"input": "more"}]), [], ["d.json:row 1", "input"]),
    "free text among rankings": ("d.jsonl", "\n".join(L({"prompt": prompt("a", "b"), "completion": c}) for c in (" <Title:a> ,  <Title:b> ", "A first.")), [], ["d.jsonl:2", "free text", "rankings"]),
    "rejected null": ("d.jsonl", L({"prompt": "q", "chosen": "a", "rejected": None}), [], ["d.jsonl:1", "docs/data.md"]),
    "empty answer": ("d.jsonl", L({"prompt": "q", "chosen": " ", "rejected": "b"}), [], ["d.jsonl:1", "chosen", "empty"]),
    "no shared prompt": ("d.jsonl", L({"chosen": "a", "rejected": "b"}), [], ["d.jsonl:1", "prompt"]),
    "kinds of answers differ": ("d.jsonl", L({"prompt": "q", "chosen": "a", "rejected": [[said("b")]]}), [], ["d.jsonl:1", "kind"]),
    "chosen is a number": ("d.jsonl", L({"prompt": "q", "chosen": 1, "rejected": 2}), [], ["d.jsonl:1", "text"]),
    "prompt is blank": ("d.jsonl", L({"prompt": " ", "chosen": "a", "rejected": "b"}), [], ["d.jsonl:1", "prompt"]),
    "a role that is unknown": ("d.jsonl", L({"messages": [said("q", "tool"), said("a")]}), [], ["d.jsonl:1", "tool"]),
    "the last turn is the user's": ("d.jsonl", L({"messages": [ASKED]}), [], ["d.jsonl:1", "assistant"]),
    "messages are a text": ("d.jsonl", L({"messages": "hello"}), [], ["d.jsonl:1", "messages"]),
    "an answer of two turns": ("d.jsonl", L({"prompt": [ASKED], "chosen": [said("a"), said("b")], "rejected": [said("c"), said("d")]}), [], ["d.jsonl:1", "one assistant message"]),
    "tools": ("d.jsonl", L({"messages": [ASKED, said("a")], "tools": [{"name": "x"}]}), [], ["d.jsonl:1", "tools"]),
    "alpaca without output": ("d.json", L([{"instruction": "q"}]), [], ["d.json:row 1", "output"]),
    "alpaca, history is a text": ("d.json", L([{"instruction": "q", "output": "a", "history": "b"}]), [], ["d.json:row 1", "history"]),
    "alpaca, output of one": ("d.json", L([{"instruction": "q", "output": ["a"]}]), [], ["d.json:row 1", "output"]),
    "tallrec, another answer": ("d.json", L([tallrec(["a"], ["b"], "c", "Maybe.")]), [], ["d.json:row 1", "Yes."]),
    "tallrec, another wording": ("d.json", L([{"instruction": "i", "input": "User Preference: x", "output": "Yes."}]), [], ["d.json:row 1", "input"]),
    "tallrec, no wording for cheeses": ("d.json", L([tallrec(["a"], ["b"], "c", "Yes.", "cheese")]), [], ["d.json:row 1", "cheese"]),
    "tallrec, nothing convertible": ("d.json", L([tallrec([], ["b"], "c", "No.")]), [], ["d.json", "none of its 1 rows", "1: no liked title"]),
    "s-dpo without a domain": ("d.json", L([SDPO]), [], ["d.json:row 1", "--domain"]),
    "s-dpo, selection not among the items": ("d.json", L([SDPO | {"trueSelection": "x"}]), ["--domain", "movie"], ["d.json:row 1", "among"]),
    "s-dpo, items twice": ("d.json", L([SDPO | {"itemList": ["moon", "salt", "salt"]}]), ["--domain", "movie"], ["d.json:row 1", "twice"]),
    "s-dpo, no history": ("d.json", L([SDPO | {"historyList": ""}]), ["--domain", "movie"], ["d.json:row 1", "historyList"]),
    "a domain for rows that name theirs": ("d.json", L([released("moon", "river")]), ["--domain", "game"], ["d.json:row 1", "--domain"]),
    "free text": ("d.jsonl", L({"prompt": "q", "chosen": "a", "rejected": "b"}), [], ["d.jsonl", "no titles to rank"]),
    "half a surrogate pair": ("d.jsonl", '{"prompt": "q", "chosen": "\\ud83d", "rejected": "b"}', [], ["d.jsonl:1", "surrogate"]),
    "compressed": ("d.json", b"\x1f\x8b\x08\x00", [], ["d.json", "compressed"]),
    "not UTF-8": ("d.json", b"\xff\xfe\x00", [], ["d.json", "UTF-8"]),
    "cut Parquet": ("d.parquet", b"PAR1\x00\x00\x00", [], ["d.parquet", "Parquet"]),
    "cut array": ("d.json", '[{"prompt": "q"', [], ["d.json:1", "JSON"]),
    "empty array": ("d.json", "[]", [], ["d.json", "empty"]),
    "nested too deep": ("d.json", "[" * 100_000, [], ["d.json:1", "JSON"]),
    "shares that leave no one": ("d.json", L([released("moon", "river")]), [], ["--valid", "smaller"]),
    "a share and a file": ("d.json", L([released("moon", "river")]), ["--valid", "0.5", "--valid-data", "d.json"], ["--valid", "keep one"]),
    "a share above its range": ("d.json", L([released("moon", "river")]), ["--test", "1.5"], ["--test", "1.5"]),
    "dataset_info.json is broken": ("dataset_info.json", "{", ["also"], ["dataset_info.json", "fix it"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_is_one_line(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, content, flags, expected = BROKEN[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    if flags == ["also"]:
        file, flags = write(tmp_path / "d.json", [released("moon", "river")]).name, []
    code, _, err = run(capsys, "prepare", "convert", file, "--out", "out", *flags)
    line = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(line) == 1 and "Traceback" not in err, err
    assert all(part in line[0] for part in expected), line
    assert not (tmp_path / "out").exists()


def test_convert_needs_out_and_keeps_what_is_finished(tmp_path, capsys):
    path = write(tmp_path / "d.json", [released("moon", "river", history=(str(i),)) for i in range(5)])
    code, _, err = run(capsys, "prepare", "convert", path)
    assert code == 2 and "--out" in err
    converted(capsys, path, tmp_path / "out")
    code, _, err = run(capsys, "prepare", "convert", path, "--out", tmp_path / "out")
    assert code == 2 and "--overwrite" in err


def test_a_conversion_killed_in_the_middle_does_not_look_complete(tmp_path, capsys, monkeypatch):
    from mlx_dmpo.machine import files

    path = write(tmp_path / "d.json", [released("moon", "river", history=(str(i),)) for i in range(9)])
    original = files.write_text

    def full(where, text):
        if where.name == "valid.jsonl":
            raise KeyboardInterrupt
        original(where, text)

    monkeypatch.setattr(files, "write_text", full)
    code, _, _ = run(capsys, "prepare", "convert", path, "--out", tmp_path / "out")
    assert code == 130 and not (tmp_path / "out" / "manifest.json").exists()


def test_bad_rows_are_left_out_by_name_only(tmp_path):
    rows = [
        TEXT["trl, standard, explicit"][0][0],
        {"prompt": "q", "chosen": "a"},
        KINDS["chat"],
        TEXT["trl, standard, explicit"][0][0],
    ]
    reported = []
    loaded = formats.load(write(tmp_path / "d.json", rows), skip_bad_rows=True, notice=reported.append)
    assert (loaded.rows, loaded.bad, len(loaded.examples)) == (4, 2, 2)
    assert [line.split(": ")[1].rsplit("/", 1)[1] for line in reported[:2]] == [
        "d.json:row 2",
        "d.json:row 3",
    ] and "2 of 4 rows" in reported[-1]


# --- fuzz: nothing but UserError escapes

WORDS = st.sampled_from(
    sorted(
        {key for row in KINDS.values() for key in row}
        | set(SDPO)
        | {"rejected1", "label", "role", "content", "from", "value", "kto_tag"}
    )
)
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["user", "gpt", "Yes.", "a::b", "\ud800", AMBER, KINDS["released"]["instruction"], *KINDS["released"]["output"]]
    ),
    st.sampled_from(
        [KINDS["tallrec"]["input"], "User Preference: ", "You are an assistant working on movie recommendations."]
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS | TEXTS, inner, max_size=3)),
    max_leaves=8,
)
ROWS = st.one_of(
    st.dictionaries(WORDS, VALUES, max_size=6),
    # a good row with one thing wrong
    st.tuples(st.sampled_from([*KINDS.values(), SDPO]), WORDS, VALUES).map(lambda t: t[0] | {t[1]: t[2]}),
    st.sampled_from([*KINDS.values(), SDPO]),
    VALUES,
)
CONTENTS = st.one_of(
    st.lists(ROWS, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    st.lists(ROWS, max_size=4).map(lambda rows: json.dumps(rows).encode()),
    st.tuples(st.lists(ROWS, min_size=1, max_size=3), st.integers(0, 400), st.binary(max_size=3)).map(
        lambda t: (lambda text: text[: t[1] % (len(text) + 1)] + t[2] + text[t[1] % (len(text) + 1) + len(t[2]) :])(
            json.dumps(t[0]).encode()
        )
    ),
    st.binary(max_size=60),
    st.binary(max_size=60).map(lambda b: b"PAR1" + b + b"PAR1"),
)


def only_user_errors(directory, content, domain, skip):
    path = directory / "d.json"
    path.write_bytes(content)
    try:
        loaded = formats.load(path, skip_bad_rows=skip, domain=domain)
    except UserError as error:
        assert str(path) in str(error) and str(error).count(": ") >= 1
        return
    assert loaded.examples and len({type(e) for e in loaded.examples}) == 1
    for example in loaded.examples:
        if isinstance(example, RankingExample):
            assert RankingExample.from_json(json.loads(json.dumps(example.to_json()))).to_json() == example.to_json()
        else:
            assert all(b.answer.strip() for b in example.branches)
            assert "".join(b.answer for b in example.branches).encode()


QUIET = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)


@settings(max_examples=400, **QUIET)
@given(CONTENTS, st.sampled_from(["", "movie"]), st.booleans())
def test_fuzz(tmp_path_factory, content, domain, skip):
    only_user_errors(tmp_path_factory.getbasetemp(), content, domain, skip)


@pytest.mark.slow
@settings(max_examples=10_000, **QUIET)
@given(CONTENTS, st.sampled_from(["", "movie"]), st.booleans())
def test_fuzz_long(tmp_path_factory, content, domain, skip):
    only_user_errors(tmp_path_factory.getbasetemp(), content, domain, skip)


# --- real samples


RELEASE = {  # file: (rows, examples)
    **{f"rec_data_ml_1m_dpo_ranking_{k}": (100 * k, 100) for k in range(1, 6)},
    **{f"rec_Amazon_Movie_dpo_ranking_{k}": (100 * k, 100) for k in range(2, 6)},
    "rec_Amazon_Movie_dpo_ranking_1": (200, 200),
    "rec_Amazon_Movie_dpo_ranking_1_old": (100, 100),
    "rec_data_ml_1m_sft_ranking": (100, 100),
    "rec_Amazon_Movie_sft_ranking": (100, 100),
    "rec_data_ml_1m_eval_ranking": (1000, 1000),
    "rec_data_ml_1m_eval_ranking_old": (1000, 1000),
    "rec_Amazon_Movie_eval_ranking": (1000, 1000),
}


def test_every_released_file(shared):
    folder = shared / "data" / "dmpo-release"
    assert {p.stem for p in folder.glob("rec_*.json")} == set(RELEASE)
    for name, expected in RELEASE.items():
        loaded = formats.load(folder / f"{name}.json")
        assert (loaded.format, loaded.rows, len(loaded.examples)) == ("released DMPO JSON", *expected)
        if name[-1] in "2345":
            assert {len(e.negatives) for e in loaded.examples} == {int(name[-1])}
            assert sum(len(e.negatives) for e in loaded.examples) == loaded.rows


@pytest.mark.parametrize(
    ("split", "rows", "examples", "users", "unconvertible"), [("train", 8000, 5559, 79, 1046), ("valid", 1000, 748, 14, 120), ("test", 1000, 686, 16, 137)]
)  # fmt: skip
def test_tallrec_sample(shared, split, rows, examples, users, unconvertible):
    loaded = formats.load(shared / "data" / "tallrec-movie" / f"{split}.json")
    assert (loaded.rows, len(loaded.examples), len({e.user for e in loaded.examples})) == (rows, examples, users)
    assert sum(loaded.unconvertible.values()) == unconvertible
    assert all(e.positive not in e.history and not set(e.negatives) & {e.positive} for e in loaded.examples)


def test_s_dpo_sample(shared):
    loaded = formats.load(shared / "data" / "s-dpo-lastfm" / "lastfm-val.json", domains=SONGS, domain="song")
    assert (loaded.rows, len(loaded.examples)) == (2767, 2767)
    assert {len(e.negatives) for e in loaded.examples} == {19}
