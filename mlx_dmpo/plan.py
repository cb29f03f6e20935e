"""What a run will need before it starts: memory, floating-point operations, time. Arithmetic on shapes; only `calibrate` runs anything.

Memory is counted tensor by tensor as MLX keeps them for the backward pass (docs/plan.md has the account and how far it was measured).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .batches import BATCH_TOKENS, by_length, pad_groups
from .errors import UserError
from .records import EncodedGroup, GroupBatch


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder of the Qwen3 kind. `bits` is 16 or 32 for plain weights, fewer for quantised ones (groups of 64)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    bits: int = 16
    group_size: int = 64

    @classmethod
    def of(cls, source: str | Path) -> ModelShape:
        """A built-in name, a model directory, or a config.json. Raises UserError for what is none of them."""
        key = str(source).rsplit("/", 1)[-1].lower()
        if not Path(source).exists():
            name, bits = key, 16
            for suffix, value in (("-bf16", 16), ("-3bit", 3), ("-4bit", 4), ("-5bit", 5), ("-6bit", 6), ("-8bit", 8)):
                if name.endswith(suffix):
                    name, bits = name.removesuffix(suffix), value
            if name in BUILT_IN:
                return replace(BUILT_IN[name], bits=bits)
            raise UserError(
                f"{source}: no such directory or config.json: name one, or one of {', '.join(BUILT_IN)} (with -4bit, -8bit at the end for a quantised one)"
            )
        path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            heads = config["num_attention_heads"]
            quantisation = config.get("quantization") or {}
            return cls(
                layers=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                intermediate=config["intermediate_size"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                vocabulary=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings")),
                bits=quantisation.get("bits", 16),
                group_size=quantisation.get("group_size", 64),
            )
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}): name a model directory or its config.json") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: is no config.json of a decoder model ({error}): name a model directory or its config.json") from None

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's linear modules."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, wide),
            "k_proj": (self.hidden, narrow),
            "v_proj": (self.hidden, narrow),
            "o_proj": (wide, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Of one layer."""
        return sum(i * o for i, o in self.projections.values())

    @property
    def parameters(self) -> int:
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * (self.linear_parameters + 2 * self.hidden + 2 * self.head_dim) + embeddings + self.hidden

    def weight_bytes(self, activation_bytes: int = 2) -> float:
        """In memory. Quantised linear and embedding weights carry a scale and a bias of the activations' type a group."""
        plain = self.layers * (2 * self.hidden + 2 * self.head_dim) + self.hidden
        matrices = self.parameters - plain
        if self.bits < 16:
            return plain * activation_bytes + matrices * (self.bits / 8 + 2 * activation_bytes / self.group_size)
        return self.parameters * activation_bytes


def _qwen3(layers: int, hidden: int, intermediate: int, heads: int, tied: bool) -> ModelShape:
    return ModelShape(layers, hidden, intermediate, heads, 8, 128, 151_936, tied)


BUILT_IN = {
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32, False),
    "qwen3-14b": _qwen3(40, 5120, 17408, 40, False),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64, False),
}


@dataclass(frozen=True)
class Work:
    """What a batch makes the model do: see GroupBatch for the sizes."""

    tokens: int  # N
    rows: int  # M
    prefix_scores: int  # query-key pairs of the prefixes, as computed
    block_scores: int  # of blocks with prefixes and themselves
    row_scores: int  # of the answer rows
    branches: int
    block_tokens: int  # G*C*T
    query_tokens: int  # G*C*Q

    @classmethod
    def of(cls, batch: GroupBatch) -> Work:
        from .scoring import PREFIX_CHUNK

        (G, P), (_, C, T), Q = batch.prefix_index.shape, batch.block_index.shape, batch.query_at.shape[2]
        chunks = [(min(PREFIX_CHUNK, P - a), min(P, a + PREFIX_CHUNK)) for a in range(0, P, PREFIX_CHUNK)]
        return cls(
            len(batch.tokens),
            len(batch.rows),
            G * sum(q * k for q, k in chunks),
            G * C * T * (P + T),
            G * C * Q * (P + T),
            sum(len(g.tails) for g in batch.groups),
            G * C * T,
            G * C * Q,
        )


# Arrays of the adapter's size that an optimiser keeps
OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "sgd": 1, "adafactor": 1, "muon": 1, "lion": 1}


