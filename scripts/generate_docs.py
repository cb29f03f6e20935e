"""Writes everything in the docs that would go stale by hand, from the code and from result files.

python scripts/generate_docs.py           rewrite
python scripts/generate_docs.py --check   exit 1 and say so if anything is stale

docs/cli.md is made from the commands' help, docs/architecture.md from the modules' docstrings, and the tables between
<!-- name --> and <!-- /name --> from docs/results/*.json, each written by the command that the page names.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from mlx_dmpo.cli.main import cli
from mlx_dmpo.cli.options import ALL
from mlx_dmpo.prompts.groups import build_group
from mlx_dmpo.prompts.orders import printed_orders
from mlx_dmpo.prompts.template import FORMS, built_in
from mlx_dmpo.records import RankingExample

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "mlx_dmpo"

# The order in which a stranger reads: the method first, then what feeds it, what runs it, and what uses it.
READING_ORDER = (
    "core prompts data model train judge use baselines report machine tools cli config records.py scores.py errors.py "
    "assets"
).split()
FIRST = "core/losses.py core/tree.py core/attention.py core/head.py core/scorer.py train/loop.py train/run.py".split()


def result(name: str) -> Any:
    return json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))


def summary(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=[a-z)`])[.;](?:\s|$)", " ".join(text.split()))[0].rstrip(".")


def command_reference() -> str:
    parts = ["# Command line", "", "Made by `scripts/generate_docs.py` from the commands' own help.", ""]

    def add(command: click.Command, name: str, parent: click.Context | None) -> None:
        context = click.Context(command, info_name=name, parent=parent, max_content_width=110)
        context.meta[ALL] = True  # every option, as --help-all shows them
        parts.extend([f"## {context.command_path}", "", "```", command.get_help(context).rstrip(), "```", ""])
        if isinstance(command, click.Group):
            for inner, subcommand in command.commands.items():
                add(subcommand, inner, context)

    add(cli, "mlx-dmpo", None)
    return "\n".join(parts)


def prompt_forms() -> str:
    """The four forms of one example: each prompt once, with its answers."""
    example = RankingExample(
        "u", "movie", ("Heat", "Ronin"), "Collateral", ("Bambi", "Dumbo"), disliked=("Cats", "Bambi")
    )
    parts = []
    for form in FORMS:
        orders = printed_orders(example, 0, both=True, redraw=False, seed=0, form=form, count=2)
        group = build_group(example, orders, built_in(form))
        lines: list[str] = []
        for i, branch in enumerate(group.branches):
            if i == 0 or branch.messages != group.branches[i - 1].messages:
                lines += ["", branch.messages[0]["content"]]
            kinds = [
                name for name, of in zip(("chosen", "rejected"), zip(*group.pairs, strict=True), strict=True) if i in of
            ]
            if group.targets is not None and i in group.targets:
                kinds.append("learnt by sft")
            lines.append(f"  -> {json.dumps(branch.answer)}  {', '.join(kinds)}".rstrip())
        parts.append(f"### {form}\n\n```\n" + "\n".join(lines[1:]) + "\n```")
    return "\n\n".join(parts)


def block(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "```\n" + "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in rows) + "\n```"


def tree() -> str:
    """The packages in reading order, with the files to read first."""
    rows = [("mlx_dmpo/", summary(PACKAGE / "__init__.py"))]
    for name in READING_ORDER:
        path = PACKAGE / name
        if path.is_dir():
            rows.append((f"  {name}/", summary(path / "__init__.py")))
            rows += [(f"    {f.split('/')[1]}", summary(PACKAGE / f)) for f in FIRST if f.startswith(name + "/")]
        else:
            rows.append((f"  {name}", summary(path)))
    return block(rows)


def architecture() -> str:
    """Every module, in reading order."""
    rows = []
    for name in READING_ORDER:
        path = PACKAGE / name
        if not path.is_dir():
            rows.append((name, summary(path)))
            continue
        rows.append((f"{name}/", summary(path / "__init__.py")))
        for file in sorted(path.rglob("*.py"), key=lambda p: (f"{name}/{p.name}" not in FIRST, p)):
            if file.parent == path and file.name == "__init__.py":
                continue
            inner = file.relative_to(path).as_posix().removesuffix("/__init__.py")
            rows.append((f"  {inner}", summary(file)))
    return block(rows)


def interval(metric: Mapping[str, Any]) -> str:
    return f"{metric['value']:.3f} ({metric['low']:.3f} to {metric['high']:.3f})"


def table(head: str, rows: Iterable[str]) -> str:
    """A Markdown table of rows without their outer bars."""
    return "\n".join([f"| {head} |", "|---" * (head.count(" | ") + 1) + "|", *(f"| {row} |" for row in rows)])


def demo_table() -> str:
    """From docs/results/demo.json, a demo run's summary.json."""
    found = result("demo")
    rows = []
    for name in ("base", "sft", "dmpo"):
        m = found[name]
        cells = [interval(m[key]) for key in ("pair_accuracy", "auc", "position_bias", "mean_margin")]
        rows.append(f"{name} | {m['n']} | {' | '.join(cells)}")
    return table("model | pairs | pair accuracy | AUC | position bias | mean margin (nats)", rows)


