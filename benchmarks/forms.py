"""What each prompt form costs: a training step with k = 1, 3, 5 negatives, and the evaluation of the same pairs.

python benchmarks/forms.py [--model SHAPE] [--pairs-model SHAPE] [--data FILE --tokenizer DIR] [--groups 8]
[--pairs 1000] [--repeats 5] [--json FILE]

All forms take turns on the same examples in one process; times are medians. Training is `dmpo`'s own step, optimizer
included. `k = 5 / k = 1` is time per group. Evaluation scores each pair as `evaluate` does: pairwise in both printed
orders with both answers, listwise in 2 orders (all that a pair has; one with assumed lengths), direct in one prompt,
pointwise with the answers Yes. and No.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import contenders
import mlx.core as mx
import shapes

from mlx_dmpo.core.tree import EncodedGroup, pad_groups
from mlx_dmpo.model.score import score_groups
from mlx_dmpo.prompts.placeholders import FORMS

KS = (1, 3, 5)


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    mx.synchronize()
    return time.perf_counter() - started


def training(model: Any, source: shapes.Source, groups: int, repeats: int) -> dict[str, dict[str, Any]]:
    """form -> k -> median seconds per group and tokens per group."""
    references = contenders.References(model)
    step = contenders.ours(model, references).step
    batches = {(form, k): source.groups(groups, k, form=form) for form in FORMS for k in KS}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in batches}
    for batch in batches.values():
        references(batch)  # the reference is data: it is scored before the steps
    for repeat in range(repeats + 1):
        for key, batch in batches.items():
            took = seconds(lambda batch=batch: step(batch))  # type: ignore[misc]
            if repeat:  # the first round is not counted
                times[key].append(took / len(batch))
    found: dict[str, dict[str, Any]] = {}
    for (form, k), per_group in times.items():
        tokens = sum(g.shared_tokens for g in batches[form, k]) / len(batches[form, k])
        found.setdefault(form, {})[str(k)] = {"seconds": statistics.median(per_group), "tokens": tokens}
    return found


def evaluation(model: Any, source: shapes.Source, pairs: int, repeats: int) -> dict[str, dict[str, Any]]:
    """form -> seconds for all pairs, and tokens per pair."""
    made: dict[str, list[EncodedGroup]] = {
        form: source.groups(pairs, 1, form=form, both=form == "pairwise", orders=2) for form in FORMS
    }
    model.eval()
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for groups in made.values():  # warm up
        list(score_groups(model, contenders.SHARED, groups[:8], 8, ""))
    part = max(1, pairs // repeats)
    for start in range(0, pairs, part):  # the forms take turns, part by part
        for form, groups in made.items():
            some = groups[start : start + part]
            times[form].append(seconds(lambda some=some: list(score_groups(model, contenders.SHARED, some, 8, ""))))  # type: ignore[misc]
    return {
        form: {
            "seconds": sum(times[form]),
            "pairs": len(groups),
            "tokens": sum(g.shared_tokens for g in groups) / len(groups),
            "padding": pad_groups(groups[:8]).padding_share,
        }
        for form, groups in made.items()
    }


def table(found: dict[str, Any]) -> str:
    """Both parts in one Markdown table."""
    lines = [
        (
            "| form | s per group, k = 1 | k = 3 | k = 5 | k = 5 / k = 1 | tokens, k = 5 | evaluation, s | pairwise / "
            "this |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    whole = found["evaluation"]["pairwise"]["seconds"]
    for form in FORMS:
        t, e = found["training"][form], found["evaluation"][form]
        cells = [f"{t[str(k)]['seconds']:.3f}" for k in KS]
        ratio = t["5"]["seconds"] / t["1"]["seconds"]
        lines.append(
            f"| {form} | {' | '.join(cells)} | {ratio:.2f} | {t['5']['tokens']:.0f} | {e['seconds']:.1f} "
            f"| {whole / e['seconds']:.2f} |"
        )
    pairs = found["evaluation"]["direct"]["pairs"]
    return "\n".join([*lines, "", f"Evaluation of {pairs} pairs, pairwise in both printed orders."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="qwen3-0.6b-proportional", choices=["embedded", *shapes.SHAPES], metavar="SHAPE"
    )
    parser.add_argument("--pairs-model", default="", metavar="SHAPE", help="shape of the evaluation (default: --model)")
    parser.add_argument("--data", default="", help="examples with at least 5 negatives (default: assumed lengths)")
    parser.add_argument("--pairs-data", default="", help="examples for the evaluation (default: --data)")
    parser.add_argument("--tokenizer", default="", help="directory of the tokenizer for --data")
    parser.add_argument("--groups", type=int, default=8, help="groups of a training step")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args()
    known = {"embedded": shapes.embedded_shape(), **shapes.SHAPES}
    shape, pairs_shape = known[args.model], known[args.pairs_model or args.model]
    model = shapes.build(shape)
    source = shapes.Source(args.data, shapes.tokenizer(args.tokenizer), shape.vocabulary)
    found = {
        "model": args.model,
        "pairs_model": args.pairs_model or args.model,
        "data": Path(args.data).name or "assumed lengths",
        "device": str(mx.default_device()),
        "training": training(model, source, args.groups, args.repeats),
        "evaluation": evaluation(
            shapes.build(pairs_shape),
            replace(source, data=args.pairs_data or args.data, vocabulary=pairs_shape.vocabulary),
            args.pairs,
            args.repeats,
        ),
    }
    print(table(found))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