@dataclass(frozen=True)
class Training:
    """What of a run's settings memory and time depend on."""

    adapted_layers: int
    rank: int = 8
    keys: tuple[str, ...] = ()  # of the projections; none means all
    checkpoint: bool = False
    activation_bytes: int = 2
    optimizer_states: int = 2

    def adapted(self, shape: ModelShape) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's adapted matrices."""
        named = {k.rsplit(".", 1)[-1] for k in self.keys}
        return {k: size for k, size in shape.projections.items() if not named or k in named}

    def adapter_parameters(self, shape: ModelShape) -> int:
        return self.adapted_layers * sum(self.rank * (i + o) for i, o in self.adapted(shape).values())


def forward_flops(shape: ModelShape, work: Work) -> float:
    """2 per multiplication and addition; the last layer and the head at the answer rows alone."""
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    keys_values = 2 * shape.hidden * narrow
    rest = shape.linear_parameters - keys_values
    per_score = 4 * wide
    full = 2 * shape.linear_parameters * work.tokens + per_score * (work.prefix_scores + work.block_scores)
    last = 2 * (keys_values * work.tokens + rest * work.rows) + per_score * work.row_scores
    return (shape.layers - 1) * full + last + 2 * shape.hidden * shape.vocabulary * work.rows


def step_flops(shape: ModelShape, work: Work, training: Training) -> float:
    """Forward and backward: what each frozen matrix passes back costs what it cost forward; the first adapted layer's input needs none."""
    head = 2 * shape.hidden * shape.vocabulary * work.rows
    layers = (forward_flops(shape, work) - head) / shape.layers  # the last layer's saving spread evenly: exact for all layers adapted
    first = 2 * shape.hidden * (shape.heads + 2 * shape.kv_heads) * shape.head_dim * work.tokens
    attention_again = 4 * shape.heads * shape.head_dim * (work.prefix_scores + work.block_scores) * (training.adapted_layers - 1)
    attention_again += 4 * shape.heads * shape.head_dim * work.row_scores  # two products forward, four backward
    backward = layers * training.adapted_layers - first + attention_again + head
    adapter = 6 * training.adapter_parameters(shape) * work.tokens
    again = layers * training.adapted_layers if training.checkpoint else 0
    return forward_flops(shape, work) + backward + adapter + again


def separate_flops(shape: ModelShape, groups: Sequence[EncodedGroup]) -> float:
    """Forward of every sequence alone, with the vocabulary at every position."""
    total = 0.0
    for group in groups:
        for tail in group.tails:
            n = len(group.prefix) + len(tail) - 1
            total += shape.layers * (2 * shape.linear_parameters * n + 4 * shape.heads * shape.head_dim * n * n)
            total += 2 * shape.hidden * shape.vocabulary * n
    return total


# Arrays that MLX keeps of one layer for the backward pass, and holds at most while it runs back through one, in units of
# (tokens x hidden, x query width, x key and value width, x intermediate, heads x prefix scores, heads x block scores).
# Fitted to measured peaks, float32: benchmarks/plan_accuracy.py checks them on other shapes.
KEPT = (4.2, 4.44, 0.73, 4.99, 0.94, 1.07)
RUNNING = (10.69, 2.34, 2.05, 5.02, 0.25, 1.79)  # beside what is kept of the layers below
RECOMPUTING = (9.97, 7.68, 2.68, 14.23, 1.04, 1.73)  # forward again and backward, nothing else kept


def _layer(counts: tuple[float, ...], shape: ModelShape, work: Work) -> float:
    N = work.tokens
    units = (
        N * shape.hidden,
        N * shape.heads * shape.head_dim,
        2 * N * shape.kv_heads * shape.head_dim,
        N * shape.intermediate,
        shape.heads * work.prefix_scores,
        shape.heads * work.block_scores,
    )
    return sum(c * u for c, u in zip(counts, units, strict=True))


