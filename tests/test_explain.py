"""Explanations: strips that add up, leave-one-out against scoring from scratch, flip sets against brute force, the
command.
"""

import importlib.util
import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_dmpo import Ranker
from mlx_dmpo.cli.main import main
from mlx_dmpo.errors import UserError
from mlx_dmpo.records import RankingExample
from mlx_dmpo.use.align import align
from mlx_dmpo.use.flip import flip_set
from mlx_dmpo.use.html import write
from mlx_dmpo.use.inputs import read_data
from mlx_dmpo.use.show import explanation_text

# --- alignment


def test_stretches_that_changed_places_are_aligned():
    assert align([1, 2, 3, 9], [3, 1, 2, 9]) == [(0, 1), (1, 2), (2, 0), (3, 3)]
    assert align([1, 2], [3]) == [(0, None), (1, None), (None, 0)]
    assert align([5, 5], [5]) == [(0, 0), (1, None)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=9), st.lists(st.integers(0, 4), max_size=9))
def test_every_token_is_in_exactly_one_line(chosen, rejected):
    lines = align(chosen, rejected)
    assert sorted(i for i, _ in lines if i is not None) == list(range(len(chosen)))
    assert sorted(j for _, j in lines if j is not None) == list(range(len(rejected)))
    assert all(chosen[i] == rejected[j] for i, j in lines if i is not None and j is not None)


# --- flip sets


def margins_of(n, base, effects, pairs):
    """An arbitrary margin of what is left: base - sum of single effects - sum of what two items do together."""

    def margin(removed):
        return base - sum(effects[i] for i in removed) - sum(pairs[i, j] for i, j in itertools.combinations(removed, 2))

    return margin


def smallest(n, base, margin, limit):
    for size in range(1, min(limit, n - 1) + 1):
        if any(margin(s) * base < 0 for s in itertools.combinations(range(n), size)):
            return size
    return None


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 7), st.integers(0, 10**6), st.sampled_from([0, 1, 2, 3]), st.sampled_from([1, -1]))
def test_the_flip_set_is_the_smallest_and_flips(n, seed, limit, sign):
    rng = np.random.default_rng(seed)
    base = float(sign * rng.uniform(0.5, 4))
    margin = margins_of(n, base, rng.normal(size=n), rng.normal(size=(n, n)))
    found, alone = flip_set(n, base, lambda sets: np.array([margin(s) for s in sets]), limit)
    if n > 1:
        assert alone == pytest.approx([margin((i,)) for i in range(n)])
    size = smallest(n, base, margin, limit)
    assert (found and len(found)) == size
    if found:
        assert margin(found) * base < 0


def test_a_set_of_two_that_greed_misses():
    """Alone, item 0 moves most, but only 1 and 2 together flip."""
    together = np.zeros((4, 4))
    together[1, 2] = 5
    margin = margins_of(4, 2.0, [0.5, 0.1, 0.1, 0.0], together)
    found, _ = flip_set(4, 2.0, lambda sets: np.array([margin(s) for s in sets]))
    assert found == (1, 2)


def test_no_set_is_scored_twice_and_an_early_answer_ends_the_search():
    seen = []

    def margins(sets):
        seen.extend(sets)
        return np.array([3.0 - 2 * len(s) for s in sets])

    found, _ = flip_set(10, 3.0, margins)
    assert len(found) == 2 and len(seen) == len(set(seen)) == 10 + 9  # every single item, then the greedy pairs


def test_a_tie_and_a_history_of_one_have_no_flip():
    assert flip_set(3, 0.0, lambda sets: np.ones(len(sets)))[0] is None
    assert flip_set(1, 1.0, lambda sets: -np.ones(len(sets)))[0] is None


# --- a model


HISTORY = ("river", "glass garden", "winter", "amber", "paper moon")
CHOSEN, REJECTED = "lantern", "lantern tower"  # one title begins the other


@pytest.fixture(scope="module", params=["pairwise", "direct", "pointwise", "listwise"])
def ranker(request, model_directory, tmp_path_factory):
    adapter = tmp_path_factory.mktemp("adapters") / "random"
    tiny.save_adapter(model_directory, adapter)
    return Ranker.load(model_directory, adapter, prompt=request.param, allow_other_prompt=True)


def from_scratch(ranker, history, chosen=CHOSEN, rejected=REJECTED):
    (scores,) = ranker.scoring.model.score([RankingExample("", "movie", tuple(history), chosen, (rejected,))])
    return float(scores.margins[0])


