"""`compare`: rankers on the same examples, pair by pair, with intervals over users and p-values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..report import names as naming
from . import metrics, ranking
from .bootstrap import Bootstrap, draw_counts, percentiles
from .pooling import Entry, Key, entries, keyed
from .significance import bootstrap_p, holm, mcnemar

TRIVIAL = ("popularity", "first-listed")

Mean = Mapping[str, np.ndarray]  # metric -> (n,) value of each pair, averaged over seeds


def trivial(name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows as a ranker without a model would have scored them.

    popularity    the more popular title first; needs the rows' `popularity`
    first-listed  the title that the file lists first; where the file fixes no order, both orders cancel: a tie
    Raises UserError where the rows do not hold what it takes.
    """
    found = []
    for row in rows:
        if name == "popularity":
            if "popularity" not in row:
                raise UserError("--against popularity: scores.jsonl holds no popularity: run evaluate again")
            margin = float(row["popularity"][0] - row["popularity"][1])
        else:
            first = row.get("source_positive_first")
            margin = 0.0 if first is None else 1.0 if first else -1.0
        kept = {k: row[k] for k in row if k not in ("positive_first", "positive_second", "given")}
        found.append(kept | {"margin": margin})
    return found


@dataclass(frozen=True)
class Common:
    """The examples that all entries scored."""

    keys: list[Key]
    only_in: dict[str, list[list[str]]]

    @classmethod
    def of(cls, found: Sequence[Entry]) -> Common:
        shared = set(found[0].keys).intersection(*(e.keys for e in found[1:]))
        keys = [key for key in found[0].keys if key in shared]
        if not keys:
            raise UserError("compare: the evaluations have no example in common: evaluate both on the same data")
        only = {e.name: [list(key[:4]) for key in e.keys if key not in shared] for e in found}
        return cls(keys, {name: rows for name, rows in only.items() if rows})


def _pair_values(entry: Entry, keys: Sequence[Key]) -> Mean:
    margins = entry.margins(keys)
    found = {"pair_accuracy": metrics.wins(margins).mean(axis=0)}
    return found | {"mean_margin": margins.mean(axis=0)} if entry.nats else found


def _candidate_values(entry: Entry, keys: Sequence[Key]) -> Mean:
    per_seed = [ranking.per_example([run[key] for key in keys]) for run in entry.candidates]
    return {name: np.mean([values[name] for values in per_seed], axis=0) for name in per_seed[0]}


def _differences(
    found: Sequence[Entry], values: Sequence[Mean], users: Sequence[str], resamples: int, seed: int
) -> Iterator[dict[str, Any]]:
    """a minus b, for each pair of entries and each metric that is a mean over rows, paired by resampling users."""
    bootstrap = Bootstrap(users, resamples, seed)
    statistics = [
        (a, b, metric, bootstrap.mean(values[a][metric] - values[b][metric]))
        for a, b in itertools.combinations(range(len(found)), 2)
        for metric in values[a]
        if metric in values[b]
    ]
    bootstrap.run()
    for a, b, metric, statistic in statistics:
        measured = bootstrap.metric(statistic)
        yield {
            "a": found[a].name,
            "b": found[b].name,
            "metric": metric,
            "difference": measured["value"],
            "low": measured.get("low"),
            "high": measured.get("high"),
            "p": bootstrap_p(statistic(bootstrap.draws)) if bootstrap.has_interval else None,
            "p_holm": None,
            "mcnemar_p": None,
        }


def _auc_differences(
    found: Sequence[Entry], keys: Sequence[Key], users: Sequence[str], resamples: int, seed: int
) -> Iterator[dict[str, Any]]:
    """AUC is not a mean over pairs, and is computed again in each resample. The mean of the seeds' AUCs is compared."""
    units = Bootstrap(users, resamples, seed)
    margins = [entry.margins(keys) for entry in found]
    value = np.array([np.mean([metrics.auc(m)[0] for m in seeds]) for seeds in margins])
    draws: list[np.ndarray] = []
    if units.has_interval:
        for counts in draw_counts(units.units, resamples, seed, len(keys)):
            weights = counts[:, units.index]
            draws.append(np.array([np.mean([metrics.auc(m, weights) for m in seeds], axis=0) for seeds in margins]))
    drawn = np.concatenate(draws, axis=1) if draws else None  # (entries, resamples)
    for a, b in itertools.combinations(range(len(found)), 2):
        difference = drawn[a] - drawn[b] if drawn is not None else None
        interval = {} if difference is None else percentiles(difference)
        yield {
            "a": found[a].name,
            "b": found[b].name,
            "metric": "auc",
            "difference": float(value[a] - value[b]),
            "low": interval.get("low"),
            "high": interval.get("high"),
            "p": None if difference is None else bootstrap_p(difference),
            "p_holm": None,
            "mcnemar_p": None,
        }


