"""Speed and memory of training and evaluation, side by side with the neighbours, on the same groups in one process.

All contenders of a kind take turns on the same groups; figures are medians. Beside each time stands how far its loss and gradient
are from ours, so that nobody compares different work. Memory is MLX's peak above what was resident before the step.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import contenders
import mlx.core as mx
import numpy as np
import shapes
from mlx.utils import tree_flatten

from mlx_dmpo.config import DmpoSettings
from mlx_dmpo.core.tree import EncodedGroup, pad_groups, planned
from mlx_dmpo.model import cost, device

MB = 1e6
TURN, RUNS = 20.0, 5  # seconds of a turn, and how often a step is run in it at most
EVALUATED_AT_ONCE = 40  # pairs between two turns, at most; there are five turns or more


def matmul_peak(dtype: mx.Dtype) -> float:
    """FLOP/s of large products, the best of several."""
    on_cpu = device.on_cpu()
    n = 2048 if on_cpu else 8192
    a, b = mx.random.normal((n, n)).astype(dtype), mx.random.normal((n, n)).astype(dtype)
    mx.eval(a, b)
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        mx.eval(a @ b)
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)


def timed(step: Callable[..., Any], groups: Sequence[EncodedGroup]) -> tuple[float, float]:
    """Seconds, and bytes of peak memory above what was active before."""
    gc.collect()
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    started = time.perf_counter()
    step(groups)
    mx.synchronize()
    return time.perf_counter() - started, mx.get_peak_memory() - before


def compete(
    field: Sequence[contenders.Contender], batches: Sequence[Sequence[EncodedGroup]]
) -> dict[str, dict[str, Any]]:
    """Medians over the batches; contenders take turns on each, and in a turn do what they can within TURN seconds, at
    most RUNS times. The shortest batch is run once before, unmeasured; on a GPU, where a step is compiled for each
    length, all of them.
    """
    for batch in [shortest(batches)] if device.on_cpu() else batches:
        for contender in field:
            contender.step(batch)
    runs: dict[str, list[tuple[float, float]]] = {c.name: [] for c in field}
    for batch in batches:
        for contender in field:
            turn = [timed(contender.step, batch)]
            while len(turn) < RUNS and sum(s for s, _ in turn) + turn[0][0] < TURN:
                turn.append(timed(contender.step, batch))
            runs[contender.name].append((statistics.median(s for s, _ in turn), max(m for _, m in turn)))
    out = {}
    for name, measured in runs.items():
        out[name] = {
            "seconds": statistics.median(s for s, _ in measured),
            "all_seconds": [round(s, 4) for s, _ in measured],
            "memory_mb": statistics.median(m for _, m in measured) / MB,
        }
    return out


def shortest(batches: Sequence[Sequence[EncodedGroup]]) -> Sequence[EncodedGroup]:
    return min(batches, key=lambda batch: sum(g.shared_tokens for g in batch))


def differences(field: Sequence[contenders.Contender], batch: Sequence[EncodedGroup]) -> dict[str, dict[str, float]]:
    """Of each contender's loss, and of its gradient relative to ours."""
    found = {}
    for contender in field:
        value, gradient = contender.check(batch)
        found[contender.name] = float(value), {k: np.array(v.astype(mx.float32)) for k, v in tree_flatten(gradient)}
        del value, gradient
    our_value, our_gradient = found[field[0].name]
    norm = float(np.sqrt(sum((v**2).sum() for v in our_gradient.values())))
    return {
        name: {
            "loss": value,
            "loss_difference": value - our_value,
            "gradient_difference": float(
                np.sqrt(sum(((gradient[k] - our_gradient[k]) ** 2).sum() for k in our_gradient))
            )
            / norm,
        }
        for name, (value, gradient) in found.items()
    }


def table(title: str, results: dict[str, dict[str, Any]], unit: str, count: float) -> None:
    ours = next(iter(results.values()))
    print(f"\n  {title}")
    print(
        f"    {'':<14} {'seconds':>9} {unit + '/s':>9} {'MB peak':>9} {'time':>8} {'memory':>8} {'Δ loss':>10} {'Δ gradient':>11}"
    )
    for name, r in results.items():
        print(
            f"    {name:<14} {r['seconds']:>9.3f} {count / r['seconds']:>9.2f} {r['memory_mb']:>9.0f} {r['seconds'] / ours['seconds']:>7.2f}x "
            f"{r['memory_mb'] / ours['memory_mb']:>7.2f}x {r.get('loss_difference', 0):>10.1e} {r.get('gradient_difference', 0):>11.1e}",
            flush=True,
        )


