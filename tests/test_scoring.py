"""Shared history = each sequence alone, in values and in gradients."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx.utils import tree_map
from mlx_lm.models import qwen3
from mlx_lm.tuner.lora import LoRALinear

from mlx_dmpo.core import attention, family, head
from mlx_dmpo.core import scorer as core_scorer
from mlx_dmpo.core.scorer import plain_logps, shared_logps
from mlx_dmpo.core.selfcheck import choose_scorer
from mlx_dmpo.core.tree import by_length, pad_groups, planned


def gradients(model, batch, score, seed=0, **options):
    """Values (G, R) and the adapter's gradient of a random weighting of them."""
    parameters = model.trainable_parameters()
    weights = mx.array(np.random.default_rng(seed).normal(size=batch.answer_mask.shape[:2]).astype(np.float32))

    def loss(parameters):
        model.update(parameters)
        logps = score(model, batch, **options)
        return (weights * logps).sum(), logps

    (_, logps), found = mx.value_and_grad(loss)(parameters)
    mx.eval(logps, found)
    model.update(parameters)
    return np.array(logps), found


def by_hand(model, group):
    """Float64 log-softmax over the model's own logits, one token at a time."""
    out = []
    for tail, n in zip(group.tails, group.answer_lengths, strict=True):
        tokens = np.concatenate([group.prefix, tail])
        logits = np.array(model(mx.array(tokens)[None])[0], np.float64)
        logps = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        out.append(sum(logps[t - 1, tokens[t]] for t in range(len(tokens) - n, len(tokens))))
    return out


@pytest.mark.parametrize("groups", [tiny.equal_groups, tiny.ragged_groups, tiny.tree_groups])
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_shared_equals_plain_in_values_and_gradients(groups, bits, checkpoint):
    model = tiny.model(bits=bits)
    batch = pad_groups(groups(np.random.default_rng(1)))
    plain, plain_gradient = gradients(model, batch, plain_logps)
    shared, shared_gradient = gradients(model, batch, shared_logps, checkpoint=checkpoint)
    assert np.abs(shared - plain).max() <= 5e-4
    assert tiny.relative_error(shared_gradient, plain_gradient) <= 1e-4
    assert all(np.abs(v).max() > 0 for v in tiny.leaves(plain_gradient).values())  # every adapter leaf takes part


def test_the_plain_scorer_is_the_sum_of_the_answers_token_log_probs():
    model = tiny.model().eval()
    groups = tiny.ragged_groups(np.random.default_rng(2))
    plain = np.array(plain_logps(model, pad_groups(groups)))
    for row, group in zip(plain, groups, strict=True):
        np.testing.assert_allclose(row[: len(group.tails)], by_hand(model, group), atol=1e-4)
        assert not row[len(group.tails) :].any()


