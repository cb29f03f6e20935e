"""Raw titles -> the titles that the model sees, by one rule for all splits.

Two items whose titles end up equal are one item from here on: nothing that the model sees tells them apart.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# As MovieLens has them. An article that ends in an apostrophe is joined without a space: "Avventura, L'" ->
# "L'Avventura".
ARTICLES = (
    "The A An Le La Les L' Un Une El Los Las Una Il Lo Gli I O Os Der Die Das Ein Eine Den Det De Het En Ett".split()
)


_ARTICLE = re.compile(rf"(^|\()([^()]+?), ({'|'.join(ARTICLES)})(?=\s*(?:[()]|$))")


_YEAR = re.compile(r"\s*\(\d{4}(?:-\d{0,4})?\)$")


_ANGLES = str.maketrans("<>", "‹›")  # else "> " inside a title would end it: the prompt writes <Title:...>


# Format characters that belong to the spelling: joiners (Persian, Indic scripts, emoji), number marks (Arabic, Syriac),
# the tags of a flag such as Scotland's.
_SPELT = re.compile("[\u200c\u200d\u0600-\u0605\u06dd\u070f\u08e2]|\U0001f3f4[\U000e0020-\U000e007e]{1,8}\U000e007f")


def without_hidden(text: str) -> str:
    """The text without control and invisible characters; white space stays, and so does what a script or an emoji is
    spelt with.

    Characters that Python's tables do not know stay, so that a title does not depend on the version of Python.
    """
    if text.isprintable():
        return text
    spelt = {n for m in _SPELT.finditer(text) for n in range(*m.span())}
    hidden = ("Cc", "Cf", "Cs", "Co")
    return "".join(c for n, c in enumerate(text) if n in spelt or c.isspace() or unicodedata.category(c) not in hidden)


def normalize(title: str, articles: bool = True, years: bool = True) -> str:
    """Entities unescaped, white space folded, control characters gone, NFC; < and > as ‹ and ›. May leave nothing: "".

    articles  "Sixth Sense, The (1999)" -> "The Sixth Sense (1999)", also within the brackets of another language's
              title
    years     False drops the year that ends the title
    """
    title, before = _clean(title), title
    while title != before:  # "&amp;amp;" is seen in the wild, and a control character may hide an entity
        title, before = _clean(title), title
    title = title.translate(_ANGLES)
    if not years:
        title = _YEAR.sub("", title)
    if articles:
        title = _ARTICLE.sub(lambda m: f"{m[1]}{m[3]}{'' if m[3].endswith(chr(39)) else ' '}{m[2]}", title)
    return " ".join(title.split())


def years_differ(some: Collection[str], others: Collection[str]) -> bool:
    """Whether a year ends most titles of one side and few of the other: it would tell the sides apart."""

    def share(titles: Collection[str]) -> float:
        return sum(bool(_YEAR.search(t.strip())) for t in titles) / max(1, len(titles))

    return abs(share(some) - share(others)) > 0.5


def _clean(title: str) -> str:
    return " ".join(without_hidden(unicodedata.normalize("NFC", html.unescape(title))).split())


@dataclass(frozen=True, slots=True, eq=False)
class Catalogue:
    """titles[t] stands for the items ids[t]; of_item (I,) int32 gives an item's title, -1 where it has none."""

    titles: list[str]
    ids: list[list[str]]
    of_item: np.ndarray

    @property
    def merged(self) -> list[int]:
        """The titles that stand for more than one item."""
        return [t for t, ids in enumerate(self.ids) if len(ids) > 1]


def catalogue(items: Sequence[str], raw: Mapping[str, str], articles: bool, years: bool) -> Catalogue:
    """The distinct titles of `items`, in their order."""
    index: dict[str, int] = {}
    ids: list[list[str]] = []
    of_item = np.full(len(items), -1, np.int32)
    for i, item in enumerate(items):
        title = normalize(raw.get(item, ""), articles, years)
        if title:
            of_item[i] = index.setdefault(title, len(index))
            if of_item[i] == len(ids):
                ids.append([])
            ids[of_item[i]].append(item)
    return Catalogue(list(index), ids, of_item)
