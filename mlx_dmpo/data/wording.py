"""The wording of domains that a prepared directory was made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError
from ..machine import files
from ..machine.run_directory import MANIFEST

T = TypeVar("T", bound=Any)


def manifest_of(data: str | Path) -> Mapping[str, Any]:
    """The settings that a prepared directory was made with; {} where there are none."""
    path = Path(data) / MANIFEST
    if not path.is_file():
        return {}
    whole = files.read_json(path)
    config = whole.get("config") if isinstance(whole, dict) else None
    if not isinstance(config, dict):
        return {}
    # where the split was left to `prepare`, the manifest has what it chose
    return {**config, "split": whole.get("split") or config.get("split")}


def own_domains(data: Sequence[str]) -> dict[str, dict[str, str]]:
    """The wording of domains that prepared directories were made with. Raises UserError where two of them differ."""
    found: dict[str, dict[str, str]] = {}
    for name in data:
        worded = manifest_of(name).get("domains")
        for domain, wording in (worded if isinstance(worded, dict) else {}).items():
            if found.setdefault(domain, wording) != wording:
                raise UserError(
                    f'{name}: words the domain "{domain}" differently from the directories before it: check them apart'
                )
    return found


def with_own_domains(settings: T, adapter: str = "") -> T:
    """The settings with the wording that their data directory was made with, beneath their own.

    adapter  the adapter that is started from or measured: its wording of a domain comes before the directory's
    """
    own = own_domains([settings.data]) if settings.data else {}
    stored = files.read_json(path) if (path := Path(adapter) / "adapter_config.json").is_file() else {}
    prompt = stored.get("prompt") if isinstance(stored, dict) else None
    trained = prompt.get("domains") if isinstance(prompt, dict) else None
    new = {name: words for name, words in own.items() if name not in (trained or {})}
    return replace(settings, domains=new | settings.domains) if new else settings