@pytest.mark.parametrize("trained", [False, True])
def test_per_token_log_probs_agree_and_add_up(trained):
    """With the head frozen and with an adapter on it."""
    model = tiny.model(tied=False, lora_layers=0)
    tiny.adapt(model, {"keys": ["self_attn.v_proj", *(["lm_head"] if trained else [])]})
    groups = tiny.ragged_groups(np.random.default_rng(15))
    batch = pad_groups(groups)
    shared, plain = (np.array(score(model, batch, per_token=True)) for score in (shared_logps, plain_logps))
    assert shared.shape == batch.answer_mask.shape
    np.testing.assert_allclose(shared, plain, atol=5e-4)
    for tokens, score in ((shared, shared_logps), (plain, plain_logps)):
        np.testing.assert_allclose(tokens.sum(axis=-1), np.array(score(model, batch)), atol=1e-4)
        assert not tokens[batch.answer_mask == 0].any() and (tokens[batch.answer_mask == 1] < 0).all()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_plain_scorer_checkpointed_has_the_same_gradient(checkpoint):
    model = tiny.model()
    batch = pad_groups(tiny.ragged_groups(np.random.default_rng(3)))
    _, expected = gradients(model, batch, shared_logps)
    _, found = gradients(model, batch, plain_logps, checkpoint=checkpoint)
    assert tiny.relative_error(found, expected) <= 1e-4


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_other_families_and_untied_heads(kind, tied):
    model = tiny.model(kind, tied=tied)
    batch = pad_groups(tiny.ragged_groups(np.random.default_rng(4)))
    plain, plain_gradient = gradients(model, batch, plain_logps)
    shared, shared_gradient = gradients(model, batch, shared_logps, checkpoint=True)
    assert np.abs(shared - plain).max() <= 5e-4
    assert tiny.relative_error(shared_gradient, plain_gradient) <= 1e-4
    assert choose_scorer(model, tiny.COMMON["vocab_size"]).shared


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_chunks_of_the_head_add_up(monkeypatch, bits, tied, trained):
    """Chunks of 7 rows, with the head frozen (its slope taken with its value) or adapted (recomputed)."""
    monkeypatch.setattr(head, "LOGITS_BYTES", 7 * 4 * tiny.COMMON["vocab_size"])
    model = tiny.model(bits=bits, tied=tied, lora_layers=0 if trained else 2)
    if trained:
        keys = ["self_attn.v_proj", "embed_tokens" if tied else "lm_head"]
        tiny.adapt(model, {"keys": ["model." + k if k == "embed_tokens" else k for k in keys]})
        assert any("embed_tokens" in k or "lm_head" in k for k in tiny.leaves(model.trainable_parameters()))
    batch = pad_groups(tiny.ragged_groups(np.random.default_rng(11)))
    plain, plain_gradient = gradients(model, batch, plain_logps)
    shared, shared_gradient = gradients(model, batch, shared_logps)
    assert np.abs(shared - plain).max() <= 5e-4
    assert tiny.relative_error(shared_gradient, plain_gradient) <= 1e-4
    np.testing.assert_allclose(np.array(shared_logps(model.eval(), batch)), plain, atol=5e-4)


def without_running_again(run, parameters, *arrays):
    return run(parameters, *arrays)


@pytest.mark.parametrize("trained", ["adapter", "norms and MLP", "MLP out"])
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_keeping_less_of_the_mlp_changes_nothing(monkeypatch, kind, trained, seed):
    """What is run again in the backward pass gives what automatic differentiation gives, with dropout too."""
    model = tiny.model(kind, dropout=0.0 if seed is None else 0.5)
    if trained != "adapter":
        model.freeze()
        for layer in model.model.layers:
            for part in (layer.post_attention_layernorm, layer.mlp) if "norms" in trained else (layer.mlp.down_proj,):
                part.unfreeze()
    assert family._is_swiglu(model.model.layers[0].mlp)
    batch = pad_groups(tiny.ragged_groups(np.random.default_rng(12)))
    values, less = gradients(model, batch, shared_logps, dropout_seed=seed)
    monkeypatch.setattr(family, "recomputed", without_running_again)
    monkeypatch.setattr(family, "_swiglu", family._swiglu_forward)
    expected, kept = gradients(model, batch, shared_logps, dropout_seed=seed)
    np.testing.assert_allclose(values, expected, atol=1e-5)
    assert tiny.leaves(less).keys() == tiny.leaves(kept).keys()
    assert tiny.relative_error(less, kept) <= 1e-6


