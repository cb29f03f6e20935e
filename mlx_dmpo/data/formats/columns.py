"""Columns of other names: what a dataset_info.json says of them, and names that are understood without one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...records import PreferenceGroup
from .common import REJECTED, Context, Row, fail, is_preference

ALPACA_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "chosen": "chosen",
    "rejected": "rejected",
}


SHAREGPT_COLUMNS = {"messages": "conversations", "system": "system", "chosen": "chosen", "rejected": "rejected"}


TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"}


def column_map(path: Path) -> Callable[[Any, str], Any] | None:
    """What the `dataset_info.json` beside a file says of its columns, as a function (row, source) -> row in the
    standard names.

    None where there is no such file, or it says nothing of this one. Raises UserError for a map that cannot be
    followed.
    """
    info = path.parent / "dataset_info.json"
    if path == info or not info.is_file():
        return None
    try:
        entries = json.loads(info.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{info}: cannot be read ({error}): fix it, or move it away from {path.name}") from None
    entries = entries.items() if isinstance(entries, dict) else ()
    found = [(name, e) for name, e in entries if isinstance(e, dict) and e.get("file_name") == path.name]
    if not found or not {"columns", "tags"} & set(found[0][1]):
        return None
    name, entry = found[0]
    columns, tags = entry.get("columns", {}), entry.get("tags", {})
    standard = SHAREGPT_COLUMNS if entry.get("formatting") == "sharegpt" else ALPACA_COLUMNS
    for part, known, given in (("columns", standard, columns), ("tags", TAGS, tags)):
        if not isinstance(given, dict) or any(not isinstance(v, str) for v in given.values()):
            raise UserError(f'{info}: "{part}" of {name} is not a map of names: write {{"prompt": "question", ...}}')
        for key in given:
            if key not in known:
                raise UserError(f'{info}: {part} of {name}: "{key}" is not supported: known are {", ".join(known)}')
    # a tag's value -> the standard one: {"role": "from", "content": "value", "user": "human", ...}
    names = {tags.get(tag, value): value for tag, value in TAGS.items()}

    def retagged(message: Any) -> Any:
        if isinstance(message, list):
            return [retagged(m) for m in message]
        if not isinstance(message, dict):
            return message
        found = {names.get(key, key): value for key, value in message.items()}
        return found | {"from": names.get(str(found["from"]), found["from"])} if "from" in found else found

    def mapped(row: Any, source: str) -> Any:
        if not isinstance(row, dict):
            return row
        for key, column in columns.items():
            if column not in row:
                raise UserError(f'{source}: column "{column}" is missing: {info.name} names it as the {key} of {name}')
        # what the entry does not name keeps its place only where it already has the standard name
        row = {standard[k]: row[c] for k, c in columns.items()} | {
            s: row[s] for k, s in standard.items() if k not in columns and s in row and s not in columns.values()
        }
        return {k: retagged(v) for k, v in row.items()} if standard is SHAREGPT_COLUMNS else row

    return mapped


# Names under which prompts, system texts and answers are seen elsewhere.
PROMPTS = ("question", "query", "input", "instruction", "problem", "post", "user_prompt", "user_input", "user_message")


SYSTEMS = ("system_prompt", "system_message")


CHOSEN = ("chosen_response", "response_chosen", "chosen_answer", "preferred", "accepted")


REJECTED_TOO = ("rejected_response", "response_rejected", "rejected_answer", "dispreferred", "rejected")


COMPLETIONS = ("response", "answer", "output")


# Columns whose text may be a part of the prompt: never left out in silence.
_PART = {*PROMPTS, *SYSTEMS, "system", "prompt", "context", "history", "dialogue", "conversation", "conversations"}


# Columns that describe a row; their text is never the prompt.
_ABOUT = re.compile(
    r"(.*_)?(id|idx|index|uuid|source|dataset|category|categories|type|topic|tags?|labels?|lang|language|model|models|"
    r"score|scores|rating|ratings|split|url|date|timestamp|license|notes?|comments?|rationale|reason|metadata|"
    r"chosen|rejected|margin|difficulty|subset|author|title)(_.*)?"
)


def _folded(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip()).casefold()


def _filled(value: Any) -> bool:
    return isinstance(value, str | list) and bool(value.strip() if isinstance(value, str) else value)


def renamed(row: Any, source: str, context: Context) -> Any:
    """The row, columns of other names under the standard ones: a question is a prompt, a response a completion.

    Raises UserError where it is not clear which column is the prompt: a text beside an answer is never thrown away.
    """
    if not isinstance(row, dict) or "trueSelection" in row or "positive" in row:
        return row
    row = dict(row)

    def rename(names: Sequence[str], standard: str) -> None:
        found = [name for name in names if _filled(row.get(name))]
        if standard in row or not found:
            return
        if len(found) > 1:
            raise fail(
                source,
                f"columns {' and '.join(found)} may both be the {standard}",
                f"rename one to {standard}, or name the columns in a dataset_info.json beside the file",
            )
        row[standard] = row.pop(found[0])
        context.renamed[found[0]] = standard

    for name in [n for n in row if isinstance(n, str) and _folded(n) != n and _folded(n) not in row]:
        if _folded(name) in {*_PART, *COMPLETIONS, *CHOSEN, *REJECTED_TOO, "chosen", "completion", "messages"}:
            row[_folded(name)] = row.pop(name)
    for one, other in zip(CHOSEN, REJECTED_TOO, strict=True):
        if one in row and other in row:
            rename([one], "chosen")
            rename([other], "rejected")
    rename(SYSTEMS, "system")
    if is_preference(row):
        whole = isinstance(row["chosen"], list) and len(row["chosen"]) > 1  # the conversations hold the prompt
        if not whole and not {"conversations", "instruction", "prompt"} & set(row):
            rename(PROMPTS, "prompt")
        if isinstance(row["chosen"], str) and not {"conversations", "instruction", "prompt"} & set(row):
            _refuse_unknown_prompt(row, source)
    elif "instruction" in row:
        rename(COMPLETIONS, "output")
    elif not {"conversations", "messages", "completion"} & set(row) and any(n in row for n in COMPLETIONS):
        rename(PROMPTS, "prompt")
        if "prompt" in row:
            rename(COMPLETIONS, "completion")
    return row


def _refuse_unknown_prompt(row: Row, source: str) -> None:
    """Raises UserError where another column may hold the prompt: what the answers begin with would be taken for it."""
    for name, value in row.items():
        known = is_answer(name) or name == "system" or _ABOUT.fullmatch(_folded(name))
        if not known and _filled(value) and not (isinstance(value, str) and re.fullmatch(r"[\x21-\x7e]+", value)):
            raise fail(
                source,
                f'has no column "prompt", and "{name}" may hold it',
                'rename it to "prompt", or remove it if the answers begin with their prompt',
            )


def is_answer(name: str) -> bool:
    return name in ("chosen", "rejected") or bool(REJECTED.fullmatch(name))


def _texts(value: Any) -> Iterator[str]:
    """The texts of a column: itself, or those of its messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        yield from _texts(value.get("content", value.get("value")))


def refuse_lost_text(row: Row, used: frozenset[str], form: str, group: PreferenceGroup, source: str) -> None:
    """Raises UserError where a column that may be a part of the prompt is not in the prompt that was read."""
    read = "\n".join([m["content"] for b in group.branches for m in b.messages] + [b.answer for b in group.branches])
    for name in row:
        if name not in used and name in _PART and any(t.strip() and t.strip() not in read for t in _texts(row[name])):
            raise fail(
                source,
                f'column "{name}" is not part of {form}, and its text would be lost',
                "join it to the prompt, or remove the column",
            )
