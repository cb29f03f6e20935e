"""Settings of `baseline`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

from ..errors import UserError
from .evaluation import EvaluateSettings
from .fields import default_of, setting

COUNTERS = ("first-listed", "popularity", "like-ratio")
FACTORS = ("als", "bpr", "item-knn")
SEQUENTIAL = ("gru4rec", "caser", "sasrec", "dros-sasrec")
LANGUAGE = ("zero-shot", "in-context")
BASELINES = (*COUNTERS, *FACTORS, *SEQUENTIAL, *LANGUAGE)
FITTED = tuple(name for name in BASELINES if name not in ("first-listed", "zero-shot"))


@dataclass(frozen=True)
class BaselineSettings(EvaluateSettings):
    train_data: str = setting(
        "", "Data of the training users, where --data is one file (default: --data's train split).", path=True
    )
    fit: str = setting(
        "train",
        "train fits on the training users, as few-shot papers do; all adds the validation users and the tested users' "
        "histories: every interaction that is not a test target.",
        choices=("train", "all"),
    )
    match_titles: str = setting(
        "exact",
        "short compares titles up to the first comma or bracket, for files that spell titles differently.",
        choices=("exact", "short"),
    )
    out: str = setting(
        "", "Directory to write: metrics.json, scores.jsonl, manifest (default: runs/baselines/NAME).", path=True
    )
    factors: int = setting(64, "Size of the vectors of users and items (als, bpr, and the sequential models).", low=1)
    epochs: int = setting(0, "Passes over the interactions; 0 takes 15 for als, 100 for bpr, 50 for the others.", low=0)
    learning_rate: float = setting(0.0, "Step size; 0 takes 0.01 for bpr, 0.001 for the sequential models.", low=0)
    neighbours: int = setting(50, "item-knn: number of similar items kept per item.", low=1)
    dropout: float = setting(0.2, "Dropout of the sequential models.", low=0, high=0.9)
    max_history: int = setting(50, "Number of the latest history items that a sequential model sees.", low=2)
    dros_weight: float = setting(0.0, "Weight of the robust loss of a sequential model (dros-sasrec: 0.1).", low=0)
    text_embeddings: bool = setting(False, "Sequential models: start items from --model's embeddings of their titles.")
    shots: int = setting(4, "in-context: worked examples of training users in the prompt.", low=1)


_LANGUAGE_ONLY = """model quantize quantize_group_size quantize_mode dtype prompt allow_other_prompt max_seq_length
    scoring orders calibrate per_token generate max_tokens""".split()
_APPLIES = {
    **dict.fromkeys(_LANGUAGE_ONLY, LANGUAGE),
    **dict.fromkeys(("train_data", "fit", "match_titles"), FITTED),
    "factors": ("als", "bpr", *SEQUENTIAL),
    "epochs": ("als", "bpr", *SEQUENTIAL),
    "learning_rate": ("bpr", *SEQUENTIAL),
    "neighbours": ("item-knn",),
    **dict.fromkeys(("dropout", "max_history", "dros_weight", "text_embeddings"), SEQUENTIAL),
    "shots": ("in-context",),
    "adapter_path": (),
}
_OF_EMBEDDINGS = ("model", "quantize", "quantize_group_size", "quantize_mode", "dtype")


def check_baseline(name: str, settings: BaselineSettings, given: Collection[str] = ()) -> None:
    """Raises UserError for a name that is not a baseline, and for a setting that has no effect on this one.

    given  names of the flags that were given: these are refused also where their value is the default
    """
    if name not in BASELINES:
        raise UserError(f"{name}: no such baseline: give one of {', '.join(BASELINES)}")
    for spec in fields(settings):
        applies: Any = _APPLIES.get(spec.name, BASELINES)
        if spec.name in _OF_EMBEDDINGS and settings.text_embeddings:
            applies = (*applies, *SEQUENTIAL)
        if name not in applies and (spec.name in given or getattr(settings, spec.name) != default_of(spec)):
            flag = f"--{spec.name.replace('_', '-')}"
            meant = f" (it applies to {', '.join(applies)})" if applies else ""
            raise UserError(f"{flag}: has no effect on {name}{meant}: leave it out")
    fit = settings.fit != "train" or "fit" in given
    if name == "in-context" and (fit or settings.match_titles != "exact" or "match_titles" in given):
        flag = "--fit" if fit else "--match-titles"
        raise UserError(f"{flag}: has no effect on in-context, whose examples are training users': leave it out")
