"""Learning rates and epochs on validation users: SFT at each rate, then DMPO at each rate from the best SFT.

python benchmarks/settings.py NAME --model MODEL --data DATA [--sft-data FILE] [--valid-data FILE] [--prompt direct]

Every run validates after each epoch. The best is the highest order-debiased pair accuracy, then the lowest loss. No
test user is read. Prints a Markdown table, and puts it into docs/results/settings.json under NAME. A finished run is
not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def trained(out: Path, stage: str, *arguments: str) -> list[dict[str, Any]]:
    """The validations of a run, one per epoch."""
    if not (out / "manifest.json").exists():
        command = [sys.executable, "-m", "mlx_dmpo", stage, *arguments, "--adapter-path", str(out)]
        subprocess.run(command, check=True)
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "valid_pair_accuracy" in line]


def goodness(row: dict[str, Any]) -> tuple[float, float]:
    return row["valid_pair_accuracy"], -row["valid_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--model", default="", help="the embedded one when left out")
    parser.add_argument("--data", default="", help="the embedded data when left out")
    parser.add_argument("--sft-data", default="")
    parser.add_argument("--valid-data", default="")
    parser.add_argument("--prompt", default="pairwise")
    parser.add_argument("--sft-rates", nargs="+", default=["2e-5", "1e-4", "5e-4"])
    parser.add_argument("--dmpo-rates", nargs="+", default=["5e-6", "2e-5", "1e-4", "5e-4"])
    parser.add_argument("--epochs", default="3")
    parser.add_argument("--more", nargs="*", default=[], help="further flags of both stages")
    parser.add_argument("--out", type=Path, default=Path("runs/settings"))
    parser.add_argument("--results", type=Path, default=Path("docs/results/settings.json"))
    args = parser.parse_args()
    shared = ["--prompt", args.prompt, "--epochs", args.epochs, *args.more]
    for flag, value in {"--model": args.model, "--valid-data": args.valid_data}.items():
        shared += [flag, value] if value else []
    rows: list[dict[str, Any]] = []
    start = ""
    for stage, rates in {"sft": args.sft_rates, "dmpo": args.dmpo_rates}.items():
        data = args.sft_data if stage == "sft" and args.sft_data else args.data
        given = [*shared, *(["--data", data] if data else []), *(["--start-adapter", start] if start else [])]
        for rate in rates:
            path = args.out / args.name / f"{stage}-{rate}"
            for line in trained(path, stage, *given, "--learning-rate", rate):
                names = ("epoch", "valid_pair_accuracy", "valid_loss", "valid_margin")
                rows.append({"stage": stage, "learning_rate": float(rate), **{n: line[n] for n in names}})
        best = max((r for r in rows if r["stage"] == stage), key=goodness)
        best["best"] = True
        start = str(args.out / args.name / f"{stage}-{next(r for r in rates if float(r) == best['learning_rate'])}")
    found = json.loads(args.results.read_text()) if args.results.exists() else {}
    found[args.name] = {"model": Path(args.model).name or "embedded", "prompt": args.prompt, "rows": rows}
    args.results.write_text(json.dumps(found, indent=1) + "\n")
    print("| stage | learning rate | epoch | pair accuracy | loss | margin |\n|---|---|---|---|---|---|")
    for r in rows:
        accuracy = f"{r['valid_pair_accuracy']:.3f}" + (" (best)" if r.get("best") else "")
        print(f"| {r['stage']} | {r['learning_rate']:g} | {r['epoch']:g} | {accuracy} |", end="")
        print(f" {r['valid_loss']:.4f} | {r['valid_margin']:+.3f} |")


if __name__ == "__main__":
    main()
