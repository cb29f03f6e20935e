"""Templates of the user's own: what loads, what is refused with one line, and what an adapter keeps."""

import importlib.util
import json
from pathlib import Path

import pytest
from test_forms import run

from mlx_dmpo.errors import UserError
from mlx_dmpo.prompts import template as prompts
from mlx_dmpo.prompts.groups import build_group
from mlx_dmpo.prompts.template import FORMS, SAMPLES, Template, built_in
from mlx_dmpo.records import RankingExample

ROOT = Path(__file__).resolve().parents[1]
HASHES = {
    "pairwise": "f479a5574d8181df",
    "listwise": "22b05b4061c7c5f8",
    "direct": "68a047faa86f9f22",
    "pointwise": "f4284be8828a5116",
}

S_DPO = """\
# one of S-DPO's ten prompts for music, with marks around the titles
form: listwise
prompt: "This person has listened to {items} [{history}] recently. Choose the next one from: [{candidates}]. Answer:"
title: "“{title}”"
separator: ", "
answer: "{title}"
domains:
  song: {items: bands}
"""

DIRECT = {"form": "direct", "prompt": "Liked: {history}. Next?", "title": "<{title}>", "answer": "{title}"}
PAIR = {
    "form": "pairwise",
    "prompt": "Liked: {history}. Better: <{first}> or <{second}>?",
    "title": "<{title}>",
    "answer": "<{first}> > <{second}>",
}
POINT = {
    "form": "pointwise",
    "prompt": "Liked: {history}. And <{target}>?",
    "title": "<{title}>",
    "answer_yes": "Yes",
    "answer_no": "No",
}


def without(template, *keys, **change):
    return {k: v for k, v in {**template, **change}.items() if k not in keys}


# what is wrong: (template, what the line says)
BAD = {
    "no form": (without(DIRECT, "form"), '"form" is missing'),
    "no prompt": (without(DIRECT, "prompt"), '"prompt" is missing'),
    "blank prompt": (without(DIRECT, prompt=" "), '"prompt" is missing'),
    "no title": (without(DIRECT, "title"), '"title" is missing'),
    "no answer": (without(DIRECT, "answer"), '"answer": is missing'),
    "unknown form": (without(DIRECT, form="triplewise"), "'triplewise' is not a prompt form"),
    "form is a list": (without(DIRECT, form=["direct"]), '"form": is not text'),
    "misspelt key": (without(DIRECT, promt="x"), 'did you mean "prompt"?'),
    "unknown key": (without(DIRECT, zzz="x"), "is not part of a template"),
    "number for text": (without(DIRECT, separator=3), "is not text"),
    "unknown placeholder": (without(DIRECT, prompt="{history} {genre}"), "{genre} is not a placeholder of form direct"),
    "another form's placeholder": (without(DIRECT, prompt="{history} <{first}>"), "{first} is not a placeholder"),
    "missing placeholder": (without(DIRECT, prompt="Next?"), "{history} is missing"),
    "missing second": (without(PAIR, prompt="{history}. <{first}>?"), "{second} is missing"),
    "twice": (without(DIRECT, prompt="{history} {history}"), "{history} occurs twice"),
    "stray brace": (without(DIRECT, prompt="{history} }"), "write {{ and }}"),
    "attribute": (without(DIRECT, prompt="{history.__class__}"), "is not a placeholder"),
    "format spec": (without(DIRECT, prompt="{history:>9}"), "is not a placeholder"),
    "index": (without(DIRECT, prompt="{0}"), "is not a placeholder"),
    "conversion": (without(DIRECT, prompt="{history!r}"), "is not a placeholder"),
    "title without title": (without(DIRECT, title="<>"), "does not hold {title} once"),
    "title twice": (without(DIRECT, title="<{title}{title}>"), "does not hold {title} once"),
    "unmarked list": (without(DIRECT, title="{title}"), "nothing marks where {title} begins and ends"),
    "mark on one side": (without(DIRECT, title="- {title}"), "nothing marks where {title}"),
    "unmarked pair": (without(PAIR, prompt="{history}. Is it {first} or {second}?"), "nothing marks where {first}"),
    "unmarked target": (without(POINT, prompt="{history}. Is it {target}"), "nothing marks where {target}"),
    "answer without title": (without(DIRECT, answer="yes"), "form direct needs {title}"),
    "answer of one title": (without(PAIR, answer="{first}"), "needs {first} and {second}"),
    "ambiguous answer": (without(PAIR, answer="{first}{second}"), "nothing marks where {first}"),
    "ambiguous comma": (without(PAIR, answer="<{first}>, {second}"), "nothing marks where {second}"),
    "yes in direct": (without(DIRECT, answer_yes="Yes"), "has no effect in form direct"),
    "answer in pointwise": (without(POINT, answer="{title}"), "has no effect in form pointwise"),
    "no yes": (without(POINT, "answer_yes"), '"answer_yes": is missing'),
    "yes is no": (without(POINT, answer_no=" yes"), "begin alike"),
    "yes begins no": (without(POINT, answer_no="Yes, but no"), "begin alike"),
    "domains is a list": (without(DIRECT, domains=["movie"]), "is not a mapping"),
    "unknown word": (without(DIRECT, domains={"movie": {"genre": "x"}}), 'unknown word "genre"'),
    "word that the prompt uses": (
        without(DIRECT, prompt="{items}: {history}", domains={"song": {"item": "song"}}),
        'song: wording is not complete: prompt p uses items: add items as text',
    ),
    "word is a number": (without(DIRECT, domains={"movie": {"items": 3}}), "each as text"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_template_is_one_line(name, tmp_path):
    values, message = BAD[name]
    file = tmp_path / "p.yaml"
    file.write_text(json.dumps(values))  # JSON is YAML
    with pytest.raises(UserError) as error:
        prompts.load(str(file))
    assert str(error.value).startswith(f"{file}:") and message in str(error.value)
    assert "\n" not in str(error.value)


FILES = {
    "form: direct\nform: pairwise\n": "given twice",
    "form: [\n": "not valid YAML",
    "- form\n": "not a mapping",
    "a: &a x\nb: *a\n": "alias",
    "form: !!python/object:os.system x\n": "not valid YAML",
    "": '"form" is missing',
}


@pytest.mark.parametrize("text", FILES)
def test_a_bad_file_is_one_line(text, tmp_path):
    (tmp_path / "p.yaml").write_text(text)
    code, printed = run("evaluate", "--prompt", tmp_path / "p.yaml", "--out", tmp_path / "e")
    assert code == 2 and FILES[text] in printed.splitlines()[-1] and not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.yaml", "no such file"),
        ("pairwize", 'did you mean "pairwise"?'),
        ("x", "give pairwise, listwise, direct, pointwise, or a YAML file"),
    ],
)
def test_a_name_that_is_none(name, message):
    with pytest.raises(UserError, match=message):
        prompts.load(name)


