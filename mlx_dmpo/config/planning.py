"""Settings of `plan`."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import Lora, setting
from .training import TrainSettings

_TRAIN = TrainSettings()


@dataclass(frozen=True)
class PlanSettings:
    model: str = setting(
        "qwen3-0.6b",
        "Built-in name (qwen3-0.6b to qwen3-32b, with -4bit or -8bit at the end), model directory, or config.json.",
        path=True,
    )
    data: str = setting("", "Data whose lengths are measured with --tokenizer; without it they are assumed.", path=True)
    tokenizer: str = setting(
        "", "Directory of the tokenizer for --data (default: --model, where it is a directory).", path=True
    )
    history: int = setting(22, "Assumed number of history items, without --data.", low=1, high=10_000)
    title_tokens: int = setting(5, "Assumed tokens per title, without --data.", low=1, high=1000)
    groups: int = setting(100, "Assumed number of training groups, without --data.", low=1, high=1_000_000)
    num_negatives: int = setting(5, "Negatives per group.", low=1, high=1000, short="-k")
    prompt: str = setting(
        "", "Prompt form: pairwise (default), listwise, direct, pointwise, or a YAML file.", path=True
    )
    stage: str = setting("dmpo", "What is trained.", choices=("sft", "dmpo"))
    batch_size: int = setting(_TRAIN.batch_size, "Groups run at once.", low=1)
    batch_tokens: int | None = setting(None, "Tokens run at once (8192 when left out).", low=1)
    max_seq_length: int = setting(
        _TRAIN.max_seq_length, "Maximum length of prompt plus answer, in tokens, with --data.", low=16
    )
    num_layers: int = setting(-1, "Adapt this many of the last layers; -1 adapts all.", low=-1)
    lora_rank: int = setting(Lora().rank, "Rank of the LoRA matrices.", low=1)
    lora_keys: tuple[str, ...] = setting((), "Linear layers to adapt (default: all).")
    optimizer: str = setting("adamw", "Optimizer.", choices=("adamw", "adam", "sgd", "adafactor", "muon", "lion"))
    grad_checkpoint: bool | None = setting(None, "Recompute each layer in the backward pass.")
    dtype: str = setting("16", "Bits of an activation, and of an unquantized weight.", choices=("16", "32"))
    epochs: float = setting(3.0, "Passes over the groups.", above=0)
    tflops: float = setting(
        0.0,
        "TFLOP/s that a training step reaches; when left out, it is measured on this machine in a few seconds.",
        low=0,
    )
