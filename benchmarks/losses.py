"""Every loss on the same data, over several seeds: base, SFT, then dpo, dmpo, s-dpo and simpo from that SFT adapter.

python benchmarks/losses.py --model MODEL --data DIR [--test FILE] [--seeds 3] [--out runs/losses]

Nothing is tuned on the data that is measured: no validation is read, and the last adapter counts. Prints a Markdown
table of the order-debiased pair accuracy and the AUC, mean and spread (smallest to largest) over the seeds. A finished
part is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

LOSSES = {"dpo": (), "dmpo": (), "s-dpo": (), "simpo": ("--beta", "2", "--gamma", "0.5")}


def run(out: Path, *arguments: str) -> Path:
    if not (out / "manifest.json").exists():
        subprocess.run([sys.executable, "-m", "mlx_dmpo", *arguments], check=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="directory with train.jsonl")
    parser.add_argument("--test", type=Path, help="file to measure on (default: DIR/test.jsonl)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--negatives", type=int, default=2, help="negatives of each test example")
    parser.add_argument("--out", type=Path, default=Path("runs/losses"))
    parser.add_argument("--sft", nargs="*", default=["--epochs=5", "--learning-rate=1e-3"], help="settings of SFT")
    parser.add_argument(
        "--preference",
        nargs="*",
        default=["--epochs=2", "--learning-rate=5e-4"],
        help="settings of the preference losses",
    )
    args = parser.parse_args()
    model, train = ("--model", args.model), ("--data", str(args.data / "train.jsonl"))
    measure = (
        "evaluate",
        *model,
        "--data",
        str(args.test or args.data / "test.jsonl"),
        "--num-negatives",
        str(args.negatives),
    )
    found: dict[str, list[dict]] = {}

    def measured(name: str, adapter: Path | None, out: Path) -> None:
        adapted = ("--adapter-path", str(adapter)) if adapter else ()
        directory = run(out, *measure, *adapted, "--out", str(out))
        found.setdefault(name, []).append(json.loads((directory / "metrics.json").read_text()))

    measured("base", None, args.out / "base")
    for seed in range(args.seeds):
        at = args.out / str(seed)
        seeded = ("--seed", str(seed), "--overwrite")
        sft = run(at / "sft", "sft", *model, *train, *seeded, *args.sft, "--adapter-path", str(at / "sft"))
        measured("sft", sft, at / "sft-eval")
        for loss, options in LOSSES.items():
            place = at / loss
            how = (
                "--loss",
                loss,
                "--start-adapter",
                str(sft),
                "--adapter-path",
                str(place),
                *options,
                *args.preference,
            )
            measured(loss, run(place, "dmpo", *model, *train, *seeded, *how), at / f"{loss}-eval")
    print(f"| model | pairs | pair accuracy, mean ({args.seeds} seeds: least to most) | AUC |\n|---|---|---|---|")
    for name, results in found.items():
        cells = []
        for key in ("pair_accuracy", "auc"):
            values = [m[key]["value"] for m in results]
            spread = (
                f" ({min(values):.3f} to {max(values):.3f})"
                if len(values) > 1
                else f" [{results[0][key]['low']:.3f}, {results[0][key]['high']:.3f}]"
            )
            cells.append(f"{sum(values) / len(values):.3f}{spread}")
        print(f"| {name} | {results[0]['n']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
