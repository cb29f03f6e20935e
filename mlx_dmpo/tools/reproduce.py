"""A comparison described in a YAML file: its cells, and running those that are not done.

A cell is one system on one data set: a directory with a run, its evaluation and cell.json. See docs/reproduce.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from .. import config
from ..config.baseline import BASELINES, COUNTERS, LANGUAGE, BaselineSettings, check_baseline
from ..errors import UserError
from ..machine import console, files, run_directory

CELL = "cell.json"
STAGES: dict[str, type] = {
    "sft": config.SftSettings,
    "dmpo": config.DmpoSettings,
    "evaluate": config.EvaluateSettings,
    "baseline": BaselineSettings,
}
KEYS = ("name", "out", "data", "models", "prompts", "systems", "k", "few_shot", "seeds", "against", *STAGES)


@dataclass(frozen=True)
class Step:
    """One command of a cell, and the directory whose manifest says that it is done."""

    arguments: tuple[str, ...]
    directory: Path

    @property
    def done(self) -> bool:
        return run_directory.is_complete(self.directory)


@dataclass(frozen=True)
class Cell:
    """One row of a table. `steps` are run in order; `needs` is the cell whose adapter the first of them starts from.

    "" and None: not of this kind of cell, as the seed of popularity. `few_shot` 0 is all training users.
    """

    path: Path
    data: str
    system: str
    steps: tuple[Step, ...]
    model: str = ""
    prompt: str = ""
    k: int | None = None
    few_shot: int | None = None
    seed: int | None = None
    needs: Cell | None = None

    @property
    def done(self) -> bool:
        return all(step.done for step in self.steps)


@dataclass(frozen=True)
class Data:
    """What a data set's commands are given: `test`, and for training `train` and perhaps another file for `sft`."""

    test: str
    train: str = ""
    sft: str = ""
    valid: str = ""


@dataclass(frozen=True)
class Comparison:
    """The YAML file, checked. `systems`: name -> settings of its training, or of a baseline."""

    name: str
    out: Path
    data: dict[str, Data]
    models: dict[str, str]
    prompts: tuple[str, ...]
    systems: dict[str, dict[str, Any]]
    k: tuple[int, ...]
    few_shot: tuple[int, ...]
    seeds: tuple[int, ...]
    against: str
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        raise UserError(f"{where}: is not a mapping of names: write name: value lines below it")
    return {str(k): v for k, v in value.items()}


def _numbers(value: Any, where: str) -> tuple[int, ...]:
    numbers = value if isinstance(value, list) else [value]
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
        raise UserError(f"{where}: is not a list of whole numbers: write it as [1, 3, 5]")
    return tuple(dict.fromkeys(numbers))


def read(path: str | Path) -> Comparison:
    """A comparison's file. Raises UserError, with file and line, for whatever is missing, unknown or malformed."""
    values, lines = config.read_yaml(path)

    def at(key: str) -> str:
        return f'{path}:{lines.get(key, 1)}: "{key}"'

    for key in values:
        if key not in KEYS:
            raise UserError(f"{at(key)}: unknown setting: known are {', '.join(KEYS)}")
    for key in ("data", "systems"):
        if not values.get(key):
            raise UserError(f'{path}:1: "{key}" is missing: see docs/reproduce.md')
    for key in ("name", "out"):
        if key in values and not (isinstance(values[key], str) and values[key].strip()):
            raise UserError(f"{at(key)}: is not text: write a name, or leave it out")
    name = values.get("name", Path(path).stem)
    data = {n: _data(d, f"{at('data')}: {n}") for n, d in _mapping(values["data"], at("data")).items()}
    stages = {stage: _mapping(values[stage], at(stage)) if values.get(stage) else {} for stage in STAGES}
    for stage, given in stages.items():
        config.build(STAGES[stage], given, lambda key, stage=stage: f"{at(stage)}: {key}")
    systems: dict[str, dict[str, Any]] = {}
    for entry in values["systems"] if isinstance(values["systems"], list) else [values["systems"]]:
        if not isinstance(entry, str | Mapping):
            raise UserError(f"{at('systems')}: {entry!r} is not a system: write its name, or name: {{setting: value}}")
        for system, given in (entry if isinstance(entry, Mapping) else {entry: {}}).items():
            if str(system) in systems:
                raise UserError(f"{at('systems')}: {system} is listed twice: give each system its own name")
            systems[str(system)] = _system(str(system), given or {}, stages, at("systems"))
    against = str(values.get("against", ""))
    if against and against not in systems:
        raise UserError(f"{at('against')}: {against!r} is none of the systems: name one of them")
    models = {n: str(m) for n, m in _mapping(values["models"], at("models")).items()} if values.get("models") else {}
    if not models and any(s not in BASELINES or s in LANGUAGE for s in systems):
        raise UserError(f'{path}:1: "models" is missing: systems other than baselines need a model')
    prompts = values.get("prompts", ["pairwise"])
    return Comparison(
        name,
        Path(values.get("out", f"runs/reproduce/{name}")),
        data,
        models,
        tuple(map(str, prompts if isinstance(prompts, list) else [prompts])),
        systems,
        _numbers(values.get("k", [5]), at("k")),
        _numbers(values.get("few_shot", [0]), at("few_shot")),
        _numbers(values.get("seeds", [0]), at("seeds")),
        against,
        stages,
    )


