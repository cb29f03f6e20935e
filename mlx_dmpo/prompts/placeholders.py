"""Placeholders of a template: which a form has, and how text is cut at them."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from ..errors import UserError

FORMS = {  # form -> placeholders that its prompt must have, those of its answer
    "pairwise": (("history", "first", "second"), ("first", "second")),
    "listwise": (("history", "candidates"), ("title",)),
    "direct": (("history",), ("title",)),
    "pointwise": (("history", "target"), ()),
}
LISTS = ("history", "disliked", "candidates")  # placeholders for several titles, each printed by the template's `title`
TITLES = ("first", "second", "target")  # placeholders for one title
SAMPLES = ("Heat", "Heat 2", "2", "Up, Up", 'The "A" <B>', "a > b", "{first}", "and")  # titles for the checks at load


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain's words: "{topic} recommendations", "history of {items} they have {consumed}", "the target {item}"."""

    topic: str = ""
    items: str = ""
    consumed: str = ""
    consuming: str = ""
    item: str = ""


WORDS = tuple(f.name for f in fields(Domain))


def parts(text: str, where: str) -> list[tuple[str, str]]:
    """[(literal text, placeholder that follows it or "")]. Raises UserError for braces that are not a placeholder."""
    try:
        found = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UserError(f"{where}: {error}: write {{{{ and }}}} for braces that are text") from None
    for _, name, spec, conversion in found:
        if name is not None and (spec or conversion or not name.isidentifier()):
            shown = "{" + name + ("!" + conversion if conversion else "") + (":" + spec if spec else "") + "}"
            raise UserError(f"{where}: {shown} is not a placeholder: write a bare name such as {{history}}")
    return [(literal, name or "") for literal, name, _, _ in found]


def filled(text: Sequence[tuple[str, str]], values: Mapping[str, str]) -> str:
    return "".join(literal + (values[name] if name else "") for literal, name in text)
