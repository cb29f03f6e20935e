"""The release's wording to the letter, in both printed orders, and its inverse."""

import pytest

from mlx_dmpo.data import formats
from mlx_dmpo.data.rows import read_rows
from mlx_dmpo.errors import UserError
from mlx_dmpo.prompts import pairwise
from mlx_dmpo.records import RankingExample

MOVIE = RankingExample("u", "movie", ("Heat ", "Ronin"), "Gigi ", ("Tarzan ",))
GAME = RankingExample("u", "game", ("Doom",), "Quake", ("Myst",))


def prompt(example, positive_first):
    return pairwise.build_group(example, [(positive_first,)]).branches[0].messages[0]["content"]


def test_movie_wording():
    assert prompt(MOVIE, False) == (
        "You are an assistant working on movie recommendations. Here is the user's history of movies they have "
        "watched:  <Title:Heat >  "
        "<Title:Ronin> . Rank the likelihood of the user watching the two movies  <Title:Tarzan >  and  <Title:Gigi > ."
    )
    assert prompt(MOVIE, True).endswith("the two movies  <Title:Gigi >  and  <Title:Tarzan > .")


def test_game_wording():
    assert prompt(GAME, True) == (
        "You are an assistant working on Video Games recommendations. Here is the user's history of Video Games they "
        "have shopped:  <Title:Doom> . "
        "Rank the likelihood of the user shopping the two Video Games  <Title:Quake>  and  <Title:Myst> ."
    )


def test_answers_name_the_liked_item_first_whatever_the_order():
    for positive_first in (True, False):
        chosen, rejected = pairwise.build_group(MOVIE, [(positive_first,)]).branches
        assert chosen.answer == " <Title:Gigi > ,  <Title:Tarzan > "
        assert rejected.answer == " <Title:Tarzan > ,  <Title:Gigi > "


def test_both_orders_put_two_prompts_a_pair_into_the_group():
    example = RankingExample("u", "movie", ("a",), "p", ("q", "r"))
    group = pairwise.build_group(example, [(True, False), (True, False)])
    assert group.pairs == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert len({b.messages[0]["content"] for b in group.branches}) == 4


@pytest.mark.parametrize(
    "title", ["a > b", "  spaces ", "Ünïcode – 東京", "a, b", "a.  and  b", "{history}", "tab\there", "x> <Title:y"]
)
def test_odd_titles_survive_the_round_trip(title):
    example = RankingExample("u", "movie", ("plain", title), title + "!", ("other",))
    parsed = pairwise.parse_prompt(prompt(example, True))
    assert (parsed.domain, parsed.history, parsed.first, parsed.second) == (
        "movie",
        ("plain", title),
        title + "!",
        "other",
    )


def test_other_wordings_are_not_parsed():
    assert pairwise.parse_prompt("Say hello.") is None
    assert pairwise.parse_prompt(prompt(MOVIE, True).replace("watching", "eating")) is None


def test_a_domain_is_data():
    domains = pairwise.with_domains(
        {"song": {"topic": "music", "items": "songs", "consumed": "listened to", "consuming": "listening to"}}
    )
    example = RankingExample("u", "song", ("Yesterday",), "Help!", ("Airbag",))
    text = pairwise.build_group(example, [(True,)], domains).branches[0].messages[0]["content"]
    assert "working on music recommendations" in text and "songs they have listened to" in text
    assert pairwise.parse_prompt(text, domains).domain == "song"
    with pytest.raises(UserError, match="song"):
        pairwise.build_group(example, [(True,)])


def test_every_released_prompt_is_rebuilt_to_the_letter(shared):
    """Parsed and printed again, a row of the release is itself."""
    files = sorted((shared / "data" / "dmpo-release").glob("rec_*.json"))
    assert files
    for file in files:
        rows = [row for _, row in read_rows(file, "test")]
        example_rows = 0
        for example in formats.load_examples(file):
            group = pairwise.build_group(example, [(flag,) for flag in example.positive_first])
            for k in range(len(example.negatives)):
                row = rows[example_rows]
                chosen, rejected = group.branches[2 * k : 2 * k + 2]
                output = row["output"] if isinstance(row["output"], list) else [row["output"], rejected.answer]
                assert [chosen.messages[0]["content"], chosen.answer, rejected.answer] == [row["instruction"], *output]
                example_rows += 1
        assert example_rows == len(rows)