def smollm2_sentence() -> str:
    """From docs/results/smollm2-ml-1m.json, as `scripts/reproduce configs/reproduce/smollm2-ml-1m.yaml` wrote it."""
    table = result("smollm2-ml-1m")
    found = {(r["system"], r["prompt"]): r for r in table["rows"]}
    popularity, base = found["popularity", None], found["base", "direct"]
    dmpo = next(r for r in table["over_seeds"] if (r["system"], r["prompt"]) == ("dmpo", "direct"))
    d = dmpo["minus"]["pair_accuracy"]
    excludes = d["low"] > 0 or d["high"] < 0
    return (
        f"On a real language model (SmolLM2-135M, the released MovieLens-1M files, 100 training users, {base['users']} "
        f"others, {len(dmpo['seeds'])} seeds), the pair accuracy of DMPO minus that of the SFT it starts from is "
        f"{d['difference']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f}): "
        f"{'a difference' if excludes else 'no difference is shown'}. DMPO has "
        f"{dmpo['over_seeds']['pair_accuracy']['mean']:.3f}, the untrained model {interval(base['pair_accuracy'])}, "
        f"and popularity, counted over the same 100 users, {interval(popularity['pair_accuracy'])}."
    )


def demo_picture() -> str:
    """Pair accuracy of the three stages with intervals, as an SVG that follows light and dark mode."""
    found = result("demo")
    left, width, top, step = 90, 400, 34, 34

    def x(value: float) -> float:
        return left + width * value

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 168" role="img" font-family="system-ui, sans-serif"'
        ' font-size="13" aria-label="Pair accuracy on unseen users: base, SFT, DMPO">',
        "<style>text{fill:#24292f}.axis{stroke:#8c959f}.bar{fill:#0969da}.line{stroke:#24292f}"
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.axis{stroke:#8b949e}.bar{fill:#58a6ff}.line{stroke:#e6edf3}}"
        "</style>",
        f'<text x="{left}" y="16" font-weight="600">Pairs ranked right on {found["base"]["users"]} unseen users'
        " (95 % intervals)</text>",
    ]
    for n, name in enumerate(("base", "sft", "dmpo")):
        m, y = found[name]["pair_accuracy"], top + n * step
        parts += [
            f'<text x="{left - 12}" y="{y + 15}" text-anchor="end">{name.upper() if n else name}</text>',
            f'<rect class="bar" x="{left}" y="{y}" width="{x(m["value"]) - left:.1f}" height="22" rx="3"/>',
            f'<path class="line" fill="none" stroke-width="1.5" d="M{x(m["low"]):.1f} {y + 11}H{x(m["high"]):.1f}'
            f'M{x(m["low"]):.1f} {y + 6}v10M{x(m["high"]):.1f} {y + 6}v10"/>',
            f'<text x="{x(m["high"]) + 8:.1f}" y="{y + 15}">{100 * m["value"]:.1f} %</text>',
        ]
    bottom = top + 3 * step
    parts.append(f'<path class="axis" fill="none" stroke-dasharray="4 3" d="M{x(0.5):.1f} {top - 6}V{bottom}"/>')
    for value in (0, 0.25, 0.5, 0.75, 1):
        label = f"{100 * value:.0f} %" + (" (chance)" if value == 0.5 else "")
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 18}" text-anchor="middle" font-size="12">{label}</text>')
    return "\n".join([*parts, "</svg>", ""])