def test_less_is_kept_of_the_mlp(monkeypatch):
    """The MLP is 16 times as wide as the model: of its five arrays of a layer three are not kept."""
    model = tiny.model(intermediate_size=1024, num_hidden_layers=6, lora_layers=6)
    batch = pad_groups(tiny.ragged_groups(np.random.default_rng(13)))

    def peak():
        gradients(model, batch, shared_logps)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        gradients(model, batch, shared_logps)
        return mx.get_peak_memory() - before

    less = peak()
    monkeypatch.setattr(family, "recomputed", without_running_again)
    monkeypatch.setattr(family, "_swiglu", family._swiglu_forward)
    assert less < 0.7 * peak()


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
def test_projections_of_one_input_are_what_their_modules_give(bits, dtype, count):
    """LoRA of several ranks and scales, whose products are put together: values, and gradients of all factors and x."""
    rng = np.random.default_rng(21)
    linears = [nn.Linear(64, out, bias=out == 96) for out in (64, 96, 32)[:count]]
    for linear in linears:
        linear.set_dtype(dtype)
    linears = [nn.QuantizedLinear.from_linear(m, 32, 4) if bits else m for m in linears]
    ranks, scales = (4, 8, 3)[:count], (2.0, 0.5, 20.0)[:count]
    modules = [LoRALinear.from_base(m, r, scale=s) for m, r, s in zip(linears, ranks, scales, strict=True)]
    for m in modules:
        m.linear.freeze()
        m.lora_b = mx.array(rng.normal(size=m.lora_b.shape).astype(np.float32))
    x = mx.array(rng.normal(size=(21, 64)).astype(np.float32)).astype(dtype)

    def found(run):
        def loss(parameters, x):
            for m, p in zip(modules, parameters, strict=True):
                m.update(p)
            return sum((mx.sin(mx.arange(y.size).reshape(y.shape)) * y).sum() for y in run(modules, x))

        def wide(tree):
            return tree_map(lambda a: a.astype(mx.float32), tree)

        values = [np.array(y.astype(mx.float32)) for y in run(modules, x)]
        return values, wide(mx.grad(loss, argnums=(0, 1))([m.trainable_parameters() for m in modules], x))

    assert all(map(family._is_lora, modules))
    values, gradient = found(family.project)
    plain, expected = found(lambda modules, x: [m(x) for m in modules])
    for ours, theirs in zip(values, plain, strict=True):
        assert np.abs(ours - theirs).max() <= (1e-6 if dtype == mx.float32 else 0.01) * np.abs(theirs).max()
    assert tiny.relative_error(gradient, expected) <= (1e-6 if dtype == mx.float32 else 1e-2)


