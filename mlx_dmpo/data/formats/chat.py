"""Conversations: ShareGPT and mlx-lm's chat rows."""

from __future__ import annotations

from typing import Any

from ...records import Example
from .common import Context, Row, fail, group, is_preference, messages_of, only_answer, rejected_of, with_system


def read_sharegpt(row: Row, source: str, context: Context) -> Example:
    """{conversations, chosen, rejected, system}; without chosen and rejected the last turn is the answer."""
    messages = with_system(messages_of(row.get("conversations"), "conversations", source), row, source)
    if not is_preference(row):
        return group(messages[:-1], only_answer(messages[-1:], "conversations", source), [], source, context)

    def answer(value: Any, name: str) -> str:
        if isinstance(value, str):
            return value
        return only_answer(messages_of(value if isinstance(value, list) else [value], name, source), name, source)

    rejected = [answer(r, "rejected") for r in rejected_of(row, source)]
    return group(messages, answer(row["chosen"], "chosen"), rejected, source, context)


def read_chat(row: Row, source: str, context: Context) -> Example:
    """{messages}: the last turn is the answer, everything before it the prompt."""
    if row.get("tools"):
        raise fail(source, '"tools" are not supported', "remove them")
    messages = with_system(messages_of(row["messages"], "messages", source), row, source)
    return group(messages[:-1], only_answer(messages[-1:], "messages", source), [], source, context)