def memory(shape: ModelShape, work: Work, training: Training) -> dict[str, float]:
    """Bytes, by what holds them, of the step at its highest; `peak` is their sum. `work` is the largest micro-batch."""
    from .scoring import LOGITS_BYTES

    e = training.activation_bytes
    N, M = work.tokens, work.rows
    answers = replace(work, tokens=M, prefix_scores=0, block_scores=work.row_scores)
    chunk = min(4.0 * M * shape.vocabulary, max(LOGITS_BYTES, 4 * shape.vocabulary))
    logits = 2 * chunk + 4 * M * (shape.hidden + 1)
    # mlx-lm keeps adapters in float32: beside 16-bit activations every adapted matrix has its input cast, and kept
    cast = 4.0 * sum(i for i, _ in training.adapted(shape).values()) if e < 4 else 0.0
    wide = cast * N + 8.0 * N * shape.intermediate if cast else 0.0
    last = e * _layer(KEPT, shape, answers) + cast * M + 3 * e * N * (shape.hidden + shape.kv_heads * shape.head_dim)
    through = (0.0 if training.checkpoint else last) + logits  # at the vocabulary
    if training.checkpoint:
        kept = float(e * N * shape.hidden * training.adapted_layers)
        running = e * _layer(RECOMPUTING, shape, work) + wide
    else:
        kept = (e * _layer(KEPT, shape, work) + cast * N) * (training.adapted_layers - 1)
        running = e * _layer(RUNNING, shape, work) + wide
    adapter = 4.0 * training.adapter_parameters(shape)
    found = {
        "weights": shape.weight_bytes(e),
        "adapter": adapter,
        "optimizer": training.optimizer_states * adapter,
        "gradients": adapter,
        "activations": kept + (running if running > through else max(0.0, through - logits)),
        "logits": logits if through >= running else 0.0,
    }
    return found | {"peak": sum(found.values())}


def assumed_groups(
    count: int, k: int, *, history: int = 22, title_tokens: int = 5, both: bool = False, vocabulary: int = 151_936, seed: int = 0
) -> list[EncodedGroup]:
    """Random tokens as long as ranking prompts are in Qwen3's tokens: k questions that name two titles, each answered in both orders."""
    rng = np.random.default_rng(seed)

    def draw(n: int) -> np.ndarray:
        return rng.integers(0, vocabulary, n).astype(np.int32)

    groups = []
    for _ in range(count):
        between, after, start, end, positive = draw(4), draw(14), draw(3), draw(3), draw(title_tokens)
        tails = []
        for _ in range(k):
            negative = draw(title_tokens)
            orders = [(positive, negative), (negative, positive)]
            for first, second in orders if both else [orders[rng.integers(2)]]:
                for a, b in orders:
                    tails.append(np.concatenate([first, between, second, after, start, a, between, b, end]))
        answer = len(start) + 2 * title_tokens + len(between) + len(end)
        pairs = np.arange(len(tails), dtype=np.int32).reshape(-1, 2)
        groups.append(EncodedGroup(draw(38 + history * (title_tokens + 4)), tuple(tails), (answer,) * len(tails), pairs))
    return groups


def largest(groups: Sequence[EncodedGroup], batch_size: int, batch_tokens: int = BATCH_TOKENS) -> Work:
    """The micro-batch of the most tokens, as training puts them together within the data's own order of lengths."""
    longest = sorted(groups, key=lambda g: g.shared_tokens)[-batch_size:]
    while len(longest) > 1 and sum(g.shared_tokens for g in longest) > batch_tokens:
        longest.pop(0)
    return Work.of(pad_groups(longest))


MACS = (8, 16, 24, 32, 36, 48, 64, 96, 128)


def usable(gigabytes: float) -> float:
    """Bytes that Metal recommends as a working set on a Mac of so many GB: two thirds up to 36 GB, three quarters above."""
    return gigabytes * 2**30 * (2 / 3 if gigabytes <= 36 else 3 / 4)


def machine_memory() -> float:
    """Bytes that a run can have here: Metal's recommended working set, or all of the machine's memory."""
    import os

    import mlx.core as mx

    if mx.metal.is_available():
        return float(mx.device_info()["max_recommended_working_set_size"])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@dataclass(frozen=True)
class Case:
    """A run to be planned."""

    shape: ModelShape
    training: Training
    groups: Sequence[EncodedGroup]
    batch_size: int
    batch_tokens: int = BATCH_TOKENS

    @property
    def largest(self) -> Work:
        return largest(self.groups, self.batch_size, self.batch_tokens)

    def peak(self) -> float:
        return memory(self.shape, self.largest, self.training)["peak"]


