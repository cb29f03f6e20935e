"""`mlx-dmpo check`: each finding on invented data that has just that fault, and a clean bill where there is none."""

import json
import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_bad_input import run
from test_other_formats import KINDS, SDPO, prompt, released, write

from mlx_dmpo.data import check
from mlx_dmpo.data.titles import normalize
from mlx_dmpo.records import RankingExample

TITLES = [
    f"{a} {b}"
    for a in ("Amber", "Iron", "Silver", "Paper", "Copper")
    for b in ("river", "garden", "lantern", "harbour", "tower")
]


def row(user, history, positive, *negatives, **more):
    return {
        "user": user,
        "domain": "movie",
        "history": list(history),
        "positive": positive,
        "negatives": list(negatives),
        **more,
    }


def rows(name, count=12, titles=TITLES):
    """Sound rows: each user's own history, no candidate in it."""
    picked = [random.Random(f"{name} {u}").sample(titles, 6) for u in range(count)]
    return [row(f"{name}{u}", t[:3], *t[3:]) for u, t in enumerate(picked)]


def titles(content):
    return {t for r in content for t in (*r["history"], r["positive"], *r["negatives"])}


def findings(tmp_path, **files):
    paths = [str(write(tmp_path / f"{name}.jsonl", content)) for name, content in files.items()]
    return check.check(check.read_parts(paths))


def warnings(found):
    return [f for f in found if f.level != "note"]


def test_a_sound_directory_is_clean(tmp_path, capsys):
    for split in ("train", "valid", "test"):
        write(tmp_path / f"{split}.jsonl", rows(split))
    code, out, err = run(capsys, "check", tmp_path)
    assert (code, err) == (0, "") and "0 errors, 0 warnings" in out
    assert "12 groups of 12 users (1 to 1 each, median 1); k = 2: 12" in out
    known, new = titles(rows("train")), titles(rows("valid"))
    assert f"{len(known & new)} of {len(new)} movie titles" in out and out.count("occur in") == 3


def test_the_prepared_test_data_is_clean(data_directory, capsys):
    code, out, _ = run(capsys, "check", data_directory)
    assert code == 0, out
    assert "(ragged)" in out


