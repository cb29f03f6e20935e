"""What to change when too few users are eligible, computed: every change is tried on the ratings at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ..config import PrepareSettings
from .splits import DRAWN, Histories, LikedRule, eligible_users, is_liked, is_one, least_disliked

SHOWN = 4  # changes named
VALUES = 20  # thresholds tried
MANY = 1 / 3  # share of one extreme rating that is pointed out


def advice(h: Histories, rule: LikedRule, settings: PrepareSettings, titles: int) -> str:
    """The threshold, the ratings on each side, and which single change makes how many users eligible."""
    users = int((np.diff(h.start) > 0).sum())
    now = len(eligible_users(h, settings, titles)[0])
    liked = int(h.liked.sum())
    sides = f"{rule.words}: {liked:,} of {len(h.liked):,} ratings are liked, {len(h.liked) - liked:,} disliked"
    found: dict[str, int] = {}
    for flag, changed, other in _changes(h, rule, settings):
        number = len(eligible_users(changed, other, titles)[0])
        name = flag.split()[0]
        known = next((f for f in found if f.split()[0] == name), "")
        if number > max(now, found.get(known, 0)):  # the best value of each flag, the mildest among equals
            found.pop(known, None)
            found[flag] = number
    best = sorted(found.items(), key=lambda change: -change[1])[:SHOWN]
    if best:
        each = "; ".join(f"{flag}: {number:,} of {users:,}" for flag, number in best)
        return f"{sides}; one change at a time makes eligible: {each}"
    if settings.negatives not in DRAWN:
        other = replace(settings, negatives="popularity", min_disliked=0)
        number = len(eligible_users(h, other, titles)[0])
        if number > now:
            return f"{sides}; --negatives popularity --min-disliked 0 makes {number:,} of {users:,} eligible"
        return f"{sides}; no single change helps: users rated too little; lower --min-liked and --min-disliked together"
    return f"{sides}; add --catalogue FILE, further titles to draw negatives from"


def _changes(h: Histories, rule: LikedRule, s: PrepareSettings) -> Iterator[tuple[str, Histories, PrepareSettings]]:
    """(flag, histories, settings) of each change, the mildest of a flag first."""
    counts = np.diff(h.start)
    user = np.repeat(np.arange(len(counts)), counts)

    def by(other: LikedRule) -> Histories:
        return replace(h, liked=is_liked(other, user, h.rating, h.start))

    for quantile in (0.5, 0.75, 0.25):
        if rule.quantile != quantile:
            yield f"--liked-quantile {quantile:g}", by(LikedRule(None, quantile, "")), s
    values = np.unique(h.rating)
    if len(values) > VALUES:
        values = np.unique(np.quantile(h.rating, np.linspace(0.05, 0.95, VALUES), method="inverted_cdf"))
    centre = rule.threshold if rule.threshold is not None else float(np.median(h.rating))
    for value in sorted(values[:-1] if len(values) > 1 else [], key=lambda v: abs(v - centre)):
        if value != rule.threshold:
            yield f"--liked-above {value:g}", by(LikedRule(float(value), None, "")), s
    for number in range(s.min_liked - 1, 1, -1):
        yield f"--min-liked {number}", h, replace(s, min_liked=number)
    for number in range(s.min_disliked - 1, least_disliked(replace(s, min_disliked=0), False) - 1, -1):
        yield f"--min-disliked {number}", h, replace(s, min_disliked=number)
    if s.max_interactions and is_one(s):
        yield "--max-interactions 0", h, replace(s, max_interactions=0)


def extreme(rating: np.ndarray) -> str:
    """A note where the lowest or the highest rating makes up more than a third of a column, "" otherwise."""
    values, counts = np.unique(rating, return_counts=True)
    if len(values) < 2:
        return ""
    for place, name in ((0, "lowest"), (-1, "highest")):
        share = counts[place] / len(rating)
        value = f"{values[place]:g}"
        if share > MANY:
            fix = (
                f"if it means not rated, add --unrated {value}"
                if place == 0
                else "if that makes too much liked or disliked, set --liked-above or --liked-quantile"
            )
            return f"{share:.0%} of the ratings are {value}, the {name} value: {fix}"
    return ""
