"""Settings of `sft` and `dmpo`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from .effects import without_effect
from .fields import FROZEN_CACHE, CommonSettings, Lora, default_of, setting


@dataclass(frozen=True)
class TrainSettings(CommonSettings):
    adapter_path: str = setting("", "Directory to write: adapter, metrics, pictures, manifest.", path=True)
    valid_data: str = setting(
        "", "Validation examples, where --data is a file (a directory has its own valid.jsonl).", path=True
    )
    holdout: float = setting(
        0.1,
        "Share of the training users held out for validation where the data has no validation split, at least 5 "
        "users; 0 (--no-holdout) trains on all of them.",
        low=0,
        high=0.5,
        off=True,
    )
    fine_tune_type: str = setting("lora", "Kind of adapter.", choices=("lora", "dora"))
    num_layers: int = setting(-1, "Adapt this many of the last layers; -1 adapts all.", low=-1)
    lora_parameters: Lora = setting(Lora, "LoRA's rank, scale, dropout and keys.")
    epochs: float = setting(2.0, "Passes over the training groups.", above=0)
    iters: int | None = setting(None, "Optimizer steps; replaces epochs.", low=1)
    batch_tokens: int | None = setting(
        None,
        "Tokens run at once, shared ones counted once; the other groups of a micro-batch run after it, with the same "
        "result.  [default: what --memory auto chooses, at most 8192]",
        low=1,
    )
    grad_accumulation_steps: int = setting(
        2, "Micro-batches per step: a step sees batch_size x this many groups.", low=1
    )
    candidate_order: str = setting(
        "fixed",
        "Printed order of each pair. fixed: the file's, or else drawn once by seed; epoch: drawn again each epoch.",
        choices=("fixed", "epoch"),
    )
    both_orders: bool = setting(
        False, "Train on both printed orders of every pair, against order bias; the shared history keeps it cheap."
    )
    orders: int | None = setting(
        None,
        "listwise: printed orders of the candidates per group (1 when left out); more reduce position bias.",
        low=1,
    )
    optimizer: str = setting("adamw", "Optimizer.", choices=("adamw", "adam", "sgd", "adafactor", "muon", "lion"))
    optimizer_config: dict[str, Any] = setting(dict, "Further arguments of the optimizer, such as betas (YAML only).")
    learning_rate: float = setting(1e-4, "Peak learning rate.", above=0)
    lr_schedule: str | dict[str, Any] = setting(
        "cosine",
        "How the learning rate falls to 0 (YAML may give mlx-lm's form: name, arguments, warmup).",
        choices=("cosine", "linear", "constant"),
    )
    warmup: float = setting(0.0, "Steps over which the learning rate rises; below 1, a share of all steps.", low=0)
    weight_decay: float = setting(0.0, "Decoupled weight decay (adamw, lion, muon, adafactor).", low=0)
    max_grad_norm: float = setting(1.0, "Clip gradients to this global norm; 0 does not clip.", low=0)
    grad_checkpoint: bool | None = setting(
        None,
        "Recompute each layer in the backward pass: less memory, about a third more time.  [default: where --memory "
        "auto finds no other way]",
    )
    frozen_cache_gb: float = setting(
        1.0,
        "With --num-layers: GB for outputs of the layers below the adapter, which never change and are kept.",
        low=0,
    )
    frozen_cache: str = setting("", FROZEN_CACHE, path=True)
    memory_check: bool = setting(
        True, "Refuse a run that, by the count of `mlx-dmpo plan`, does not fit in this machine's memory."
    )
    caffeinate: bool = setting(True, "On a Mac: keep it from falling asleep while the run lasts.")
    steps_per_report: int = setting(5, "Steps between lines of metrics.jsonl.", low=1)
    steps_per_eval: int = setting(0, "Steps between validations; 0 validates at the end of every epoch.", low=0)
    val_batches: int | None = setting(
        None,
        "Validation micro-batches, a sample of the split; -1 takes all of it.  "
        "[default: all groups, of more than 1,000 a sample of 1,000]",
        low=-1,
    )
    best_metric: str = setting(
        "auto",
        "Metric that decides which adapter is best; auto: pair accuracy, ties by loss; loss for data without pairs.",
        choices=("auto", "valid_loss", "valid_pair_accuracy"),
    )
    patience: int = setting(0, "Stop after this many validations without a new best; 0 never stops early.", low=0)
    save_every: int = setting(
        100, "Steps between checkpoints (a new best is also one); each is an adapter directory too.", low=1
    )
    keep_checkpoints: int = setting(2, "Checkpoints kept, beside the best.", low=1)
    resume: bool = setting(
        False, "Continue from the newest checkpoint in --adapter-path; the result is that of an uninterrupted run."
    )
    max_bad_steps: int = setting(3, "Stop after this many steps in a row were skipped because of NaN or Inf.", low=1)
    debug_nan: bool = setting(
        False, "Name the first layer with NaN or Inf whenever a step is skipped (slow for that step)."
    )
    report_to: str = setting("", "Experiment tracker: tensorboard, wandb or swanlab; several are comma-separated.")
    plain: bool = setting(False, "Print plain lines instead of the live panel, which only a terminal shows.")
    project_name: str = setting("", "Project name for the experiment tracker.")
    overwrite: bool = setting(False, "Replace a finished run in --adapter-path.")


@dataclass(frozen=True)
class SftSettings(TrainSettings):
    adapter_path: str = setting("runs/sft", "Directory to write: adapter, metrics, pictures, manifest.", path=True)
    start_adapter: str = setting("", "Adapter directory to start from.", path=True)
    num_negatives: int = setting(
        -1, "Negatives used of each example; 0 takes all; -1 takes one, and all where a list is printed.", low=-1
    )


LOSSES = ("dmpo", "dpo", "s-dpo", "simpo", "mppo", "recpo", "mult-dpo")


@dataclass(frozen=True)
class DmpoSettings(TrainSettings):
    adapter_path: str = setting("runs/dmpo", "Directory to write: adapter, metrics, pictures, manifest.", path=True)
    start_adapter: str = setting(
        "",
        "Adapter directory to start from, as sft wrote it; it is also the reference. Left out: the base model is both.",
        path=True,
    )
    loss: str = setting("dmpo", "How a group's margins become one loss.", choices=LOSSES)
    beta: float = setting(
        None, "Strength of the preference: 0.1 to 0.5, simpo 2 to 10.  [default: 0.1; simpo: 2]", above=0
    )
    gamma: float = setting(
        None,
        "Target reward margin of simpo; recpo multiplies each pair's own target margin by it; other losses have none.  "
        "[default: 0.5; recpo: 2]",
        low=0,
    )
    num_positives: int = setting(
        1,
        "mult-dpo: liked titles of each example that are ranked above the negatives: the positive and the last of the "
        "history, which are no longer printed in it.",
        low=1,
    )
    negatives_select: str = setting(
        "all",
        "boundary trains, in each group, on the negatives that the policy prefers to the liked title, or, if there are "
        "none, on those nearest to it (DynamicPO); try it with many negatives.",
        choices=("all", "boundary"),
    )
    dynamic_beta: bool = setting(
        False,
        "With boundary: scale beta of each pair between 0.5 and 1.5 by its distance from the boundary (DynamicPO).",
    )
    label_smoothing: float = setting(0.0, "Probability that a preference is the wrong way round.", low=0, high=0.499)
    sft_weight: float = setting(
        0.0, "Weight of the chosen answers' mean token loss, added to the preference loss.", low=0
    )
    reference_free: bool = setting(False, "Leave the reference out of the margin.")
    preset: str = setting(
        "",
        "released-code: what the DMPO release's trainer computes (pairwise, reference-free, + 1.0 x SFT), which is not "
        "the paper's loss.",
        choices=("", "released-code"),
    )

    def __post_init__(self) -> None:
        if self.beta is None:
            object.__setattr__(self, "beta", 2.0 if self.loss == "simpo" else 0.1)
        if self.gamma is None:
            object.__setattr__(self, "gamma", 2.0 if self.loss == "recpo" else 0.5)


# What may change when a run is resumed: paths (their contents are compared), reports, and how a step's work is cut up.
_FREE = frozenset(
    """model data valid_data skip_bad_rows prompt allow_other_prompt domains adapter_path start_adapter batch_size
    batch_tokens grad_accumulation_steps val_batches grad_checkpoint steps_per_report report_to plain project_name
    save_every keep_checkpoints overwrite resume preset max_bad_steps debug_nan memory memory_limit
    memory_check caffeinate""".split()
)


def resume_key(settings: TrainSettings) -> dict[str, Any]:
    """The settings that decide every step of a run; those without effect count as their defaults."""
    idle = without_effect(settings)
    defaults = {f.name: default_of(f) for f in fields(settings) if f.name in idle}
    values = {**asdict(settings), **defaults}
    return {
        **{name: value for name, value in values.items() if name not in _FREE},
        "batch_size x grad_accumulation_steps": settings.batch_size * settings.grad_accumulation_steps,
    }


# Settings that a preset sets; flags and YAML override them.
PRESETS: dict[str, dict[str, Any]] = {
    "released-code": {"loss": "dpo", "reference_free": True, "sft_weight": 1.0, "holdout": 0.0}
}


def describe_preset(settings: DmpoSettings) -> str:
    """What a preset and the settings that override it compute, on one line."""
    given = PRESETS[settings.preset]
    changed = [f"{name} {getattr(settings, name)}" for name, value in given.items() if getattr(settings, name) != value]
    if not changed:
        return (
            f"preset {settings.preset}: pairwise DPO without a reference + 1.0 x SFT: "
            "what the DMPO release's trainer computes, not the paper's loss"
        )
    reference = (
        "without a reference" if settings.reference_free or settings.loss in ("simpo", "mppo") else "with a reference"
    )
    sft = f" + {settings.sft_weight:g} x SFT" if settings.sft_weight else ""
    return (
        f"preset {settings.preset} with {', '.join(changed)}: {settings.loss} {reference}{sft}: "
        "no longer what the DMPO release's trainer computes"
    )
