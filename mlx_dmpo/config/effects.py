"""Settings that have no effect because of other settings: such a flag is refused, such a line of a file is reported"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

COMPARED = "data split num_negatives seed batch_size skip_bad_rows domain max_seq_length scoring".split()
DRAWN = "n temperature top_p top_k max_tokens".split()


def without_effect(settings: Any) -> dict[str, str]:
    """Name -> reason of every setting that has no effect on what the command does with these settings."""
    if not is_dataclass(settings):
        return {}
    has = {name for name in vars(settings)}
    return {name: why for name, why in _rules(settings, has) if name in has}


def _rules(s: Any, has: set[str]) -> Iterator[tuple[str, str]]:
    if "quantize" in has and s.quantize is None:
        yield "quantize_group_size", "without quantize"
        yield "quantize_mode", "without quantize"
    if has >= {"split", "data"} and _is_one_split(s.data):
        yield "split", "for data that is one file or names its split"
    if "frozen_cache" in has and s.scoring == "plain":
        yield "frozen_cache", "with scoring plain, which runs every sequence alone"
    if "lr_schedule" in has:
        yield from _training(s, has)
    elif "frozen_cache" in has:  # evaluate
        if s.adapter_path:
            yield "num_layers", "with adapter_path, whose layers count"
        elif not s.frozen_cache:
            yield "num_layers", "without frozen_cache"
        if not s.adapter_path and not s.num_layers:
            yield "frozen_cache", "without adapter_path or num_layers: the base model has no layers below an adapter"
    if "loss" in has:
        if s.loss not in ("simpo", "recpo"):
            yield "gamma", f"with loss {s.loss}: only simpo and recpo have a target margin"
        if s.loss in ("simpo", "mppo"):
            yield "reference_free", f"with loss {s.loss}, which has no reference"
        if s.loss == "mppo":
            yield "beta", "with loss mppo, whose likelihoods lie between 0 and 1 as they are"
        if s.loss == "mult-dpo":
            yield from (
                (name, "with loss mult-dpo, which has no pairs") for name in ("label_smoothing", "negatives_select")
            )
        else:
            yield "num_positives", f"with loss {s.loss}: only mult-dpo takes several"
    if "negatives_select" in has and s.negatives_select != "boundary":
        yield "dynamic_beta", "without negatives_select boundary"
    if "score" in has:
        if s.score:
            yield from ((name, "with score, which draws no answers") for name in (*DRAWN, "seed"))
        else:
            yield "scoring", "without score"
            if s.temperature == 0:
                yield from ((name, "at temperature 0") for name in ("top_p", "top_k"))
    if "examples" in has and not s.examples:
        yield from ((name, "with examples 0, which compares nothing") for name in COMPARED)
    if "tokenizer" in has:  # plan
        assumed, measured = ("history", "title_tokens", "groups"), ("tokenizer", "max_seq_length")
        for name in assumed if s.data else measured:
            yield name, "with data, which is measured" if s.data else "without data"
    elif has >= {"max_seq_length", "num_negatives"} and "batch_size" not in has and not s.model:  # check
        for name in ("max_seq_length", "num_negatives", "prompt"):
            yield name, "without model, whose tokenizer counts"


def _training(s: Any, has: set[str]) -> Iterator[tuple[str, str]]:
    if s.valid_data or not s.data or (Path(s.data) / "valid.jsonl").is_file():
        yield "holdout", "beside validation data"
    elif s.val_batches == 0:
        yield "holdout", "with val_batches 0, which validates nothing"
    if s.iters is not None:
        yield "epochs", "with iters"
    if s.both_orders:
        yield "candidate_order", "with both_orders"
    if isinstance(s.lr_schedule, dict):
        yield "learning_rate", "with a mapping in lr_schedule: give it among its arguments"
        yield "warmup", "with a mapping in lr_schedule: give it there"
    if s.num_layers == -1 and not getattr(s, "start_adapter", ""):
        for name in ("frozen_cache_gb", "frozen_cache"):
            yield name, "without num_layers: every layer is adapted, and none stays the same"
    if not s.report_to:
        yield "project_name", "without report_to"


def _is_one_split(data: str) -> bool:
    return bool(data) and (Path(data).is_file() or (not Path(data).exists() and "@" in data))
