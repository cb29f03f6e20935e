"""What is wrong or suspicious in data: findings with the rows they are about. Reads rows, never a model."""

from __future__ import annotations

import html
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..errors import UserError
from ..prompts.pairwise import DOMAINS, Domain
from ..records import Example, PreferenceGroup, RankingExample
from . import formats
from .guess import ratings_beside
from .rows import SPLITS, has_split
from .titles import without_hidden
from .wording import manifest_of

SHOWN = 3  # rows that a finding names on the terminal; --json has all of them


ALIKE = 0.8  # share of the shorter history's titles from which two histories are one user's at two times


TWO_STAGES = "fine between two training stages, wrong between training and test"


NOTHING_THERE = "holds no train.jsonl, valid.jsonl or test.jsonl: name a prepared directory or a data file"


COMMON_ENOUGH = 20  # titles below which two files need not have one in common


ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True)
class Finding:
    """level: error (the data cannot be used as it is), warning (a number made of it may mislead), or note."""

    level: str
    what: str
    count: int = 0
    rows: tuple[str, ...] = ()

    def line(self) -> str:
        more = len(self.rows) - SHOWN
        rest = f" and {more} more, listed by --json" if more > 0 else ""
        rows = f"  ({', '.join(self.rows[:SHOWN])}{rest})" if self.rows else ""
        return f"{self.level}: {self.what}{rows}"


def short(text: str, length: int = 60) -> str:
    """A text for a message: escaped, and cut where it is long."""
    return ascii(text if len(text) <= length else f"{text[: length - 3]}...")


@dataclass(frozen=True)
class Part:
    """One file, or one split of a directory: what could be read, and what each row that could not says."""

    name: str
    loaded: formats.DataFile | None
    bad: tuple[str, ...]
    prepared: str = ""  # the prepared directory that it is a split of
    by_time: bool = False  # the directory's splits are parts of each user's time: users stand in all of them


def read_parts(data: Sequence[str], domains: Mapping[str, Domain] = DOMAINS, domain: str = "") -> list[Part]:
    """A directory's or hub data set's splits, or a file, of each name.

    Raises UserError where there is nothing to read at all.
    """
    parts = []
    for name in data:
        splits = [split for split in SPLITS if has_split(name, split)]
        if not splits and Path(name).is_dir():
            raise UserError(f"{name}: {ratings_beside(Path(name)) or NOTHING_THERE}")
        prepared = name if manifest_of(name) else ""
        by_time = manifest_of(name).get("split") == "time"
        for split in splits or ["train"]:
            notes: list[str] = []
            loaded, failed = None, []
            try:
                loaded = formats.load(name, split, domains, True, notes.append, domain)
            except UserError as error:
                failed = [str(error)]
            bad = [message.removeprefix("left out: ") for message in notes if message.startswith("left out: ")]
            bad = bad or failed
            called = loaded.name if loaded else f"{name} ({split})" if splits else name
            parts.append(Part(called, loaded, tuple(bad), prepared, by_time))
    return parts


def _finding(level: str, what: str, rows: Sequence[str]) -> Iterator[Finding]:
    """One finding that begins with the number of rows; none where no row is concerned."""
    if rows:
        yield Finding(level, f"{len(rows)} {what}", len(rows), tuple(dict.fromkeys(rows)))


def _invisible(text: str) -> bool:
    """Whether it holds control or invisible characters that `prepare` would take out."""
    return without_hidden(text) != text


def titles_of(example: RankingExample) -> tuple[str, ...]:
    return (*example.history, example.positive, *example.negatives)


def loose(title: str) -> str:
    """A title without year, what follows a comma or bracket, leading article, case, entities and odd white space."""
    short = re.split(r"[,(\[]", html.unescape(title))[0]
    short = re.sub(r"^(the|a|an)\s", "", short.strip(), flags=re.IGNORECASE)
    return " ".join(short.casefold().split())


def check_rows(part: Part) -> Iterator[Finding]:
    for message in part.bad[:SHOWN]:
        yield Finding(ERROR, message, 1)
    if len(part.bad) > SHOWN:
        yield Finding(ERROR, f"{len(part.bad)} rows of {part.name} cannot be read in all", len(part.bad), part.bad)
    for reason, n in (part.loaded.unconvertible if part.loaded else {}).items():
        yield Finding(NOTE, f"{n} rows of {part.name} hold no ranking pair: {reason}", n)


def check_titles(examples: Sequence[RankingExample]) -> Iterator[Finding]:
    """Titles that a prompt or a comparison would trip over."""
    faults = (
        ("titles hold HTML entities, such as {}: unescape them", lambda t: html.unescape(t) != t),
        ("titles hold control or invisible characters, such as {}: take them out", _invisible),
        ("titles hold stray white space, such as {}: fold it", lambda t: t != " ".join(t.split())),
        ("titles hold \ufffd, a decoding fault, such as {}: decode the source again", lambda t: "\ufffd" in t),
        (("titles hold < or >, which the prompt marks titles with, such as {}: rename "
"them"), lambda t: "<" in t or ">" in t),
    )  # fmt: skip
    where: dict[str, str] = {}
    for e in examples:
        for title in titles_of(e):
            where.setdefault(title, e.source)
    for what, wrong in faults:
        found = [title for title in where if wrong(title)]
        if found:
            yield from _finding(WARNING, what.format(short(found[0])), [where[t] for t in found])


