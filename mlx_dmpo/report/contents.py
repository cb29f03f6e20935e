"""Run and evaluation directories -> everything that a report shows, in plain values. No model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..machine import files, run_directory
from . import read
from .names import short_names
from .tables import RANKING, format_metric, p_value

SHOWN = 10  # pairs in the tables of the hardest and the easiest
MANY = 12  # evaluations above which each shows fewer pairs, and small charts are drawn for the first so many
EXPLANATIONS = "explain*.json"


@dataclass
class Evaluation:
    """A finished evaluation: its name in the report, metrics.json, manifest.json and scores.jsonl."""

    name: str
    path: Path
    metrics: dict[str, Any]
    manifest: dict[str, Any]
    margins: np.ndarray
    hardest: list[dict[str, Any]]
    easiest: list[dict[str, Any]]


@dataclass
class Run:
    """A finished training run: its name in the report, manifest.json and metrics.jsonl."""

    name: str
    path: Path
    manifest: dict[str, Any]
    lines: list[dict[str, Any]]


@dataclass
class Contents:
    """comparison, baselines: as judge.compare.for_report returns them; None and {} where nothing was compared."""

    evaluations: list[Evaluation] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    comparison: dict[str, Any] | None = None
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def everything(self) -> list[Evaluation | Run]:
        return [*self.runs, *self.evaluations]

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        return {e.name: e.metrics for e in self.evaluations}


def read_contents(directories: Sequence[Path]) -> Contents:
    """Raises UserError for a directory that holds no finished run or evaluation, and for values of another kind."""
    unique = list(dict.fromkeys(directories))
    evaluated = [d for d in unique if (d / "metrics.json").is_file()]
    trained = [d for d in unique if d not in evaluated]
    for directory in unique:
        if not run_directory.is_complete(directory) or (
            directory in trained and not (directory / "metrics.jsonl").is_file()
        ):
            raise UserError(
                f"{directory}: holds no finished run or evaluation: name a directory that sft, dmpo or evaluate wrote"
            )
    names = short_names(evaluated) if evaluated else {}
    found = Contents([_evaluation(d, names[d], len(evaluated) > MANY) for d in evaluated])
    names = short_names(trained) if trained else {}
    found.runs = [Run(names[d], d, read.read_manifest(d), read.read_training(d / "metrics.jsonl")) for d in trained]
    return found


def _evaluation(directory: Path, name: str, many: bool) -> Evaluation:
    metrics, manifest = read.read_evaluation(directory)
    rows = read.read_scores(directory / "scores.jsonl")
    if len({"given" in row for row in rows}) > 1:
        raise UserError(f"{directory / 'scores.jsonl'}: mixes free text and ranking pairs: write the directory again")
    margins = np.array([row["margin"] for row in rows], np.float64)
    order, count = np.argsort(margins, kind="stable"), 3 if many else SHOWN
    hardest, easiest = ([rows[i] for i in part] for part in (order[:count], order[::-1][:count]))
    return Evaluation(name, directory, metrics, manifest, margins, hardest, easiest)


# --- sentences


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def points(value: float) -> str:
    """A difference of shares in percentage points."""
    return f"{abs(100 * value):.1f}".removesuffix(".0") if abs(value) < 0.1 else f"{abs(100 * value):.1f}"


def _between(low: float, high: float, scale: float = 100) -> str:
    return f"95 %: {scale * low:.0f} to {scale * high:.0f}".replace("-", "−")


def headline(found: Contents) -> str:
    """The main result in one sentence."""
    if not found.evaluations:
        return f"{len(found.runs)} training run{'s' if len(found.runs) > 1 else ''}, not evaluated yet"
    best = max(found.evaluations, key=lambda e: e.metrics["pair_accuracy"]["value"])
    accuracy = best.metrics["pair_accuracy"]
    says = f"{best.name} ranks {percent(accuracy['value'])} of pairs right"
    difference = _main_difference(found, best.name)
    if difference is None:
        interval = f" ({_between(accuracy['low'], accuracy['high'])})" if "low" in accuracy else ""
        other = found.baselines.get("popularity")
        against = f"; popularity alone ranks {percent(other['pair_accuracy']['value'])}" if other else ""
        return f"{says}{interval}{against}"
    other_name, value, low, high = difference
    side = "above" if value >= 0 else "below"
    if low is None or high is None:
        return f"{says}, {points(value)} points {side} {other_name} (too few users for an interval)"
    interval = _between(low, high) if value >= 0 else _between(-high, -low)
    doubt = ", not a significant difference" if low <= 0 <= high else ""
    return f"{says}, {points(value)} points {side} {other_name} ({interval}){doubt}"


def _main_difference(found: Contents, best: str) -> tuple[str, float, float | None, float | None] | None:
    """The best evaluation against the runner-up: (its name, difference, low, high)."""
    rows = found.comparison["differences"] if found.comparison else []
    mine = [d for d in rows if d["metric"] == "pair_accuracy" and best in (d["a"], d["b"])]
    accuracy = {e.name: e.metrics["pair_accuracy"]["value"] for e in found.evaluations}
    mine = [d for d in mine if (d["b"] if d["a"] == best else d["a"]) in accuracy]
    if not mine:
        return None
    row = max(mine, key=lambda d: accuracy[d["b"] if d["a"] == best else d["a"]])
    if row["a"] == best:
        return row["b"], row["difference"], row["low"], row["high"]
    low, high = (None, None) if row["low"] is None else (-row["high"], -row["low"])
    return row["a"], -row["difference"], low, high


def _listed(values: Sequence[str], most: int = 4) -> str:
    unique = list(dict.fromkeys(v for v in values if v))
    more = f" and {len(unique) - most} more" if len(unique) > most else ""
    shown = unique[:most]
    return (", ".join(shown) + more) if more or len(shown) < 2 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def what_was_run(found: Contents) -> str:
    """One paragraph: models, data, pairs, settings that matter, machine, versions."""
    parts = []
    manifests = [x.manifest for x in found.everything]
    if found.evaluations:
        first = found.evaluations[0].metrics
        sizes = {(e.metrics["n"], e.metrics["users"]) for e in found.evaluations}
        size = (
            f"{first['n']:,} pairs of {first['users']:,} users"
            if len(sizes) == 1
            else f"{min(n for n, _ in sizes):,} to {max(n for n, _ in sizes):,} pairs"
        )
        data = _listed([Path(str(e.manifest["config"].get("data") or "embedded data")).name for e in found.evaluations])
        split = _listed([str(e.manifest["config"].get("split") or "") for e in found.evaluations])
        k = max(e.metrics.get("k", 1) for e in found.evaluations)
        plural = "s" if len(found.evaluations) > 1 else ""
        parts.append(
            f"{len(found.evaluations)} evaluation{plural} on {size} from {data}{f' (split {split})' if split else ''}, "
            f"with up to {k} disliked title{'s' if k > 1 else ''} per liked one."
        )
        prompts = _listed(
            [str(p.get("name", "")) for e in found.evaluations if isinstance(p := e.manifest.get("prompt"), dict)]
        )
        models = _listed([Path(str(e.manifest.get("model") or "")).name for e in found.evaluations])
        if models:
            parts.append(f"Base model: {models}{f'; prompt: {prompts}' if prompts else ''}.")
    if found.runs:
        kinds = Counter(
            run.manifest["command"].split()[1] if " " in run.manifest["command"] else "" for run in found.runs
        )
        shown = [f"{count} × {kind}" for kind, count in kinds.items() if kind]
        parts.append(
            f"{len(found.runs)} training run{'s' if len(found.runs) > 1 else ''} ({_listed(shown)})." if shown else ""
        )
        parts.append(_settings_sentence(found.runs))
    devices = _listed([str(m.get("device") or "") for m in manifests])
    versions: dict[str, str] = {}
    for m in manifests:
        versions |= m["versions"] if isinstance(m.get("versions"), dict) else {}
    named = ", ".join(f"{name} {versions[name]}" for name in ("mlx-dmpo", "mlx", "mlx-lm") if name in versions)
    if devices or named:
        parts.append(
            f"Computed {f'on {devices}' if devices else ''}{f' with {named}' if named else ''}.".replace("  ", " ")
        )
    return " ".join(part for part in parts if part)


def _settings_sentence(runs: Sequence[Run]) -> str:
    shown = []
    words = {
        "loss": "loss",
        "beta": "β",
        "learning_rate": "learning rate",
        "epochs": "epochs",
        "batch_size": "batch size",
    }
    for key, word in words.items():
        given = [run.manifest["config"][key] for run in runs if run.manifest["config"].get(key) is not None]
        values = _listed([f"{v:g}" if isinstance(v, int | float) else str(v) for v in given])
        if values:
            shown.append(f"{word} {values}")
    return f"Settings: {'; '.join(shown)}." if shown else ""


# --- tables of the page


def ranking_table(found: Contents) -> list[list[str]] | None:
    """HR@k and the like of the evaluations that ranked candidates; None where none did."""
    ranked = {e.name: e.metrics for e in found.evaluations if "mrr" in e.metrics}
    if not ranked:
        return None
    head = ["", "candidates", "ranked by", *(heading for _, heading, _ in RANKING)]
    rows = []
    for name, m in ranked.items():
        about = m["candidates"]
        size = str(about["most"]) if about["most"] == about["fewest"] else f"{about['fewest']} to {about['most']}"
        cells = [format_metric(m[key], form) for key, _, form in RANKING]
        rows.append([name, f"{size} ({about['negatives']})", about["ranked_by"], *cells])
    return [head, *rows]


def comparison_table(found: Contents) -> list[list[str]] | None:
    if not found.comparison:
        return None
    rows = [d for d in found.comparison["differences"] if d["metric"] == "pair_accuracy"]
    head = ["comparison", "points", "95 % interval", "p", "p (Holm)", "McNemar"]
    table = [head]
    for d in rows:
        value, low, high, names = d["difference"], d["low"], d["high"], (d["a"], d["b"])
        if value < 0:  # the better one first
            value, low, high, names = -value, high and -high, low and -low, names[::-1]
        interval = "-" if low is None else f"{100 * low:+.1f} to {100 * high:+.1f}".replace("-", "−")
        p = [p_value(d[name]) for name in ("p", "p_holm", "mcnemar_p")]
        table.append([f"{names[0]} − {names[1]}", f"{100 * value:+.1f}", interval, *p])
    return table


def generation_table(found: Contents) -> list[list[str]] | None:
    """Does it answer? None where no evaluation generated."""
    generations = {e.name: e.metrics["generation"] for e in found.evaluations if e.metrics.get("generation")}
    if not generations:
        return None
    head = ["", "answers", "valid", "agree with the scores", "rank the liked title first", "cut"]
    rows = [
        [name, str(g["n"]), *(format_metric(g[key], ".3f") for key in ("valid", "agrees", "right")), str(g["cut"])]
        for name, g in generations.items()
    ]
    return [head, *rows]


def pair_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    popular = all("popularity" in row for row in rows)
    head = ["user", "liked", "disliked", "margin, nats", *(["popularity"] if popular else [])]
    table = [head]
    for row in rows:
        extra = ["{:,} : {:,}".format(*row["popularity"])] if popular else []
        table.append([row["user"], row["positive"], row["negative"], f"{row['margin']:+.2f}", *extra])
    return table


@dataclass
class Shown:
    """An explanation file: its name, and for each model the margin and what each history item adds to it."""

    name: str
    models: list[dict[str, Any]]


def explanations(found: Contents) -> list[Shown]:
    """Of `explain --json` files that lie in the directories. Raises UserError for one of another kind."""
    shown = []
    for x in found.everything:
        for path in sorted(x.path.glob(EXPLANATIONS)):
            value = files.read_json(path)
            models = value.get("models", [value]) if isinstance(value, dict) else None
            if not isinstance(models, list) or not all(map(read.is_explanation, models)):
                raise UserError(f"{path}: holds no explanation: write it again with explain --json")
            largest = max((abs(e["effect"]) for m in models for e in m["history"]), default=0.0) or 1.0
            made = [
                {
                    "name": m.get("name", x.name),
                    "margin": m["margin"],
                    "flip": m.get("flip"),
                    "history": [{**e, "width": 100 * abs(e["effect"]) / largest} for e in m["history"]],
                }
                for m in models
            ]
            shown.append(Shown(f"{x.name}/{path.name}", made))
    return shown


def commands(found: Contents) -> list[str]:
    """What to type to get the same again, in the order of the work: training, then evaluation."""
    ordered = sorted((x.manifest for x in found.everything), key=lambda m: str(m.get("finished", "")))
    return list(dict.fromkeys(m["command"] for m in ordered))


def facts(manifest: Mapping[str, Any]) -> list[list[str]]:
    """Settings of a run as a table, without those left empty."""
    keys = ("device", "seconds", "steps", "best_step", "peak_memory_gb", "finished")
    values = {k: manifest[k] for k in keys if k in manifest} | dict(manifest["config"])
    rows = [[str(k), str(v)] for k, v in values.items() if v not in ("", None, {}, [])]
    return [["setting", "value"], *rows]
