"""TALLRec's rows: a window of liked and disliked titles and a target, answered Yes. or No."""

from __future__ import annotations

import re

from ...records import Example
from .common import Context, Row, Unconvertible, checked, digest, fail

INPUT = re.compile(
    r"User Preference: ?(?P<liked>.*)\nUser Unpreference: ?(?P<disliked>.*)\n"
    r"Whether the user will like the target (?P<domain>\w+) (?P<target>\".*)\?"
)


# a title in quotation marks; books have `"Title" written by Author`, and an author's name may hold commas
ITEM = re.compile(r'"(?P<title>.*?)"(?:\s*written by\s*(?P<author>.*?))?(?=, "|$)')


def _title(found: re.Match[str]) -> str:
    """As TALLRec prints it, without the marks around a bare title: `"Dune" written by Frank Herbert`, or `Heat`."""
    return f'"{found["title"]}" written by {found["author"]}' if found["author"] is not None else found["title"]


def _titles(text: str, source: str) -> tuple[str, ...]:
    text = text.strip()
    found = list(ITEM.finditer(text))
    if ", ".join(m[0] for m in found) != text:
        raise fail(
            source, f"the titles in {text[:60]!r} cannot be separated", 'write each as "Title" or "Title" written by X'
        )
    return tuple(_title(m) for m in found)


def _target(text: str, source: str) -> str:
    """The target is in quotation marks; a book's has a second pair around title and author."""
    doubled = text.startswith('""') and text.endswith('"') and "written by" in text
    found = ITEM.fullmatch(text[1:-1] if doubled else text)
    if not found:
        raise fail(source, f"the target {text[:60]!r} is not one title", 'write it as "Title" or "Title" written by X')
    return _title(found)


def read_tallrec(row: Row, source: str, context: Context) -> Example:
    """A window of liked and disliked titles and a target, answered Yes. or No.

    Yes: the target is the positive, the liked are the history, the disliked the negatives.
    No: the target is the one negative, the last liked is the positive, those before it the history.
    A row whose window is the last one's with its target, less some items, belongs to the same user.
    """
    found = INPUT.fullmatch(row["input"])
    answer = row.get("output")
    if not found or answer not in ("Yes.", "No."):
        what = '"output" is neither "Yes." nor "No."' if found else '"input" is not worded as in TALLRec'
        raise fail(source, what, "word it as docs/data.md shows")
    liked, disliked = (_titles(found[side], source) for side in ("liked", "disliked"))
    target = _target(found["target"], source)
    items = frozenset((*liked, *disliked))
    if not context.user or not items or not items <= context.window:
        context.user = "tallrec-" + digest([*liked, "", *disliked, "", target])
    context.window = items | {target}
    if target in items:
        raise Unconvertible("the target is already in the window")
    if answer == "Yes.":
        history, positive, negatives = liked, target, tuple(dict.fromkeys(t for t in disliked if t not in liked))
    else:
        history, positive, negatives = liked[:-1], liked[-1] if liked else "", (target,)
    history = tuple(t for t in history if t != positive)
    if not history:
        raise Unconvertible(
            "no liked title to be the history" if liked or answer == "Yes." else "no liked title to be the positive"
        )
    if not negatives:
        raise Unconvertible("no disliked title to be a negative")
    domain = context.domain or found["domain"]
    old = [t for t in dict.fromkeys(disliked) if t != positive]
    return checked(context.user, domain, history, positive, negatives, source, context, disliked=old)
