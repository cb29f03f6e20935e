"""Titles as people type them -> the catalogue's titles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ..data.titles import normalise

CLOSE = 86.0  # of 100: rapidfuzz's weighted ratio from which a typed title is taken for the catalogue's


@dataclass
class Catalogue:
    """The titles that can be ranked, in the order of their file; all distinct. Empty where the data set has none."""

    titles: tuple[str, ...] = ()
    _folded: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    _known: frozenset[str] = field(default=frozenset(), init=False, repr=False)

    def __post_init__(self) -> None:
        self._known = frozenset(self.titles)
        for title in self.titles:
            self._folded.setdefault(title.casefold(), title)

    def match(self, typed: str, notice: Callable[[str], None] = lambda message: None) -> str:
        """The catalogue's title that `typed` means; an unknown title is kept as typed. `notice` gets a line about either."""
        from rapidfuzz import fuzz, process, utils

        if typed in self._known:
            return typed
        title = normalise(typed)
        if not self.titles or not title or title in self._known:
            return title
        if title.casefold() in self._folded:
            return self._folded[title.casefold()]
        found = process.extractOne(
            title, self.titles, scorer=fuzz.WRatio, processor=utils.default_process, score_cutoff=CLOSE
        )
        # a weighted ratio is high for any short word inside a long title: the lengths must be comparable too
        if found and fuzz.ratio(utils.default_process(title), utils.default_process(found[0])) >= CLOSE - 26:
            notice(f'note: "{title}" is taken for "{found[0]}"')
            return str(found[0])
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
        begins: Sequence[str] = [t for t in self.titles if utils.default_process(t).startswith(wanted)][:limit]
        found = process.extract(
            query, self.titles, scorer=fuzz.WRatio, processor=utils.default_process, limit=limit, score_cutoff=55
        )
        return list(dict.fromkeys([*begins, *(title for title, _, _ in found)]))[:limit]