def _data(value: Any, where: str) -> Data:
    if isinstance(value, str):
        return Data(value, value, "", "")
    given = _mapping(value, where)
    known = [f.name for f in fields(Data)]
    for key, part in given.items():
        if key not in known or not isinstance(part, str):
            raise UserError(f"{where}.{key}: is not a path of a known part: known are {', '.join(known)}")
    if "test" not in given:
        raise UserError(f"{where}: has no test: name a directory or a file")
    return Data(**given)


def _system(name: str, given: Any, stages: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Any]:
    """The settings of a system, checked as its command will check them."""
    settings = dict(_mapping(given, f"{where}: {name}")) if given else {}

    def at(key: str) -> str:
        return f"{where}: {name}.{key}"

    if name in BASELINES:
        merged = {**_applicable(name, stages["baseline"]), **settings}
        check_baseline(name, config.build(BaselineSettings, merged, at))
        return merged
    if name in ("base", "sft"):
        config.build(STAGES["evaluate" if name == "base" else "sft"], settings, at)
        return settings
    settings.setdefault("loss", name)
    start = settings.pop("start", "sft")
    if start not in ("sft", "base"):
        raise UserError(f"{at('start')}: {start!r} is not a choice: give sft or base")
    config.build(config.DmpoSettings, {**stages["dmpo"], **settings}, at)
    return {**settings, "start": start}


def _applicable(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of settings for all baselines, those that have an effect on this one."""
    kept = {}
    for key, value in given.items():
        try:
            check_baseline(name, config.build(BaselineSettings, {key: value}))
        except UserError:
            continue
        kept[key] = value
    return kept


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a command's flags: {"epochs": 3.0, "both_orders": True} -> --epochs 3.0 --both-orders."""
    found = []
    for key, value in settings.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, Mapping):  # lora_parameters: {rank: 8} is --lora-rank 8
            found += flags({f"{key.removesuffix('_parameters')}_{k}": v for k, v in value.items()})
        elif isinstance(value, bool):
            found.append(flag if value else f"--no-{flag[2:]}")
        else:
            for one in value if isinstance(value, list | tuple) else [value]:
                found += [flag, str(one)]
    return found


def cells(plan: Comparison) -> list[Cell]:
    """Every cell, in the order in which they are run: seed by seed, so that a whole table stands after the first."""
    found: dict[Path, Cell] = {}
    for seed, few, k in product(plan.seeds, plan.few_shot, plan.k):
        for data in plan.data:
            for system, settings in plan.systems.items():
                if system in BASELINES and system not in LANGUAGE:
                    cell = _baseline(plan, data, system, settings, few, seed)
                    found.setdefault(cell.path, cell)
        for data, model, prompt in product(plan.data, plan.models, plan.prompts):
            for system in plan.systems:
                for cell in _of_model(plan, data, model, prompt, system, k, few, seed):
                    found.setdefault(cell.path, cell)
    return list(found.values())


def _trained_on(plan: Comparison, data: str, few: int, k: int, stage: str) -> str:
    """The training data of a cell: the file, with {k} filled in, or the few-shot subset made of it."""
    given = plan.data[data]
    path = (given.sft if stage == "sft" and given.sft else given.train).replace("{k}", str(k))
    if not path:
        raise UserError(f"data: {data} has no train: name the training users' file or directory")
    return str(subset(plan, data, few, stage)) if few else path


def subset(plan: Comparison, data: str, few: int, stage: str) -> Path:
    return plan.out / data / "few-shot" / f"{stage}-{few}"


def _baseline(plan: Comparison, data: str, system: str, settings: Mapping[str, Any], few: int, seed: int) -> Cell:
    given = plan.data[data]
    fitted = system not in ("first-listed",)
    of_seed = system not in (*COUNTERS, "item-knn")
    path = plan.out / data / "_".join([system, *([f"n{few}"] if few else []), *([f"s{seed}"] if of_seed else [])])
    arguments = ["baseline", system, "--data", given.test, "--out", str(path / "eval")]
    alone = not given.train or (given.train == given.test and not few)
    if fitted and not alone:
        arguments += ["--train-data", _trained_on(plan, data, few, max(plan.k), "dmpo")]
    more = {**settings, **({"seed": seed} if of_seed else {})}
    step = Step((*arguments, *flags(more)), path / "eval")
    return Cell(path, data, system, (step,), few_shot=few if fitted else None, seed=seed if of_seed else None)