def test_lines_are_named(tmp_path):
    (tmp_path / "p.yaml").write_text('form: direct\ntitle: "<{title}>"\nprompt: "{genre}"\nanswer: "{title}"\n')
    with pytest.raises(UserError, match=r'p\.yaml:3: "prompt"'):
        prompts.load(str(tmp_path / "p.yaml"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("domain", ["movie", "game", "book", "music", "product"])
def test_built_in_forms_speak_every_domain(form, domain):
    template = built_in(form)
    example = RankingExample("u", domain, SAMPLES[:3], "p", ("q",))
    orders = {"pairwise": [(True,)], "listwise": [(0, 1)]}.get(form, [])
    text = build_group(example, orders, template).branches[0].messages[0]["content"]
    assert "{" not in text.replace("{first}", "") and SAMPLES[1] in text


def test_odd_titles_stay_in_their_place():
    """A title is refused only where it holds the very text that ends its place."""
    for form in FORMS:
        template = built_in(form)
        orders = {"pairwise": [(True,)], "listwise": [(0, 1)]}.get(form, [])
        odd = RankingExample("u", "movie", ("{history}", "a > b", 'The "A"', "x, y"), "{target}", ("a. b?",))
        text = build_group(odd, orders, template).branches[0].messages[0]["content"]
        assert "{history}" in text and "a > b" in text
    cases = {
        "pairwise": (">  <Title:", "A>  <Title:B"),
        "listwise": (">, <", "A>, <B"),
        "direct": (">, <", "A>, <B"),
        "pointwise": ('", "', 'A", "B'),
    }
    for form, (end, title) in cases.items():
        orders = {"pairwise": [(True,)], "listwise": [(0, 1)]}.get(form, [])
        bad = RankingExample("u", "movie", (title,), "p", ("q",), source="d.jsonl:3")
        with pytest.raises(UserError) as error:
            build_group(bad, orders, built_in(form))
        assert str(error.value).startswith("d.jsonl:3: the title") and repr(end) in str(error.value)
    for form, places in (("pairwise", ("positive", "negatives")), ("pointwise", ("positive",))):
        end = ">  and  <Title:" if form == "pairwise" else '"?'
        orders = {"pairwise": [(True,)]}.get(form, [])
        for place in places:
            values = {"positive": "p", "negatives": ("q",)}
            values[place] = f"A{end}B" if place == "positive" else ("A> .B",)
            with pytest.raises(UserError, match="ends a title's place"):
                build_group(RankingExample("u", "movie", ("h",), **values), orders, built_in(form))


def test_a_template_without_words_takes_any_domain(tmp_path):
    (tmp_path / "p.yaml").write_text(json.dumps(DIRECT))
    template = prompts.load(str(tmp_path / "p.yaml"))
    group = build_group(RankingExample("u", "whatever", ("A", "B"), "C", ("D",)), [], template)
    assert group.branches[0].messages[0]["content"] == "Liked: <A><B>. Next?"
    with pytest.raises(UserError, match='d:1: no wording for domain "whatever"'):
        build_group(RankingExample("u", "whatever", ("A",), "C", ("D",), source="d:1"), [], built_in("direct"))


def test_a_users_file_is_a_fifth_form(model_directory, data_directory, tmp_path):
    """S-DPO's wording: sft, dmpo and evaluate; the last two take it from the adapter, the file gone."""
    file, common = tmp_path / "music.yaml", ("--model", model_directory, "--data", data_directory)
    file.write_text(S_DPO)
    train = ("--iters", "1", "--num-layers", "1")
    code, printed = run("sft", *common, "--prompt", file, "--adapter-path", tmp_path / "sft", *train)
    assert code == 0, printed
    words = file.read_text()
    file.unlink()
    code, printed = run(
        "dmpo", *common, "--start-adapter", tmp_path / "sft", "--adapter-path", tmp_path / "dmpo", *train
    )
    assert code == 0, printed
    code, printed = run("evaluate", *common, "--adapter-path", tmp_path / "dmpo", "--limit", "2")
    assert code == 0, printed
    kept = json.loads((tmp_path / "dmpo" / "eval" / "manifest.json").read_text())["prompt"]
    assert kept["name"] == "music" and kept["domains"]["song"]["items"] == "bands" and kept["title"] == "“{title}”"
    # the same file with another word is another prompt
    file.write_text(words.replace("Choose", "Pick"))
    code, printed = run(
        "dmpo", *common, "--prompt", file, "--start-adapter", tmp_path / "sft", "--adapter-path", tmp_path / "other"
    )
    assert code == 2 and "is worded otherwise" in printed.splitlines()[-1] and not (tmp_path / "other").exists()
    # domains may be added, but not worded otherwise
    config = tmp_path / "c.yaml"
    arguments = ("evaluate", *common, "--adapter-path", tmp_path / "dmpo", "--limit", "2", "-c", config)
    config.write_text("domains: {hymn: {items: hymns}}\n")
    code, printed = run(*arguments, "--out", tmp_path / "e1")
    assert code == 0, printed
    config.write_text("domains: {song: {items: tunes}}\n")
    code, printed = run(*arguments, "--out", tmp_path / "e2")
    assert code == 2 and "another wording" in printed.splitlines()[-1]
    assert run(*arguments, "--allow-other-prompt", "--out", tmp_path / "e2")[0] == 0


def test_a_damaged_stored_prompt_is_refused():
    stored = built_in("direct").to_json()
    assert prompts.read_stored(stored, "a").hash == built_in("direct").hash
    for damaged, message in (
        ({**stored, "prompt": stored["prompt"] + " Please."}, "hash"),
        ({**stored, "form": "other"}, "not a prompt form"),
        ("direct", "is not a template"),
        ({**stored, "domains": {"movie": 3}}, "wording is not complete"),
    ):
        with pytest.raises(UserError, match=message):
            prompts.read_stored(damaged, "adapter_config.json")


def test_the_hash_covers_what_is_printed_and_not_the_name():
    template = built_in("direct")
    same = Template.build({k: v for k, v in template.to_json().items() if k not in ("hash", "name")}, "x", "mine")
    assert same.name == "mine" and same.hash == template.hash
    values = {k: v for k, v in template.to_json().items() if k != "hash"}
    for key in ("prompt", "title", "separator", "empty", "answer"):
        assert Template.build({**values, key: values[key] + " "}, "x").hash != template.hash


def generator():
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "scripts" / "generate_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_golden_prompts():
    """docs/prompts.md prints the four forms of one example: a change of wording must be seen there."""
    page = (ROOT / "docs" / "prompts.md").read_text(encoding="utf-8")
    assert "<!-- prompts -->\n" + generator().prompt_forms() + "\n<!-- /prompts -->" in page
    assert '-> " <Title:Collateral> ,  <Title:Bambi> "  chosen' in page
    assert "Name one more movie that this user will like. Answer with its title only.\n" in page
    assert (
        'User Unpreference: "Cats"\nWhether the user will like the target movie "Dumbo"?\n  -> "Yes."  rejected\n'
        in page
    )


def test_the_wording_of_the_built_in_forms_is_fixed():
    """Adapters keep these hashes.

    Whoever changes a wording makes a new form of it, or every adapter of it is refused.
    """
    assert {form: built_in(form).hash for form in FORMS} == HASHES


def test_later_commands_know_the_domains_of_the_adapter(model_directory, tmp_path):
    """Worded in sft's config only; the rows of every later command are of that domain."""
    row = {"user": "u", "domain": "song", "history": ["amber", "river"], "positive": "glass", "negatives": ["iron"]}
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row | {"user": split}) + "\n")
    config = tmp_path / "c.yaml"
    config.write_text(
        "domains: {song: {topic: music, items: songs, item: song, consumed: heard, consuming: hearing}}\n"
    )
    common, train = ("--model", model_directory, "--data", tmp_path), ("--iters", "1", "--num-layers", "1")
    for form in ("pairwise", "direct"):
        out = tmp_path / form
        code, printed = run("sft", *common, "-c", config, "--prompt", form, "--adapter-path", out / "sft", *train)
        assert code == 0, printed
        for command in (
            ("dmpo", "--start-adapter", out / "sft", "--adapter-path", out / "dmpo", *train),
            ("evaluate", "--adapter-path", out / "sft"),
            ("sample", "--adapter-path", out / "sft", "--score", "--out", out / "s.jsonl"),
            ("export", "--adapter-path", out / "sft", "--examples", "1"),
        ):
            code, printed = run(command[0], *common, *command[1:])
            assert code == 0, printed
        code, printed = run("evaluate", *common, "--prompt", form, "--out", out / "e")
        assert code == 2 and 'no wording for domain "song"' in printed


