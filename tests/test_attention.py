"""Attention over prefix trees: two softmaxes against one, and rows that are moved against those that are added up."""

from dataclasses import fields

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_dmpo.core import attention
from mlx_dmpo.core.layout import layout
from mlx_dmpo.core.scorer import plain_logps, shared_logps
from mlx_dmpo.core.tree import GroupBatch, pad_groups, planned

H, HKV, SIZE = 4, 2, 8


def batches():
    rng = np.random.default_rng(5)
    yield "one group", pad_groups(tiny.equal_groups(rng)[:1])
    yield "ragged", pad_groups(tiny.ragged_groups(rng))
    yield "planned sizes", pad_groups(tiny.ragged_groups(rng), planned)


BATCHES = list(batches())


def as_traced(batch):
    """Its arrays as a compiled step has them: no length is known."""
    arrays = {f.name: mx.array(getattr(batch, f.name)) for f in fields(batch) if f.name != "groups"}
    return GroupBatch(**arrays, groups=())


def one_softmax(q, kp, vp, kb, vb, queries):
    """attention._attend_below with every score of a query in one row, and automatic differentiation."""
    G, Hkv, C, n, Q = queries.spread.shape
    P, T = kp.shape[2], kb.shape[3]
    q = q.reshape(-1, SIZE)[queries.spread]
    far = (q.reshape(G, Hkv, C * n * Q, SIZE) @ kp.swapaxes(-1, -2)).reshape(G, Hkv, C, n, Q, P)
    if queries.far is not None:  # (G, 1, 1, B or 1, P)
        B = queries.back.shape[-1]
        mask = mx.broadcast_to(queries.far, (G, Hkv, n, B, P)).reshape(-1, P)
        far = far + mask[queries.spread]
    near = (q.reshape(G, Hkv, C, n * Q, SIZE) @ kb.swapaxes(-1, -2)).reshape(G, Hkv, C, n, Q, T) + queries.near
    weights = mx.softmax(mx.concatenate([far, near], axis=-1), axis=-1)
    out = (weights[..., :P].reshape(G, Hkv, -1, P) @ vp).reshape(G, Hkv, C, n * Q, SIZE)
    out = out + weights[..., P:].reshape(G, Hkv, C, n * Q, T) @ vb
    return out.reshape(-1, SIZE)[queries.back].reshape(G, Hkv, -1, SIZE)


@pytest.mark.parametrize("who", ["every", "answers"])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("name, batch", BATCHES, ids=[name for name, _ in BATCHES])
def test_two_softmaxes_are_one(name, batch, window, who):
    at = layout(batch, mx.float32, (H, HKV), window)
    queries, (G, _, P), (_, _, C, T) = getattr(at, who), at.prefix.shape, at.block.shape
    B = queries.back.shape[-1]
    shapes = [(G, HKV, H // HKV * B, SIZE), *2 * [(G, HKV, P, SIZE)], *2 * [(G, HKV, C, T, SIZE)]]
    given = [2 * mx.random.normal(s, key=mx.random.key(i)) for i, s in enumerate(shapes)]
    # what lies in a slot of padding counts nowhere, and gets no gradient from above
    filled = mx.ones((B * H * G, 1)) if queries.filled is None else queries.filled[-B * H * G :]
    upper = mx.random.normal(given[0].shape, key=mx.random.key(9)) * filled.reshape(G, HKV, -1, 1)

    def total(attend):
        return lambda *given: (upper * attend(*given, queries)).sum()

    (value, gradients), (expected, wanted) = (
        mx.value_and_grad(total(attend), argnums=range(5))(*given) for attend in (attention._attend_below, one_softmax)
    )
    assert abs(value.item() - expected.item()) <= 1e-4 * max(1, abs(expected.item()))
    kept = filled.reshape(G, HKV, -1, 1)
    for which, (found, right) in enumerate(zip(gradients, wanted, strict=True)):
        found, right = (np.array(x * kept if which == 0 else x) for x in (found, right))
        assert np.abs(found - right).max() <= 1e-4 * max(1.0, np.abs(right).max())


@pytest.mark.parametrize("name, batch", BATCHES, ids=[name for name, _ in BATCHES])
@pytest.mark.parametrize("traced", [False, True], ids=["arrays", "traced"])
@pytest.mark.parametrize("who", ["every", "answers"])
def test_moved_rows_have_the_gradient_of_added_ones(name, batch, traced, who):
    """There and back through the slots, with anything in the slots and the rows of padding."""
    queries = getattr(layout(as_traced(batch) if traced else batch, mx.float32, (H, HKV)), who)
    M = len(queries.place)
    rows = mx.random.normal((M * H, SIZE), key=mx.random.key(0))
    upper = mx.random.normal((M, H, SIZE), key=mx.random.key(1))
    factor = mx.random.normal((len(queries.slots), 1), key=mx.random.key(2))
    real = mx.ones((M, 1, 1)) if queries.real is None else queries.real

    def moved(rows):
        slots = attention._moved(rows, queries.slots, queries.place, queries.real)
        return attention._moved(factor * slots, queries.place, queries.slots, queries.filled)

    def added(rows):
        return (factor * rows[queries.slots])[queries.place]

    # a step's loss reads no row of padding
    (value, found), (expected, right) = (
        mx.value_and_grad(lambda rows, way=way: (upper * real * way(rows)).sum())(rows) for way in (moved, added)
    )
    assert value.item() == pytest.approx(expected.item(), abs=1e-4)
    np.testing.assert_allclose(np.array(found), np.array(right), atol=1e-5)
    if not traced and name == "one group":
        assert queries.real is None and queries.filled is None  # nothing is masked where nothing is padded


def test_a_prefix_may_be_empty():
    group = tiny.group(np.random.default_rng(3), 1, [6, 5, 6], [3, 2, 3])
    bare = type(group)(np.zeros(0, np.int32), group.tails, group.answer_lengths, group.pairs)
    model = tiny.model()
    for groups in ([bare], [bare, group]):
        found = np.array(shared_logps(model, pad_groups(groups)))
        np.testing.assert_allclose(found, np.array(plain_logps(model, pad_groups(groups))), atol=1e-4)