def measure(name: str, options: argparse.Namespace, peak: float) -> dict[str, Any]:
    shape = shapes.embedded_shape() if name == "embedded" else shapes.SHAPES[name]
    model = shapes.build(shape)
    tokenizer = shapes.tokenizer(options.tokenizer)
    train_data = shapes.Source(options.data, tokenizer, shape.vocabulary)
    count = options.repeat
    five = train_data.groups(count, 5)
    batches = [[g] for g in five]
    weights = mx.get_active_memory()
    result: dict[str, Any] = {"groups": len(five), "tokens_shared": float(np.mean([g.shared_tokens for g in five]))}
    result["tokens_separate"] = float(np.mean([g.separate_tokens for g in five]))
    print(f"\n{name}: {shape.layers} layers, {shape.vocabulary:,} columns; {result['tokens_shared']:.0f} tokens a group of 5 pairs "
          f"({result['tokens_separate']:.0f} with every sequence alone)")  # fmt: skip
    assert len(five) >= count, f"{options.data}: only {len(five)} groups of 5 negatives"

    base = shapes.without_adapter(model, shape)
    second = mx.get_active_memory() - weights
    result["resident_mb"] = {"ours": weights / MB, "mlx-lm-lora": (weights + second) / MB}
    print(
        f"  resident: {weights / MB:.0f} MB of weights; mlx-lm-lora, with its second model, {(weights + second) / MB:.0f} MB"
    )

    references = contenders.References(base)
    one = train_data.groups(count, 1)
    alone = []
    for g in [*one, *five]:  # before the steps, as a run does, whose steps only look them up
        started = time.perf_counter()
        references([g])
        alone.append(time.perf_counter() - started)
    result["reference_seconds"] = statistics.median(alone[-len(five) :])
    print(f"  reference log-probs of a group, once a run, in no step below: {result['reference_seconds']:.3f} s")
    field = [
        contenders.ours(model, references),
        contenders.pair_sharing(model, references),
        contenders.plain(model, references),
    ]
    if not options.no_peers:
        field.append(contenders.mlx_lm_lora(model, base))
    dmpo = compete(field, batches)
    for who, found in differences(field, shortest(batches)).items():
        dmpo[who] |= found
    table("DMPO step, one group of k = 5", dmpo, "groups", 1)
    ours = dmpo["mlx-dmpo"]

    ones = compete([contenders.ours(model, references)], [[g] for g in one])["mlx-dmpo"]
    print(f"    k = 5 over k = 1: {ours['seconds'] / ones['seconds']:.2f}x the time ({ones['seconds']:.3f} s at k = 1)")

    size = 4
    sequences = train_data.groups(count * size, 1, chosen_only=True)
    sequences = sorted(sequences, key=lambda g: g.shared_tokens)  # as mlx-lm means to
    sft_batches = [sequences[i : i + size] for i in range(0, len(sequences), size)]
    field = [contenders.our_sft(model)] + ([] if options.no_peers else [contenders.mlx_lm_sft(model)])
    sft = compete(field, sft_batches)
    for who, found in differences(field, shortest(sft_batches)).items():
        sft[who] |= found
    table(f"SFT step, batch of {size}", sft, "sequences", size)

    pairs = shapes.Source(options.eval_data or options.data, tokenizer, shape.vocabulary)
    tested = pairs.groups(options.eval_pairs.get(name, options.eval_pairs["others"]), 1, both=True)
    at_once = min(EVALUATED_AT_ONCE, max(1, len(tested) // 5))
    parts = [tested[i : i + at_once] for i in range(0, len(tested), at_once)]
    model.eval()
    field = [contenders.our_scores(model), contenders.one_by_one(model)]
    scores = [c.step(parts[0]) for c in field]
    evaluation = compete(field, parts)
    model.train()
    for contender, found in zip(field, scores, strict=True):
        each = evaluation[contender.name]
        each["seconds"] = sum(each["all_seconds"])
        each["loss_difference"] = float(np.abs(found - scores[0]).max())
    table(
        f"evaluation of {len(tested)} pairs in both orders, in all (Δ loss: largest difference of a log-prob)",
        evaluation,
        "pairs",
        len(tested),
    )

    training = cost.Training(shape.layers, activation_bytes=model.model.norm.weight.dtype.size)
    flops = [cost.step_flops(shape, cost.Work.of(pad_groups(b)), training) for b in batches]
    padding = [contenders.PAD(b).padding_share for b in [*batches, *sft_batches]]
    on_gpu = [pad_groups(b, planned).padding_share for b in [*batches, *sft_batches]]
    result |= {
        "dmpo": dmpo,
        "dmpo_k1": ones,
        "sft": sft,
        "evaluate": evaluation,
        "evaluate_pairs": len(tested),
        "step_time_k5_over_k1": ours["seconds"] / ones["seconds"],
        "dmpo_k5_speed_vs_plain": dmpo["plain scorer"]["seconds"] / ours["seconds"],
        "dmpo_k5_memory_vs_plain": dmpo["plain scorer"]["memory_mb"] / ours["memory_mb"],
        "dmpo_k5_speed_vs_pair_sharing": dmpo["pair sharing"]["seconds"] / ours["seconds"],
        "dmpo_k5_memory_vs_pair_sharing": dmpo["pair sharing"]["memory_mb"] / ours["memory_mb"],
        "evaluate_speed_vs_plain": evaluation["one by one"]["seconds"] / evaluation["mlx-dmpo"]["seconds"],
        "padding_share": float(np.mean(padding)),
        "padding_share_on_gpu": float(np.mean(on_gpu)),
        "flops_share_of_matmul_peak": statistics.median(flops) / ours["seconds"] / peak,
        "step_gflop": statistics.median(flops) / 1e9,
    }
    if not options.no_peers:
        spread = result["reference_seconds"] / DmpoSettings().epochs
        result |= {
            "dmpo_k5_speed_vs_mlx_lm_lora": dmpo["mlx-lm-lora"]["seconds"] / ours["seconds"],
            "dmpo_k5_speed_vs_mlx_lm_lora_with_reference": dmpo["mlx-lm-lora"]["seconds"] / (ours["seconds"] + spread),
            "dmpo_k5_memory_vs_mlx_lm_lora": dmpo["mlx-lm-lora"]["memory_mb"] / ours["memory_mb"],
            "sft_speed_vs_mlx_lm": sft["mlx-lm"]["seconds"] / sft["mlx-dmpo"]["seconds"],
            "sft_memory_vs_mlx_lm": sft["mlx-lm"]["memory_mb"] / sft["mlx-dmpo"]["memory_mb"],
        }
        ratio = result["dmpo_k5_speed_vs_mlx_lm_lora_with_reference"]
        print(
            f"\n  with our reference pass spread over the {DmpoSettings().epochs:.0f} epochs of a run, mlx-lm-lora's step takes {ratio:.2f}x our time"
        )
    print(
        f"\n  our DMPO step: {result['step_gflop']:.0f} GFLOP, {100 * result['flops_share_of_matmul_peak']:.0f} % of the measured matmul peak; "
        f"padding {100 * result['padding_share']:.1f} % of tokens, {100 * result['padding_share_on_gpu']:.1f} % in the planned shapes of a GPU"
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="", help="training file of groups with 5 negatives, such as the released ML-1M one (default: made-up groups)")  # fmt: skip
    parser.add_argument("--eval-data", default="", help="file of pairs to evaluate (default: --data)")
    parser.add_argument("--tokenizer", default="", help="directory of the tokenizer for --data, such as Qwen3's")
    parser.add_argument("--shapes", default="embedded,qwen3-0.6b-proportional,qwen3-0.6b-2l", help=f"comma-separated: embedded, {', '.join(shapes.SHAPES)}")  # fmt: skip
    parser.add_argument(
        "--repeat", type=int, default=5, help="groups measured of each kind; the median counts (default 5)"
    )
    parser.add_argument("--eval-pairs", default="40", metavar="N[,SHAPE=N]", help="pairs of an evaluation, for a shape or for all others (default 40; one by one takes about 1.3 s a pair on qwen3-0.6b-proportional, 2 cores)")  # fmt: skip
    parser.add_argument("--no-peers", action="store_true", help="only our own scorers; needs no mlx-lm-lora")
    parser.add_argument("--json", default="", metavar="FILE", help="write everything measured")
    options = parser.parse_args()
    if bool(options.data) != bool(options.tokenizer):
        parser.error("--data and --tokenizer go together")
    names = [n.strip() for n in options.shapes.split(",")]
    for name in names:
        if name != "embedded" and name not in shapes.SHAPES:
            parser.error(f"--shapes: {name} is unknown: choose among embedded, {', '.join(shapes.SHAPES)}")
    wanted = dict(part.split("=", 1) if "=" in part else ("others", part) for part in options.eval_pairs.split(","))
    if not all(n.strip().isdigit() and int(n) > 0 for n in wanted.values()) or not set(wanted) <= {"others", *names}:
        parser.error(f"--eval-pairs: {options.eval_pairs} is not a count of pairs, or SHAPE=COUNT of --shapes")
    options.eval_pairs = {"others": 40} | {name: int(n) for name, n in wanted.items()}
    on_cpu = device.on_cpu()
    peak = matmul_peak(mx.float32 if on_cpu else mx.bfloat16)
    versions = {}
    for package in ("mlx", "mlx-lm", "mlx-lm-lora"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    print(f"{'CPU' if on_cpu else mx.device_info()['device_name']}, {platform.platform()}; "
          f"{', '.join(f'{k} {v}' for k, v in versions.items())}; matmul peak {peak / 1e9:.0f} GFLOP/s")  # fmt: skip
    out: dict[str, Any] = {
        "versions": versions,
        "matmul_gflops": peak / 1e9,
        "reference_epochs": DmpoSettings().epochs,
        "arguments": [Path(argument).name for argument in sys.argv[1:]],
        "shapes": {},
    }
    for name in names:
        out["shapes"][name] = measure(name, options, peak)
        if options.json:
            Path(options.json).write_text(json.dumps(out, indent=2) + "\n")
        gc.collect()
        mx.clear_cache()
    print(
        "\n"
        + json.dumps(
            {n: {k: round(v, 3) for k, v in s.items() if isinstance(v, float)} for n, s in out["shapes"].items()},
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