def compare_entries(found: Sequence[Entry], *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The differences of every two entries on the examples that all of them scored.

    difference  a minus b, of each metric; low, high: 95 %, paired bootstrap over users; p: of the same bootstrap
    p_holm      p corrected for the number of comparisons of this metric
    mcnemar_p   of pair accuracy between two single runs: exact, ties count as not right
    Raises UserError for fewer than two entries, or none of their examples in common.
    """
    if len(found) < 2:
        raise UserError("compare: only one evaluation is given: name two directories, or add --against popularity")
    common = Common.of(found)
    users = [key[0] for key in common.keys]
    values = [_pair_values(entry, common.keys) for entry in found]
    differences = list(_differences(found, values, users, resamples, seed))
    differences += _auc_differences(found, common.keys, users, resamples, seed)
    if all(entry.candidates for entry in found):
        shared = set(found[0].candidates[0]).intersection(*(run for e in found for run in e.candidates))
        keys = [key for key in found[0].candidates[0] if key in shared]
        if keys:
            ranked = [_candidate_values(entry, keys) for entry in found]
            differences += _differences(found, ranked, [key[0] for key in keys], resamples, seed)
    by_name = {entry.name: entry for entry in found}
    for row in differences:
        a, b = by_name[row["a"]], by_name[row["b"]]
        if row["metric"] == "pair_accuracy" and len(a.runs) == len(b.runs) == 1:
            row["mcnemar_p"] = mcnemar(a.margins(common.keys)[0] > 0, b.margins(common.keys)[0] > 0)
    for metric in dict.fromkeys(row["metric"] for row in differences):
        family = [row for row in differences if row["metric"] == metric and row["p"] is not None]
        for row, p in zip(family, holm([row["p"] for row in family]), strict=True):
            row["p_holm"] = p
    pooled = {entry.name: _spread(entry, common.keys) for entry in found if len(entry.runs) > 1}
    return {
        "n": len(common.keys),
        "users": len(set(users)),
        "only_in": common.only_in,
        "differences": differences,
        **({"pooled": pooled} if pooled else {}),
    }


def _spread(entry: Entry, keys: Sequence[Key]) -> dict[str, Any]:
    """Mean and standard deviation over seeds (n − 1 in the denominator)."""
    margins = entry.margins(keys)
    measured: dict[str, Callable[[np.ndarray], float]] = {
        "pair_accuracy": lambda m: float(metrics.wins(m).mean()),
        "auc": lambda m: float(metrics.auc(m)[0]),
        "mean_margin": lambda m: float(m.mean()),
    }
    found: dict[str, Any] = {"seeds": len(margins)}
    for name, measure in measured.items():
        values = np.array([measure(m) for m in margins])
        found[name] = {"mean": float(values.mean()), "spread": float(values.std(ddof=1))}
    return found


def compare(
    directories: Sequence[Path], against: Sequence[str] = (), *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Evaluation directories, and rankers of `TRIVIAL`, as `compare --json` prints them. Raises UserError."""
    unique = list(dict.fromkeys(directories))
    found = entries(unique, naming.short_names(unique))
    rows = list(found[0].runs[0].values())
    found += [Entry(name, (keyed(trivial(name, rows)),), nats=False) for name in dict.fromkeys(against)]
    return compare_entries(found, resamples=resamples, seed=seed)


def for_report(directories: Sequence[Path]) -> dict[str, Any]:
    """What the report page adds to its evaluations: differences, and metrics of the trivial rankers on the same
    pairs."""
    unique = list(dict.fromkeys(directories))
    found = entries(unique, naming.short_names(unique))
    rows = list(found[0].runs[0].values())
    against = [name for name in TRIVIAL if _has_opinion(name, rows)]
    baselines = {name: metrics.ranking_metrics(trivial(name, rows), resamples=1000) for name in against}
    for measured in baselines.values():
        measured["mean_margin"] = {"value": None}  # counts, or ±1: no nats
    try:
        together = compare_entries(found, resamples=1000) if 1 < len(found) <= 12 else None
    except UserError:  # no example in common: tables and charts are shown without a comparison
        together = None
    return {"comparison": together, "baselines": baselines}


def _has_opinion(name: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    wanted = "popularity" if name == "popularity" else "source_positive_first"
    return all(wanted in row for row in rows)
