"""Ranking evaluation: examples -> a Scorer -> scores.jsonl -> metrics.json, with whatever else was requested.

Every pair is scored in both printed orders, each with both answers. Preferences in free text have one prompt, as it is:
no printed order, and no number about orders.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from .. import assets
from ..config import EvaluateSettings
from ..core.scorer import SCORER_VERSION
from ..data import formats
from ..data.rows import data_file, hub_inputs
from ..errors import UserError
from ..machine import console, files, mac, memory, run_directory, trained_on
from ..machine.ranks import world
from ..model import device
from ..model.open import LanguageModelScorer, choose_template, open_scorer, refuse_for_free_text
from ..prompts.orders import first_negatives
from ..records import Example, RankingExample
from ..report import charts
from ..scores import Scorer, check_finite
from . import candidates, generation, metrics, ranking
from .facts import Facts, load_facts
from .progress import PROGRESS, claim, rows_in_chunks
from .rows import rows_of

SCORES, CANDIDATES, ANSWERS = "scores.jsonl", "candidates.jsonl", "answers.jsonl"
BATCHES = 16  # batches that are scored between two writes of scores.jsonl

# Settings that cannot change a score, or whose effect the key holds as the examples' or the weights' digest.
_NOT_IN_KEY = {
    "model",
    "adapter_path",
    "data",
    "split",
    "limit",
    "num_negatives",
    "domain",
    "skip_bad_rows",
    "out",
    "prompt",
    "domains",
    "allow_other_prompt",
}
_NOT_IN_KEY |= {"memory", "memory_limit", "resamples", "overwrite", "generate", "max_tokens", "seed", "caffeinate"}


def output_directory(settings: EvaluateSettings) -> Path:
    return Path(settings.out or (Path(settings.adapter_path) / "eval" if settings.adapter_path else "runs/base/eval"))


def read_examples(settings: EvaluateSettings) -> list[Example]:
    """The examples of --data with the settings' negatives. Raises UserError for data without pairs."""
    domains = choose_template(settings, settings.adapter_path).domains  # refuses before a directory is made
    data = settings.data or str(assets.data_dir())
    loaded = formats.load(data, settings.split, domains, settings.skip_bad_rows, console.notice, settings.domain)
    if not loaded.has_pairs:
        raise UserError(
            f"{loaded.name}: holds {loaded.format}, one answer per prompt: give data with chosen and rejected answers"
        )
    if not loaded.ranking:
        refuse_for_free_text(settings)
        console.notice("note: free text: each pair is scored in its one prompt; there are no printed orders to compare")
    return [first_negatives(e, settings.num_negatives) for e in loaded.examples[: settings.limit or None]]


def evaluate(settings: EvaluateSettings, command: str = "evaluate") -> dict[str, Any]:
    """Scores a split with a language model, writes the evaluation directory, returns its metrics.

    Continues an unfinished evaluation of the same settings. Raises UserError for what the user can fix.
    """
    with memory.memory_limits(settings), world().watched(), mac.awake(settings.caffeinate):
        _check(settings)
        examples = read_examples(settings)
        finished = run_directory.is_complete(output_directory(settings))
        with _directory(settings, command) as run:
            scorer = open_scorer(settings, settings.adapter_path)
            examples = scorer.usable(examples)
            path = run.path if run else None
            result = measure(scorer, examples, settings, path, _key(settings, scorer, examples), finished)
            if run:
                _count_trained_on(settings, examples, result)
                facts = _model_facts(scorer, isinstance(examples[0], RankingExample))
                _finish(run, settings, settings.adapter_path or scorer.base.name, result, facts)
            return result


def write_evaluation(
    scorer: Scorer, examples: Sequence[Example], settings: EvaluateSettings, command: str, **facts: Any
) -> dict[str, Any]:
    """What `evaluate` writes, for any Scorer: settings.out gets metrics.json, scores.jsonl, pictures and the manifest.

    facts  what the manifest says besides. Raises UserError for what the user can fix.
    """
    with memory.memory_limits(settings), world().watched(), mac.awake(settings.caffeinate):
        _check(settings)
        finished = run_directory.is_complete(output_directory(settings))
        if isinstance(scorer, LanguageModelScorer):
            examples = scorer.usable(list(examples))
            facts |= _model_facts(scorer, isinstance(examples[0], RankingExample))
        free = ("out", "overwrite", "resamples", "memory", "memory_limit", "caffeinate")
        given = {k: v for k, v in files.plain(settings).items() if k not in free}
        key = files.plain({"examples": _digest(examples), "versions": run_directory.versions(), **given, **facts})
        with _directory(settings, command) as run:
            result = measure(scorer, examples, settings, run.path if run else None, key, finished)
            if run:
                _finish(run, settings, scorer.name, result, facts)
            return result


