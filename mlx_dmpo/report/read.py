"""Run and evaluation directories, read with every value checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..machine import files, run_directory
from .tables import COLUMNS


def _number(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
    )  # neither NaN nor infinite


def _metric(value: Any, interval: bool = False) -> bool:
    return (
        isinstance(value, dict)
        and (_number(value.get("value")) or (value.get("value") is None and not interval))
        and (("low" not in value and not interval) or (_number(value.get("low")) and _number(value.get("high"))))
    )


def _evaluation(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(_number(value.get(name)) for name in ("n", "users", "ties"))
        and "pair_accuracy" in value  # of the others free text leaves some out
        and all(
            _metric(value[name], interval=name.startswith("pair_accuracy")) for name, _, _ in COLUMNS if name in value
        )
    )


def _score(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), str) for name in ("user", "positive", "negative"))
        and _number(value.get("margin"))
        and all(
            isinstance(order, dict) and _number(order.get("chosen_logp")) and _number(order.get("rejected_logp"))
            for order in (
                [value["given"]] if "given" in value else [value.get("positive_first"), value.get("positive_second")]
            )
        )
    )


def _training(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _number(value.get("step"))
        and all(_number(v) for k, v in value.items() if k.removeprefix("valid_") in CURVES)
    )


def _manifest(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("command"), str) and isinstance(value.get("config"), dict)


def _read(path: Path, fits: Callable[[Any], bool]) -> Any:
    """A JSON file that `fits`, or JSON lines each of which does. Raises UserError for another."""
    if path.suffix == ".json":
        value = files.read_json(path)
        if not fits(value):
            raise UserError(f"{path}: holds other values than this program writes: write the directory anew")
        return value
    values = files.read_lines(path)
    for n, value in enumerate(values, 1):
        if not fits(value):
            raise UserError(f"{path}: row {n} holds other values than this program writes: write the directory anew")
    if not values:
        raise UserError(f"{path}: is empty: write the directory anew")
    return values


def read_evaluation(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """metrics.json and manifest.json of a finished evaluation. Raises UserError for any other directory."""
    if not run_directory.is_complete(directory) or not (directory / "metrics.json").is_file():
        raise UserError(f"{directory}: holds no finished evaluation: name a directory that evaluate wrote")
    return _read(directory / "metrics.json", _evaluation), _read(directory / run_directory.MANIFEST, _manifest)


CURVES = {"loss": "loss", "margin": "margin", "pair_accuracy": "pair accuracy"}