# name: (rows to add to a sound file, part of the warning)
FAULTS = {
    "entities": (
        row("x", ["Iron &amp; salt"], "Amber river", "Iron tower"),
        "HTML entities, such as 'Iron &amp; salt'",
    ),
    "control characters": (
        row("x", ["Iron\x07"], "Amber river", "Iron tower"),
        "control or invisible characters, such as 'Iron\\x07'",
    ),
    "invisible characters": (row("x", ["Iron\u200b"], "Amber river", "Iron tower"), "control or invisible"),
    "white space at the end": (row("x", ["Iron "], "Amber river", "Iron tower"), "stray white space, such as 'Iron '"),
    "two spaces": (row("x", ["Iron  salt"], "Amber river", "Iron tower"), "stray white space"),
    "a space that does not break": (row("x", ["Iron\xa0salt"], "Amber river", "Iron tower"), "stray white space"),
    "a decoding fault": (row("x", ["Caf\ufffd"], "Amber river", "Iron tower"), "decoding fault"),
    "marks of the prompt": (row("x", ["Iron> <Title:salt"], "Amber river", "Iron tower"), "< or >"),
    "the positive in the history": (row("x", ["Amber river"], "Amber river", "Iron tower"), "is in their history"),
    "a negative in the history": (row("x", ["Iron tower"], "Amber river", "Iron tower"), "is in their history"),
    "a twin": (row("x", ["Iron tower"], "Amber river", "AMBER river"), "case or white space only"),
    "a row twice": (rows("u")[3], "repeat an earlier pair"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named_with_its_row(name, tmp_path):
    extra, expected = FAULTS[name]
    found = warnings(findings(tmp_path, d=[*rows("u"), extra]))
    assert len(found) == 1 and expected in found[0].what, found
    assert found[0].level == "warning" and [r.rsplit("/", 1)[1] for r in found[0].rows] == ["d.jsonl:13"]
    assert check.exit_code(found) == 1


def test_rows_that_cannot_be_read_are_errors(tmp_path, capsys):
    path = tmp_path / "d.jsonl"
    path.write_text(
        "".join(json.dumps(r) + "\n" for r in rows("u", 4))
        + '{"user": 1\n'
        + json.dumps(row("x", ["a"], "b", "b"))
        + "\n"
    )
    code, out, _ = run(capsys, "check", path)
    assert code == 2 and "2 errors, 0 warnings" in out
    assert "d.jsonl:5: not valid JSON" in out and "d.jsonl:6: the positive is among the negatives" in out
    path.write_text("{oops\n" * 9)
    code, out, _ = run(capsys, "check", path, "--json")
    assert code == 2 and json.loads(out)["errors"] == 4 and "9 rows" in out  # three by name, and their number
    assert len(json.loads(out)["findings"][-1]["rows"]) == 9


def test_27_rows_twice_and_in_two_files(tmp_path):
    """As in an evaluation file of the DMPO release."""
    sound = [
        released(TITLES[i % 20 + 2], TITLES[i % 20 + 3], i % 2 == 0, (TITLES[i % 20], f"title {i}")) for i in range(200)
    ]
    found = warnings(check.check(check.read_parts([str(write(tmp_path / "eval.json", sound + sound[:27]))])))
    assert [f.what.split(" ")[0] for f in found] == ["27"] and "repeat an earlier pair" in found[0].what
    assert found[0].rows[0].endswith("eval.json:row 201") and len(found[0].rows) == 27
    assert found[0].line().count("eval.json:row") == 3 and found[0].line().endswith("and 24 more, listed by --json)")
    other = [released("Other", f"negative {i}", i % 2 == 0, (f"history {i}",)) for i in range(50)]
    parts = check.read_parts(
        [str(write(tmp_path / "train.json", other + sound[:27])), str(write(tmp_path / "eval.json", sound))]
    )
    output = [f.what for f in warnings(check.check(parts))]
    assert any(t.startswith("27 groups") and "27 of them the whole history" in t for t in output)
    assert any(t.startswith("27 groups") and "(history, pair)" in t for t in output)


def test_a_user_in_two_splits(tmp_path):
    test = rows("b")
    test[5]["user"] = "a3"
    found = warnings(findings(tmp_path, train=rows("a"), test=test))
    mine = [f for f in found if "have a user that is also in" in f.what]
    assert [(f.count, f.rows[0].rsplit("/", 1)[1]) for f in mine] == [(1, "test.jsonl:6")]


def test_titles_spelt_in_two_ways(tmp_path):
    """Year and trailing article in one file only, as in the released ML-1M."""
    other = [f"{t}, The (1999)" for t in TITLES]
    new = titles(rows("b", titles=other))
    alike = {t for t in new if t.removesuffix(", The (1999)") in titles(rows("a"))}
    found = warnings(findings(tmp_path, train=rows("a"), test=rows("b", titles=other)))
    assert (
        len(found) == 1
        and f"0 of {len(new)} movie titles" in found[0].what
        and f"{len(alike)} more only in a different" in found[0].what
    )
    assert f"'{min(alike)}' there '{min(alike).removesuffix(', The (1999)')}'" in found[0].what
    apart = findings(tmp_path, train=rows("a", 25), test=rows("b", 25, [f"Q{i}" for i in range(25)]))
    assert ["no title in common" in f.what for f in warnings(apart)] == [True]
    sequels = [
        *TITLES[:20],
        *(f"{t} (1999)" for t in TITLES[20:]),
    ]  # a few spelt alike but for the year prove no mismatch
    assert warnings(findings(tmp_path, train=rows("a", 25), test=rows("b", 10, sequels))) == []


@pytest.mark.parametrize(("share", "level"), [(0.5, "note"), (0.9, "warning"), (0.1, "warning")])
def test_order_balance(share, level, tmp_path):
    content = [r | {"positive_first": [u < share * 100] * 2} for u, r in enumerate(rows("u", 100))]
    output = [f for f in findings(tmp_path, d=content) if "prints the positive first" in f.what]
    assert [f.level for f in output] == [level] and f"{share:.1%} of 200 pairs" in output[0].what


def test_free_text(tmp_path):
    pair = lambda i, chosen, rejected: {"prompt": f"Question {i}?", "chosen": chosen, "rejected": rejected}  # noqa: E731
    fair = [pair(i, "yes it is" if i % 2 else "yes", "no it is" if i % 3 else "no") for i in range(40)]
    assert warnings(findings(tmp_path, d=fair)) == []
    for extra, expected in (
        (fair[0], "repeat an earlier one"),
        (pair(99, "yes\x07", "no"), "control"),
        (pair(99, "yes", "yes "), "white space only"),
    ):
        found = warnings(findings(tmp_path, d=[*fair, extra]))
        assert len(found) == 1 and expected in found[0].what and found[0].rows[0].endswith("d.jsonl:41")
    long = [pair(i, "yes, and at length", "no") for i in range(40)]
    assert ["length alone" in f.what for f in warnings(findings(tmp_path, d=long))] == [True]
    both = warnings(findings(tmp_path, a=fair[:20], b=fair[19:]))
    assert len(both) == 1 and "1 groups" in both[0].what and "have a prompt that is also in" in both[0].what


def test_what_cannot_be_converted_is_a_note(tmp_path):
    rows = [KINDS["tallrec"], KINDS["tallrec"] | {"input": KINDS["tallrec"]["input"].replace('"a"', "")}]
    output = check.check(check.read_parts([str(write(tmp_path / "d.json", rows))]))
    assert (
        any(f.level == "note" and "1 rows" in f.what and "no liked title" in f.what for f in output)
        and check.exit_code(output) == 0
    )


def counter(model_directory):
    """Tokens of one user turn and its answer, rendered by hand."""
    from mlx_dmpo.model.loading import load_tokenizer

    tokenizer = load_tokenizer(str(model_directory))
    rendered = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>"
    return lambda asked, answer: len(tokenizer.encode(rendered.format(asked, answer), add_special_tokens=False))


def test_tokens(model_directory, tmp_path, capsys):
    count = counter(model_directory)
    example = row("u", ["Amber", "Iron"], "Moon", "Salt", "Glass", positive_first=[True, True])
    path = write(tmp_path / "d.jsonl", [example])
    code, out, _ = run(capsys, "check", path, "--model", model_directory, "--json")
    assert code == 0
    tokens = json.loads(out)["tokens"][0]
    lengths = [
        count(prompt("Moon", negative, ("Amber", "Iron")), f" <Title:{a}> ,  <Title:{b}> ")
        for negative in ("Salt", "Glass")
        for a, b in (("Moon", negative), (negative, "Moon"))
    ]
    assert (tokens["max"], tokens["mean"], tokens["separate_tokens_a_group"]) == (
        max(lengths),
        sum(lengths) / 4,
        sum(lengths),
    )
    assert tokens["shared_tokens_a_group"] < tokens["separate_tokens_a_group"] and tokens["groups_cut"] == 0
    code, out, _ = run(
        capsys, "check", path, "--model", model_directory, "--json", "--max-seq-length", max(lengths) - 1
    )
    found = json.loads(out)
    assert code == 1 and found["tokens"][0]["groups_cut"] == 1 and found["tokens"][0]["history_items_cut"] == 1
    code, out, _ = run(capsys, "check", path, "--model", model_directory, "--max-seq-length", 20)
    assert code == 2 and "1 groups" in out and "do not fit 20 tokens at all" in out and "d.jsonl:1" in out


def test_tokens_of_free_text(model_directory, tmp_path, capsys):
    count = counter(model_directory)
    answers = ["Amber.", "Lantern.", "No."]
    path = write(tmp_path / "d.jsonl", [{"prompt": "Name a river.", "chosen": answers[0], "rejected": answers[1:]}])
    code, out, _ = run(capsys, "check", path, "--model", model_directory, "--json")
    tokens = json.loads(out)["tokens"][0]
    asked = count("Name a river.", "") - 1  # without the end of the turn
    separate = sum(count("Name a river.", a) for a in answers)
    assert code == 0 and tokens["separate_tokens_a_group"] == separate
    assert tokens["shared_tokens_a_group"] == separate - 2 * asked  # the answers differ from their first letter on


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "DATA"),
        (["{tmp}/none.jsonl"], "none.jsonl"),
        (["{tmp}"], "holds no train.jsonl"),
        (["{tmp}/d.jsonl", "--max-seq-length", "100"], "has no effect without model"),
        (["{tmp}/d.jsonl", "--model", "{tmp}"], "config.json"),
        (["{tmp}/s.json"], "--domain"),
    ],
)
def test_what_a_user_can_get_wrong(arguments, expected, tmp_path, capsys):
    write(tmp_path / "d.jsonl", rows("u"))
    write(tmp_path / "s.json", [SDPO])
    code, out, err = run(capsys, "check", *(a.format(tmp=tmp_path) for a in arguments))
    assert code == 2 and expected in out + err and "Traceback" not in err