def benchmark_table() -> str:
    """From docs/results/benchmark.json, as `scripts/benchmark --json` wrote it: others' time and memory over ours."""
    found = result("benchmark")
    shapes: dict[str, Any] = found["shapes"]

    def both(part: str, other: str) -> Callable[[Mapping[str, Any]], str]:
        def cell(s: Mapping[str, Any]) -> str:
            theirs, ours = s[part][other], s[part]["mlx-dmpo"]
            return f"{theirs['seconds'] / ours['seconds']:.1f} / {theirs['memory_mb'] / ours['memory_mb']:.1f}"

        return cell

    lines: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        (f"DMPO step, k = 5: mlx-lm-lora {found['versions']['mlx-lm-lora']}", both("dmpo", "mlx-lm-lora")),
        (
            f"the same, our reference pass spread over {found['reference_epochs']:.0f} epochs (time)",
            lambda s: f"{s['dmpo_k5_speed_vs_mlx_lm_lora_with_reference']:.1f}",
        ),
        ("DMPO step, k = 5: each sequence alone", both("dmpo", "plain scorer")),
        ("DMPO step, k = 5: sharing within a pair", both("dmpo", "pair sharing")),
        ("our step, k = 5 over k = 1 (time)", lambda s: f"{s['step_time_k5_over_k1']:.2f}"),
        (f"SFT step: mlx-lm {found['versions']['mlx-lm']}", both("sft", "mlx-lm")),
        (
            "evaluation in both orders, one by one (time; pairs)",
            lambda s: f"{s['evaluate_speed_vs_plain']:.1f} ({s['evaluate_pairs']:,})",
        ),
        (
            "our DMPO step in seconds, and its share of the matmul peak",
            lambda s: f"{s['dmpo']['mlx-dmpo']['seconds']:.2f}, {100 * s['flops_share_of_matmul_peak']:.0f} %",
        ),
    ]
    head = " | ".join(["others' time / memory relative to ours", *shapes])
    return table(head, (" | ".join([name, *map(cell, shapes.values())]) for name, cell in lines))


def speed_sentence() -> str:
    """The benchmark's headline, from the same file."""
    found = result("benchmark")

    def over_ours(shape: str) -> tuple[float, float]:
        dmpo = found["shapes"][shape]["dmpo"]
        ours, theirs = dmpo["mlx-dmpo"], dmpo["mlx-lm-lora"]
        return theirs["seconds"] / ours["seconds"], theirs["memory_mb"] / ours["memory_mb"]

    small, whole = over_ours("qwen3-0.6b-proportional"), over_ours("qwen3-0.6b-2l")
    return (
        "Relative to ours, on the same groups with equal losses and gradients, mlx-lm-lora's DMPO step takes\n"
        f"{small[0]:.0f} times the time and {small[1]:.0f} times the memory on two layers proportioned like Qwen3-0.6B,"
        f" and {whole[0]:.0f} and {whole[1]:.0f} times\n"
        "with Qwen3's whole vocabulary ([docs/performance.md](docs/performance.md))."
    )


def device_table() -> str:
    """From docs/results/device-*.json, as `benchmarks/device.py --json` wrote them on a GPU."""
    runs = [result("device-not-compiled"), result("device-compiled")]
    head = (
        "shape | step | groups at once | seconds | groups/s | share of the peak | peak memory / planned, GB "
        "| scoring, s | its share"
    )
    rows = [
        f"{name} | {'compiled' if r['compiled'] else 'not compiled'} | {r['groups']} | {r['seconds']:.3f} "
        f"| {r['groups_per_second']:.1f} | {100 * r['share_of_peak']:.1f} % | {r['peak_gb']:.1f} / "
        f"{r['planned_gb']:.1f} | {r['scoring_seconds']:.3f} | {100 * r['scoring_share_of_peak']:.1f} %"
        for run in runs
        for name, shape in run["shapes"].items()
        for r in shape["steps"]
    ]
    peaks = " and ".join(f"{run['matmul_flops'] / 1e12:.0f}" for run in runs)
    return f"{table(head, rows)}\n\n{runs[0]['device']}, MLX {runs[0]['mlx']}; large products {peaks} TFLOP/s."