def _model_facts(scorer: LanguageModelScorer, titles: bool) -> dict[str, Any]:
    """What a manifest says of the model.  titles: the examples rank titles, through a prompt template."""
    base = scorer.base
    facts: dict[str, Any] = {
        "model": base.name,
        "base_fingerprint": base.fingerprint,
        "shared_prefix_scorer": scorer.groups.shared,
        "prompt": scorer.template.to_json() if titles else None,
    }
    return facts | ({"template_date": base.date} if base.date else {})


def _check(settings: EvaluateSettings) -> None:
    """Raises UserError for flags that have no effect."""
    if settings.candidates:
        candidates.parse_count(settings.candidates)
    elif settings.candidate_negatives != EvaluateSettings().candidate_negatives:
        raise UserError(
            "--candidate-negatives: has no effect without --candidates: add --candidates N, or leave it out"
        )
    if settings.max_tokens != EvaluateSettings().max_tokens and not settings.generate:
        raise UserError("--max-tokens: has no effect without --generate: add --generate N, or leave it out")


@contextlib.contextmanager
def _directory(settings: EvaluateSettings, command: str) -> Iterator[run_directory.RunDirectory | None]:
    """The evaluation directory on the rank that writes; None on the others."""
    if not world().first:
        yield None
        return
    out = output_directory(settings)
    with run_directory.RunDirectory(out, command, settings, overwrite=settings.overwrite, flag="--out") as run:
        try:
            yield run
        except KeyboardInterrupt:
            console.notice(f"{out}: what was scored is kept: run the same command again to continue")
            raise


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for e in examples:
        digest.update(json.dumps(files.plain(e) | {"source": ""}, sort_keys=True).encode())
    return digest.hexdigest()


def _key(settings: EvaluateSettings, scorer: LanguageModelScorer, examples: Sequence[Example]) -> dict[str, Any]:
    """Everything that can change a score, under the names by which a message calls it."""
    adapter = Path(settings.adapter_path) if settings.adapter_path else None
    weights = ("adapters.safetensors", "adapter_config.json") if adapter else ()
    given = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in _NOT_IN_KEY}
    if settings.candidates or scorer.template.form == "listwise":  # which draws candidates, or their printed orders
        given["seed"] = settings.seed
    return files.plain(
        {
            "examples": _digest(examples),
            "model": scorer.base.fingerprint,
            "adapter": {name: files.sha256(adapter / name) for name in weights if adapter},
            "prompt": scorer.template.to_json(),
            "shared scorer": scorer.groups.shared,
            "scorer version": SCORER_VERSION,
            "device": device.device_name(),
            "ranks": world().size,
            "versions": run_directory.versions(),
            **given,
        }
    )


def measure(
    scorer: Scorer,
    examples: Sequence[Example],
    settings: EvaluateSettings,
    directory: Path | None,
    key: dict[str, Any],
    finished: bool = False,
) -> dict[str, Any]:
    """Scores `examples` with any Scorer, writes scores.jsonl (and candidates.jsonl, answers.jsonl), returns the
    metrics.

    directory  where rows are appended as they are computed; None on a rank that writes nothing
    key        what the rows depend on (see progress.claim); finished: the directory's earlier evaluation is replaced
    """
    if directory:
        claim(directory, key, (SCORES, CANDIDATES, ANSWERS), finished=finished, overwrite=settings.overwrite)
    data = settings.data or str(assets.data_dir())
    facts = load_facts(data, examples)
    rows = _scored(scorer, examples, settings, directory, facts)
    how = {"resamples": settings.resamples, "seed": settings.seed}
    result = metrics.ranking_metrics(rows, **how)
    if world().first and (note := result["intervals"].get("note")):
        console.notice(f"note: {note}")
    if result["popularity"]:
        result["popularity"] = {"source": facts.source, **result["popularity"]}
    if settings.candidates:
        result |= _ranked(scorer, examples, settings, directory, facts)
    if settings.generate and world().first:
        result["generation"] = _generated(scorer, examples, rows, settings, directory)
    return result