def _of_model(
    plan: Comparison, data: str, model: str, prompt: str, system: str, k: int, few: int, seed: int
) -> Iterator[Cell]:
    """The cell of a system on a model, after the SFT cell that it starts from."""
    where, given, settings = plan.out / data / model / prompt, plan.data[data], dict(plan.systems[system])
    shared = ["--model", plan.models[model], "--prompt", prompt]

    def evaluated(path: Path, adapter: Path | None) -> Step:
        about = ["--adapter-path", str(adapter)] if adapter else []
        given_to_all, layers = dict(plan.stages["evaluate"]), plan.stages["dmpo"].get("num_layers", -1)
        if not adapter and given_to_all.pop("frozen_cache", "") and layers > 0:
            given_to_all |= {"frozen_cache": plan.stages["evaluate"]["frozen_cache"], "num_layers": layers}
        more = flags({**given_to_all, **(settings if system == "base" else {})})
        arguments = ["evaluate", *shared, *about, "--data", given.test, "--out", str(path / "eval"), *more]
        return Step(tuple(arguments), path / "eval")

    def trained(stage: str, path: Path, more: Mapping[str, Any], start: Path | None) -> Step:
        arguments = [stage, *shared, "--data", _trained_on(plan, data, few, k, stage), "--adapter-path", str(path)]
        arguments += ["--start-adapter", str(start)] if start else []
        arguments += ["--valid-data", given.valid] if given.valid else []
        return Step((*arguments, *flags({**plan.stages[stage], **more, "seed": seed})), path)

    names: dict[str, Any] = {"model": model, "prompt": prompt, "data": data}
    if system in LANGUAGE:
        path = where / (f"{system}_s{seed}" if system == "in-context" else system)
        arguments = ["baseline", system, *shared, "--data", given.test, "--out", str(path / "eval")]
        if system == "in-context":
            settings["seed"] = names["seed"] = seed
            if given.train != given.test or few:
                arguments += ["--train-data", _trained_on(plan, data, few, k, "dmpo")]
        yield Cell(path, system=system, steps=(Step((*arguments, *flags(settings)), path / "eval"),), **names)
    elif system == "base":
        yield Cell(where / "base", system=system, steps=(evaluated(where / "base", None),), **names)
    elif system not in BASELINES:
        ending = "".join([f"_n{few}" if few else "", f"_s{seed}"])
        start = where / f"sft{ending}"
        first = Cell(
            start,
            system="sft",
            steps=(trained("sft", start, plan.systems.get("sft", {}), None), evaluated(start, start)),
            few_shot=few,
            seed=seed,
            **names,
        )
        if system == "sft":
            yield first
            return
        after_sft = settings.pop("start") == "sft"
        if after_sft:
            yield first
        path = where / f"{system}_k{k}{ending}"
        step = trained("dmpo", path, {**settings, "num_negatives": k}, start if after_sft else None)
        needs = first if after_sft else None
        steps = (step, evaluated(path, path))
        yield Cell(path, system=system, steps=steps, k=k, few_shot=few, seed=seed, needs=needs, **names)


def read_notes(cell: Cell) -> dict[str, Any]:
    """A cell's cell.json, {} where there is none yet. Raises UserError for other values than `run_cell` writes."""
    path = cell.path / CELL
    noted: Any = files.read_json(path) if path.exists() else {}
    if not isinstance(noted, dict) or not all(
        isinstance(v, dict) and type(v.get("seconds")) in (int, float) and type(v.get("peak_bytes")) is int
        for v in noted.values()
    ):
        raise UserError(f"{path}: has values that this program does not write: remove it")
    return noted


def run_cell(cell: Cell) -> None:
    """Runs the steps that are not done, each in a process of its own, and notes time and memory in cell.json.

    Raises UserError where one fails: the cell stays undone, and the next run continues it.
    """
    cell.path.mkdir(parents=True, exist_ok=True)
    noted = read_notes(cell)
    for step in cell.steps:
        if step.done:
            continue
        arguments = list(step.arguments)
        if any((step.directory / run_directory.CHECKPOINTS).glob("[0-9]*")):
            arguments.append("--resume")
        console.notice("$ mlx-dmpo " + " ".join(arguments))
        seconds, peak, code = run_command(arguments)
        if code:
            raise UserError(f"{cell.path}: mlx-dmpo {arguments[0]} ended with {code}: see above, then run this again")
        before = noted.get(arguments[0], {"seconds": 0.0, "peak_bytes": 0})
        noted[arguments[0]] = {
            "command": "mlx-dmpo " + " ".join(step.arguments),
            "seconds": round(before["seconds"] + seconds, 1),
            "peak_bytes": max(before["peak_bytes"], peak),
        }
        files.write_json(cell.path / CELL, noted)


def run_command(arguments: Sequence[str]) -> tuple[float, int, int]:
    """(seconds, highest resident memory in bytes, exit code) of a command of ours."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "mlx_dmpo", *arguments])
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return time.monotonic() - started, usage.ru_maxrss * unit, process.returncode