def test_escapes_in_titles_do_not_reach_the_terminal(tmp_path, capsys):
    code, out, err = run(
        capsys,
        "check",
        write(
            tmp_path / "d.jsonl",
            [row("u", ["\x1b[31mred"], "a", "b"), row("u", ["a"], "b", "c") | {"domain": "\x1b[31mred"}],
        ),
    )
    assert code == 2 and "\x1b" not in out + err
    code, out, _ = run(capsys, "check", tmp_path / "d.jsonl", "--json")
    assert out.isascii() and "\x1b" not in out and "u001b" in out


# --- real samples


def test_released_ml_1m_titles_do_not_match(shared):
    """The release's own train/test mismatch: none of the 2,029 evaluation titles occurs in a training file."""
    folder = shared / "data" / "dmpo-release"
    for train in ("sft_ranking", "dpo_ranking_5"):
        parts = check.read_parts([str(folder / f"rec_data_ml_1m_{name}.json") for name in (train, "eval_ranking")])
        output = [f.what for f in warnings(check.check(parts))]
        assert any("0 of 2029 movie titles" in t and "only in a different spelling" in t for t in output)
        assert not any("that is also in" in t and t.split()[1:3] == ["groups", "of"] for t in output)


def test_real_samples_without_errors(shared):
    parts = check.read_parts([str(shared / "data" / "tallrec-movie" / f"{s}.json") for s in ("train", "test")])
    assert check.exit_code(check.check(parts)) < 2
    assert check.exit_code(check.check(check.read_parts([str(shared / "data" / "ml-1m-pairs")]))) == 0