def check_pairs(examples: Sequence[RankingExample]) -> Iterator[Finding]:
    inside = [e.source for e in examples if {e.positive, *e.negatives} & set(e.history)]
    yield from _finding(WARNING, "examples have a candidate that is in their history: the answer can be copied", inside)
    twins = [
        e.source
        for e in examples
        if loose(e.positive) and any(e.positive.casefold().split() == n.casefold().split() for n in e.negatives)
    ]
    yield from _finding(
        WARNING, "examples have a negative that differs from the positive in case or white space only", twins
    )
    seen: set[tuple[Any, ...]] = set()
    twice = []
    for e in examples:
        pairs = {(e.user, e.history, e.positive, n) for n in e.negatives}
        if pairs & seen:
            twice.append(e.source)
        seen |= pairs
    yield from _finding(
        WARNING, "examples repeat an earlier pair (user, history, positive, negative): it counts twice", twice
    )


def check_order(name: str, examples: Sequence[RankingExample]) -> Iterator[Finding]:
    """Whether the file prints the positive first about half the time: |z| > 3 is one in 370 by chance."""
    flags = [flag for e in examples for flag in e.positive_first or ()]
    if not flags:
        return
    share = sum(flags) / len(flags)
    z = (share - 0.5) / math.sqrt(0.25 / len(flags))
    text = f"{name} prints the positive first in {share:.1%} of {len(flags)} pairs"
    if abs(z) > 3:
        yield Finding(
            WARNING,
            f"{text}: position alone gives the answer away; train with --both-orders or --candidate-order epoch",
            len(flags),
        )
    else:
        yield Finding(NOTE, f"{text}, which is balanced", len(flags))


def check_structure(name: str, examples: Sequence[Example]) -> Iterator[Finding]:
    users = Counter(e.user for e in examples)
    ks = Counter(len(e.negatives) if isinstance(e, RankingExample) else len(e.pairs) for e in examples)
    k = ", ".join(f"k = {k}: {n}" for k, n in sorted(ks.items())[:8])
    rows = sorted(users.values())
    kind = "users" if isinstance(examples[0], RankingExample) else "prompts"
    yield Finding(
        NOTE,
        f"{name}: {len(examples)} groups of {len(users)} {kind} ({rows[0]} to {rows[-1]} each, median "
        f"{median(rows):g}); {k}{', …' if len(ks) > 8 else ''}{' (ragged)' if len(ks) > 1 else ''}",
        len(examples),
    )
    if isinstance(examples[0], RankingExample):
        lengths = sorted(len(e.history) for e in examples if isinstance(e, RankingExample))
        yield Finding(NOTE, f"{name}: histories of {lengths[0]} to {lengths[-1]} titles, median {median(lengths):g}")


def check_text(name: str, groups: Sequence[PreferenceGroup]) -> Iterator[Finding]:
    """Preferences in free text: repeated pairs, control characters, answers that differ in white space, a length that
    gives the answer away."""
    seen: set[tuple[str, str, str]] = set()
    twice, control, same = [], [], []
    longer = pairs = 0
    for g in groups:
        texts = [m["content"] for b in g.branches[:1] for m in b.messages] + [b.answer for b in g.branches]
        if any(map(_invisible, texts)):
            control.append(g.source)
        for chosen, rejected in ((g.branches[c].answer, g.branches[r].answer) for c, r in g.pairs):
            pairs += 1
            longer += len(chosen) > len(rejected)
            if chosen.split() == rejected.split():
                same.append(g.source)
            if (g.user, chosen, rejected) in seen:
                twice.append(g.source)
            seen.add((g.user, chosen, rejected))
    yield from _finding(WARNING, "rows hold control or invisible characters: take them out", control)
    yield from _finding(WARNING, "pairs differ in white space only", same)
    yield from _finding(WARNING, "pairs repeat an earlier one: each counts twice", twice)
    if pairs:
        share = longer / pairs
        biased = pairs >= COMMON_ENOUGH and abs(share - 0.5) > 0.25
        what = f"{name}: the chosen answer is the longer one in {share:.1%} of {pairs} pairs"
        yield Finding(
            WARNING if biased else NOTE, what + (": length alone gives the answer away" if biased else ""), pairs
        )