WORDINGS = """
form: listwise
prompt: "I listened to [{history}]. Choose the next from [{candidates}]. Answer:"
more_prompts:
  - "After [{history}], which comes next of these: [{candidates}]? Answer:"
  - "Which of [{candidates}] follows [{history}]? Answer:"
title: "<{title}>"
separator: ", "
answer: "{title}"
"""


def test_each_users_examples_take_one_of_several_wordings(tmp_path):
    path = tmp_path / "music.yaml"
    path.write_text(WORDINGS)
    template = prompts.load(str(path))
    begins = {"I listened", "After", "Which of"}
    seen = {}
    for n in range(60):
        example = RankingExample(f"u{n % 30}", "movie", ("amber", str(n)), "iron", ("salt",))
        group = build_group(example, [(0, 1), (1, 0)], template)
        texts = {b.messages[0]["content"] for b in group.branches}
        (begin,) = {next(b for b in begins if t.startswith(b)) for t in texts}
        assert seen.setdefault(example.user, begin) == begin and len(texts) == 2
    assert set(seen.values()) == begins
    assert prompts.read_stored(template.to_json(), "a") == template
    one = prompts.load(str(_one_wording(tmp_path)))
    assert "more_prompts" not in one.to_json() and one.hash != template.hash


def _one_wording(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text(WORDINGS.replace(WORDINGS[WORDINGS.index("more_prompts") : WORDINGS.index("title:")], ""))
    return path


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (" follows [{history}]", "", '"more_prompts": {history} is missing'),
        ("more_prompts:\n", "more_prompts: one\nx:\n", '"more_prompts": is not a list of texts'),
    ],
)
def test_every_wording_is_checked(old, new, said, tmp_path):
    path = tmp_path / "music.yaml"
    path.write_text(WORDINGS.replace(old, new))
    with pytest.raises(UserError) as error:
        prompts.load(str(path))
    assert said in str(error.value) and "\n" not in str(error.value)
