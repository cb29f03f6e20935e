"""Rows of titles: the project's own, the released DMPO JSON, S-DPO's candidate lists."""

from __future__ import annotations

from ...prompts.pairwise import domain_of, parse_prompt
from ...records import Example, RankingExample
from .alpaca import read_alpaca
from .common import Context, Row, checked, fail, history_user, text


def read_own(row: Row, source: str, context: Context) -> Example:
    if context.domain:
        raise fail(source, f"names its own domain ({row.get('domain')})", "leave --domain out")
    example = RankingExample.from_json(row, source)
    domain_of(example, context.domains)
    return example


def read_released(row: Row, source: str, context: Context) -> Example:
    """An alpaca row in the release's ranking wording, which must be understood."""
    unknown = set(row) - {"instruction", "input", "output"}
    if unknown:
        raise fail(source, f'unknown field "{min(unknown)}"', "remove or rename it")
    if row.get("input"):
        raise fail(source, '"input" is not empty', "put the whole prompt into instruction")
    if parse_prompt(row["instruction"], context.domains) is None:
        raise fail(
            source,
            "the instruction is not the release's ranking prompt",
            "word it as docs/data.md shows, or add its domain under `domains:` in the config",
        )
    if isinstance(row["output"], list) and len(row["output"]) != 2:
        raise fail(source, '"output" is neither an answer nor [chosen, rejected]', "give one text, or two")
    example = read_alpaca(row, source, context)
    if not isinstance(example, RankingExample):
        raise fail(
            source,
            '"output" does not rank the two titles of the instruction',
            "name both titles, each once, as the instruction does",
        )
    return example


def read_s_dpo(row: Row, source: str, context: Context) -> Example:
    """{historyList, itemList, trueSelection}: the items other than the true one are the negatives and the
    candidates.
    """
    positive = text(row, "trueSelection", source)

    def listed(name: str) -> list[str]:
        value = row.get(name)
        value = value.split("::") if isinstance(value, str) else value
        if not isinstance(value, list) or not value or any(not isinstance(t, str) or not t.strip() for t in value):
            raise fail(
                source, f'"{name}" is not a list of titles', 'write a list, or one text with "::" between the titles'
            )
        return [t.strip() for t in value]

    history, items = listed("historyList"), listed("itemList")
    if positive.strip() not in items:
        raise fail(source, "the true selection is not among the items", "list it in itemList")
    if not context.domain:
        raise fail(
            source,
            "names no domain",
            f"say what the items are by --domain, one of {', '.join(context.domains)}, or word one in a config",
        )
    negatives = [t for t in items if t != positive.strip()]
    user = history_user(context.domain, history)
    # all of them stay candidates of the list, also where fewer negatives are trained on
    return checked(user, context.domain, history, positive.strip(), negatives, source, context, candidates=negatives)
