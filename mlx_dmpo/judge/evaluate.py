"""Pairwise ranking evaluation: every pair in both printed orders, each with both answers -> scores.jsonl -> metrics.json.

Preferences in free text have one prompt, as it is: no printed order, and no number that speaks of one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import assets
from ..config import EvaluateSettings
from ..data import formats
from ..data.rows import data_file
from ..errors import UserError
from ..machine import console, files, memory, run_directory
from ..machine.ranks import world
from ..model import adapters, device
from ..model.open import open_scorer, refuse_for_free_text
from ..prompts import pairwise
from ..prompts.orders import first_negatives
from ..records import Example, RankingExample
from ..report import charts
from . import metrics
from .rows import rows_of


def output_directory(settings: EvaluateSettings) -> Path:
    return Path(settings.out or (Path(settings.adapter_path) / "eval" if settings.adapter_path else "runs/base/eval"))


def evaluate(settings: EvaluateSettings, command: str = "evaluate") -> dict[str, Any]:
    """Scores a split, writes the evaluation directory, returns its metrics. Raises UserError for what the user can mend."""
    with memory.memory_limits(settings), world().watched():
        domains = pairwise.with_domains(settings.domains)
        data = settings.data or str(assets.data_dir())
        loaded = formats.load(data, settings.split, domains, settings.skip_bad_rows, console.notice, settings.domain)
        if not loaded.has_pairs:
            raise UserError(
                f"{loaded.name}: holds {loaded.format}, one answer a prompt: give data with chosen and rejected answers"
            )
        if not loaded.ranking:
            refuse_for_free_text(settings)
            console.notice(
                "note: free text: each pair is scored in its one prompt; numbers of printed orders do not exist"
            )
        examples = [first_negatives(e, settings.num_negatives) for e in loaded.examples[: settings.limit or None]]
        if settings.adapter_path:
            adapters.read_adapter_config(settings.adapter_path)
        if not world().first:
            return _metrics(settings, examples)[1]
        with run_directory.RunDirectory(
            output_directory(settings), command, settings, overwrite=settings.overwrite, flag="--out"
        ) as run:
            rows, result, facts = _metrics(settings, examples)
            files.write_text(
                run.path / "scores.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            )
            files.write_json(run.path / "metrics.json", result)
            charts.plot_comparison({settings.adapter_path or facts["model"]: result}, run.path / "accuracy.png")
            charts.plot_margins(rows, run.path / "margins.png")
            if file := data_file(data, settings.split):
                run.input(file)
            run.finish(device.device_name(), adapter=settings.adapter_path or None, **facts)
            return result


def _metrics(
    settings: EvaluateSettings, examples: Sequence[Example]
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """Rows of scores.jsonl, metrics, and what was scored with."""
    scorer = open_scorer(settings, settings.adapter_path)
    rows = [row for scores in scorer.score(examples) for row in rows_of(scores)]
    result = metrics.ranking_metrics(rows, resamples=settings.resamples, seed=settings.seed)
    base = scorer.base
    return (
        rows,
        result,
        {
            "model": base.name,
            "base_fingerprint": base.fingerprint,
            "shared_road": scorer.groups.shared,
            "prompt": scorer.template.to_json() if isinstance(examples[0], RankingExample) else None,
        },
    )
