"""The smallest set of history items whose removal changes a margin's sign"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

Removed = tuple[int, ...]  # places in the history, ascending
CHUNK = 64  # sets scored at once in the exact search
MOST = 5000  # sets of one size that are searched where nobody says how large a set may be


def affordable(n: int, most: int = MOST) -> int:
    """The largest size, at most three, of which a history of n items has at most `most` sets."""
    return max((size for size in (1, 2, 3) if math.comb(n, size) <= most), default=0)


def sets(n: int, limit: int) -> int:
    """How many sets of up to `limit` of n items a search scores at most."""
    return sum(math.comb(n, size) for size in range(1, min(limit, n - 1) + 1))


def flip_set(
    n: int, base: float, margins: Callable[[Sequence[Removed]], np.ndarray], limit: int = 3
) -> tuple[Removed | None, np.ndarray]:
    """(the set, None if no set of up to `limit` items changes the sign; the margin without each single item (n,)).

    n        items of the history; at least one is always left
    margins  the margins without each of several sets of items
    Single items first. Then greedily: the item that moves the margin most, and what moves it most together with that.
    Then every set of two and of three, the likeliest first by the sum of the single effects, so that a greedy set of
    three is given only if no set of two does it.
    """
    known: dict[Removed, float] = {(): base}

    def score(sets: Iterable[Removed]) -> list[Removed]:
        """Scores what is not known yet; gives those that change the sign, the strongest first."""
        sets = list(dict.fromkeys(sets))
        missing = [s for s in sets if s not in known]
        if missing:
            known.update(zip(missing, map(float, margins(missing)), strict=True))
        turned = [s for s in sets if known[s] * base < 0]
        return sorted(turned, key=lambda s: (known[s] * np.sign(base), s))

    singles = [(i,) for i in range(n)] if n > 1 else []
    turned = score(singles)
    alone = np.array([known.get((i,), base) for i in range(n)])
    limit = min(limit, n - 1)
    if limit < 1 or base == 0 or not singles:
        return None, alone
    if turned:
        return turned[0], alone
    greedy = _greedy(n, base, score, known, limit)
    for size in range(2, limit + 1):
        if greedy is not None and len(greedy) == size:
            return greedy, alone
        moved = np.sign(base) * (base - alone)  # how far each single item moves the margin towards 0
        every = sorted(itertools.combinations(range(n), size), key=lambda s: (-moved[list(s)].sum(), s))
        for start in range(0, len(every), CHUNK):
            if turned := score(every[start : start + CHUNK]):
                return turned[0], alone
    return None, alone


def _greedy(
    n: int, base: float, score: Callable[[Iterable[Removed]], list[Removed]], known: dict[Removed, float], limit: int
) -> Removed | None:
    """The first set on the greedy path that changes the sign."""
    taken: Removed = ()
    for _ in range(limit):
        grown = [tuple(sorted((*taken, i))) for i in range(n) if i not in taken]
        if turned := score(grown):
            return turned[0]
        taken = min(grown, key=lambda s: (known[s] * np.sign(base), s))
    return None
