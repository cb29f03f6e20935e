"""What sharing saves when ranking: all pairs of one list, and a whole catalogue, against one sequence or title at a
time.

    python benchmarks/rank.py [--model M] [--history 30] [--candidates 20] [--titles 2000] [--alone 0] [--json FILE]

Four measurements in one run, on the same model and the same titles, each after one warm-up on a smaller list:

    pairs    all pairs of the candidates in both printed orders, as `rank --method pairs` scores them
    alone    the same prompts and answers, one sequence at a time through the model's own forward pass
    items    every title by `rank --method items --prompt direct`
    one by one  the same titles, a score each in its own call, the history run again each time

`--alone N` times only N of the sequences and titles of the slow side, spread evenly, and scales up; 0 times all of
them. The aims are 8 times (pairs) and 20 times (items).
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_dmpo import Ranker
from mlx_dmpo.core.tree import EncodedGroup
from mlx_dmpo.prompts.groups import build_group
from mlx_dmpo.records import RankingExample

WORDS = "Amber Lantern River Glass Winter Garden Iron Echo Silver Harbour Paper Moon Copper Orchard Salt Tower".split()


def invented(n: int) -> list[str]:
    """n distinct titles of two words and a year."""
    made = [f"{a} {b} ({1950 + (7 * i) % 70})" for i, (a, b) in enumerate(itertools.product(WORDS, repeat=2))]
    more = [f"The {a} of the {b} {c}" for a, b, c in itertools.product(WORDS, repeat=3)]
    return [*made, *more][:n]


def sequences(ranker: Ranker, history: Sequence[str], candidates: Sequence[str]) -> list[EncodedGroup]:
    """Every prompt with each of its answers, a group of one branch each."""
    encoder, found = ranker.scoring.model.encoder, []
    for a, b in itertools.combinations(candidates, 2):
        example = RankingExample("", "movie", tuple(history), a, (b,))
        group = encoder.encode_group(build_group(example, [(True, False)], ranker.scoring.model.template))
        for tail, n in zip(group.tails, group.answer_lengths, strict=True):
            found.append(EncodedGroup(group.prefix, (tail,), (n,), np.zeros((0, 2), np.int32)))
    return found


def spread(things: Sequence[Any], n: int) -> list[Any]:
    return (
        list(things)
        if not n or n >= len(things)
        else [things[i] for i in np.linspace(0, len(things) - 1, n).astype(int)]
    )


def pairs_and_alone(options: argparse.Namespace, history: list[str], candidates: list[str]) -> dict[str, Any]:
    ranker = Ranker.load(options.model, budget=10**6)
    plain = Ranker.load(options.model, scoring="plain").scoring.model
    ranker.rank(history, candidates[:3])
    started = time.perf_counter()
    found = ranker.rank(history[::-1], candidates)
    shared = time.perf_counter() - started
    started = time.perf_counter()
    alone = sequences(ranker, history[::-1], candidates)
    encoding = time.perf_counter() - started  # `rank`'s time holds its encoding too
    some = spread(alone, options.alone)
    list(plain._logps(some[:2], ""))
    started = time.perf_counter()
    list(plain._logps(some, ""))
    seconds = encoding + (time.perf_counter() - started) * len(alone) / len(some)
    return {
        "what": f"all pairs of {len(candidates)} candidates, history of {len(history)}",
        "shared": {"tokens": found.tokens, "seconds": shared, "pairs": found.pairs_scored},
        "alone": {
            "tokens": sum(g.separate_tokens for g in alone),
            "seconds": seconds,
            "sequences": len(alone),
            "timed": len(some),
        },
        "times_faster": seconds / shared,
    }


def items_and_one_by_one(options: argparse.Namespace, history: list[str], titles: list[str]) -> dict[str, Any]:
    ranker = Ranker.load(options.model, prompt="direct")
    one = Ranker.load(options.model, prompt="direct", scoring="plain").scoring.model
    ranker.rank(history, titles[:8])
    started = time.perf_counter()
    found = ranker.rank(history[::-1], titles)
    shared = time.perf_counter() - started
    some = spread(titles, options.alone)
    one.score_items(history, some[:1], "movie")
    one.tokens = 0
    started = time.perf_counter()
    scores = {t: one.score_items(history[::-1], [t], "movie")[0] for t in some}
    seconds = (time.perf_counter() - started) * len(titles) / len(some)
    ranked = {r.title: r.score for r in found.ranking}
    return {
        "what": f"{len(titles)} titles by items, history of {len(history)}",
        "shared": {"tokens": found.tokens, "seconds": shared},
        "one by one": {
            "tokens": one.tokens * len(titles) // len(some),
            "seconds": seconds,
            "titles": len(titles),
            "timed": len(some),
        },
        "times_faster": seconds / shared,
        "largest_difference_nats": max(abs(ranked[t] - s) for t, s in scores.items()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="model directory (the embedded one when left out)")
    parser.add_argument("--history", type=int, default=30)
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--titles", type=int, default=2000)
    parser.add_argument(
        "--alone", type=int, default=0, help="sequences and titles of the slow side that are timed; 0: all"
    )
    parser.add_argument("--json", default="", help="file to write the numbers to")
    options = parser.parse_args()
    titles = invented(options.titles + options.history)
    history, rest = titles[:: len(titles) // options.history][: options.history], titles
    rest = [t for t in rest if t not in set(history)]
    results = [
        pairs_and_alone(options, history, rest[: options.candidates]),
        items_and_one_by_one(options, history, rest[: options.titles]),
    ]
    for result in results:
        print(result["what"])
        for name, side in result.items():
            if isinstance(side, dict):
                print(f"  {name:<10}  {side['tokens']:>10,} tokens  {side['seconds']:>8.2f} s")
        print(f"  {result['times_faster']:.1f} times faster")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