def test_the_margin_and_the_strip_that_adds_up_to_it(ranker):
    found = ranker.explain(HISTORY, CHOSEN, REJECTED, max_flip=0)
    assert found.margin == pytest.approx(from_scratch(ranker, HISTORY), abs=5e-4)
    assert sum(t.difference for t in found.tokens) == pytest.approx(found.margin, abs=1e-4)
    for t in found.tokens:
        if ranker.scoring.form != "pointwise":
            assert t.difference == pytest.approx((t.chosen or 0) - (t.rejected or 0))
    assert {t.side for t in found.tokens} <= {"chosen", "rejected", "both"}


def test_leave_one_out_is_scoring_from_scratch(ranker):
    found = ranker.explain(HISTORY, CHOSEN, REJECTED, max_flip=0)
    assert [e.title for e in found.history] == list(HISTORY)
    for i, effect in enumerate(found.history):
        without = from_scratch(ranker, HISTORY[:i] + HISTORY[i + 1 :])
        assert effect.effect == pytest.approx(found.margin - without, abs=1e-3)  # of two numbers within 5e-4 each


def test_the_flip_set_flips_and_no_smaller_one_does(ranker):
    turned = []
    for chosen, rejected in (("lantern", "lantern tower"), ("orchard", "echo")):
        found = ranker.explain(HISTORY, chosen, rejected, max_flip=3)
        margins = {
            left: from_scratch(ranker, [t for i, t in enumerate(HISTORY) if i not in left], chosen, rejected)
            for size in (1, 2, 3)
            for left in itertools.combinations(range(5), size)
        }
        if any(abs(m) < 1e-3 for m in margins.values()):
            continue  # a tie within rounding may fall either way
        flips = [left for left, m in margins.items() if m * found.margin < 0]
        assert (found.flip and len(found.flip)) == (min(map(len, flips)) if flips else None)
        if found.flip:
            assert margins[tuple(HISTORY.index(t) for t in found.flip)] * found.margin < 0
            turned.append(found.flip)
    print(ranker.scoring.form, turned)


def test_old_history_items_without_room_are_left_out_and_reported(model_directory, capsys):
    ranker = Ranker.load(model_directory, max_seq_length=400)
    history = [f"river glass winter {i}" for i in range(40)]
    found = ranker.explain(history, "amber", "iron", max_flip=0)
    assert 0 < found.dropped < 39 and [e.title for e in found.history] == history[found.dropped :]
    assert f"the {found.dropped} oldest history items do not fit" in capsys.readouterr().err
    assert sum(t.difference for t in found.tokens) == pytest.approx(found.margin, abs=1e-4)


def test_calibrated_and_per_token_margins_add_up_too(model_directory):
    for options in ({"calibrate": True}, {"prompt": "direct", "calibrate": True, "per_token": True}):
        ranker = Ranker.load(model_directory, **options)
        found = ranker.explain(HISTORY, CHOSEN, REJECTED, max_flip=0)
        assert found.margin == pytest.approx(from_scratch(ranker, HISTORY), abs=5e-4)
        assert sum(t.difference for t in found.tokens) == pytest.approx(found.margin, abs=1e-4)


def test_what_cannot_be_explained(model_directory):
    ranker = Ranker.load(model_directory)
    with pytest.raises(UserError, match="both the chosen and the rejected"):
        ranker.explain(HISTORY, "amber", "amber")
    with pytest.raises(UserError, match="history: it is empty"):
        ranker.explain([], "amber", "iron")


def test_the_sides_of_tokens(ranker):
    """Each title's own tokens spell it, also where one title begins the other."""
    if ranker.scoring.form != "pairwise":
        return
    found = ranker.explain(HISTORY, CHOSEN, REJECTED, max_flip=0)
    spelt = {side: "".join(t.token for t in found.tokens if t.side == side) for side in ("chosen", "rejected")}
    assert CHOSEN in spelt["chosen"] and "tower" not in spelt["chosen"]
    assert REJECTED in spelt["rejected"]


# --- the command


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["explain", *map(str, arguments)])
    return stop.value.code


