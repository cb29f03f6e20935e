"""The release's pairwise prompt: written as pairwise.yaml words it, and read back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..records import PreferenceGroup, RankingExample
from . import groups
from .template import Domain, _domains, built_in, built_in_domains

__all__ = ["DOMAINS", "PAIRWISE", "TITLE", "Domain", "ParsedPrompt", "build_group", "domain_of", "pair_prompt"]
__all__ += ["parse_prompt", "ranking_answer", "titles", "with_domains"]

PAIRWISE = built_in("pairwise")
TITLE = PAIRWISE.title.replace("{title}", "{}")
DOMAINS: dict[str, Domain] = built_in_domains()


def with_domains(extra: Mapping[str, Mapping[str, str]] | None) -> dict[str, Domain]:
    """The built-in domains and a config's own. Raises UserError for wording with unknown words."""
    return _domains(extra, "domains")


def domain_of(example: RankingExample, domains: Mapping[str, Domain]) -> Domain:
    """The words of an example's domain. Raises UserError where there are none."""
    return replace(PAIRWISE, domains=domains).domain(example.domain, example.source)


def titles(items: Sequence[str]) -> str:
    return PAIRWISE.printed(items) if items else ""


def pair_prompt(example: RankingExample, negative: str, positive_first: bool, domain: Domain) -> str:
    """The paper's pairwise prompt for one (positive, negative) in one printed order."""
    first, second = (example.positive, negative) if positive_first else (negative, example.positive)
    return PAIRWISE.message(domain, example.source, history=example.history, first=first, second=second)


def ranking_answer(first: str, second: str) -> str:
    return PAIRWISE.answer_of(first, second)


def build_group(
    example: RankingExample,
    orders: groups.Orders,
    domains: Mapping[str, Domain] = DOMAINS,
    drop_history: int = 0,
) -> PreferenceGroup:
    """`groups.build_group` in the release's wording."""
    return groups.build_group(example, orders, replace(PAIRWISE, domains=domains), drop_history)


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    domain: str
    history: tuple[str, ...]
    first: str
    second: str


def parse_prompt(text: str, domains: Mapping[str, Domain] = DOMAINS) -> ParsedPrompt | None:
    """The inverse of `pair_prompt`: titles and domain of a printed prompt, or None where it has another wording."""
    start, rest = PAIRWISE.prompt.split("{history}")
    for name, domain in domains.items():
        words = {
            "topic": domain.topic,
            "items": domain.items,
            "consumed": domain.consumed,
            "consuming": domain.consuming,
        }
        head = start.format(**words)
        middle = rest[: rest.index(" <Title:{first}")].format(**words)
        question = text.rfind(middle)
        if not text.startswith(head) or question < len(head):
            continue
        history = text[len(head) : question]
        items = tuple(re.findall(r" <Title:(.*?)> (?= <Title:|$)", history, re.DOTALL))
        match = re.fullmatch(r" <Title:(.*)>  and  <Title:(.*)> \.", text[question + len(middle) :], re.DOTALL)
        if match and titles(items) == history:
            return ParsedPrompt(name, items, *match.groups())
    return None
