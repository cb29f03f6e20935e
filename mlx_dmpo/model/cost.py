"""What a run will need: memory, floating-point operations, time. Arithmetic on shapes

Memory is counted tensor by tensor, as MLX keeps them for the backward pass: see docs/plan.md, also for how exact it is.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..core.tree import BATCH_TOKENS, EncodedGroup, GroupBatch, pad_groups
from .shape import ModelShape


@dataclass(frozen=True)
class Work:
    """What a batch makes the model do: see GroupBatch for the sizes."""

    tokens: int  # N
    rows: int  # M
    prefix_scores: int  # query-key pairs of the prefixes, as computed
    block_scores: int  # of what lies below them with prefixes and in blocks
    row_scores: int  # of the answer rows
    branches: int

    @classmethod
    def of(cls, batch: GroupBatch) -> Work:
        from ..core.layout import PREFIX_CHUNK

        (G, P), (_, C, T), Q = batch.prefix_index.shape, batch.block_index.shape, batch.query_at.shape[2]
        B, S = batch.below_index.shape[1], batch.group_rows.shape[1]
        chunks = [(min(PREFIX_CHUNK, P - a), min(P, a + PREFIX_CHUNK)) for a in range(0, P, PREFIX_CHUNK)]
        return cls(
            len(batch.tokens),
            len(batch.rows),
            G * sum(q * k for q, k in chunks),
            G * (B * P + C * T * T),
            G * (S * P + C * Q * T),
            sum(len(g.tails) for g in batch.groups),
        )


# Arrays of the adapter's size that an optimizer keeps
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


@dataclass(frozen=True)
class Scale:
    """What a device takes of the activations counted here: see model.probe.scale_of."""

    kept: float = 1.0  # a training step
    recomputed: float = 1.0  # one whose layers are recomputed
    forward: float = 1.0  # scoring


AS_COUNTED = Scale()


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
    """Forward and backward: what each frozen matrix passes back costs what it cost forward; the first adapted layer's
    input needs none."""
    head = 2 * shape.hidden * shape.vocabulary * work.rows
    layers = (
        forward_flops(shape, work) - head
    ) / shape.layers  # the last layer's saving spread evenly: exact for all layers adapted
    first = 2 * shape.hidden * (shape.heads + 2 * shape.kv_heads) * shape.head_dim * work.tokens
    attention_again = (
        4 * shape.heads * shape.head_dim * (work.prefix_scores + work.block_scores) * (training.adapted_layers - 1)
    )
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


# Arrays that MLX keeps of one layer for the backward pass, and holds at most while it runs back through one, in
# units of
# (tokens x hidden, x query width, x key and value width, x intermediate, heads x prefix scores, heads x block scores).
# Fitted to measured peaks, float32: benchmarks/plan_accuracy.py checks them on other shapes.
KEPT = (3.54, 4.23, 1.54, 1.63, 0.78, 1.17)
# beside what is kept of the layers below: while it runs back through the MLP, and through attention
RUNNING = ((9.02, 0.46, 0.84, 7.9, 0.0, 0.0), (0.0, 8.32, 2.79, 0.11, 1.83, 0.83))
# forward again and backward, nothing else kept
RECOMPUTING = ((5.05, 5.3, 0.76, 9.2, 0.87, 1.25), (2.21, 12.71, 5.01, 0.0, 2.49, 2.36))
# without a gradient, one layer at a time, in float32 and in 16 bits (where adapters, softmax and casts are float32)
FORWARD = {4: (5.31, 6.84, 0.92, 3.97, 0.45, 1.36), 2: (9.43, 5.88, 0.9, 12.9, 0.26, 2.64)}


# matrices whose input is one array
_INPUTS = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "q, k, v") | dict.fromkeys(("gate_proj", "up_proj"), "gate, up")


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


def memory(shape: ModelShape, work: Work, training: Training, scale: Scale = AS_COUNTED) -> dict[str, float]:
    """Bytes, by what holds them, of the step at its highest; `peak` is their sum. `work` is the largest micro-batch."""
    from ..core.head import chunk_bytes

    e = training.activation_bytes
    N, M = work.tokens, work.rows
    answers = replace(work, tokens=M, prefix_scores=0, block_scores=work.row_scores)
    logits = 2 * chunk_bytes(M, shape.vocabulary) + 4 * M * (shape.hidden + 1)
    # mlx-lm keeps adapters in float32: beside 16-bit activations every input of adapted matrices has a cast, which
    # those of one input share; attention's are kept. Factors fitted like KEPT
    adapted = training.adapted(shape) if e < 4 else {}
    inputs = {_INPUTS.get(name, name): i for name, (i, _) in adapted.items()}
    of_mlp = 4.0 * sum(i for name, i in inputs.items() if name in ("gate, up", "down_proj"))
    of_attention = 4.0 * sum(inputs.values()) - of_mlp
    cast = 1.5 * of_attention
    wide = N * (5.5 * of_mlp if training.checkpoint else 3.1 * (of_attention + of_mlp))
    keys_values = 3 * e * N * (shape.hidden + shape.kv_heads * shape.head_dim)  # of the last layer
    last = e * _layer(KEPT, shape, answers) + cast * M + keys_values
    through = (0.0 if training.checkpoint else last) + logits  # at the vocabulary
    if training.checkpoint:
        kept = float(e * N * shape.hidden * training.adapted_layers)
        stages = RECOMPUTING
    else:
        kept = (e * _layer(KEPT, shape, work) + cast * N) * (training.adapted_layers - 1)
        stages = RUNNING
    if training.adapted_layers > 1:
        back = e * max(_layer(stage, shape, work) for stage in stages) + wide
    else:  # the last layer alone, or a layer below it outside the gradient
        back = e * max(_layer(stage, shape, answers) for stage in stages) + keys_values + wide
        back = max(back, e * _layer(FORWARD[e], shape, work))
    adapter = 4.0 * training.adapter_parameters(shape)
    activations = kept + (back if back > through else max(0.0, through - logits))
    found = {
        "weights": shape.weight_bytes(e),
        "adapter": adapter,
        "optimizer": training.optimizer_states * adapter,
        "gradients": adapter,
        "activations": activations * (scale.recomputed if training.checkpoint else scale.kept),
        "logits": logits if through >= back else 0.0,
    }
    return found | {"peak": sum(found.values())}


def scoring_memory(shape: ModelShape, work: Work, activation_bytes: int, scale: Scale = AS_COUNTED) -> float:
    """Bytes above the model that scoring a batch takes at its highest, outside gradient tracing."""
    from ..core.head import chunk_bytes

    running = activation_bytes * _layer(FORWARD[activation_bytes], shape, work)
    head = activation_bytes * (work.tokens + work.rows) * shape.hidden + 2 * chunk_bytes(work.rows, shape.vocabulary)
    return max(scale.forward * running, head)


def assumed_groups(
    count: int,
    k: int,
    *,
    history: int = 22,
    title_tokens: int = 5,
    both: bool = False,
    vocabulary: int = 151_936,
    seed: int = 0,
    form: str = "pairwise",
) -> list[EncodedGroup]:
    """Random tokens as long as the prompts of a form are in Qwen3's tokens.

    pairwise: k questions that name two titles, each answered in both orders; pointwise: k + 1 questions that name one,
    answered Yes and No; listwise and direct: one prompt, answered by k + 1 titles, in listwise printed in it.
    """
    rng = np.random.default_rng(seed)

    def draw(n: int) -> np.ndarray:
        return rng.integers(0, vocabulary, n).astype(np.int32)

    groups = []
    for _ in range(count):
        if form != "pairwise":
            groups.append(_assumed_group(draw, form, k, history, title_tokens))
            continue
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
        groups.append(
            EncodedGroup(draw(38 + history * (title_tokens + 4)), tuple(tails), (answer,) * len(tails), pairs)
        )
    return groups


def _assumed_group(
    draw: Callable[[int], np.ndarray], form: str, k: int, history: int, title_tokens: int
) -> EncodedGroup:
    printed = k + 1 if form == "listwise" else 0
    prefix = draw(48 + (history + printed) * (title_tokens + 2))
    if form == "pointwise":  # the question, then Yes or No, a full stop and the end of turn
        questions = [draw(8 + title_tokens + 6) for _ in range(k + 1)]
        tails = [np.concatenate([question, draw(3)]) for question in questions for _ in range(2)]
        pairs = [(0, 2 * n) for n in range(1, k + 1)]
        targets = (0, *(2 * n + 1 for n in range(1, k + 1)))
        return EncodedGroup(prefix, tuple(tails), (3,) * len(tails), np.array(pairs, np.int32), targets=targets)
    last = draw(1)
    tails = [np.concatenate([last, draw(title_tokens + 1)]) for _ in range(k + 1)]
    pairs = [(0, n) for n in range(1, k + 1)]
    return EncodedGroup(prefix, tuple(tails), (title_tokens + 1,) * (k + 1), np.array(pairs, np.int32))


def heaviest(
    groups: Sequence[EncodedGroup],
    batch_size: int,
    batch_tokens: int = BATCH_TOKENS,
    pad: Callable[[Sequence[EncodedGroup]], GroupBatch] = pad_groups,
) -> list[Work]:
    """The micro-batches that can take the most memory: the longest groups, and those near `batch_tokens` with a long
    prefix, to which all are padded; the longest group may run alone, and middling ones together.
    """
    order = sorted(groups, key=lambda g: g.shared_tokens)
    sizes = [g.shared_tokens for g in order]
    found = [[order[i] for i in _filled(sizes, batch_size, batch_tokens)]]
    for beside in sorted({b for b in (1, 2, 3, batch_size // 2, batch_size - 1) if 0 < b < batch_size}):
        some = [[order[i] for i in rows] for rows in _neighbours(sizes, beside, batch_tokens)]
        if some:
            found.append(max(some, key=lambda g: sum(x.shared_tokens for x in g) * max(len(x.prefix) for x in g)))
    return [Work.of(pad(some)) for some in found]


def _neighbours(sizes: Sequence[int], beside: int, tokens: int) -> Iterator[list[int]]:
    """For each index: it with the largest so many neighbours below it that fit in `tokens` together."""
    sums = [0, *itertools.accumulate(sizes)]
    for last in range(beside, len(sizes)):
        windows = range(last - beside + 1)
        fitting = bisect_right(windows, tokens - sizes[last], key=lambda at: sums[at + beside] - sums[at])
        if fitting:
            yield [last, *range(fitting - 1, fitting - 1 + beside)]


def _filled(sizes: Sequence[int], most: int, tokens: int) -> list[int]:
    """Indices of at most `most` groups: the last, then each time the largest one below that still fits in `tokens`."""
    at = len(sizes) - 1
    found, free = [at], tokens - sizes[at]
    while len(found) < most and (at := min(at, bisect_right(sizes, free)) - 1) >= 0:
        found.append(at)
        free -= sizes[at]
    return found
