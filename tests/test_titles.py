"""Titles: one rule, stable under repetition, safe inside the prompt."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dmpo.data.titles import catalogue, normalize
from mlx_dmpo.prompts.pairwise import DOMAINS, pair_prompt, parse_prompt
from mlx_dmpo.records import RankingExample


@pytest.mark.parametrize(
    ("raw", "title", "short"),
    [
        ("Sixth Sense, The (1999)", "The Sixth Sense (1999)", "Sixth Sense, The"),
        (
            "City of Lost Children, The (Cité des enfants perdus, La) (1995)",
            "The City of Lost Children (La Cité des enfants perdus) (1995)",
            "City of Lost Children, The (Cité des enfants perdus, La)",
        ),
        ("Avventura, L' (1960)", "L'Avventura (1960)", "Avventura, L'"),
        ("Twilight Zone, The (1959-1964)", "The Twilight Zone (1959-1964)", "Twilight Zone, The"),
        ("Kiss Me, Guido (1997)", "Kiss Me, Guido (1997)", "Kiss Me, Guido"),
        ("Girl, Interrupted", "Girl, Interrupted", "Girl, Interrupted"),
        ("1984 (2001: A Copy)", "1984 (2001: A Copy)", "1984 (2001: A Copy)"),
        ("  Tom &amp;amp; Jerry\t\u00a0(1940) \n", "Tom & Jerry (1940)", "Tom & Jerry"),
        ("Bell\x07 and \u202eRLO\x1b[31m", "Bell and RLO[31m", "Bell and RLO[31m"),
        ("Cafe\u0301", "Caf\u00e9", "Caf\u00e9"),
        ("&lt;b&gt; > <Title:x>", "‹b› › ‹Title:x›", "‹b› › ‹Title:x›"),
        ("\u200d\u0000 ", "\u200d", "\u200d"),
        (" \t", "", ""),
    ],
)
def test_the_rule(raw, title, short):
    assert normalize(raw) == title
    assert normalize(raw, articles=False, years=False) == short


@given(st.text(max_size=40), st.booleans(), st.booleans())
def test_no_title_breaks_the_prompt(raw, articles, years):
    title = normalize(raw, articles, years)
    assert "<" not in title and ">" not in title and "\n" not in title
    if title:
        example = RankingExample("u", "movie", (title, "b"), title, ("c",))
        parsed = parse_prompt(pair_prompt(example, "c", True, DOMAINS["movie"]))
        assert parsed is not None and (parsed.history, parsed.first, parsed.second) == ((title, "b"), title, "c")


def test_equal_titles_are_one_item():
    raw = {"1": "Sixth Sense, The", "2": "The  Sixth Sense", "3": "Amber", "5": "\x00"}
    found = catalogue(["3", "1", "4", "2", "5"], raw, True, True)
    assert found.titles == ["Amber", "The Sixth Sense"]
    assert found.ids == [["3"], ["1", "2"]]
    assert np.array_equal(found.of_item, [0, 1, -1, 1, -1])
    assert found.merged == [1]