def remedies(case: Case) -> list[tuple[str, Case]]:
    """Changes that save memory, the cheapest first; each on top of those before it."""
    out: list[tuple[str, Case]] = []

    def then(what: str, **change: Any) -> None:
        nonlocal case
        case = replace(case, **change)
        out.append((", ".join([*([out[-1][0]] if out else []), what]), case))

    while case.batch_size > 1:
        then(f"--batch-size {case.batch_size // 2}", batch_size=case.batch_size // 2)
        if len(out) > 1:  # halved again: one flag says it
            out[-1] = (out[-1][0].split(", ")[-1], case)
    if not case.training.checkpoint:
        then("--grad-checkpoint", training=replace(case.training, checkpoint=True))
    if case.training.adapted_layers > 8:
        then("--num-layers 8", training=replace(case.training, adapted_layers=8))
    if case.shape.bits > 4:
        then("--quantize 4", shape=replace(case.shape, bits=4))
    return out


def cheapest(case: Case, limit: float) -> str | None:
    """ "" where the case fits in `limit` bytes, the flags that make it fit, or None."""
    if case.peak() <= limit:
        return ""
    return next((what for what, changed in remedies(case) if changed.peak() <= limit), None)


# Of the rate of plain matrix products, what a step reaches: only to foresee how long the calibration takes
STEP_SHARE = 0.25


def calibrate(shape: ModelShape, training: Training, seconds: float = 10.0) -> float:
    """FLOP/s that a training step of the model's width reaches on this machine, in about `seconds`.

    Measured on two layers with as much of the vocabulary as weighs the same beside them, on one group of k = 5; on a CPU in float32, as runs
    there. Where that would take too long, on a shorter group, and then on a narrower model.
    """
    import time

    import mlx.core as mx
    import mlx.nn as nn

    from .model import on_cpu, random_qwen3
    from .scoring import group_logps

    width = 4 if on_cpu() else training.activation_bytes
    setting = replace(training, adapted_layers=2, keys=(), activation_bytes=width)
    small = replace(shape, layers=2, vocabulary=max(64, 2 * shape.vocabulary // shape.layers))
    begun = time.perf_counter()

    def timed(work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        mx.eval(work())
        return time.perf_counter() - started

    while True:
        model = random_qwen3(small, mx.float32 if width == 4 else mx.bfloat16, rank=training.rank)
        x, up = mx.random.normal((32, small.hidden)).astype(model.model.norm.weight.dtype), model.model.layers[0].mlp.up_proj
        products = 2 * 32 * small.hidden * small.intermediate / min(timed(lambda: up(x)) for _ in range(2))  # noqa: B023
        lengths = [assumed_groups(1, k, history=history, vocabulary=small.vocabulary) for k, history in ((5, 22), (1, 22), (1, 2))]
        batches = [pad_groups(groups) for groups in lengths]
        quick = [b for b in batches if 3 * step_flops(small, Work.of(b), setting) < STEP_SHARE * products * seconds]
        if quick or small.hidden <= 256:
            break
        small = replace(small, hidden=small.hidden // 2, intermediate=small.intermediate // 2)
    batch = (quick or batches[-1:])[0]
    step = nn.value_and_grad(model, lambda: group_logps(model, batch, checkpoint=training.checkpoint).sum())
    timed(step)
    taken = [timed(step)]
    while len(taken) < 5 and time.perf_counter() - begun + taken[-1] < seconds:
        taken.append(timed(step))
    return step_flops(small, Work.of(batch), setting) / min(taken)


def check(case: Case, limit: float) -> None:
    """Raises UserError where a run cannot fit in `limit` bytes, with the cheapest flags that make it fit."""
    peak = case.peak()
    if peak <= limit:
        return
    change = cheapest(case, limit)
    raise UserError(
        f"memory: about {peak / 1e9:.1f} GB will be needed, and this machine gives {limit / 1e9:.1f} GB: "
        f"{f'add {change}' if change else 'take a smaller model or a shorter --max-seq-length'}, or go on all the same with --no-memory-check"
    )


def plan(case: Case, *, epochs: float = 1.0, flops_per_second: float = 0.0) -> dict[str, Any]:
    """Everything that `mlx-dmpo plan` tells, in bytes, FLOPs, tokens and seconds."""
    works = [Work.of(pad_groups([case.groups[i] for i in rows])) for rows in by_length(case.groups, case.batch_size, case.batch_tokens)]
    flops = sum(step_flops(case.shape, w, case.training) for w in works)
    reference = sum(forward_flops(case.shape, w) for w in works)
    separate = 3 * separate_flops(case.shape, case.groups)
    parts = memory(case.shape, case.largest, case.training)
    found: dict[str, Any] = {
        "memory": parts,
        "fits": {str(gb): cheapest(case, usable(gb)) for gb in MACS},
        "groups": len(case.groups),
        "tokens_per_epoch": sum(g.shared_tokens for g in case.groups),
        "tokens_per_epoch_separate": sum(g.separate_tokens for g in case.groups),
        "flops_per_epoch": flops,
        "flops_per_epoch_separate": separate,
        "flops_of_reference": reference,
        "padding_share": 1 - sum(g.shared_tokens - len(g.tails) for g in case.groups) / sum(w.tokens for w in works),
    }
    if flops_per_second:
        found["seconds_per_epoch"] = flops / flops_per_second
        found["seconds"] = epochs * flops / flops_per_second + reference / flops_per_second
    return found


def run(
    *,
    model: str,
    data: str,
    tokenizer: str,
    history: int,
    title_tokens: int,
    groups: int,
    num_negatives: int,
    stage: str,
    batch_size: int,
    batch_tokens: int,
    max_seq_length: int,
    num_layers: int,
    lora_rank: int,
    lora_keys: Sequence[str],
    optimizer: str,
    grad_checkpoint: bool,
    dtype: str,
    epochs: float,
    tflops: float,
    as_json: bool,
) -> dict[str, Any]:
    """The command's plan. Raises UserError for a model, data or flag that it cannot plan with."""
    shape = ModelShape.of(model)
    if num_layers == 0 or num_layers > shape.layers:
        raise UserError(f"--num-layers: {num_layers} does not fit a model of {shape.layers} layers: give 1 to {shape.layers}, or -1")
    for key in lora_keys:
        if key.rsplit(".", 1)[-1] not in shape.projections:
            raise UserError(f'--lora-keys: "{key}" is no linear layer of the model: choose among {", ".join(shape.projections)}')
    if data:
        encoded = measured_groups(data, tokenizer or model, num_negatives, max_seq_length, stage == "sft")
    else:
        encoded = assumed_groups(groups, num_negatives, history=history, title_tokens=title_tokens)
        if stage == "sft":
            encoded = [chosen_only(g) for g in encoded]
    width = int(dtype) // 8
    training = Training(
        shape.layers if num_layers < 0 else num_layers, lora_rank, tuple(lora_keys), grad_checkpoint, width, OPTIMIZER_STATES[optimizer]
    )
    case = Case(shape, training, encoded, batch_size, batch_tokens)
    rate = tflops * 1e12 or calibrate(shape, training)
    found = plan(case, epochs=epochs, flops_per_second=rate)
    return found | {"flops_per_second": rate, "rate": "given" if tflops else "measured here", "parameters": shape.parameters}


def measured_groups(data: str, tokenizer: str, k: int, max_seq_length: int, sft: bool) -> list[EncodedGroup]:
    """A data set's groups in tokens, without its model."""
    from . import rundir
    from .batches import first_negatives, printed_orders
    from .data import formats, prompts
    from .encode import Encoder
    from .model import load_tokenizer

    domains = prompts.with_domains({})
    examples = [first_negatives(e, k) for e in formats.load_examples(Path(data), "train", domains, False, rundir.notice)]
    encoder = Encoder(load_tokenizer(tokenizer), max_seq_length, domains)
    return [
        encoder.encode(e, printed_orders(e, i, both=False, redraw=False, seed=0), chosen_only=sft)
        for i, e in enumerate(tqdm(examples, desc="encode", unit="example", disable=None, leave=False))
    ]


def chosen_only(group: EncodedGroup) -> EncodedGroup:
    rows = group.pairs[:, 0]
    return replace(
        group,
        tails=tuple(group.tails[r] for r in rows),
        answer_lengths=tuple(group.answer_lengths[r] for r in rows),
        pairs=np.zeros((0, 2), np.int32),
    )


def told(found: dict[str, Any]) -> str:
    """The plan as a table."""
    lines = ["memory of a training step at its highest"]
    for name, value in found["memory"].items():
        lines.append(f"  {name:<12} {value / 1e9:>8.2f} GB")
    lines.append("fits in a Mac of")
    for gigabytes, change in found["fits"].items():
        answer = "yes" if change == "" else f"with {change}" if change else "no"
        lines.append(f"  {gigabytes:>4} GB ({usable(float(gigabytes)) / 1e9:.1f} GB usable)  {answer}")
    shared, separate = found["tokens_per_epoch"], found["tokens_per_epoch_separate"]
    lines.append(f"an epoch of {found['groups']} groups")
    lines.append(f"  tokens       {shared:>12,} ({separate:,} with every sequence alone: {separate / shared:.1f} x)")
    flops, alone = found["flops_per_epoch"], found["flops_per_epoch_separate"]
    lines.append(
        f"  TFLOP        {flops / 1e12:>12,.1f} ({alone / 1e12:,.1f}: {alone / flops:.1f} x); the reference, once: {found['flops_of_reference'] / 1e12:,.1f}"
    )
    if "seconds" in found:
        rate = f"{found['flops_per_second'] / 1e12:.3g} TFLOP/s, {found['rate']}"
        lines.append(
            f"  time         {clock(found['seconds_per_epoch']):>12}; with the reference and all epochs {clock(found['seconds'])} ({rate})"
        )
    return "\n".join(lines)


def clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
