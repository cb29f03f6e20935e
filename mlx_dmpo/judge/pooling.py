"""Evaluation directories as entries of a comparison; those of runs that differ only in the seed become one entry."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..machine import files, run_directory
from ..report import read

Key = tuple[str, str, str, str, int]  # user, domain, positive, negative, and how often the same stood before

# What may differ between two seeds of one experiment: the seed, and where its files lie.
_FREE = {
    "seed",
    "out",
    "adapter_path",
    "start_adapter",
    "valid_data",
    "overwrite",
    "resume",
    "project_name",
    "report_to",
}


@dataclass(frozen=True)
class Entry:
    """One ranker on its examples: `runs` holds one list of rows per seed, all of the same keys.

    nats  its margins are log-probs; those of a ranker without a model are counts
    """

    name: str
    runs: tuple[Mapping[Key, Mapping[str, Any]], ...]
    candidates: tuple[Mapping[Key, Mapping[str, Any]], ...] = ()
    nats: bool = True

    @property
    def keys(self) -> list[Key]:
        return list(self.runs[0])

    def margins(self, keys: Sequence[Key]) -> np.ndarray:
        """(seeds, n)."""
        return np.array([[run[key]["margin"] for key in keys] for run in self.runs], np.float64)


def keyed(rows: Sequence[Mapping[str, Any]]) -> dict[Key, Mapping[str, Any]]:
    """Rows under their user, domain and titles. A candidates row has no negative."""
    found: dict[Key, Mapping[str, Any]] = {}
    for row in rows:
        n = 0
        key = (row["user"], row.get("domain", ""), row["positive"], row.get("negative", ""), n)
        while key in found:
            n += 1
            key = (*key[:4], n)
        found[key] = row
    return found


def _training(adapter: Any) -> Any:
    """The settings of the training run that made an adapter, and of those it started from, without what a seed changes.

    None where they are not known: the adapter's directory is gone, or another program made it.
    """
    if not isinstance(adapter, str) or not adapter:
        return "base"
    path = Path(adapter)
    if not run_directory.is_complete(path):
        return None
    manifest = files.read_json(path / run_directory.MANIFEST)
    config = manifest.get("config") if isinstance(manifest, dict) else None
    if not isinstance(config, dict) or "seed" not in config:
        return None
    start = _training(config.get("start_adapter"))
    kept = {k: v for k, v in config.items() if k not in _FREE}
    return None if start is None else [kept, manifest.get("inputs"), start]


def identity(directory: Path) -> str | None:
    """Equal for evaluations whose runs differ only in the seed. None for a base model, which has no seed."""
    _, manifest = read.read_evaluation(directory)
    training = _training(manifest.get("adapter"))
    if training in (None, "base"):
        return None
    evaluation = {k: v for k, v in manifest["config"].items() if k not in _FREE}
    return json.dumps([evaluation, manifest.get("base_fingerprint"), training], sort_keys=True)


def _seed(directory: Path) -> Any:
    adapter = read.read_evaluation(directory)[1]["adapter"]
    return files.read_json(Path(adapter) / run_directory.MANIFEST)["config"]["seed"]


def _candidates(directory: Path) -> dict[Key, Mapping[str, Any]] | None:
    path = directory / "candidates.jsonl"
    return keyed(read.read_candidates(path)) if path.is_file() else None


def entries(directories: Sequence[Path], names: Mapping[Path, str]) -> list[Entry]:
    """Evaluation directories, seeds pooled. Raises UserError for a directory that holds no finished evaluation."""
    groups: dict[str, list[Path]] = {}
    for directory in directories:
        groups.setdefault(identity(directory) or str(directory), []).append(directory)
    found = []
    for members in groups.values():
        seeds = [_seed(d) for d in members] if len(members) > 1 else []
        # the same seed twice does not count as two seeds: such evaluations stay separate
        parts = [members] if len(set(seeds)) == len(seeds) else [[d] for d in members]
        found += [_entry(part, names) for part in parts]
    return found


def _entry(members: Sequence[Path], names: Mapping[Path, str]) -> Entry:
    runs = tuple(keyed(read.read_scores(d / "scores.jsonl")) for d in members)
    candidates = [_candidates(d) for d in members]
    name = names[members[0]] + (f" ({len(members)} seeds)" if len(members) > 1 else "")
    common = set(runs[0]).intersection(*runs[1:])
    runs = tuple({key: run[key] for key in runs[0] if key in common} for run in runs)
    whole = tuple(c for c in candidates if c is not None)
    return Entry(name, runs, whole if len(whole) == len(members) else ())
