"""Pairwise ranking evaluation: every pair in both printed orders, each with both answers -> scores.jsonl -> metrics.json.

Preferences in free text have one prompt, as it is: no printed order, and no number that speaks of one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import assets
from ..config import EvaluateSettings
from ..core.selfcheck import GroupScorer, choose_scorer
from ..data import formats
from ..data.rows import data_file
from ..errors import UserError
from ..machine import console, files, memory, run_directory
from ..machine.ranks import world
from ..model import adapters, device, loading
from ..model.encode import Encoder
from ..model.score import score_groups
from ..prompts import pairwise
from ..prompts.orders import first_negatives
from ..records import Example, PreferenceGroup, RankingExample
from ..report import charts
from . import metrics


def score_examples(
    base: loading.Loaded, scorer: GroupScorer, encoder: Encoder, examples: Sequence[Example], batch_size: int
) -> Iterator[dict[str, Any]]:
    """One scores.jsonl row a (positive, negative) pair, in the examples' order; log-probs in nats, summed over the answer."""
    groups = [
        encoder.encode(e, [(True, False)] * len(e.negatives) if isinstance(e, RankingExample) else []) for e in examples
    ]
    scored = {id(group): logps for group, logps in score_groups(base.model, scorer, groups, batch_size, "evaluate")}
    for example, group in zip(examples, groups, strict=True):
        if isinstance(example, PreferenceGroup):
            yield from _text_scores(example, np.asarray(scored[id(group)], np.float64))
            continue
        # branches: negative, printed order (positive first, then second), answer (chosen, then rejected)
        logps = np.asarray(scored[id(group)], np.float64).reshape(len(example.negatives), 2, 2)
        for k, negative in enumerate(example.negatives):
            row: dict[str, Any] = {
                "user": example.user,
                "domain": example.domain,
                "positive": example.positive,
                "negative": negative,
            }
            for name, (chosen, rejected) in zip(("positive_first", "positive_second"), logps[k].tolist(), strict=True):
                row[name] = {"chosen_logp": chosen, "rejected_logp": rejected}
            row["margin"] = float((logps[k, :, 0] - logps[k, :, 1]).sum())
            if example.positive_first is not None:
                row["source_positive_first"] = example.positive_first[k]
            yield row


def _text_scores(group: PreferenceGroup, logps: np.ndarray) -> Iterator[dict[str, Any]]:
    """One row a pair of a group in free text, in its one prompt.  logps (R,), nats."""
    for chosen, rejected in group.pairs:
        yield {
            "user": group.user,
            "domain": group.domain,
            "positive": group.branches[chosen].answer,
            "negative": group.branches[rejected].answer,
            "given": {"chosen_logp": float(logps[chosen]), "rejected_logp": float(logps[rejected])},
            "margin": float(logps[chosen] - logps[rejected]),
        }


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
            console.notice(
                "note: free text: each pair is scored in its one prompt; numbers of printed orders do not exist"
            )
        examples = [first_negatives(e, settings.num_negatives) for e in loaded.examples[: settings.limit or None]]
        if settings.adapter_path:
            adapters.read_adapter_config(settings.adapter_path)
        if not world().first:
            return _metrics(settings, examples, domains)[1]
        with run_directory.RunDirectory(
            output_directory(settings), command, settings, overwrite=settings.overwrite, flag="--out"
        ) as run:
            rows, result, facts = _metrics(settings, examples, domains)
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
    settings: EvaluateSettings, examples: Sequence[Example], domains: dict[str, pairwise.Domain]
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """Rows of scores.jsonl, metrics, and what was scored with."""
    base = loading.load(settings)
    if settings.adapter_path:
        adapters.load_adapter(base, settings.adapter_path)
    base.model.eval()
    scorer = choose_scorer(base.model, base.vocabulary, settings.scoring)
    if not scorer.shared:
        console.notice(f"note: every sequence is run alone, which is slower: {scorer.reason}")
    encoder = Encoder(base.tokenizer, settings.max_seq_length, domains)
    rows = list(score_examples(base, scorer, encoder, examples, settings.batch_size))
    result = metrics.ranking_metrics(rows, resamples=settings.resamples, seed=settings.seed)
    return rows, result, {"model": base.name, "base_fingerprint": base.fingerprint, "shared_road": scorer.shared}