def _scored(
    scorer: Scorer, examples: Sequence[Example], settings: EvaluateSettings, directory: Path | None, facts: Facts
) -> list[dict[str, Any]]:
    def compute(part: Sequence[Example]) -> Iterator[dict[str, Any]]:
        for scores in scorer.score(part):
            for row in rows_of(check_finite(scores, scorer.name)):
                yield facts.add_to(row, scores.example)

    return rows_in_chunks(
        directory and directory / SCORES, examples, _pairs, compute, BATCHES * settings.batch_size, "evaluate"
    )


def _pairs(example: Example) -> int:
    return len(example.negatives if isinstance(example, RankingExample) else example.pairs)


def _ranked(
    scorer: Scorer, examples: Sequence[Example], settings: EvaluateSettings, directory: Path | None, facts: Facts
) -> dict[str, Any]:
    """The ranking metrics, and under "candidates" what was ranked."""
    chosen = candidates.candidate_examples(settings, examples, facts)
    ranker = candidates.Ranker.of(scorer, chosen)
    rows = rows_in_chunks(
        directory and directory / CANDIDATES, chosen, lambda _: 1, ranker.rows, settings.batch_size, "rank candidates"
    )
    sizes = [row["candidates"] for row in rows]
    return {
        **ranking.candidate_metrics(rows, resamples=settings.resamples, seed=settings.seed),
        "candidates": {
            "n": len(rows),
            "fewest": min(sizes),
            "most": max(sizes),
            "negatives": "catalogue" if settings.candidates == "all" else settings.candidate_negatives,
            "seed": settings.seed,
            "ranked_by": ranker.how,
            "ties": sum(row["tied"] > 0 for row in rows),
        },
    }


def _generated(
    scorer: Scorer,
    examples: Sequence[Example],
    rows: Sequence[dict[str, Any]],
    settings: EvaluateSettings,
    directory: Path | None,
) -> dict[str, Any]:
    if not isinstance(scorer, LanguageModelScorer):
        raise UserError(f"--generate: {scorer.name} writes no text: leave --generate out")
    ends = np.cumsum([0, *map(_pairs, examples[: settings.generate])])
    by_example = [rows[start:end] for start, end in itertools.pairwise(ends)]
    todo = list(generation.tasks(examples[: settings.generate], by_example, scorer, settings.seed))
    found: list[dict[str, Any]] = []
    size = scorer.prompts_at_once(max(len(task.prompt) for task in todo) + settings.max_tokens, 1) if todo else 1
    for start in range(0, len(todo), size):
        found += generation.answer_rows(scorer, todo[start : start + size], settings.max_tokens)
    if directory:
        files.write_text(
            directory / ANSWERS, "".join(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in found)
        )
    return generation.generation_metrics(found, resamples=settings.resamples, seed=settings.seed)


def _count_trained_on(settings: EvaluateSettings, examples: Sequence[Example], result: dict[str, Any]) -> None:
    """Adds to the result how many of the examples the adapter was trained on, and warns where there are any."""
    trained = trained_on.count(settings.adapter_path, examples)
    if trained is not None:
        result["trained_on"] = trained
    if trained:
        console.notice(
            f"warning: {trained} of the {len(examples)} examples were in the training data of {settings.adapter_path}: "
            "this does not measure ranking for new users; give test data with --data"
        )


def _finish(
    run: run_directory.RunDirectory,
    settings: EvaluateSettings,
    name: str,
    result: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """metrics.json, the pictures, and the manifest last."""
    files.write_json(run.path / "metrics.json", result)
    charts.plot_comparison({name: result}, run.path / "accuracy.png")
    charts.plot_margins(files.read_lines(run.path / SCORES), run.path / "margins.png")
    data = settings.data or str(assets.data_dir())
    if file := data_file(data, settings.split):
        run.input(file)
    run.inputs |= hub_inputs(data, settings.split)
    run.finish(device.device_name(), adapter=settings.adapter_path or None, **facts)
    (run.path / PROGRESS).unlink(missing_ok=True)
