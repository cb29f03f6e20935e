"""Alpaca rows, as LLaMA-Factory has them."""

from __future__ import annotations

from ...records import Example, Message
from .common import Context, Row, fail, group, is_preference, rejected_of, text, with_system


def _alpaca_prompt(row: Row, source: str) -> list[Message]:
    """system, history and instruction, as LLaMA-Factory's alpaca converter joins them."""
    messages = with_system([], row, source)
    history = row.get("history") or []
    if not isinstance(history, list) or any(
        not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(t, str) and t.strip() for t in turn)
        for turn in history
    ):
        raise fail(source, '"history" is not a list of [question, answer]', "write each earlier turn as two texts")
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    parts = [text(row, "instruction", source), text(row, "input", source, blank=True)]
    return [*messages, {"role": "user", "content": "\n".join(p for p in parts if p)}]


def read_alpaca(row: Row, source: str, context: Context) -> Example:
    """{instruction, input, output} of one answer, or [chosen, rejected, ...]; or {instruction, input, chosen,
    rejected}.
    """
    prompt = _alpaca_prompt(row, source)
    if is_preference(row):
        answers = [row["chosen"], *rejected_of(row, source)]
        name = "chosen" if not isinstance(row["chosen"], str) else "rejected"
    else:
        if row.get("output") is None:
            raise fail(source, 'field "output" is missing', 'add "output", or "chosen" and "rejected"')
        answers, name = row["output"] if isinstance(row["output"], list) else [row["output"]], "output"
    if not answers or not all(isinstance(a, str) for a in answers):
        raise fail(source, f'"{name}" is neither an answer nor a list of answers', "give texts")
    if isinstance(row.get("output"), list) and len(answers) < 2:
        raise fail(source, '"output" is neither an answer nor [chosen, rejected]', "give one text, or two")
    return group(prompt, answers[0], answers[1:], source, context)
