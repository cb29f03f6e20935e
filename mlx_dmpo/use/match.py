"""Titles as people type them -> the catalogue's titles."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..data.titles import normalize
from ..errors import UserError

CLOSE = 80.0  # of 100: the lowest ratio of rapidfuzz at which a typed title is read as the catalogue's


_YEAR = re.compile(r"\(\d{4}\)\s*$")


def _same_numbers(typed: str, title: str) -> bool:
    """Whether two titles hold the same numbers: "Heat 2" is not "Heat".

    A year in brackets at the end may be left out.
    """
    if not _YEAR.search(typed):
        title = _YEAR.sub("", title)
    return sorted(re.findall(r"\d+", typed)) == sorted(re.findall(r"\d+", title))


@dataclass
class Catalogue:
    """The titles that can be ranked, in the order of their file; all distinct. Empty where the data set has none."""

    titles: tuple[str, ...] = ()
    _folded: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    _known: frozenset[str] = field(default=frozenset(), init=False, repr=False)
    _yearless: tuple[str, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        self._known = frozenset(self.titles)
        self._yearless = tuple(_YEAR.sub("", title) for title in self.titles)
        for title in self.titles:
            self._folded.setdefault(title.casefold(), title)

    def match(self, typed: str, notice: Callable[[str], None] = lambda message: None) -> str:
        """The catalogue's title that `typed` means; an unknown title is kept as typed.

        `notice` gets a line about either. Raises UserError for text with half a surrogate pair, or bytes that are not
        UTF-8.
        """
        from rapidfuzz import fuzz, process, utils

        if typed in self._known:
            return typed
        if any("\ud800" <= c <= "\udfff" for c in typed):  # cleaning would drop them: "Caf" for a Latin-1 "Café"
            raise UserError(f"title {typed[:60]!r}: is not valid Unicode: write it in UTF-8")
        title = normalize(typed)
        if not self.titles or not title or title in self._known:
            return title
        if title.casefold() in self._folded:
            return self._folded[title.casefold()]
        choices = self.titles if _YEAR.search(title) else self._yearless
        near = process.extract(
            title, choices, scorer=fuzz.ratio, processor=utils.default_process, limit=5, score_cutoff=CLOSE
        )
        for _, _, place in near:
            if _same_numbers(title, self.titles[place]):
                notice(f'note: "{title}" is read as "{self.titles[place]}"')
                return self.titles[place]
        notice(f'note: "{title}" is not in the catalogue: it is used as typed')
        return title

    def match_all(self, typed: Iterable[str], notice: Callable[[str], None] = lambda message: None) -> list[str]:
        return [self.match(title, notice) for title in typed]

    def search(self, query: str, limit: int) -> list[str]:
        """The titles most like `query`, best first; the first `limit` of the catalogue for an empty query."""
        from rapidfuzz import fuzz, process, utils

        wanted = utils.default_process(query)
        if not wanted:
            return list(self.titles[:limit])
        begins = [t for t in self.titles if utils.default_process(t).startswith(wanted)][:limit]
        found = process.extract(
            query, self.titles, scorer=fuzz.WRatio, processor=utils.default_process, limit=limit, score_cutoff=55
        )
        return list(dict.fromkeys([*begins, *(title for title, _, _ in found)]))[:limit]