def test_projections_keep_their_dropout():
    modules = [LoRALinear.from_base(nn.Linear(8, 8), 4, dropout=0.5) for _ in range(2)]
    for m in modules:
        m.lora_b = mx.ones(m.lora_b.shape)
    x = mx.ones((3, 8))
    mx.random.seed(5)
    ours = family.project(modules, x)
    mx.random.seed(5)
    for mine, m in zip(ours, modules, strict=True):
        np.testing.assert_array_equal(np.array(mine), np.array(m(x)))
    for m in modules:
        m.eval()
    for mine, m in zip(family.project(modules, x), modules, strict=True):
        np.testing.assert_allclose(np.array(mine), np.array(m(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [0, 4])
def test_dora(bits):
    model = tiny.model(dora=True, bits=bits)
    assert not any(map(family._is_lora, model.modules()))
    batch = pad_groups(tiny.ragged_groups(np.random.default_rng(5)))
    plain, plain_gradient = gradients(model, batch, plain_logps)
    shared, shared_gradient = gradients(model, batch, shared_logps, checkpoint=True)
    assert np.abs(shared - plain).max() <= 5e-4
    assert tiny.relative_error(shared_gradient, plain_gradient) <= 1e-4


def test_dropout_is_drawn_alike_when_a_layer_is_recomputed():
    model = tiny.model(dropout=0.5)
    batch = pad_groups(tiny.equal_groups(np.random.default_rng(6)))
    values, expected = gradients(model, batch, shared_logps, dropout_seed=7)
    again, found = gradients(model, batch, shared_logps, dropout_seed=7, checkpoint=True)
    np.testing.assert_allclose(again, values, atol=1e-4)
    assert tiny.relative_error(found, expected) <= 1e-4
    other, _ = gradients(model, batch, shared_logps, dropout_seed=8)
    assert np.abs(other - values).max() > 1e-2  # dropout is on at all


def test_a_groups_score_does_not_depend_on_its_batch():
    model = tiny.model()
    groups = tiny.ragged_groups(np.random.default_rng(8))
    together = np.array(shared_logps(model, pad_groups(groups)))
    for row, group in zip(together, groups, strict=True):
        alone = np.array(shared_logps(model, pad_groups([group])))[0]
        np.testing.assert_allclose(row[: len(alone)], alone, atol=5e-4)


def test_planned_sizes_and_padding_do_not_matter():
    model = tiny.model()
    groups = tiny.ragged_groups(np.random.default_rng(9))
    expected, expected_gradient = gradients(model, pad_groups(groups), shared_logps)
    batch = pad_groups(groups, lambda size, coarse: -(-size // 20) * 20)
    assert {len(batch.tokens) % 20, batch.prefix_index.shape[1] % 20, batch.answer_mask.shape[2] % 20} == {0}
    assert 0 < batch.padding_share < 0.2
    batch.tokens[batch.starts[-1] :] = 99
    batch.answer_targets[batch.answer_mask == 0] = 99
    found, gradient = gradients(model, batch, shared_logps, checkpoint=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert tiny.relative_error(gradient, expected_gradient) <= 1e-4


def test_an_unknown_family_falls_back_and_says_so():
    model = tiny.model()
    model.model_type = "phi9"
    model.model.layers[1].self_attn.temperature = 2.0
    scorer = choose_scorer(model, tiny.COMMON["vocab_size"])
    assert scorer.logps is plain_logps and "phi9 has temperature in its attention" in scorer.reason


def test_a_model_that_computes_otherwise_falls_back(monkeypatch):
    """Same names, other arithmetic: the self-check finds it."""
    model = tiny.model()
    attention = type(model.model.layers[0].self_attn)
    original = attention.__call__
    monkeypatch.setattr(attention, "__call__", lambda self, *a, **k: 1.1 * original(self, *a, **k))
    scorer = choose_scorer(model, tiny.COMMON["vocab_size"])
    assert scorer.logps is plain_logps and "differs" in scorer.reason
    assert choose_scorer(model, tiny.COMMON["vocab_size"], "plain").logps is plain_logps


def test_a_model_that_windows_attention_falls_back(monkeypatch):
    """Short sequences are the same; only a long probe can tell."""
    model, window = tiny.model(), 64
    original = qwen3.Attention.__call__

    def windowed(self, x, mask=None, cache=None):
        back = mx.arange(x.shape[1])[:, None] - mx.arange(x.shape[1])
        return original(self, x, (back >= 0) & (back < window), cache)

    monkeypatch.setattr(qwen3.Attention, "__call__", windowed)
    batch = pad_groups(tiny.ragged_groups(np.random.default_rng(16)))
    np.testing.assert_allclose(np.array(shared_logps(model, batch)), np.array(plain_logps(model, batch)), atol=5e-4)
    scorer = choose_scorer(model, tiny.COMMON["vocab_size"])
    assert not scorer.shared and "differs from the plain one" in scorer.reason


def test_a_wrong_gradient_falls_back(monkeypatch):
    """Right values, but no gradient reaches the prefix: what keys in a cache would do."""
    model, original = tiny.model(), attention.apply_rope
    monkeypatch.setattr(attention, "apply_rope", lambda *given: mx.stop_gradient(original(*given)))
    batch = pad_groups(tiny.ragged_groups(np.random.default_rng(17)))
    np.testing.assert_allclose(np.array(shared_logps(model, batch)), np.array(plain_logps(model, batch)), atol=5e-4)
    scorer = choose_scorer(model, tiny.COMMON["vocab_size"])
    assert not scorer.shared and "gradients" in scorer.reason
    assert choose_scorer(model.eval(), tiny.COMMON["vocab_size"]).shared  # which needs none
    assert not model.training


def test_the_self_check_leaves_the_model_as_it_was():
    model = tiny.model(dropout=0.5)
    before = tiny.leaves(model.parameters())
    assert choose_scorer(model, tiny.COMMON["vocab_size"]).shared and model.training
    assert all(m.training for m in model.modules())
    assert all(np.array_equal(v, before[k]) for k, v in tiny.leaves(model.parameters()).items())


def test_half_precision_keeps_the_shared_scorer():
    model = tiny.model()
    model.set_dtype(mx.bfloat16)
    scorer = choose_scorer(model, tiny.COMMON["vocab_size"])
    assert scorer.shared, scorer.reason
    batch = pad_groups(tiny.equal_groups(np.random.default_rng(10)))
    assert core_scorer.shared_logps(model, batch).dtype == mx.float32


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("groups", [tiny.ragged_groups, tiny.tree_groups])
@pytest.mark.parametrize("budget", [0, 40_000, 1e9])
def test_frozen_outputs_change_nothing(groups, bits, checkpoint, budget):
    """No room, room for some groups, room for all; met again in another batch, order and padding."""
    model = tiny.model(bits=bits)
    assert core_scorer.frozen_layers(model) == 1
    groups = groups(np.random.default_rng(12))
    plain, plain_gradient = gradients(model, pad_groups(groups), plain_logps)
    frozen = core_scorer.FrozenOutputs(model, budget, len(groups))
    for again in range(2):
        batch = pad_groups(groups, planned if again else lambda size, coarse: size)
        found, gradient = gradients(model, batch, shared_logps, checkpoint=checkpoint, frozen=frozen(batch))
        assert np.abs(found - plain).max() <= 5e-4
        assert tiny.relative_error(gradient, plain_gradient) <= 1e-4
    assert frozen.bytes <= budget and (budget == 0) == (not frozen.kept)
    assert budget < 1e9 or len(frozen.kept) == len(groups)
    reverse = pad_groups(groups[::-1])
    assert np.abs(np.array(shared_logps(model, reverse, frozen=frozen(reverse)))[::-1] - plain).max() <= 5e-4


@pytest.mark.parametrize("redrawn", [False, True])
def test_frozen_outputs_that_are_never_used_again_are_dropped(redrawn):
    """Room for 3 of 6 groups. Fixed groups: the same 3 are kept. Other groups each epoch: those of the last epochs."""
    model, rng = tiny.model(), np.random.default_rng(18)
    draw = lambda: [tiny.group(rng, 20, [6, 6], [2, 2]) for _ in range(6)]  # noqa: E731
    groups, first = draw(), None
    size = pad_groups(groups[:1]).starts[-1] * tiny.COMMON["hidden_size"] * 4
    frozen = core_scorer.FrozenOutputs(model, 3 * size, 6)
    for _ in range(5):
        for group in groups:
            frozen(pad_groups([group]))
            assert frozen.bytes == sum(h.nbytes for h, _ in frozen.kept.values()) <= 3 * size
        first = first or set(frozen.kept)
        groups = draw() if redrawn else groups
    assert len(frozen.kept) == 3 and (set(frozen.kept) == first) == (not redrawn)


def test_every_layer_is_run_where_the_embedding_trains():
    model = tiny.model(lora_layers=0)
    tiny.adapt(model, {"keys": ["model.embed_tokens", "self_attn.v_proj"]}, layers=1)
    assert core_scorer.frozen_layers(model) == 0


def test_planned_sizes_are_few_and_pad_little():
    for coarse in (False, True):
        assert len({planned(n, coarse) for n in range(1, 4097)}) < 50
        assert all(0 <= planned(n, coarse) - n < 128 or n > 1024 for n in range(1, 4097))
    assert all(planned(n) - n < max(32, n / 8 + 1) for n in range(1, 4097))
    rng = np.random.default_rng(0)
    lengths = rng.integers(250, 900, 200)  # tokens of groups such as the released ML-1M ones
    assert 1 - lengths.sum() / sum(planned(int(n)) for n in lengths) < 0.1


def test_micro_batches_keep_to_their_tokens_and_lose_no_group():
    groups = tiny.ragged_groups(np.random.default_rng(13)) * 3
    for size, tokens in ((1, 10**9), (4, 10**9), (4, 150), (9, 10)):
        parts = [list(rows) for rows in by_length(groups, size, tokens)]
        assert sorted(i for rows in parts for i in rows) == list(range(len(groups)))
        assert all(len(rows) == 1 or sum(groups[i].shared_tokens for i in rows) <= tokens for rows in parts)
        assert max(map(len, parts)) <= size


def test_shared_tokens_counts_the_tree():
    rng = np.random.default_rng(14)
    for group in [*tiny.tree_groups(rng), *tiny.ragged_groups(rng)]:
        sequences = [tuple(np.concatenate([group.prefix, t]).tolist()) for t in group.tails]
        assert group.shared_tokens == len({s[:n] for s in sequences for n in range(1, len(s) + 1)})
        run = {s[:n] for s in sequences for n in range(1, len(s))}  # the very last token predicts nothing
        assert pad_groups([group]).starts[-1] == len(run)
