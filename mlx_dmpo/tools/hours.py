"""How long a cell of a comparison will take, by `plan`: FLOPs of its groups over this machine's rate"""

from __future__ import annotations

import functools
from typing import Any

from ..config import DmpoSettings, SftSettings, default_of
from ..core.tree import by_length, pad_groups
from ..model.calibrate import calibrate
from ..model.cost import OPTIMIZER_STATES, Training, Work, forward_flops
from ..model.device import on_cpu
from ..model.fit import Case
from ..model.shape import ModelShape
from ..prompts import template as prompts
from .plan import measured_groups, plan
from .reproduce import Cell, Step

LANGUAGE_COMMANDS = ("evaluate", "sft", "dmpo")


def _flags(step: Step) -> dict[str, str]:
    """--flag value pairs of a command, without the dashes."""
    words = step.arguments[1:]
    return {a[2:].replace("-", "_"): b for a, b in zip(words, [*words[1:], ""], strict=False) if a.startswith("--")}


@functools.lru_cache(maxsize=8)
def _rate(model: str, layers: int, rank: int, width: int) -> float:
    shape = ModelShape.of(model)
    return calibrate(shape, _training(shape, layers, rank, width))


def _training(shape: ModelShape, layers: int, rank: int, width: int) -> Training:
    return Training(shape.layers if layers < 0 else layers, rank, (), False, width, OPTIMIZER_STATES["adamw"])


@functools.lru_cache(maxsize=64)
def _groups(data: str, model: str, k: int, sft: bool, prompt: str) -> Any:
    return measured_groups(data, model, k, 2048, sft, prompts.load(prompt))


def step_hours(step: Step, rate: float = 0.0) -> float:
    """Hours of one command; none for what has no language model. Raises UserError for a model that is not here."""
    command, given = step.arguments[0], _flags(step)
    if command not in LANGUAGE_COMMANDS and not (command == "baseline" and "model" in given):
        return 0.0
    model, prompt = given["model"], given.get("prompt", "pairwise")
    shape, width = ModelShape.of(model), 4 if on_cpu() else 2
    layers, rank = int(given.get("num_layers", -1)), int(given.get("lora_rank", 8))
    rate = rate or _rate(model, layers, rank, width)
    training = _training(shape, layers, rank, width)
    k = int(given.get("num_negatives", 1 if command == "sft" else 0))
    groups = _groups(given["data"], model, k, command == "sft", prompt)
    if command in ("sft", "dmpo"):
        settings: Any = SftSettings if command == "sft" else DmpoSettings
        spec = settings.__dataclass_fields__["epochs"]
        epochs = float(given.get("epochs", default_of(spec)))
        case = Case(shape, training, groups, int(given.get("batch_size", 4)), int(given.get("batch_tokens", 8192)))
        found: dict[str, Any] = plan(case, epochs=epochs, flops_per_second=rate)
        return float(found["seconds"]) / 3600
    limit = int(given.get("limit", 0)) or len(groups)
    orders = 2 if prompt == "pairwise" else int(given.get("orders", 4)) if prompt == "listwise" else 1
    works = [Work.of(pad_groups([groups[i] for i in rows])) for rows in by_length(groups, 8)]
    flops = sum(forward_flops(shape, work) for work in works)
    return orders * flops / rate * min(limit / len(groups), 1.0) / 3600


def hours_of(cell: Cell, rate: float = 0.0) -> float:
    """Hours of the steps of a cell that are not done. rate: FLOP/s, 0 measures."""
    return sum(step_hours(step, rate) for step in cell.steps if not step.done)