def forms_table() -> str:
    """From docs/results/forms.json, as `benchmarks/forms.py --json` wrote it."""
    found = result("forms")
    head = (
        "form | step, s per group, k = 1 | k = 3 | k = 5 | k = 5 / k = 1 | tokens, k = 5 | evaluation, pairwise / this"
    )
    rows, whole = [], found["evaluation"]["pairwise"]["seconds"]
    for form in FORMS:
        t, e = found["training"][form], found["evaluation"][form]
        cells = " | ".join(f"{t[k]['seconds']:.3f}" for k in ("1", "3", "5"))
        ratio = t["5"]["seconds"] / t["1"]["seconds"]
        rows.append(f"{form} | {cells} | {ratio:.2f} | {t['5']['tokens']:.0f} | {whole / e['seconds']:.2f}")
    pairs = found["evaluation"]["direct"]["pairs"]
    return f"{table(head, rows)}\n\nTraining: {found['model']}. Evaluation: {pairs:,} pairs, {found['pairs_model']}."


def rank_table() -> str:
    """From docs/results/rank.json, as `benchmarks/rank.py --json` wrote it."""
    rows = []
    for r in result("rank"):
        alone = r.get("alone") or r["one by one"]
        cells = [f"{side['tokens']:,} tokens, {side['seconds']:.1f} s" for side in (r["shared"], alone)]
        cells[1] += f" ({alone['timed']:,} of {alone.get('sequences') or alone['titles']:,} timed)"
        rows.append(f"{r['what']} | {' | '.join(cells)} | {r['times_faster']:.1f}")
    return table(" | shared | each alone | times faster", rows)


def plan_table() -> str:
    """From docs/results/plan.json, as `benchmarks/plan_accuracy.py --json` wrote it."""
    found = result("plan")
    head = "configuration | peak measured (MB) | predicted | error | above the model, measured (MB) | predicted | error"
    rows = (
        f"{r['name']} | {r['measured_mb']:.0f} | {r['predicted_mb']:.0f} | {100 * r['error']:+.1f} % | "
        f"{r['measured_above_mb']:.0f} | {r['predicted_above_mb']:.0f} | {100 * r['error_above']:+.1f} %"
        for r in found
    )
    worst, above = (100 * max(abs(r[key]) for r in found) for key in ("error", "error_above"))
    return (
        f"{table(head, rows)}\n\nLargest error: {worst:.1f} % of the peak, {above:.1f} % of what lies above the model."
    )


def between(text: str, name: str, content: str, where: Path) -> str:
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    if not re.search(pattern, text, re.DOTALL):
        raise SystemExit(f"{where.name} has no <!-- {name} --> block")
    return re.sub(pattern, lambda match: match[1] + content + "\n" + match[2], text, flags=re.DOTALL)


def families_table() -> str:
    """From docs/results/families.json, as benchmarks/families.py wrote it."""
    head = (
        "family | mlx-lm's module | window | log-prob, float32 (nats) | gradient | log-prob, 4-bit | gradient "
        "| times faster"
    )
    rows = []
    for name, row in result("families")["families"].items():
        cells = [
            f"{row[part][of]:.0e}" if row[part][of] else "0"
            for part in ("float32", "4-bit")
            for of in ("nats", "gradient")
        ]
        faster = f"{row['seconds']['plain'] / row['seconds']['shared']:.1f}"
        rows.append(" | ".join([name, row["module"], "yes" if row["window"] else "", *cells, faster]))
    return table(head, rows)


# page -> its generated blocks
BLOCKS: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"tree": tree, "results": demo_table, "smollm2": smollm2_sentence, "speed": speed_sentence},
    DOCS / "architecture.md": {"modules": architecture},
    DOCS / "models.md": {"families": families_table},
    DOCS / "performance.md": {
        "benchmark": benchmark_table,
        "device": device_table,
        "forms": forms_table,
        "rank": rank_table,
    },
    DOCS / "plan.md": {"plan": plan_table},
    DOCS / "prompts.md": {"prompts": prompt_forms},
}
# files made whole
WHOLE: dict[Path, Callable[[], str]] = {
    DOCS / "cli.md": command_reference,
    DOCS / "images" / "demo.svg": demo_picture,
}


def main() -> None:
    wanted = {path: make() for path, make in WHOLE.items()}
    for path, blocks in BLOCKS.items():
        text = path.read_text(encoding="utf-8")
        for name, make in blocks.items():
            text = between(text, name, make(), path)
        wanted[path] = text
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} is stale" if "--check" in sys.argv else f"wrote {path.relative_to(ROOT)}")
        if "--check" not in sys.argv:
            path.write_text(wanted[path], encoding="utf-8")
    if stale and "--check" in sys.argv:
        raise SystemExit("run: python scripts/generate_docs.py")


if __name__ == "__main__":
    main()
