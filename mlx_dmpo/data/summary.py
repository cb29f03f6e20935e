"""What `prepare` writes beside the examples and prints: rules, counts, notes, items, users, the numbers of
the picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import PrepareSettings
from ..machine import commands
from ..prompts.pairwise import DOMAINS
from ..records import RankingExample
from . import splits
from .examples import Rankings
from .sources import BadRows, Ratings
from .titles import Catalogue

SHOWN = 5  # merged titles printed on the terminal; all are in items.jsonl
MANY = 2000  # training examples from which the time is worth a look


@dataclass(frozen=True, slots=True, eq=False)
class Domain:
    """One domain of the output, with all that was decided on the way."""

    name: str
    source: str
    split: str  # user or time
    files: list[Path]
    rules: list[str]
    notes: list[str]
    counts: dict[str, Any]
    examples: dict[str, list[RankingExample]]
    items: list[dict[str, Any]]
    users: list[dict[str, Any]]
    charts: dict[str, Any]


def rules(rule: splits.LikedRule, order: str, s: PrepareSettings, all_liked: bool) -> list[str]:
    """Every rule in words, for the terminal and the manifest."""
    one, last = splits.is_one(s), s.max_interactions
    window = f"the last {last} interactions" if last else "all interactions"
    window += " of a user" if one else " before each positive"
    ordered = {
        "time": "by time, ties in the file's order",
        "file": "in the file's order",
        "random": f"in random order (seed {s.seed})",
    }[order]
    among = " among them" if one else ""
    source = {
        "disliked": f"of the user's disliked items{among}, drawn by seed",
        "uniform": "drawn uniformly from items that the user has not seen",
        "popularity": "drawn by popularity from items that the user has not seen",
    }.get(s.negatives, "")
    if not one and s.negatives == "disliked":
        source = "of the user's disliked items, " + (
            "the nearest in time first" if order == "time" else "drawn by seed"
        )
        source += ", those of train from before valid, of valid from before test" if s.split == "time" else ""
    if not source:
        file = Path(s.negatives).name
        source = f"of the user's disliked items{among}, smallest margin in {file} first, the rest drawn by seed"
    number = f"up to {s.num_negatives}" if s.num_negatives else "all"
    positive = "the last liked" if one else f"{s.examples_per_user} of the liked, one example each"
    apart = (
        "each user's examples in order of time: 70 % train, then 10 % valid, then 20 % test"
        if s.split == "time"
        else f"users drawn by seed {s.seed}; nobody is in two splits"
        + (f"; few-shot: the first {s.few_shot} of train" if s.few_shot else "")
    )
    return [
        rule.words + ("" if all_liked else ", all others disliked"),
        f"{window}, {ordered}; a title that occurs twice counts the last time",
        f"users with at least {s.min_liked} liked and {splits.least_disliked(s, all_liked)} disliked{among}",
        f"positive: {positive}; history: the liked before it",
        f"negatives: {number} {source}",
        apart,
        (
            f"titles: articles {'first' if s.title_articles else 'as they are'}, years "
            f"{'kept' if s.title_years else 'dropped'}"
        ),
    ]


def counts(
    ratings: Ratings,
    bad: BadRows,
    h: splits.Histories,
    titles: Catalogue,
    eligible: Sequence[int],
    unfit: dict[str, int],
    examples: dict[str, list[RankingExample]],
) -> dict[str, Any]:
    users = int((np.diff(h.start) > 0).sum())
    lengths = {s: [len(e.history) for e in es] for s, es in examples.items() if es}
    """The numbers of the manifest."""
    return {
        "ratings": len(ratings.interactions.user),
        "rows_unreadable": dict(bad.counts),
        "ratings_without_title": h.untitled,
        "items_without_title": int((titles.of_item < 0).sum()),
        "ratings_repeated": h.repeated,
        "ratings_used": len(h.title),
        "liked": int(h.liked.sum()),
        "users": users,
        "titles": len(titles.titles),
        "titles_merged": len(titles.merged),
        "users_eligible": len(eligible),
        "users_unfit": unfit,
        "examples": {split: len(found) for split, found in examples.items()},
        "history": {s: {"min": min(n), "median": float(np.median(n)), "max": max(n)} for s, n in lengths.items()},
        "negatives": {
            s: dict(sorted(Counter(len(e.negatives) for e in es).items())) for s, es in examples.items() if es
        },
    }


def notes(
    bad: BadRows,
    titles: Catalogue,
    h: splits.Histories,
    items: Sequence[str],
    examples: dict[str, list[RankingExample]],
    scored: Counter[str] | None,
) -> Iterator[str]:
    """What was left out, and why."""
    for reason, count in bad.counts.items():
        yield f"{count:,} rows left out: {reason} (first: {bad.first[reason]})"
    if h.untitled:
        without = (titles.of_item < 0).nonzero()[0]
        such = f", such as {items[without[0]]}" if len(without) else ""
        yield f"{h.untitled:,} ratings left out: no title for {len(without):,} items{such}"
    twice = [title for title in titles.titles if _encoded_twice(title)]
    if twice:
        yield (
            f"{len(twice):,} titles are UTF-8 that was read as Windows-1252 and saved again, such as {twice[0]}: take "
            "the file from before that"
        )
    if h.repeated:
        yield f"{h.repeated:,} ratings left out: the same user and title again later"
    merged = titles.merged
    if merged:
        shown = "; ".join(f"{titles.titles[t]} ({', '.join(titles.ids[t][:SHOWN])})" for t in merged[:SHOWN])
        more = "; ..." if len(merged) > SHOWN else ""
        yield f"titles of more than one item, which count as one (all in items.jsonl): {len(merged):,}: {shown}{more}"
    if scored is not None:
        yield "negatives by margin: " + ", ".join(
            f"{scored[split]} of {len(found)} {split} users" for split, found in examples.items()
        )


def _encoded_twice(title: str) -> bool:
    """Whether its characters are the bytes of UTF-8 text, as in "AmÃ©lie"."""
    try:
        return not title.isascii() and bool(title.encode("cp1252").decode())
    except UnicodeError:
        return False


def items(
    name: str, titles: Sequence[str], ids: Sequence[Sequence[str]], h: splits.Histories, popularity: np.ndarray
) -> list[dict[str, Any]]:
    """Every title with the items that it stands for, how often it was rated (in the catalogue too) and liked."""
    liked = np.bincount(h.title[h.liked], minlength=len(titles))
    rows = zip(titles, ids, popularity.tolist(), liked.tolist(), strict=True)
    return [
        {"domain": name, "title": title, "ids": list(ids), "ratings": n, "liked": k} for title, ids, n, k in rows if n
    ]


def users(
    name: str,
    rankings: Rankings,
    attributes: Mapping[str, Mapping[str, Any]],
    examples: dict[str, list[RankingExample]],
) -> list[dict[str, Any]]:
    """What is known about the users of the examples: gender and age band where the source has them, and, where a user
    has several examples, all liked titles (oldest first) and all titles met, so that rankings can leave these out."""
    h, titles = rankings.histories, rankings.titles
    several = not splits.is_one(rankings.settings)
    if not several and not attributes:
        return []
    number = {user: n for n, user in enumerate(h.users)}
    found = []
    for user in dict.fromkeys(e.user for es in examples.values() for e in es):
        row: dict[str, Any] = {"user": user, "domain": name, **attributes.get(user, {})}
        if several:
            places = h.of(number[user])
            row["liked"] = [titles[t] for t in h.title[places][h.liked[places]]]
            met = [*h.title[places].tolist(), *rankings.seen.get(user, ())]
            row["seen"] = [titles[t] for t in dict.fromkeys(met)]
        found.append(row)
    return found


def charts(h: splits.Histories, popularity: np.ndarray, examples: dict[str, list[RankingExample]]) -> dict[str, Any]:
    """The numbers behind the picture."""
    values, which = np.unique(h.rating, return_inverse=True)
    return {
        "ratings": (
            values,
            np.bincount(which[h.liked], minlength=len(values)),
            np.bincount(which[~h.liked], minlength=len(values)),
        ),
        "per_user": np.diff(h.start),
        "popularity": popularity,
        "history": {split: [len(e.history) for e in found] for split, found in examples.items()},
        "negatives": {split: [len(e.negatives) for e in found] for split, found in examples.items()},
    }


def people(number: int, width: int = 0) -> str:
    """ "1 user", "12 users"."""
    return f"{number:>{width},} user{'' if number == 1 else 's'}"


def lines(domains: Sequence[Domain]) -> Iterator[str]:
    """What was read, every rule, and how much training will see."""
    for d in domains:
        c = d.counts
        yield f"{d.name}: {d.source}"
        share = c["liked"] / max(1, c["ratings_used"])
        yield f"  {c['ratings']:,} ratings of {c['titles']:,} titles by {people(c['users'])}; {share:.0%} liked"
        yield from (f"  note: {note}" for note in d.notes)
        yield from (f"  rule: {rule}" for rule in d.rules)
        unfit = ", ".join(f"{n:,} {reason}" for reason, n in c["users_unfit"].items())
        are = "is" if c["users_eligible"] == 1 else "are"
        yield f"  {people(c['users_eligible'])} {are} eligible{f'; not: {unfit}' if unfit else ''}"
        for split, n in c["examples"].items():
            if n:
                h = c["history"][split]
                k = ", ".join(
                    f"{k} ({times:,}x)" if len(c["negatives"][split]) > 1 else str(k)
                    for k, times in c["negatives"][split].items()
                )
                users = len({e.user for e in d.examples[split]})
                several = f", {n:,} examples" if n != users else ""
                yield (
                    f"  {split:<5} {people(users, 5)}{several}  history {h['min']} to {h['max']}, median "
                    f"{h['median']:g}  k = {k}"
                )
        if c["users_left_over"]:
            yield (
                f"  {c['users_left_over']:,} eligible users are in no split (--train-users, --valid-users, "
                "--test-users)"
            )
    train = [e for d in domains for e in d.examples["train"]]
    pairs = sum(len(e.negatives) for e in train)
    yield f"training sees {len(train):,} examples ({pairs:,} pairs) an epoch"


def following(domains: Sequence[Domain], run: Path) -> Iterator[str]:
    """The command that comes next, ready to be pasted."""
    plan = commands.command("plan", data=run)
    train = sum(len(d.examples["train"]) for d in domains)
    if train > MANY:
        yield (
            f"note: {train:,} examples may take long on a laptop; --few-shot 1000 or --examples-per-user 5 makes it "
            "shorter"
        )
        yield f"how long: {plan}"
    yield (
        "note: commands without --model use the embedded toy model, which knows a fictional catalogue only: add "
        "--model, such as --model mlx-community/Qwen3-0.6B-4bit"
    )
    unworded = [d.name for d in domains if d.name not in DOMAINS]
    if unworded:
        yield (
            f"next: word the domain {', '.join(unworded)} under `domains:` in a config (configs/songs.yaml shows how), "
            "then train with -c"
        )
    else:
        yield f"next: {commands.after_prepare(run)}"
