"""What `--data` names -> rows: a file, a split of a directory, or a data set of the hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..machine import hub
from . import guess
from .parse import Rows, first_line, parse

HUB_NAME = re.compile(
    rf"(?P<name>{hub.REPOSITORY.pattern}?)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.-]+))?", re.ASCII
)


SPLITS = {"train": ("train",), "valid": ("validation", "valid", "dev"), "test": ("test",)}  # as the hub names them


def hub_name(data: str | Path) -> re.Match[str] | None:
    """`owner/name[:config][@split]` of the hub, or None for a path (see machine/hub.py)."""
    found = HUB_NAME.fullmatch(str(data))
    return found if found and not Path(data).exists() and hub.is_repository(found["name"]) else None


def data_file(data: str | Path, split: str) -> Path | None:
    """The file of a split: a directory's own, or the one named; None for a data set of the hub."""
    path = Path(data)
    return None if hub_name(data) else path / f"{split}.jsonl" if path.is_dir() else path


def has_split(data: str | Path, split: str) -> bool:
    """Whether a directory or a data set of the hub has a split of its own.

    A file, or one named split, is only itself.
    """
    found = hub_name(data)
    if found:
        return not found["split"] and any(name in _hub(found) for name in SPLITS[split])
    return Path(data).is_dir() and (Path(data) / f"{split}.jsonl").exists()


def read_rows(data: str | Path, split: str) -> Rows:
    """Raises UserError where there is nothing to read."""
    found = hub_name(data)
    if found:
        return _hub_rows(found, split)
    path = data_file(data, split)
    assert path is not None
    if Path(data).is_dir() and not path.is_file():
        trained_on = any((path.parent / f"{name}.jsonl").exists() for name in SPLITS)
        if not trained_on and (suggestion := guess.ratings_beside(path.parent)):
            raise UserError(f"{data}: {suggestion}")
        raise UserError(f"{path}: no such file: a prepared directory holds train.jsonl, valid.jsonl and test.jsonl")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise hub.missing(
            str(path),
            "name a data file, a directory with train.jsonl, valid.jsonl and test.jsonl, or a data set of the hub",
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}): name a readable file"
        ) from None
    return parse(path, content)


def _hub(found: re.Match[str]) -> Mapping[str, Any]:
    import datasets

    try:
        return datasets.load_dataset(found["name"], found["config"])
    except (
        Exception
    ) as error:  # the hub and its readers raise many kinds; each means "this is not a data set we can load"
        raise UserError(
            f"{found[0]}: no such path, and no data set of the hub that can be loaded "
            f"({type(error).__name__}: {first_line(error)}): "
            "name a file, a directory, or owner/name[:config][@split]"
        ) from error


def _hub_split(found: re.Match[str], split: str) -> tuple[str, Any]:
    """The split's own name and its rows. Raises UserError where the data set has none."""
    loaded = _hub(found)
    wanted = (found["split"],) if found["split"] else SPLITS[split]
    name = next((name for name in wanted if name in loaded), None)
    if name is None:
        raise UserError(
            f"{found[0]}: has no split {wanted[0]}: name one as {found['name']}@SPLIT, of {', '.join(map(str, loaded))}"
        )
    return name, loaded[name]


def _hub_rows(found: re.Match[str], split: str) -> Rows:
    name, rows = _hub_split(found, split)
    for n, value in enumerate(rows, 1):
        yield f"{found['name']}@{name}:row {n}", value


def hub_inputs(data: str | Path, split: str) -> dict[str, str]:
    """What a manifest says of a hub data set that was read: its revision, where that is known, and SHA-256 of the rows.

    {} for a path.
    """
    found = hub_name(data)
    if not found:
        return {}
    name, rows = _hub_split(found, split)
    digest = hashlib.sha256()
    for value in rows:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode("utf-8", "surrogatepass") + b"\n")
    sources = " ".join(map(str, getattr(getattr(rows, "info", None), "download_checksums", None) or ()))
    revision = re.search(r"@([0-9a-f]{40})/", sources)
    config = f":{found['config']}" if found["config"] else ""
    return {
        f"{found['name']}{config}@{name}": f"{f'revision {revision[1]}, ' if revision else ''}rows {digest.hexdigest()}"
    }
