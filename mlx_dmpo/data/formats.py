"""Files of ranking data -> RankingExamples: the project's own JSON lines, and the DMPO release's JSON.

The format is decided on the whole file: every row must be of the kind of the first. A row that cannot be read is named as
`file:line` (JSON lines) or `file:row N` (an array, or objects one after another).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..records import RankingExample
from .prompts import DOMAINS, Domain, domain_of, parse_prompt, ranking_answer

OWN, RELEASED = "ranking examples", "released DMPO JSON"
OWN_FIELDS = {"user", "domain", "history", "positive", "negatives"}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: name a data file, or a directory with train.jsonl, valid.jsonl and test.jsonl") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}): name a readable file") from None


def _objects(text: str) -> list[Any] | None:
    """JSON values one after another, white space or commas between; None where that is not what the text is."""
    decoder, at = json.JSONDecoder(), 0
    found: list[Any] = []
    try:
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if at == len(text):
                return found
            value, at = decoder.raw_decode(text, at)
            found.append(value)
    except (ValueError, RecursionError):
        return None


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(source, value) of each row; the value of a row that is no JSON is the UserError that says so."""
    text = _read(path)
    if not text.strip():
        raise UserError(f"{path}: is empty: give at least one row")
    if text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            if getattr(error, "msg", "") != "Extra data":  # else lines, the first of which is a list
                raise _no_json(f"{path}:{getattr(error, 'lineno', 1)}", error) from None
        else:
            if not whole:
                raise UserError(f"{path}: is empty: give at least one row")
            yield from ((f"{path}:row {n}", value) for n, value in enumerate(whole, 1))
            return
    lines: list[tuple[str, Any]] = []
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                lines.append((f"{path}:{n}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                lines.append((f"{path}:{n}", _no_json(f"{path}:{n}", error)))
    if any(isinstance(value, UserError) for _, value in lines):
        values = _objects(text)
        if values is not None:
            yield from ((f"{path}:row {n}", value) for n, value in enumerate(values, 1))
            return
    yield from lines


def _no_json(where: str, error: Exception) -> UserError:
    return UserError(f"{where}: not valid JSON ({getattr(error, 'msg', error)}): mend the syntax")


def _kind(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    return RELEASED if "instruction" in value else OWN if OWN_FIELDS & set(value) else None


def _released_row(row: dict[str, Any], source: str, domains: Mapping[str, Domain]) -> RankingExample:
    """One row of the released JSON as an example with one negative. Raises UserError."""

    def fail(what: str, mend: str) -> UserError:
        return UserError(f"{source}: {what}: {mend}")

    for name in ("instruction", "output"):
        if name not in row:
            raise fail(f'field "{name}" is missing', f'add "{name}" to the object')
    unknown = set(row) - {"instruction", "input", "output"}
    if unknown:
        raise fail(f'unknown field "{min(unknown)}"', "remove or rename it")
    if row.get("input"):
        raise fail('"input" is not empty', "put the whole prompt into instruction")
    parsed = parse_prompt(row["instruction"], domains) if isinstance(row["instruction"], str) else None
    if parsed is None:
        raise fail(
            "the instruction is not the release's ranking prompt",
            "word it as docs/data.md shows, or add its domain under `domains:` in the config",
        )
    if not parsed.history:
        raise fail("the history is empty", "give at least one title")
    answers = (ranking_answer(parsed.first, parsed.second), ranking_answer(parsed.second, parsed.first))
    output = row["output"]
    if isinstance(output, str):  # the rejected answer is the same two titles swapped
        output = [output, answers[1] if output == answers[0] else answers[0]]
    if not isinstance(output, list) or len(output) != 2 or any(not isinstance(o, str) for o in output):
        raise fail('"output" is neither an answer nor [chosen, rejected]', "give one text, or two")
    if answers[0] == answers[1] or output[0] == output[1]:
        raise fail("the pair is identical", "a pair needs two different titles")
    if sorted(output) != sorted(answers):
        raise fail('"output" does not rank the two titles of the instruction', "name both titles, each once, as the instruction does")
    positive_first = output[0] == answers[0]
    positive, negative = (parsed.first, parsed.second) if positive_first else (parsed.second, parsed.first)
    user = "history-" + hashlib.blake2b("\0".join([parsed.domain, *parsed.history]).encode(), digest_size=6).hexdigest()
    return RankingExample(user, parsed.domain, parsed.history, positive, (negative,), (positive_first,), source)


def _grouped(examples: list[RankingExample]) -> list[RankingExample]:
    """Consecutive rows of one user and positive become one example of k; a pair that stands twice begins a new one."""
    groups: list[RankingExample] = []
    for e in examples:
        last = groups[-1] if groups else None
        if last and (last.user, last.positive, last.history) == (e.user, e.positive, e.history) and e.negatives[0] not in last.negatives:
            groups[-1] = replace(
                last, negatives=last.negatives + e.negatives, positive_first=(last.positive_first or ()) + (e.positive_first or ())
            )
        else:
            groups.append(e)
    return groups


def load_examples(
    data: str | Path,
    split: str = "test",
    domains: Mapping[str, Domain] = DOMAINS,
    skip_bad_rows: bool = False,
    notice: Callable[[str], None] = lambda message: None,
) -> list[RankingExample]:
    """The examples of a data file, or of `split` of a prepared directory.

    Raises UserError at the first row that cannot be read; under `skip_bad_rows` each goes to `notice` instead, and it is
    an error only if none is left.
    """
    path = Path(data)
    if path.is_dir():
        path = path / f"{split}.jsonl"
        if not path.is_file():
            raise UserError(f"{path}: no such file: a prepared directory holds train.jsonl, valid.jsonl and test.jsonl")
    examples: list[RankingExample] = []
    kind: str | None = None
    bad = 0
    for source, value in _rows(path):
        try:
            if isinstance(value, UserError):
                raise value
            found = _kind(value)
            if found is None:
                raise UserError(f"{source}: neither a ranking example nor a row of the released JSON: write one as docs/data.md shows")
            kind = kind or found
            if found != kind:
                raise UserError(f"{source}: a row of {found} in a file of {kind}: keep one kind a file")
            example = RankingExample.from_json(value, source) if kind == OWN else _released_row(value, source, domains)
            domain_of(example, domains)
            examples.append(example)
        except UserError as error:
            if not skip_bad_rows:
                raise
            bad += 1
            notice(f"left out: {error}")
    if not examples:
        raise UserError(f"{path}: none of its {bad} rows can be read: see the lines above")
    if bad:
        notice(f"note: {bad} of {bad + len(examples)} rows of {path} were left out")
    return _grouped(examples) if kind == RELEASED else examples
