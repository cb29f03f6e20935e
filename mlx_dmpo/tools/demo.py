"""The whole chain on the embedded model and data, and what to do next."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import assets, config
from ..judge.compare import for_report
from ..judge.evaluate import evaluate
from ..machine import files
from ..report import charts, tables
from ..report import page as report_page
from ..train.run import train
from ..use.inputs import read_data
from ..use.ranker import Ranker
from ..use.show import explanation_text, ranking_text


def _use(adapter: str) -> None:
    """Ten fictional titles ranked for one test user, the first two explained, and how to try it in a browser."""
    data = read_data("")
    user = "test-0000"
    history = data.history(user)
    ranker = Ranker.load("", adapter, batch_size=32)
    ranking = ranker.rank(history, [t for t in data.catalogue.titles if t not in history][:10])
    print(f"\n== rank: ten titles for user {user}, who liked {', '.join(history)}\n{ranking_text(ranking)}")
    why = ranker.explain(history, *ranking.titles[:2])
    print(f"\n== explain: the first against the second\n{explanation_text([why])}")
    print(f"\nTry it in a browser:\n  mlx-dmpo serve --adapter-path {shlex.quote(adapter)}\n")


def demo(out: Path, seed: int = 0, prompt: str = "") -> None:
    """Writes OUT/{sft,dmpo,base,summary.json,accuracy.png,report.html}; prints the table and what to run next."""
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
    report_page.write_report([*evaluations, out / "sft", out / "dmpo"], out / "report.html", for_report)
    print(f"\n{tables.results_table(results)}\n")
    print(
        f"Every number is of {results['base']['users']} fictional users whom neither pretraining nor training has "
        f"seen ({sum(seconds.values()):.0f} s in all)."
    )
    _use(dmpo)
    print(f"Look at   {out}/report.html, {out}/accuracy.png")
    print("Next, with your own model and ratings:")
    print("  mlx-dmpo sft      --model mlx-community/Qwen3-0.6B-4bit --data DATA --adapter-path runs/sft")
    print(
        "  mlx-dmpo dmpo     --model mlx-community/Qwen3-0.6B-4bit --data DATA --start-adapter runs/sft "
        "--adapter-path runs/dmpo"
    )
    print("  mlx-dmpo evaluate --model mlx-community/Qwen3-0.6B-4bit --data DATA --adapter-path runs/dmpo")
