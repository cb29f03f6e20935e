"""What the readers of rows share: the errors, messages, and a prompt with its answers as an example."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import UserError
from ...prompts.pairwise import Domain, domain_of, parse_prompt, ranking_answer
from ...records import Branch, Example, Message, PreferenceGroup, RankingExample

Row = dict[str, Any]


class Unconvertible(UserError):
    """A valid row that holds no ranking pair. The message is the reason alone."""


@dataclass
class Context:
    """What a row is read with, and what a format remembers from row to row."""

    domains: Mapping[str, Domain]
    domain: str = ""  # as the user named it, for rows that name none
    window: frozenset[str] = frozenset()  # TALLRec: the last row's items and target
    user: str = ""
    unused: set[str] = field(default_factory=set)  # columns that the format does not know
    renamed: dict[str, str] = field(default_factory=dict)  # columns read under a standard name


def fail(source: str, what: str, fix: str) -> UserError:
    return UserError(f"{source}: {what}: {fix}")


def text(row: Row, name: str, source: str, *, blank: bool = False) -> str:
    if row.get(name) is None and not blank:
        raise fail(source, f'field "{name}" is missing', f'add "{name}" to the object')
    value = row.get(name) or ""
    if not isinstance(value, str) or not (blank or value.strip()):
        raise fail(source, f'"{name}" is not a non-empty text', f"give {name} as text")
    return value


def digest(parts: Sequence[str]) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=6).hexdigest()


def history_user(domain: str, history: Sequence[str]) -> str:
    """Files without users: rows of one history are one user's."""
    return "history-" + digest([domain, *history])


ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def message(value: Any, name: str, source: str) -> Message:
    """One message, {"role", "content"} or {"from", "value"}."""
    if not isinstance(value, dict):
        raise fail(
            source, f'"{name}" holds a message that is not an object', 'write {"role": "user", "content": "..."}'
        )
    role, content = (value.get(k, value.get(other)) for k, other in (("role", "from"), ("content", "value")))
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(p["text"] for p in content)
    if not isinstance(role, str) or role not in ROLES:
        raise fail(
            source,
            f'"{name}" holds a message of the role {role!r}',
            "write system, user or assistant; tools are not supported",
        )
    if not isinstance(content, str) or not content.strip():
        raise fail(source, f'"{name}" holds a message without text', "give each message a text")
    return {"role": ROLES[role], "content": content}


def messages_of(value: Any, name: str, source: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise fail(source, f'"{name}" is not a list of messages', 'write [{"role": "user", "content": "..."}, ...]')
    return [message(v, name, source) for v in value]


def with_system(messages: Sequence[Message], row: Row, source: str) -> list[Message]:
    """The messages after the text of the column `system`, where there is one."""
    system = text(row, "system", source, blank=True)
    if not system.strip():
        return list(messages)
    first: Message = {"role": "system", "content": system}
    if messages and messages[0]["role"] == "system":
        if messages[0] != first:
            raise fail(source, '"system" and the first message are two system texts', "keep one of them")
        return list(messages)
    return [first, *messages]


def only_answer(messages: Sequence[Message], name: str, source: str) -> str:
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise fail(
            source,
            f'"{name}" is not one assistant message after the prompt',
            "give one answer; earlier turns belong to the prompt",
        )
    return messages[0]["content"]


def group(prompt: Sequence[Message], chosen: str, rejected: Sequence[str], source: str, context: Context) -> Example:
    """One prompt with its answers; a RankingExample where it is the release's ranking prompt."""
    for name, answer in (("chosen", chosen), *(("rejected", r) for r in rejected)):
        if not answer.strip():
            raise fail(source, f"the {name} answer is empty", "give an answer")
    if chosen in rejected:
        raise fail(source, "chosen and rejected are identical", "a pair needs two different answers")
    if len(set(rejected)) < len(rejected):
        raise fail(source, "a rejected answer is listed twice", "list each once")
    if not prompt or prompt[-1]["role"] != "user":
        raise fail(source, "the prompt does not end with a user's message", "end it with what is to be answered")
    if len(prompt) == 1 and len(rejected) <= 1:
        found = ranking(prompt[0]["content"], [chosen, *rejected], source, context)
        if found:
            return found
    branches = tuple(Branch(tuple(prompt), answer) for answer in (chosen, *rejected))
    user = "prompt-" + digest([part for m in prompt for part in m.values()])
    return PreferenceGroup(
        user, context.domain or "text", branches, tuple((0, r) for r in range(1, len(branches))), source
    )


def ranking(prompt: str, answers: Sequence[str], source: str, context: Context) -> RankingExample | None:
    """(prompt, [chosen, rejected] or [chosen]) as an example with one negative; None where it is not in the release's
    wording.
    """
    parsed = parse_prompt(prompt, context.domains)
    if parsed is None:
        return None
    if context.domain:
        raise fail(source, f"names its own domain ({parsed.domain})", "leave --domain out")
    if not parsed.history:
        raise fail(source, "the history is empty", "give at least one title")
    orders = (ranking_answer(parsed.first, parsed.second), ranking_answer(parsed.second, parsed.first))
    if len(answers) == 1:  # the rejected answer is the same two titles swapped
        answers = [answers[0], orders[1] if answers[0] == orders[0] else orders[0]]
    if orders[0] == orders[1] or answers[0] == answers[1]:
        raise fail(source, "the pair is identical", "a pair needs two different titles")
    if sorted(answers) != sorted(orders):
        return None
    positive_first = answers[0] == orders[0]
    positive, negative = (parsed.first, parsed.second) if positive_first else (parsed.second, parsed.first)
    user = history_user(parsed.domain, parsed.history)
    return RankingExample(user, parsed.domain, parsed.history, positive, (negative,), (positive_first,), source)


REJECTED = re.compile(r"rejected[0-9]{1,4}")


def rejected_of(row: Row, source: str) -> list[Any]:
    """`rejected`, one answer or a list of them, or S-DPO's rejected1, rejected2, ..."""
    value = row.get("rejected")
    if value is None:
        numbered = sorted((k for k in row if REJECTED.fullmatch(k)), key=lambda k: int(k[8:]))
        return [row[k] for k in numbered]
    if value == []:
        raise fail(source, '"rejected" is empty', "give at least one rejected answer")
    conversation = isinstance(value, list) and all(isinstance(v, dict) for v in value)
    return value if isinstance(value, list) and not conversation else [value]


def is_preference(row: Row) -> bool:
    return "chosen" in row and ("rejected" in row or any(REJECTED.fullmatch(k) for k in row))


def checked(
    user: str,
    domain: str,
    history: Sequence[str],
    positive: str,
    negatives: Sequence[str],
    source: str,
    context: Context,
    **optional: Sequence[str],
) -> RankingExample:
    """The example of these fields, checked as a row of ranking examples is. Raises UserError."""
    row = {"user": user, "domain": domain, "history": list(history), "positive": positive, "negatives": list(negatives)}
    row |= {name: list(titles) for name, titles in optional.items() if titles}
    example = RankingExample.from_json(row, source)
    domain_of(example, context.domains)
    return example
