"""Settings of `evaluate`, `sample` and `export`."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import FROZEN_CACHE, CommonSettings, setting


@dataclass(frozen=True)
class EvaluateSettings(CommonSettings):
    adapter_path: str = setting("", "Adapter directory; without it the base model is evaluated.", path=True)
    split: str = setting("test", "Split of a prepared directory.", choices=("train", "valid", "test"))
    out: str = setting(
        "",
        "Directory to write: metrics.json, scores.jsonl, pictures, manifest (default: ADAPTER/eval, or "
        "runs/base/eval).",
        path=True,
    )
    batch_size: int = setting(8, "Groups run at once.", low=1)
    frozen_cache: str = setting("", FROZEN_CACHE, path=True)
    num_layers: int = setting(
        0, "With --frozen-cache, of the base model: the --num-layers of the adapters that share the cache.", low=0
    )
    orders: int | None = setting(
        None, "listwise: printed orders of the candidates over which scores are averaged (4 when left out).", low=1
    )
    calibrate: bool = setting(
        False,
        "Subtract from each score the score without the history, which takes out the model's liking for the title "
        "itself.",
    )
    per_token: bool = setting(False, "direct and listwise: divide a title's log-prob by its tokens.")
    limit: int = setting(0, "Evaluate only the first N examples; 0 takes all.", low=0)
    resamples: int = setting(2000, "Bootstrap resamples of the users for the 95 % intervals.", low=100)
    candidates: str = setting(
        "",
        "Also rank the liked title among this many candidates, itself included, or among all of the catalogue: "
        "hit rates, NDCG, MRR.",
    )
    candidate_negatives: str = setting(
        "uniform",
        "Where the other candidates come from: the example's own negatives (file), or titles of the catalogue, drawn "
        "uniformly or by popularity with --seed.",
        choices=("uniform", "popularity", "file"),
    )
    generate: int = setting(
        0, "Also let the model answer this many examples greedily, and count answers that are valid.", low=0
    )
    max_tokens: int = setting(128, "Longest generated answer, in tokens.", low=1)
    caffeinate: bool = setting(True, "On a Mac: keep it from falling asleep while the evaluation lasts.")
    overwrite: bool = setting(
        False, "Replace a finished evaluation in --out. An unfinished one of the same settings is continued without it."
    )


@dataclass(frozen=True)
class ExportSettings(CommonSettings):
    model: str = setting(
        "", "Base model (when left out, the one that the adapter names, if it is on this disk).", path=True
    )
    adapter_path: str = setting("", "Adapter directory to export, as sft, dmpo or mlx-lm wrote it.", path=True)
    to: str = setting(
        "mlx",
        "mlx: a fused model directory for mlx-lm; peft: an adapter for transformers and PEFT.",
        choices=("mlx", "peft"),
    )
    out: str = setting("", "Directory to make (default: ADAPTER/mlx or ADAPTER/peft).", path=True)
    keep_quantized: bool = setting(
        False,
        "With a quantized base: keep it as it is, with the adapter beside it (otherwise it is dequantized and fused, "
        "which is larger).",
    )
    requantize: bool = setting(
        False, "With a quantized base: fuse, then quantize again as it was, which loses part of the training."
    )
    base_name: str = setting(
        "", "Name of the base for PEFT and the model card, such as Qwen/Qwen3-0.6B (default: --model)."
    )
    split: str = setting("test", "Split of a prepared directory.", choices=("train", "valid", "test"))
    examples: int = setting(
        16,
        "Examples of --data, drawn by --seed, whose log-probs are compared before and after; 0 compares none.",
        low=0,
    )
    num_negatives: int = setting(1, "Negatives used of each example; 0 takes all.", low=0)
    eval: tuple[str, ...] = setting((), "Evaluation directory whose results go into the model card.", path=True)
    batch_size: int = setting(8, "Groups run at once.", low=1)
    overwrite: bool = setting(False, "Replace an earlier export in --out.")


@dataclass(frozen=True)
class SampleSettings(CommonSettings):
    adapter_path: str = setting("", "Adapter directory; without it the base model answers.", path=True)
    split: str = setting("test", "Split of a prepared directory.", choices=("train", "valid", "test"))
    out: str = setting("samples.jsonl", "File to write, one JSON object a line.", path=True)
    n: int = setting(10, "Answers sampled per prompt.", low=1)
    temperature: float = setting(0.8, "Sampling temperature; 0 takes the likeliest token.", low=0)
    top_p: float = setting(
        0.95, "Draw from the fewest likeliest tokens of this total probability; 1 draws from all.", above=0, high=1
    )
    top_k: int = setting(50, "Draw from this many likeliest tokens; 0 draws from all.", low=0)
    max_tokens: int = setting(128, "Longest answer, in tokens.", low=1)
    score: bool = setting(
        False, "Write the margin of every candidate negative instead of answers, for `prepare --negatives scores:FILE`."
    )
    limit: int = setting(0, "Take only the first N examples; 0 takes all.", low=0)
    overwrite: bool = setting(False, "Replace --out.")
