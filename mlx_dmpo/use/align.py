"""The tokens of two answers side by side: a token of both answers is on one line, wherever it is in them"""

from __future__ import annotations

from collections.abc import Sequence

Line = tuple[int | None, int | None]  # a place in the chosen answer, a place in the rejected one


def align(chosen: Sequence[int], rejected: Sequence[int]) -> list[Line]:
    """Pairs equal tokens of two answers, the longest common stretch first, also where stretches have changed places.

    Every token of both answers is in exactly one line. In the order of the chosen answer, then what only the rejected
    one holds.

        chosen 1 2 3 9, rejected 3 1 2 9   ->   (0, 1) (1, 2) (2, 0) (3, 3)
    """
    partner: dict[int, int] = {}
    taken: set[int] = set()
    while True:
        best = (0, 0, 0)
        for i in range(len(chosen)):
            for j in range(len(rejected)):
                n = 0
                while (
                    i + n < len(chosen)
                    and j + n < len(rejected)
                    and chosen[i + n] == rejected[j + n]
                    and i + n not in partner
                    and j + n not in taken
                ):
                    n += 1
                if n > best[0]:
                    best = (n, i, j)
        n, i, j = best
        if not n:
            break
        partner.update((i + k, j + k) for k in range(n))
        taken.update(range(j, j + n))
    lines: list[Line] = [(i, partner.get(i)) for i in range(len(chosen))]
    return lines + [(None, j) for j in range(len(rejected)) if j not in taken]
