"""The whole chain on the embedded model and data, and what to do next."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import assets, config
from ..judge.evaluate import evaluate
from ..machine import files
from ..report import charts, tables
from ..report import page as report_page
from ..train.run import train


def demo(out: Path, seed: int = 0, prompt: str = "") -> None:
    """Writes OUT/{sft,dmpo,base,summary.json,accuracy.png,report.html}; prints the table and the commands to go on with."""
    stages = config.read_yaml(assets.settings_file())[0]
    seconds: dict[str, float] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        print(f"\n== {name}", flush=True)
        started = time.perf_counter()
        result = run()
        seconds[name] = round(time.perf_counter() - started, 1)
        return result

    def settings(cls: type, stage: str, **values: Any) -> Any:
        given = {"seed": seed, "overwrite": True, "prompt": prompt, **values}
        return config.resolve(cls, None, given, stages.get(stage))

    def evaluated(name: str, adapter: str) -> Any:
        values = settings(config.EvaluateSettings, "evaluate", adapter_path=adapter, out=str(out / name / "eval"))
        return timed(f"evaluate {name}", lambda: evaluate(values, "mlx-dmpo demo"))

    sft, dmpo = str(out / "sft"), str(out / "dmpo")
    results = {"base": evaluated("base", "")}
    timed("sft", lambda: train(settings(config.SftSettings, "sft", adapter_path=sft), "mlx-dmpo demo"))
    results["sft"] = evaluated("sft", sft)
    timed(
        "dmpo",
        lambda: train(settings(config.DmpoSettings, "dmpo", start_adapter=sft, adapter_path=dmpo), "mlx-dmpo demo"),
    )
    results["dmpo"] = evaluated("dmpo", dmpo)

    files.write_json(out / "summary.json", {**results, "seconds": seconds})
    charts.plot_comparison(results, out / "accuracy.png")
    evaluations = [out / name / "eval" for name in results]
    report_page.write_report([*evaluations, out / "sft", out / "dmpo"], out / "report.html")
    print(f"\n{tables.results_table(results)}\n")
    print(
        f"Every number is of {results['base']['users']} fictional users whom neither pretraining nor training has seen ({sum(seconds.values()):.0f} s in all)."
    )
    print(f"Look at   {out}/report.html, {out}/accuracy.png")
    print("Go on with your own model and ratings:")
    print("  mlx-dmpo sft      --model mlx-community/Qwen3-0.6B-4bit --data DATA --adapter-path runs/sft")
    print(
        "  mlx-dmpo dmpo     --model mlx-community/Qwen3-0.6B-4bit --data DATA --start-adapter runs/sft --adapter-path runs/dmpo"
    )
    print("  mlx-dmpo evaluate --model mlx-community/Qwen3-0.6B-4bit --data DATA --adapter-path runs/dmpo")
