"""The commands that are printed as the next step: quoted for a shell, with the flags that they need"""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config import (
    CommonSettings,
    DmpoSettings,
    EvaluateSettings,
    SftSettings,
    TrainSettings,
    default_of,
    read_yaml,
)
from .run_directory import CONFIG, is_complete, is_taken

# Settings that a later stage needs as well, because the adapter and the data depend on them.
CARRIED = (
    "model quantize quantize_group_size quantize_mode dtype domain skip_bad_rows max_seq_length scoring memory "
    "memory_limit"
).split()


def quote(word: str) -> str:
    """`word` as one word of bash or zsh; control characters and bytes that are not UTF-8 are written as escapes."""
    if word.isprintable():
        return shlex.quote(word)
    shown = "".join(
        c if c.isprintable() and c not in "'\\" else "".join(f"\\x{b:02x}" for b in os.fsencode(c)) for c in word
    )
    return f"$'{shown}'"


def join(words: list[str]) -> str:
    """`shlex.join`, with `quote`."""
    return " ".join(map(quote, words))


def command(name: str, *arguments: str, **flags: Any) -> str:
    """`mlx-dmpo NAME ARGUMENTS --flag value ...`; None, False and "" are left out, True is a flag without a value."""
    words = ["mlx-dmpo", *name.split()]
    words += [f"./{a}" if a.startswith("-") else a for a in arguments]  # a path is not a flag
    for flag, value in flags.items():
        if value not in (None, False, ""):
            words.append(f"--{flag.replace('_', '-')}")
            words += [] if value is True else [f"{value:g}" if isinstance(value, float) else str(value)]
    return join(words)


def carried(settings: CommonSettings, target: type) -> dict[str, Any]:
    """The settings that a command of class `target` needs to see the same model and rows."""
    defaults = {f.name: default_of(f) for f in fields(target)}
    return {n: v for n in CARRIED if n in defaults and (v := getattr(settings, n)) != defaults[n]}


def config_for(settings: CommonSettings, directory: str | Path, target: type, config_file: str | None) -> list[str]:
    """`-c FILE` for further domains: the user's file where `target` can read it, else what the run wrote of them."""
    if not settings.domains:
        return []
    known = {f.name for f in fields(target)}
    if config_file and set(read_yaml(config_file)[0]) <= known:
        return ["-c", str(config_file)]
    return ["-c", str(Path(directory) / DOMAINS)]


DOMAINS = "domains.yaml"  # written into a run directory beside config.yaml, whose other settings are of one stage


def resume(settings: TrainSettings) -> str:
    """The command that continues an interrupted run."""
    stage = "sft" if isinstance(settings, SftSettings) else "dmpo"
    return join(["mlx-dmpo", stage, "-c", str(Path(settings.adapter_path) / CONFIG), "--resume"])


def numbered(path: Path) -> Path:
    """`path`, or where a run is there already `path-2`, `path-3`, ..."""
    if not is_taken(path):
        return path
    return next(p for n in itertools.count(2) if not is_taken(p := path.with_name(f"{path.name}-{n}")))


def dmpo_directory(sft: str | Path) -> Path:
    """A free directory beside an sft run: runs/sft -> runs/dmpo, runs/songs -> runs/songs-dmpo."""
    path = Path(sft)
    if path.name in ("", ".."):
        return numbered(path / "dmpo")
    return numbered(path.with_name(path.name.replace("sft", "dmpo") if "sft" in path.name else f"{path.name}-dmpo"))


def evaluation_data(settings: TrainSettings, has_test: bool) -> str:
    """Data that the run did not train on: the data set's own test split, a test file beside a training file,
    the validation file; where none of them is known, TEST, for the reader to fill in."""
    data = Path(settings.data)
    if not settings.data or has_test:
        return settings.data
    beside = data.with_name(data.name.replace("train", "test"))
    if "train" in data.name and data.is_file() and beside.is_file():
        return str(beside)
    return settings.valid_data or "TEST"


def after_prepare(directory: str | Path) -> str:
    return command("sft", data=directory, adapter_path=numbered(Path("runs/sft")))


def after_training(
    settings: TrainSettings, directory: str | Path, *, has_test: bool, config_file: str | None = None
) -> str:
    """dmpo after sft; evaluate after dmpo, never on what was trained on."""
    if not isinstance(settings, DmpoSettings):
        flags = {
            **carried(settings, DmpoSettings),
            "data": settings.data,
            "valid_data": settings.valid_data,
            "start_adapter": directory,
            "adapter_path": dmpo_directory(directory),
        }
        return command("dmpo", **flags) + _extra(config_for(settings, directory, DmpoSettings, config_file))
    flags = {
        **carried(settings, EvaluateSettings),
        "data": evaluation_data(settings, has_test),
        "adapter_path": directory,
        # an evaluation that is there is of the adapter that this run replaced
        "overwrite": is_complete(Path(directory) / "eval"),
    }
    return command("evaluate", **flags) + _extra(config_for(settings, directory, EvaluateSettings, config_file))


def _extra(words: list[str]) -> str:
    return f" {join(words)}" if words else ""


def after_evaluation(directory: str | Path) -> str:
    return command("report", str(directory), out="report.html")


def other_data(directory: Path, settings: Any) -> bool:
    """Whether `directory` holds a run or an evaluation of another model, data set or split."""
    path = directory / CONFIG
    if not path.is_file():
        return False
    stored: Mapping[str, Any] = read_yaml(path)[0]
    return any(
        name in stored and stored[name] != getattr(settings, name)
        for name in ("model", "data", "split", "adapter_path")
        if hasattr(settings, name) and not (name == "adapter_path" and isinstance(settings, TrainSettings))
    )


def own_directory(directory: Path, settings: Any) -> Path:
    """The default directory; where that holds a run on other data, one named after this data.

    runs/sft -> runs/books/sft, ADAPTER/eval -> ADAPTER/eval-books
    """
    if not other_data(directory, settings):
        return directory
    data = Path(settings.data or "embedded")
    name = data.stem if data.is_file() else data.name
    split = getattr(settings, "split", "test")
    if isinstance(settings, TrainSettings):
        return numbered_for(directory.parent / name / directory.name, settings)
    return numbered_for(
        directory.with_name(f"{directory.name}-{name}{'' if split == 'test' else f'-{split}'}"), settings
    )


def numbered_for(path: Path, settings: Any) -> Path:
    """`path`, or the first of `path-2`, `path-3`, ... that does not hold a run on other data."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{n}") for n in itertools.count(2)))
    return next(p for p in names if not other_data(p, settings))