def same_user(first: Sequence[RankingExample], second: Sequence[RankingExample]) -> list[str]:
    """Sources of those of `second` whose history shares ALIKE of the shorter one's titles, and at least two, with one
    of `first`.
    """
    histories = list(dict.fromkeys((e.domain, frozenset(e.history)) for e in first))
    sizes = np.array([len(titles) for _, titles in histories])
    where: dict[tuple[str, str], list[int]] = defaultdict(list)
    for n, (domain, titles) in enumerate(histories):
        for title in titles:
            where[domain, title].append(n)
    index = {key: np.array(found) for key, found in where.items()}
    again: list[str] = []
    known: dict[tuple[str, frozenset[str]], bool] = {}
    for e in second:
        key = (e.domain, frozenset(e.history))
        if key not in known:
            found = [index[e.domain, title] for title in key[1] if (e.domain, title) in index]
            common = np.bincount(np.concatenate(found), minlength=len(sizes)) if found else np.zeros(len(sizes))
            known[key] = bool(((common >= 2) & (common >= ALIKE * np.minimum(sizes, len(key[1])))).any())
        if known[key]:
            again.append(e.source)
    return again


def check_overlap(a: Part, b: Part) -> Iterator[Finding]:
    """Users, prompts and pairs that are in both; titles that only look different."""
    assert a.loaded and b.loaded
    first, second = a.loaded.examples, b.loaded.examples
    users = {e.user for e in first}
    derived = all(e.user.startswith(("history-", "prompt-", "tallrec-")) for e in (*first, *second))
    what = "history" if derived and a.loaded.ranking else "prompt" if derived else "user"
    shared = [e.source for e in second if e.user in users]
    text = f"groups of {b.name} have a {what} that is also in {a.name}"
    if a.by_time and a.prepared == b.prepared:
        yield from _finding(NOTE, f"{text}: the splits are parts of each user's time", shared)
    elif derived and a.loaded.ranking and b.loaded.ranking:  # no ids: a user may come again with a longer history
        again = set(same_user(first, second)) | set(shared)
        text = f"groups of {b.name} share {ALIKE:.0%} of the shorter history or more with a group of {a.name}"
        whole = f"{len(shared)} of them the whole history; this is the same user, a few items later:"
        yield from _finding(WARNING, f"{text} ({whole} {TWO_STAGES})", [e.source for e in second if e.source in again])
    else:
        yield from _finding(WARNING, f"{text}: {TWO_STAGES}", shared)
    if not (a.loaded.ranking and b.loaded.ranking):
        return
    pairs = {(e.history, e.positive, n) for e in first for n in e.negatives}
    both = [e.source for e in second if any((e.history, e.positive, n) in pairs for n in e.negatives)]
    yield from _finding(WARNING, f"groups of {b.name} have a (history, pair) that is also in {a.name}", both)
    titles: dict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for side, examples in enumerate((first, second)):
        for e in examples:
            titles[e.domain][side].update(titles_of(e))
    for domain, (left, right) in titles.items():
        # parts of one person's time need not have a title in common
        if left and right and not (a.by_time and a.prepared == b.prepared):
            yield from _check_spelling(a.name, b.name, domain, left, right)


def _check_spelling(a: str, b: str, domain: str, left: set[str], right: set[str]) -> Iterator[Finding]:
    exact = left & right
    by_key: dict[str, str] = {}
    for title in sorted(left):
        by_key.setdefault(loose(title), title)
    only_loosely = sorted(t for t in right - left if loose(t) and loose(t) in by_key)
    text = f"{len(exact)} of {len(right)} {domain} titles of {b} occur in {a} ({len(left)} titles)"
    if len(only_loosely) > len(exact):
        example = only_loosely[0]
        yield Finding(
            WARNING,
            f"{text}, {len(only_loosely)} more only in a different spelling "
            f"({short(example)} there {short(by_key[loose(example)])}): write titles alike in both",
            len(only_loosely),
        )
    elif not exact and min(len(left), len(right)) >= COMMON_ENOUGH:
        yield Finding(WARNING, f"{text}: the files have no title in common", len(right))
    else:
        yield Finding(NOTE, text, len(exact))


def check(parts: Sequence[Part]) -> list[Finding]:
    """Every finding, part by part, then of each two parts."""
    findings: list[Finding] = []
    for part in parts:
        findings += check_rows(part)
        if part.loaded is None:
            continue
        findings.append(Finding(NOTE, part.loaded.describe(), part.loaded.rows))
        examples = part.loaded.examples
        if part.loaded.ranking:
            findings += [*check_titles(examples), *check_pairs(examples), *check_order(part.name, examples)]
        else:
            findings += check_text(part.name, examples)
        findings += check_structure(part.name, examples)
    usable = [p for p in parts if p.loaded]
    for i, a in enumerate(usable):
        for b in usable[i + 1 :]:
            findings += check_overlap(a, b)
    return findings


def exit_code(findings: Sequence[Finding]) -> int:
    """0 clean, 1 warnings, 2 errors."""
    return max(({ERROR: 2, WARNING: 1, NOTE: 0}[f.level] for f in findings), default=0)


def to_json(findings: Sequence[Finding], tokens: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    levels = Counter(f.level for f in findings)
    return {
        "errors": levels[ERROR],
        "warnings": levels[WARNING],
        "findings": [asdict(f) for f in findings],
        **({"tokens": list(tokens)} if tokens else {}),
    }
