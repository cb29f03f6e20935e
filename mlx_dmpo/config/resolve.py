"""Defaults < embedded model's settings < YAML < flags."""

from __future__ import annotations

import difflib
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import UserError
from .effects import without_effect
from .fields import default_of
from .training import PRESETS

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """SafeLoader which reads 1e-5 as a number, as YAML 1.2 and mlx-lm do.

    Aliases are refused: a few lines of them can stand for gigabytes.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "an alias (*name): write the value out", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def home(text: str, where: str) -> str:
    """A path that begins with `~` or `~user` under that home directory, also after `scores:`; any other text as it is.

    A shell does this for a word of its own only, not after `=`, in quotes or in a file.
    Raises UserError for an unknown user.
    """
    kind, path = ("scores:", text[7:]) if text.startswith("scores:") else ("", text)
    if not path.startswith("~"):
        return text
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise UserError(f"{where}: {path.split('/')[0]} is nobody's home directory: write the path out, or ./{path}")
    return kind + found


def _at_home(value: Any, where: str) -> Any:
    if isinstance(value, tuple):
        return tuple(home(v, where) for v in value)
    return home(value, where) if isinstance(value, str) else value


def _coerce(value: Any, annotation: Any, where: str) -> Any:
    """`value` as the field's type, or UserError. Ints pass for floats; nothing else is converted."""
    for kind in _kinds(annotation):
        origin = typing.get_origin(kind) or kind
        if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, Mapping):
            return build(kind, value, lambda key: f"{where}.{key}")
        if origin is tuple and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return tuple(value)
        if kind is str and isinstance(value, str):
            return value
        if origin is dict and isinstance(value, Mapping):
            return dict(value)
        if kind is type(None) and value is None:
            return None
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value) if abs(value) < 1e308 else math.inf  # a longer whole number than a float holds
        if isinstance(origin, type) and isinstance(value, origin) and not (kind is int and isinstance(value, bool)):
            return value
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    wanted = " or ".join(
        names.get(k, "a mapping" if (typing.get_origin(k) or k) is not tuple else "a list of names")
        for k in _kinds(annotation)
    )
    raise UserError(f"{where}: {value!r} does not fit: give {wanted}")


def _check(value: Any, spec: Field[Any], where: str) -> None:
    meta = spec.metadata
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) < 1e308:
            raise UserError(f"{where}: is not finite: give a finite number")
        for key, bad, words in (
            ("low", lambda bound: value < bound, "at least"),
            ("above", lambda bound: value <= bound, "more than"),
            ("high", lambda bound: value > bound, "at most"),
        ):
            if meta.get(key) is not None and bad(meta[key]):
                raise UserError(f"{where}: {value:g} is out of range: give {words} {meta[key]:g}")
    if (
        meta.get("choices")
        and value is not None
        and not isinstance(value, Mapping)
        and str(value) not in meta["choices"]
    ):
        raise UserError(f"{where}: {value!r} is not a choice: give one of {', '.join(c for c in meta['choices'] if c)}")


def build(cls: type[T], values: Mapping[str, Any], where: Any = lambda key: key) -> T:
    """A settings object of `values`; `where(key)` begins the message of a UserError about that key."""
    specs = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    clean = {}
    for key, value in values.items():
        if key not in specs:
            near = difflib.get_close_matches(str(key), specs, n=1, cutoff=0.5)
            hint = f'did you mean "{near[0]}"?' if near else f"known settings: {', '.join(sorted(specs))}"
            raise UserError(f"{where(key)}: unknown setting: {hint}")
        clean[key] = _coerce(value, hints[key], where(key))
        if specs[key].metadata.get("path"):
            clean[key] = _at_home(clean[key], where(key))
        _check(clean[key], specs[key], where(key))
    return cls(**clean)


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A config file's settings and the line of each. Raises UserError for a file that cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: name an existing YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): name a readable YAML file") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)  # noqa: S506  (_Loader is a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2024-13-45
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}{line}: not valid YAML ({getattr(error, 'problem', None) or error}): fix the syntax"
        ) from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:1: not a mapping of settings: write `name: value` lines")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if key.value in lines:
            raise UserError(f'{path}:{key.start_mark.line + 1}: setting "{key.value}" is given twice: keep one of them')
        lines[key.value] = key.start_mark.line + 1
    return {str(k): v for k, v in values.items()}, lines


def resolve(
    cls: type[T],
    config: str | Path | None,
    flags: Mapping[str, Any],
    embedded: Mapping[str, Any] | None = None,
    notice: Callable[[str], None] = lambda message: None,
) -> T:
    """Defaults < the embedded model's own settings (when no model is named) < YAML < flags.

    flags   only what was given
    notice  receives a line for each setting of the file that has no effect; a flag without effect is an error
    """
    config = home(str(config), "--config") if config else None
    values, lines = read_yaml(config) if config else ({}, {})
    from_file = set(values)

    def where(key: str) -> str:
        if key in flags:
            return f"--{key.replace('_', '-')}"
        return in_file(key) if key in from_file else key

    def in_file(key: str) -> str:
        return f'{config}:{lines.get(key, 1)}: "{key}"'

    if config:
        build(cls, values, in_file)  # so that the file's own mistakes are reported with their lines
    if "epochs" in flags and flags.get("iters") is not None:
        raise UserError("--iters: both --epochs and --iters are given: keep one of them")
    if "epochs" in flags and "iters" in {f.name for f in fields(cls)}:  # type: ignore[arg-type]
        values["iters"] = None
    merged = {**values, **flags}
    if "lora_parameters" in {f.name for f in fields(cls)}:  # type: ignore[arg-type]
        lora = {k[5:]: merged.pop(k) for k in flags if k.startswith("lora_")}
        if lora:
            merged["lora_parameters"] = {**(merged.get("lora_parameters") or {}), **lora}
    if embedded and not merged.get("model"):
        merged = {**embedded, **merged}
    merged = {**PRESETS.get(str(merged.get("preset")), {}), **merged}
    settings = build(cls, merged, where)
    for name, why in without_effect(settings).items():
        if name in flags:
            raise UserError(f"{where(name)}: has no effect {why}: leave it out")
        default = next(default_of(f) for f in fields(cls) if f.name == name)  # type: ignore[arg-type]
        if name in from_file and getattr(settings, name) != default:
            notice(f"note: {in_file(name)}: has no effect {why}")
    return settings