# --- the same user, one window on


def window(history, positive="p", user=None, **more):
    row = {"user": user or "", "domain": "movie", "history": history, "positive": positive, "negatives": ["n"]}
    return row | more


def brute(first, second):
    """Whether any history of `first` shares 0.8 of the shorter one, and at least two titles."""
    return [any(len({*a} & {*b}) >= max(2, 0.8 * min(len({*a}), len({*b}))) for a in first) for b in second]


def test_a_history_that_moved_on_is_the_same_user(tmp_path):
    """15 whole histories, 12 that moved on: as in the released Games files, whose rows name no user."""
    old = [[f"{u} {i}" for i in range(10)] for u in range(40)]
    moved = [[*h[2:], "new 1", "new 2"] for h in old[15:27]]  # 8 of 10
    others = [[*h[3:], "x", "y", "z"] for h in old[27:]]  # 7 of 10
    paths = []
    for name, histories in (("sft", old), ("eval", old[:15] + moved + others)):
        rows = [released("Chosen", f"Other {i}", i % 2 == 0, tuple(h)) for i, h in enumerate(histories)]
        paths.append(str(write(tmp_path / f"{name}.json", rows)))
    found = [f for f in warnings(check.check(check.read_parts(paths))) if "shorter history" in f.what]
    assert len(found) == 1 and found[0].count == 27 and "15 of them the whole history" in found[0].what
    assert [int(r.split("row ")[1]) for r in found[0].rows] == [*range(1, 28)]
    assert found[0].line().count("eval.json:row") == 3 and "and 24 more, listed by --json" in found[0].line()


