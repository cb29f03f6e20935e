"""Every English sentence that the model sees, worded as the DMPO release words it (double spaces and all).

A domain's wording is data: the two domains of the paper and those of `prepare` are below, a config's `domains` adds or replaces others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from ..errors import UserError
from ..records import Branch, PreferenceGroup, RankingExample

PROMPT = (
    "You are an assistant working on {topic} recommendations. Here is the user's history of {items} they have {consumed}: "
    "{history}. Rank the likelihood of the user {consuming} the two {items} {first} and {second}."
)


TITLE = " <Title:{}> "


@dataclass(frozen=True, slots=True)
class Domain:
    """How a domain is spoken of: "{topic} recommendations", "history of {items} they have {consumed}", "{consuming} the two {items}"."""

    topic: str
    items: str
    consumed: str
    consuming: str


DOMAINS: dict[str, Domain] = {
    "movie": Domain("movie", "movies", "watched", "watching"),
    "game": Domain("Video Games", "Video Games", "shopped", "shopping"),
    "book": Domain("book", "books", "read", "reading"),
    "music": Domain("music", "artists", "listened to", "listening to"),
    "product": Domain("product", "products", "bought", "buying"),
}


def with_domains(extra: Mapping[str, Mapping[str, str]] | None) -> dict[str, Domain]:
    """The built-in domains and a config's own. Raises UserError for a wording with missing or unknown parts."""
    domains = dict(DOMAINS)
    names = [f.name for f in fields(Domain)]
    for key, wording in (extra or {}).items():
        if (
            not isinstance(wording, Mapping)
            or set(wording) != set(names)
            or any(not isinstance(v, str) for v in wording.values())
        ):
            raise UserError(f"domains.{key}: wording is not complete: give {', '.join(names)}, each as text")
        domains[key] = Domain(**wording)
    return domains


def domain_of(example: RankingExample, domains: Mapping[str, Domain]) -> Domain:
    """The wording of an example's domain. Raises UserError where there is none."""
    if example.domain not in domains:
        known = ", ".join(sorted(domains))
        raise UserError(
            f'{example.source}: no wording for domain "{example.domain}" (known: {known}): add it under `domains:` in the config'
        )
    return domains[example.domain]


def titles(items: Sequence[str]) -> str:
    return "".join(TITLE.format(t) for t in items)


def pair_prompt(example: RankingExample, negative: str, positive_first: bool, domain: Domain) -> str:
    """The paper's pairwise prompt for one (positive, negative) in one printed order."""
    first, second = (example.positive, negative) if positive_first else (negative, example.positive)
    return PROMPT.format(
        topic=domain.topic,
        items=domain.items,
        consumed=domain.consumed,
        consuming=domain.consuming,
        history=titles(example.history),
        first=TITLE.format(first),
        second=TITLE.format(second),
    )


def ranking_answer(first: str, second: str) -> str:
    return TITLE.format(first) + ", " + TITLE.format(second)


def build_group(
    example: RankingExample,
    orders: Sequence[tuple[bool, ...]],
    domains: Mapping[str, Domain] = DOMAINS,
    drop_history: int = 0,
) -> PreferenceGroup:
    """Every pair of an example as branches: a prompt for each negative and each of its printed orders, two answers a prompt.

    orders[k] lists the orders in which pair k is printed, as positive-first flags: (True,), (False,) or (True, False).
    The branches of a prompt stand next to each other, chosen first. `drop_history` leaves out that many of the oldest items.
    """
    domain = domain_of(example, domains)
    example = replace(example, history=example.history[drop_history:])
    branches: list[Branch] = []
    pairs: list[tuple[int, int]] = []
    for negative, flags in zip(example.negatives, orders, strict=True):
        for positive_first in flags:
            messages = ({"role": "user", "content": pair_prompt(example, negative, positive_first, domain)},)
            pairs.append((len(branches), len(branches) + 1))
            branches.append(Branch(messages, ranking_answer(example.positive, negative)))
            branches.append(Branch(messages, ranking_answer(negative, example.positive)))
    return PreferenceGroup(example.user, example.domain, tuple(branches), tuple(pairs), example.source)


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    domain: str
    history: tuple[str, ...]
    first: str
    second: str


def parse_prompt(text: str, domains: Mapping[str, Domain] = DOMAINS) -> ParsedPrompt | None:
    """The inverse of `pair_prompt`: titles and domain of a printed prompt, or None where it has another wording."""
    for name, domain in domains.items():
        head = PROMPT[: PROMPT.index("{history}")].format(
            topic=domain.topic, items=domain.items, consumed=domain.consumed
        )
        middle = f". Rank the likelihood of the user {domain.consuming} the two {domain.items} "
        question = text.rfind(middle)
        if not text.startswith(head) or question < len(head):
            continue
        history = text[len(head) : question]
        items = tuple(re.findall(r" <Title:(.*?)> (?= <Title:|$)", history, re.DOTALL))
        match = re.fullmatch(r" <Title:(.*)>  and  <Title:(.*)> \.", text[question + len(middle) :], re.DOTALL)
        if match and titles(items) == history:
            return ParsedPrompt(name, items, *match.groups())
    return None
