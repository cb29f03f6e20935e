"""Raw titles -> the titles that the model sees, by one rule for all splits.

Two items whose titles end up equal are one item from here on: nothing that the model sees tells them apart.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# As MovieLens has them. An article that ends in an apostrophe is joined without a space: "Avventura, L'" -> "L'Avventura".
ARTICLES = (
    "The A An Le La Les L' Un Une El Los Las Una Il Lo Gli I O Os Der Die Das Ein Eine Den Det De Het En Ett".split()
)


_ARTICLE = re.compile(rf"(^|\()([^()]+?), ({'|'.join(ARTICLES)})(?=\s*(?:[()]|$))")


_YEAR = re.compile(r"\s*\(\d{4}(?:-\d{0,4})?\)$")


_ANGLES = str.maketrans("<>", "‹›")  # else "> " inside a title would end it: the prompt writes <Title:...>


# format characters that a title needs: joiners of Persian, Indic scripts and emoji, and Arabic and Syriac number marks
_KEPT = "\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u08e2"


_FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007e]{1,8}\U000e007f")  # England, Scotland, Wales: a black flag and tags


def hidden(title: str) -> str:
    """The characters of a title that show nothing and that `normalise` takes out: control, direction and format characters.

    Characters that this Python's tables do not know yet stay, so that titles do not depend on the version of Python.
    """
    rest = _FLAG.sub("", title)
    return "".join(
        c for c in rest if not c.isspace() and c not in _KEPT and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co")
    )


def normalise(title: str, articles: bool = True, years: bool = True) -> str:
    """Entities unescaped, white space folded, control characters gone, NFC; < and > as ‹ and ›. May leave nothing: "".

    articles  "Sixth Sense, The (1999)" -> "The Sixth Sense (1999)", also within the brackets of another language's title
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


def _clean(title: str) -> str:
    title = unicodedata.normalize("NFC", html.unescape(title))
    for c in set(hidden(title)):
        title = _without(title, c)
    return " ".join(title.split())


def _without(title: str, character: str) -> str:
    """The title without a character, except inside a flag."""
    if not "\U000e0020" <= character <= "\U000e007f":
        return title.replace(character, "")
    flags = _FLAG.findall(title)
    parts = (part.replace(character, "") for part in _FLAG.split(title))
    return "".join(part + flag for part, flag in zip(parts, [*flags, ""], strict=True))


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
        title = normalise(raw.get(item, ""), articles, years)
        if title:
            of_item[i] = index.setdefault(title, len(index))
            if of_item[i] == len(ids):
                ids.append([])
            ids[of_item[i]].append(item)
    return Catalogue(list(index), ids, of_item)