@pytest.mark.parametrize("seed", range(5))
def test_same_user_against_every_pair(seed):
    rng = np.random.default_rng(seed)
    draw = lambda: [[f"t{t}" for t in rng.integers(0, 14, rng.integers(1, 8))] for _ in range(60)]  # noqa: E731
    first, second = draw(), draw()
    examples = [
        [RankingExample("", "movie", tuple(h), "p", ("n",), source=str(i)) for i, h in enumerate(hs)]
        for hs in (first, second)
    ]
    found = set(check.same_user(*examples))
    expected = brute(first, second)
    assert 0 < sum(expected) < 60 and found == {str(i) for i, e in enumerate(expected) if e}


def test_users_with_ids_are_compared_by_id(tmp_path):
    rows_of = lambda user: [window(["a", "b", "c"], user=f"{user}{i}") for i in range(3)]  # noqa: E731
    found = warnings(findings(tmp_path, train=rows_of("a"), test=rows_of("b")))
    assert not any("shorter history" in f.what for f in found)


def test_splits_by_time_share_their_user(tmp_path):
    """One person: training, validation and test are parts of the same time line, which is no fault."""
    for split in ("train", "test"):
        rows = [window([f"a{i}", f"b{i}"], f"{split} {i}", "me", negatives=[f"n {split} {i}"]) for i in range(4)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    shared = lambda: [f for f in check.check(check.read_parts([str(tmp_path)])) if "have a user that" in f.what]  # noqa: E731
    assert [f.level for f in shared()] == ["warning"]
    (tmp_path / "manifest.json").write_text(json.dumps({"config": {"split": "time"}}))
    assert [f.level for f in shared()] == ["note"]
    apart = check.read_parts([str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl")])
    assert [f.level for f in check.check(apart) if "have a user that" in f.what] == ["warning"]


def test_long_titles_are_shortened_and_escaped(tmp_path):
    long = "A title &amp; more " * 20
    found = warnings(findings(tmp_path, train=[window([long.strip(), "b"], user="u")]))
    line = next(f.line() for f in found if "HTML entities" in f.what)
    assert len(line) < 220 + len(str(tmp_path)) and "..." in line


# --- what prepare writes


TEXTS = ["می\u200cخواهم", "👨\u200d👩\u200d👧 Family", "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f Scotland",
         "new \U0001fae9 face", "क्\u200dष", "\U000323b0 unassigned", "ﬁne ① Ⅷ", "Amélie"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_what_belongs_to_the_spelling_is_kept_and_not_objected_to(text):
    assert normalize(text) == unicodedata.normalize("NFC", text) and not check._invisible(normalize(text))


@pytest.mark.parametrize(
    "text", ["a\u200bb", "a\u202eb", "a\x00b", "a\ue000b", "a\U000e0041b", "🏴\U000e0067b", "\ufeffab"]
)
def test_what_hides_is_taken_out_and_objected_to(text):
    assert check._invisible(text) and normalize(text) in ("ab", "🏴b")


@given(st.text(max_size=30))
def test_check_never_objects_to_the_characters_of_prepare(text):
    title = normalize(text)
    assert not check._invisible(title) and normalize(title) == title
    if title and "\ufffd" not in title:
        example = RankingExample("u", "movie", (title,), "p", ("n",), source="d:1")
        assert not [f for f in check.check_titles([example])]


def test_a_directory_brings_its_own_wording(tmp_path, capsys, model_directory):
    config = tmp_path / "c.yaml"
    config.write_text("domains:\n  song: {topic: music, items: songs, consumed: played, consuming: playing}\n")
    songs = [{"historyList": [f"a{i}", f"b{i}"], "itemList": ["x", f"y{i}"], "trueSelection": "x"} for i in range(20)]
    data = write(tmp_path / "d.json", songs)
    assert run(capsys, "prepare", "convert", data, "--domain", "song", "-c", config, "--out", tmp_path / "o")[0] == 0
    code, out, _ = run(capsys, "check", tmp_path / "o", "--model", model_directory)
    assert code != 2 and "no wording" not in out and "tokens a prompt" in out