@pytest.fixture(scope="module")
def two_adapters(model_directory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [
        tiny.save_adapter(model_directory, folder / name, size=size) for name, size in (("sft", 0.05), ("dmpo", 0.08))
    ]


def test_models_side_by_side(model_directory, data_directory, two_adapters, capsys):
    sft, dmpo = two_adapters
    arguments = ["--model", model_directory, "--data", data_directory, "--user", "test-1", "--base"]
    arguments += ["--adapter-path", sft, "--adapter-path", dmpo, "--json"]
    assert run(*arguments, "--chosen", "amber", "--rejected", "iron") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["margin", "tokens", "history", "flip", "models"]
    assert set(found["tokens"][0]) == {"token", "side", "chosen", "rejected", "difference"}
    assert set(found["history"][0]) == {"title", "effect"}
    assert [m["name"] for m in found["models"]] == [str(model_directory), str(sft), str(dmpo)]
    history = read_data(str(data_directory)).history("test-1")
    for model, adapter in zip(found["models"], (None, sft, dmpo), strict=True):
        own = Ranker.load(model_directory, adapter).explain(history, "amber", "iron")
        assert model["margin"] == pytest.approx(own.margin, abs=1e-3)
    assert found["margin"] == found["models"][-1]["margin"]
    assert len({round(m["margin"], 4) for m in found["models"]}) == 3


def test_the_top_of_the_ranking_is_explained(model_directory, data_directory, tmp_path, capsys):
    listed = tmp_path / "tonight.txt"
    listed.write_text("amber\niron\nsilver\n")
    arguments = ["--model", model_directory, "--data", data_directory, "--history", "river", "--history", "glass"]
    assert run(*arguments, "--candidates", listed) == 0
    out = capsys.readouterr().out
    order = Ranker.load(model_directory).rank(["river", "glass"], ["amber", "iron", "silver"]).titles
    assert f'chosen "{order[0]}", rejected "{order[1]}"' in out
    assert run(*arguments, "--candidates", listed, "--chosen", order[2]) == 0
    assert f'chosen "{order[2]}", rejected "{order[0]}"' in capsys.readouterr().out


def test_the_page_is_closed_and_escapes_titles(model_directory, tmp_path):
    """No script, nothing fetched, hostile titles as text."""
    hostile = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7*7 }}"]
    ranker = Ranker.load(model_directory)
    found = ranker.explain(hostile, "<b>bold</b>", "plain", max_flip=1)
    write([found, found], tmp_path / "deep" / "why.html")
    page = (tmp_path / "deep" / "why.html").read_text()
    assert "<script" not in page and "<img" not in page and "<b>bold" not in page and "{{" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "default-src &#39;none&#39;" not in page
    assert "default-src 'none'" in page and "http" not in page.replace("http-equiv", "")
    text = explanation_text([found])
    assert "<b>bold</b>" in text and "\x1b" not in explanation_text([replace(found, chosen="a\x1b[31mb")])


def test_the_page_of_an_explanation_in_a_browser(model_directory, tmp_path, browser):
    ranker = Ranker.load(model_directory)
    found = ranker.explain([*HISTORY, "<script>document.title='owned'</script>"], CHOSEN, REJECTED)
    write([found, found], tmp_path / "why.html")
    page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
    faults = []
    page.on("console", lambda m: faults.append(m.text))
    page.goto(f"file://{tmp_path / 'why.html'}")
    assert page.title() == "mlx-dmpo explanation" and faults == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("section").count() == 2
    if folder := os.environ.get("MLX_DMPO_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / "explanation-390.png"), full_page=True)


# --- the embedded model, trained as the demo trains it


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for arguments in (["sft"], ["dmpo", "--start-adapter", folder / "sft"]):
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments), "--adapter-path", str(folder / arguments[0])])
        assert stop.value.code == 0
    return folder / "dmpo"


def genres():
    """The fictional catalogue with the genre of each title, which is written nowhere in the data."""
    spec = importlib.util.spec_from_file_location("build_assets", Path(__file__).parents[1] / "scripts/build_assets.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.make_catalogue(0)


@pytest.mark.slow
def test_a_planted_favourite_genre_comes_out_on_top(trained):
    """Three histories a genre: its unseen titles rank above others, and its items, not the mixed-in ones, speak for
    them.
    """
    catalogue, ranker, rng = genres(), Ranker.load("", trained, batch_size=32), np.random.default_rng(0)
    places, own_effects, other_effects = [], [], []
    for genre in [*range(8)] * 3:
        own = rng.permutation(np.flatnonzero(catalogue.genres == genre))
        mixed_in = np.flatnonzero(catalogue.genres == (genre + 3) % 8)
        others = rng.permutation(np.flatnonzero(~np.isin(catalogue.genres, [genre, (genre + 3) % 8])))
        titles = lambda places: [catalogue.titles[i] for i in places]  # noqa: E731
        found = ranker.rank(titles(own[:7]), titles([*own[7:11], *others[:8]]))
        places += [r.rank for r in found.ranking if r.title in titles(own)]
        history = titles([i for pair in zip(own[:4], mixed_in[:4], strict=True) for i in pair])
        why = ranker.explain(history, catalogue.titles[own[8]], catalogue.titles[others[0]], max_flip=0)
        own_effects += [e.effect for e in why.history[::2]]
        other_effects += [e.effect for e in why.history[1::2]]
    print(
        f"mean place {np.mean(places):.2f} of 12 (chance 6.5, best 2.5); effects {np.mean(own_effects):+.2f} of "
        f"the genre's items, {np.mean(other_effects):+.2f} of others"
    )
    assert np.mean(places) < 5
    assert np.mean(own_effects) > np.mean(other_effects)
