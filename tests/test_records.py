"""The optional fields of an example: kept as they are, checked, and absent where a source does not give them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_dmpo.errors import UserError
from mlx_dmpo.records import RankingExample

ROW = {"user": "u", "domain": "movie", "history": ["Heat", "Ronin"], "positive": "Collateral", "negatives": ["Bambi"]}
MORE = {
    "positive_first": [True],
    "disliked": ["Cats"],
    "ratings": [4, 4.5],
    "times": [978300760, 978302109.5],
    "candidates": ["Bambi", "Dumbo"],
}

number = st.one_of(st.integers(0, 2**40), st.floats(0, 10, allow_nan=False))
title = st.text(min_size=1, max_size=8).filter(str.strip)
optional = st.fixed_dictionaries(
    {},
    optional={
        "positive_first": st.lists(st.booleans(), min_size=1, max_size=1),
        "disliked": st.lists(title, max_size=3),
        "ratings": st.lists(number, min_size=2, max_size=2),
        "times": st.lists(number, min_size=2, max_size=2),
        "candidates": st.lists(title.filter(lambda t: t != "Collateral"), unique=True, max_size=3),
    },
)


@given(optional)
def test_a_row_comes_back_as_it_was(more):
    row = ROW | more
    again = RankingExample.from_json(json.loads(json.dumps(row)), "x:1").to_json()
    assert json.dumps(again, sort_keys=True) == json.dumps(row, sort_keys=True)  # 4 stays 4, 4.0 stays 4.0


def test_an_old_row_has_none_of_them():
    example = RankingExample.from_json(ROW)
    assert [getattr(example, name) for name in MORE] == [None] * 5 and example.to_json() == ROW
    assert list(RankingExample.from_json(ROW | MORE).to_json()) == [*ROW, *MORE]  # in the file's order of fields


BAD = {
    "disliked of numbers": ({"disliked": [3]}, '"disliked" is not a list'),
    "disliked is text": ({"disliked": "Cats"}, '"disliked" is not a list'),
    "blank candidate": ({"candidates": [" "]}, '"candidates" is not a list'),
    "positive among candidates": ({"candidates": ["Collateral"]}, "the positive is among the candidates"),
    "candidate twice": ({"candidates": ["Cats", "Cats"]}, "a candidate is listed twice"),
    "too few ratings": ({"ratings": [4]}, '"ratings" does not fit'),
    "rating is text": ({"ratings": ["4", "5"]}, '"ratings" does not fit'),
    "rating is true": ({"ratings": [True, 4]}, '"ratings" does not fit'),
    "rating is infinite": ({"ratings": [float("inf"), 4]}, '"ratings" does not fit'),
    "time is NaN": ({"times": [float("nan"), 4]}, '"times" does not fit'),
    "times is a number": ({"times": 3}, '"times" does not fit'),
    "unknown": ({"rating": [1, 2]}, 'unknown field "rating"'),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_fields_are_one_line(name):
    change, message = BAD[name]
    with pytest.raises(UserError) as error:
        RankingExample.from_json(ROW | change, "d.jsonl:2")
    assert str(error.value).startswith("d.jsonl:2: ") and message in str(error.value)
