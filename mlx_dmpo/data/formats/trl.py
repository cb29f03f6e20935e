"""TRL's preferences, and rows of a prompt and its completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...records import Example
from .common import Context, Row, fail, group, messages_of, only_answer, rejected_of, text, with_system


def _common(texts: Sequence[Sequence[Any]]) -> int:
    """Length of the prefix that all share."""
    return next(
        (n for n, column in enumerate(zip(*texts, strict=False)) if any(c != column[0] for c in column)),
        min(map(len, texts)),
    )


def read_trl(row: Row, source: str, context: Context) -> Example:
    """{prompt, chosen, rejected}; without a prompt it is what chosen and rejected begin with, as in TRL's
    extract_prompt.
    """
    chosen, rejected = row["chosen"], rejected_of(row, source)
    if chosen in rejected:
        raise fail(source, "chosen and rejected are identical", "a pair needs two different answers")
    conversational = isinstance(chosen, list)
    if any(isinstance(r, list) != conversational for r in rejected):
        raise fail(source, "chosen and rejected are not of one kind", "give texts, or lists of messages")
    given = row.get("prompt")
    if not conversational:
        if not all(isinstance(a, str) for a in (chosen, *rejected)):
            raise fail(source, "chosen or rejected is not text", "give texts, or lists of messages")
        if given is None:
            shared = _common([chosen, *rejected])
            shared -= chosen[shared - 1 : shared] == " "  # the space belongs to the answer
            given, chosen, rejected = chosen[:shared], chosen[shared:], [r[shared:] for r in rejected]
            if not given.strip():
                raise fail(source, "chosen and rejected share no prompt to begin with", 'add "prompt"')
        prompt = (
            [{"role": "user", "content": given}] if isinstance(given, str) else messages_of(given, "prompt", source)
        )
        if not prompt[-1]["content"].strip():
            raise fail(source, '"prompt" is not a non-empty text', "give prompt as text")
        return group(with_system(prompt, row, source), chosen, rejected, source, context)
    conversations = [
        messages_of(m, name, source) for name, m in (("chosen", chosen), *(("rejected", r) for r in rejected))
    ]
    prompt = (
        []
        if given is None
        else [{"role": "user", "content": given}]
        if isinstance(given, str)
        else messages_of(given, "prompt", source)
    )
    shared = min(_common(conversations), min(map(len, conversations)) - 1)
    if shared:  # the conversations are whole; a prompt beside them only repeats their beginning
        if prompt and conversations[0][:shared][-len(prompt) :] != prompt:
            raise fail(source, "the prompt is not what chosen and rejected begin with", "give the prompt once")
        prompt = conversations[0][:shared]
    if not prompt:
        raise fail(source, "chosen and rejected share no prompt to begin with", 'add "prompt"')
    answers = [
        only_answer(m[shared:], name, source)
        for m, name in zip(conversations, ["chosen", *["rejected"] * len(rejected)], strict=True)
    ]
    return group(with_system(prompt, row, source), answers[0], answers[1:], source, context)


def read_completion(row: Row, source: str, context: Context) -> Example:
    """{prompt, completion}, both texts or both lists of messages."""
    prompt, completion = row["prompt"], row.get("completion")
    if isinstance(completion, list):
        answer = only_answer(messages_of(completion, "completion", source), "completion", source)
    else:
        answer = text(row, "completion", source)
    messages = (
        messages_of(prompt, "prompt", source)
        if isinstance(prompt, list)
        else [{"role": "user", "content": text(row, "prompt", source)}]
    )
    return group(with_system(messages, row, source), answer, [], source, context)
