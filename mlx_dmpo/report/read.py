"""Run and evaluation directories, read with every value checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..machine import files, run_directory
from .tables import COLUMNS

CURVES = ("loss", "margin", "pair_accuracy", "learning_rate", "peak_memory_gb")  # of metrics.jsonl, drawn


def _number(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
    )  # neither NaN nor infinite


def _metric(value: Any, needed: bool = False) -> bool:
    """A value, which may be null unless `needed`, with or without an interval."""
    return (
        isinstance(value, dict)
        and (_number(value.get("value")) or (value.get("value") is None and not needed))
        and ("low" not in value or (_number(value.get("low")) and _number(value.get("high"))))
    )


def _plain_numbers(value: Any) -> bool:
    """Whether every number of a JSON value, however deep, is one that can be printed and drawn."""
    if isinstance(value, dict | list):
        return all(map(_plain_numbers, value.values() if isinstance(value, dict) else value))
    return isinstance(value, bool) or not isinstance(value, int | float) or _number(value)


def _evaluation(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _plain_numbers(value)
        and all(_number(value.get(name)) for name in ("n", "users", "ties"))
        and "pair_accuracy" in value  # of the others free text leaves some out
        and all(_metric(value[name]) for name, _, _ in COLUMNS if name in value)
        and _metric(value["pair_accuracy"], needed=True)
    )


def _score(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), str) for name in ("user", "positive", "negative"))
        and _number(value.get("margin"))
        and _facts(value)
        and all(
            isinstance(order, dict) and _number(order.get("chosen_logp")) and _number(order.get("rejected_logp"))
            for order in (value[name] for name in ("positive_first", "positive_second", "given") if name in value)
        )
    )


def _facts(row: dict[str, Any]) -> bool:
    """What evaluate adds to a row, where it is there: see judge/facts.py."""
    popularity, seen = row.get("popularity", [0, 0]), row.get("seen", [True, True])
    return (
        isinstance(popularity, list)
        and isinstance(seen, list)
        and len(popularity) == len(seen) == 2
        and all(map(_number, popularity))
        and _number(row.get("history", 0))
        and isinstance(row.get("domain", ""), str)
        and isinstance(row.get("groups", {}), dict)
    )


def _training(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _number(value.get("step"))
        and all(_number(v) for k, v in value.items() if k.removeprefix("valid_") in CURVES)
    )


def training_line(text: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for one that this program did not write so."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if _training(value) and _plain_numbers(value) else None


def _manifest(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("command"), str) and isinstance(value.get("config"), dict)


def _read(path: Path, fits: Callable[[Any], bool]) -> Any:
    """A JSON file that `fits`, or JSON lines each of which does. Raises UserError for another."""
    if path.suffix == ".json":
        value = files.read_json(path)
        if not fits(value):
            raise UserError(f"{path}: has values that this program does not write: write the directory again")
        return value
    values = files.read_lines(path)
    for n, value in enumerate(values, 1):
        if not fits(value):
            raise UserError(f"{path}: row {n} has values that this program does not write: write the directory again")
    if not values:
        raise UserError(f"{path}: is empty: write the directory again")
    return values


def read_evaluation(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """metrics.json and manifest.json of a finished evaluation. Raises UserError for any other directory."""
    if not run_directory.is_complete(directory) or not (directory / "metrics.json").is_file():
        raise UserError(f"{directory}: holds no finished evaluation: name a directory that evaluate wrote")
    return _read(directory / "metrics.json", _evaluation), _read(directory / run_directory.MANIFEST, _manifest)


def read_scores(path: Path) -> list[dict[str, Any]]:
    """Rows of scores.jsonl. Raises UserError for a missing, empty or malformed file."""
    return _read(path, _score)


def _candidate(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), str) for name in ("user", "positive"))
        and isinstance(value.get("domain", ""), str)
        and all(_number(value.get(name)) and value[name] >= 0 for name in ("candidates", "better", "tied"))
    )


def read_training(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl. Raises UserError for a missing, empty or malformed file."""
    return _read(path, _training)


def read_manifest(directory: Path) -> dict[str, Any]:
    return _read(directory / run_directory.MANIFEST, _manifest)


def is_explanation(value: Any) -> bool:
    """What `explain --json` says of one model."""
    return (
        isinstance(value, dict)
        and _number(value.get("margin"))
        and isinstance(value.get("history"), list)
        and all(
            isinstance(e, dict) and isinstance(e.get("title"), str) and _number(e.get("effect"))
            for e in value["history"]
        )
        and isinstance(value.get("flip") or [], list)
        and all(isinstance(title, str) for title in value.get("flip") or [])
    )


def read_candidates(path: Path) -> list[dict[str, Any]]:
    """Rows of candidates.jsonl. Raises UserError for an empty or malformed file."""
    return _read(path, _candidate)
