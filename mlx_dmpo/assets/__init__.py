"""The embedded tiny model, its fictional data and the settings that suit them: see PROVENANCE.md."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def model_dir() -> Path:
    """A Qwen3 model directory, as mlx-lm loads it."""
    return _HERE / "model"


def data_dir() -> Path:
    """train.jsonl, valid.jsonl and test.jsonl of ranking examples."""
    return _HERE / "data"


def settings_file() -> Path:
    """YAML with the embedded model's own settings of `sft`, `dmpo` and `evaluate`."""
    return _HERE / "settings.yaml"
