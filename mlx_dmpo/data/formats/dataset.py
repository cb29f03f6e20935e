"""Files of data -> RankingExamples or PreferenceGroups, whatever their format (see known.py).

The format is decided on the whole file: every row must be of the kind of the first. A row that cannot be read is named
as `file:line` (JSON lines) or `file:row N` (an array, objects one after another, Parquet).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...machine.progress import track
from ...prompts.pairwise import DOMAINS, Domain
from ...records import Example, PreferenceGroup, RankingExample
from ..rows import data_file, read_rows
from .columns import column_map, refuse_lost_text, renamed
from .common import REJECTED, Context, Unconvertible, fail
from .known import OWN, RELEASED, S_DPO, TALLREC, format_of


@dataclass(frozen=True)
class DataFile:
    """A data file, read: its format in words, and its examples, all RankingExamples or all PreferenceGroups."""

    name: str
    format: str
    examples: list[Any]  # list[RankingExample] | list[PreferenceGroup]
    rows: int
    bad: int  # rows that could not be read, under skip_bad_rows
    unconvertible: dict[str, int]  # reason -> sound rows that hold no ranking pair

    @property
    def ranking(self) -> bool:
        return isinstance(self.examples[0], RankingExample)

    def describe(self) -> str:
        kinds = "ranking examples" if self.ranking else "preference groups" if self.has_pairs else "answers"
        bad = f"; {self.bad} of {self.rows} rows were left out" if self.bad else ""
        return f"{self.name}: {self.format}, {self.rows} rows, {len(self.examples)} {kinds}{bad}"

    @property
    def has_pairs(self) -> bool:
        return self.ranking or bool(self.examples[0].pairs)


def _grouped(examples: list[RankingExample]) -> list[RankingExample]:
    """Consecutive rows of one user and positive become one example of k; a repeated pair begins a new one."""
    groups: list[RankingExample] = []
    for e in examples:
        last = groups[-1] if groups else None
        if (
            last
            and (last.user, last.positive, last.history) == (e.user, e.positive, e.history)
            and not set(e.negatives) & set(last.negatives)
            and (last.positive_first is None) == (e.positive_first is None)
        ):
            orders = None if last.positive_first is None else last.positive_first + (e.positive_first or ())
            groups[-1] = replace(last, negatives=last.negatives + e.negatives, positive_first=orders)
        else:
            groups.append(e)
    return groups


def _read(rows: Iterable[tuple[str, Any]], columns: Any, context: Context) -> Iterator[tuple[str, Example | UserError]]:
    """(format, example) of each row; in place of a row that cannot be read, the error that says why."""
    kind: tuple[str, type] | None = None
    for source, value in rows:
        name = kind[0] if kind else ""
        try:
            if isinstance(value, UserError):
                raise value
            row = columns(value, source) if columns else value
            if isinstance(row, dict):
                row = {k: v for k, v in row.items() if v is not None}  # every row has each column of a table
            row = renamed(row, source, context)
            form = format_of(row, source)
            if kind and form.name != kind[0]:
                raise fail(source, f"a row of {form.name} in a file of {kind[0]}", "keep one kind in a file")
            if form.fields is not None:
                context.unused |= {k for k in row if k not in form.fields and not REJECTED.fullmatch(k)}
            name = form.name
            example = form.read(row, source, context)
            if form.text and form.fields is not None and isinstance(example, PreferenceGroup):
                refuse_lost_text(row, form.fields, form.name, example, source)
            found = (form.name, type(example))
            if kind and found != kind:
                said = {RankingExample: "rankings of two titles", PreferenceGroup: "free text"}
                raise fail(source, f"a row of {said[found[1]]} in a file of {said[kind[1]]}", "keep one kind in a file")
            kind = kind or found
            yield name, example
        except UserError as error:
            if isinstance(error, Unconvertible):
                kind = kind or (name, RankingExample)
            yield name, error


def load(
    data: str | Path,
    split: str = "test",
    domains: Mapping[str, Domain] = DOMAINS,
    skip_bad_rows: bool = False,
    notice: Callable[[str], None] = lambda message: None,
    domain: str = "",
) -> DataFile:
    """A data file, `split` of a prepared directory, or of a data set of the hub (`owner/name[:config][@split]`).

    `domain` is that of rows which name none. Raises UserError at the first row that cannot be read; under
    `skip_bad_rows` each goes to `notice` instead, and it is an error only if none is left. `notice` gets the format
    too.
    """
    path = data_file(data, split)
    columns = column_map(path) if path else None
    context = Context(domains, domain)
    examples: list[Any] = []
    reasons: Counter[str] = Counter()
    rows = bad = 0
    name = ""
    bar = track(read_rows(data, split), "read", "row")
    for found, example in _read(bar, columns, context):
        rows += 1
        if isinstance(example, Unconvertible):
            reasons[str(example)] += 1
        elif isinstance(example, UserError):
            if not skip_bad_rows:
                raise example
            bad += 1
            notice(f"left out: {example}")
        else:
            examples.append(example)
            name = found
    where = str(path or data)
    if not examples:
        why = "; ".join(f"{n}: {reason}" for reason, n in reasons.items()) or "see the lines above"
        raise UserError(f"{where}: none of its {rows} rows can be used: {why}")
    if isinstance(examples[0], RankingExample) and name != OWN:
        if name not in (RELEASED, TALLREC, S_DPO):
            name += " in the release's ranking prompt"
        if name != S_DPO:
            examples = _grouped(examples)
    loaded = DataFile(where, name, examples, rows, bad, dict(reasons))
    notice(loaded.describe())
    for reason, n in reasons.items():
        notice(f"note: {n} of {rows} rows of {where} hold no ranking pair: {reason}")
    for column, standard in context.renamed.items():
        notice(f'note: column "{column}" of {where} is read as the {standard}')
    if context.unused:
        notice(f"note: columns of {where} that are not used: {', '.join(sorted(context.unused))}")
    return loaded


def load_examples(
    data: str | Path,
    split: str = "test",
    domains: Mapping[str, Domain] = DOMAINS,
    skip_bad_rows: bool = False,
    notice: Callable[[str], None] = lambda message: None,
    domain: str = "",
) -> list[RankingExample]:
    """`load`, for what needs titles: raises UserError for free text too."""
    loaded = load(data, split, domains, skip_bad_rows, notice, domain)
    if not loaded.ranking:
        raise UserError(
            f"{loaded.name}: holds {loaded.format}, no titles to rank: give ranking examples, as docs/data.md shows "
            "them"
        )
    return loaded.examples
