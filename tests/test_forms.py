"""The four prompt forms: what they train, what they score, and that running shared tokens once changes neither."""

import contextlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from test_scoring import by_hand, gradients

from mlx_dmpo.cli.main import main
from mlx_dmpo.config import DmpoSettings, EvaluateSettings, SftSettings
from mlx_dmpo.core.scorer import plain_logps, shared_logps
from mlx_dmpo.core.tree import EncodedGroup, pad_groups, part, pieces
from mlx_dmpo.errors import UserError
from mlx_dmpo.judge import metrics
from mlx_dmpo.judge.rows import rows_of
from mlx_dmpo.model.encode import Encoder
from mlx_dmpo.model.open import choose_template, open_scorer
from mlx_dmpo.model.score import score_groups
from mlx_dmpo.model.spellings import spellings, yes_and_no
from mlx_dmpo.prompts.groups import build_group, shortened
from mlx_dmpo.prompts.orders import printed_orders, rotations
from mlx_dmpo.prompts.template import FORMS, built_in
from mlx_dmpo.records import RankingExample
from mlx_dmpo.train.objective import objective

# Ragged: 3, 1 and 2 negatives; "amber" begins "amber lantern"; disliked titles for pointwise.
EXAMPLES = [
    RankingExample(
        "u1", "movie", ("river", "glass", "winter"), "amber", ("amber lantern", "iron", "echo"), disliked=("salt",)
    ),
    RankingExample("u2", "book", ("tower",), "silver harbour", ("silver",)),
    RankingExample("u3", "movie", ("moon", "paper"), "copper", ("orchard", "copper copper"), disliked=("echo", "iron")),
]
each_form = pytest.mark.parametrize("form", FORMS)


def run(*arguments):
    """A command's exit code and all that it prints."""
    printed = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        main([str(a) for a in arguments])
    return stop.value.code, printed.getvalue()


@pytest.fixture(scope="module")
def tokenizer(model_directory):
    from mlx_lm.tokenizer_utils import load

    return load(model_directory)


def encoded(tokenizer, form, examples=EXAMPLES, **how):
    template = built_in(form)
    orders = [printed_orders(e, i, both=True, redraw=False, seed=0, form=form, count=2) for i, e in enumerate(examples)]
    encoder = Encoder(tokenizer, 2048, template)
    return [encoder.encode(e, o, **how) for e, o in zip(examples, orders, strict=True)]


@each_form
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_shared_equals_plain_in_values_and_gradients(tokenizer, form, bits, checkpoint):
    model = tiny.model(bits=bits)
    batch = pad_groups(encoded(tokenizer, form))
    plain, plain_gradient = gradients(model, batch, plain_logps)
    shared, shared_gradient = gradients(model, batch, shared_logps, checkpoint=checkpoint)
    assert np.abs(shared - plain).max() <= 5e-4
    assert tiny.relative_error(shared_gradient, plain_gradient) <= 1e-4


@each_form
def test_a_group_is_what_its_form_says(tokenizer, form):
    groups = encoded(tokenizer, form)
    for example, group in zip(EXAMPLES, groups, strict=True):
        k, pairs = len(example.negatives), group.pairs.tolist()
        if form == "pairwise":  # two printed orders a negative, each with two answers of its own
            assert pairs == [[2 * n, 2 * n + 1] for n in range(2 * k)]
        elif form == "listwise":  # two printed orders; in each one chosen answer against k
            n = 1 + k
            assert pairs == [[o * n, o * n + r] for o in range(min(2, n)) for r in range(1, n)]
        elif form == "direct":  # the paper's formula: one x, one y_w, k y_l
            assert pairs == [[0, r] for r in range(1, k + 1)] and len(group.tails) == k + 1
        else:  # Yes to the liked against Yes to each disliked; SFT learns Yes and No
            assert pairs == [[0, 2 * r] for r in range(1, k + 1)]
            assert group.targets == (0, *(2 * r + 1 for r in range(1, k + 1)))
    sft = encoded(tokenizer, form, chosen_only=True)[0]
    texts = [tokenizer.decode(t[len(t) - n :].tolist()) for t, n in zip(sft.tails, sft.answer_lengths, strict=True)]
    expected = {
        "pairwise": [f" <Title:amber> ,  <Title:{n}> <|im_end|>" for n in EXAMPLES[0].negatives for _ in range(2)],
        "listwise": ["amber<|im_end|>"] * 2,
        "direct": ["amber<|im_end|>"],
        "pointwise": ["Yes.<|im_end|>", "No.<|im_end|>", "No.<|im_end|>", "No.<|im_end|>"],
    }
    assert texts == expected[form]
    assert len(sft.pairs) == 0


def test_pointwise_sft_loss_learns_no_for_the_disliked(tokenizer):
    """Validation has the pairs too, and the same SFT loss as training."""
    with_pairs, alone = (encoded(tokenizer, "pointwise", **how)[0] for how in ({}, {"chosen_only": True}))
    model = tiny.model().eval()
    losses = []
    for group in (with_pairs, alone):
        batch = pad_groups([group])
        losses.append(float(objective(SftSettings())(shared_logps(model, batch), None, batch)[0][0]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@each_form
@pytest.mark.parametrize("k", [1, 3])
def test_losses_at_the_reference(tokenizer, form, k):
    """dpo and dmpo are log 2, s-dpo log(1 + pairs); with one pair the three are one loss with one gradient."""
    examples = [replace(EXAMPLES[0], negatives=EXAMPLES[0].negatives[:k])]
    template = built_in(form)
    orders = printed_orders(examples[0], 0, both=False, redraw=False, seed=0, form=form)
    batch = pad_groups([Encoder(tokenizer, 2048, template).encode(examples[0], orders)])
    model = tiny.model().eval()
    policy = shared_logps(model, batch)
    moved = np.random.default_rng(0).normal(size=policy.shape).astype(np.float32)
    found = {}
    for name in ("dpo", "dmpo", "s-dpo"):
        loss = objective(DmpoSettings(loss=name, beta=0.3))
        at_start = float(loss(policy, policy, batch)[0][0])
        assert at_start == pytest.approx(math.log(1 + k) if name == "s-dpo" else math.log(2), abs=1e-6)

        def value(p, loss=loss):
            return loss(p, policy, batch)[0].sum()

        found[name] = [np.array(x) for x in mx.value_and_grad(value)(policy + mx.array(moved))]
    for other in ("dpo", "s-dpo") if k == 1 else ():
        assert found[other][0] == pytest.approx(found["dmpo"][0], abs=1e-6)
        np.testing.assert_allclose(found[other][1], found["dmpo"][1], atol=1e-6)


def settings(model_directory, data_directory, **more):
    return EvaluateSettings(**{"model": str(model_directory), "data": str(data_directory), **more})


def scorer(model_directory, form, **more):
    return open_scorer(EvaluateSettings(**{"model": str(model_directory), "prompt": form, **more}))


def alone(scorer, group, r):
    """A branch's log-prob by the model's own forward, in float64."""
    return by_hand(scorer.base.model, part(group, np.array([r])))[0]


@pytest.mark.parametrize("form", ["direct", "listwise"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("calibrate", [False, True])
def test_title_scores_are_the_models_own(model_directory, form, per_token, calibrate):
    made = scorer(model_directory, form, per_token=per_token, calibrate=calibrate)
    for example, scores in zip(EXAMPLES, made.score(EXAMPLES), strict=True):
        n = 1 + len(example.negatives)

        def items(example, n=n):
            orders = rotations(example, 4, 0) if form == "listwise" else []
            group = made.encoder.encode(example, orders)
            values = np.array([alone(made, group, r) for r in range(len(group.tails))])
            if per_token:
                values = values / np.array(group.answer_lengths)
            return values.reshape(-1, n), orders

        expected, orders = items(example)
        if calibrate:
            expected = expected - items(replace(example, history=(), disliked=None))[0]
        np.testing.assert_allclose(scores.items, expected.mean(axis=0), atol=5e-4)
        np.testing.assert_allclose(scores.margins, scores.items[0] - scores.items[1:], atol=1e-12)
        np.testing.assert_allclose(scores.logps[:, 0, 0] - scores.logps[:, 0, 1], scores.margins, atol=1e-12)
        if form == "listwise":
            wins = np.zeros(n)
            for row, order in zip(expected, orders, strict=True):
                wins[order.index(int(row.argmax()))] += 1 / len(orders)
            np.testing.assert_allclose(scores.places, wins, atol=1e-12)
        else:
            assert scores.places is None


@pytest.mark.parametrize("calibrate", [False, True])
def test_pointwise_scores_are_log_odds_of_every_spelling(model_directory, calibrate):
    made = scorer(model_directory, "pointwise", calibrate=calibrate)
    yes, no = made.spellings
    assert len(yes) > 1 and len(no) > 1

    def log_odds(example):
        found = []
        group = build_group(example, [], made.template)
        for branch in group.branches[::2]:
            prompt = made.encoder.prompt(branch, "")
            odds = []
            for sequences in (yes, no):
                total = 0.0
                for sequence in sequences:
                    tokens = np.array([*prompt, *sequence], np.int32)
                    one = EncodedGroup(
                        tokens[: len(prompt) - 1],
                        (tokens[len(prompt) - 1 :],),
                        (len(sequence),),
                        np.zeros((0, 2), np.int32),
                    )
                    total += math.exp(by_hand(made.base.model, one)[0])
                odds.append(math.log(total))
            found.append(odds[0] - odds[1])
        return np.array(found)

    for example, scores in zip(EXAMPLES, made.score(EXAMPLES), strict=True):
        expected = log_odds(example)
        if calibrate:
            expected = expected - log_odds(replace(example, history=(), disliked=None))
        np.testing.assert_allclose(scores.items, expected, atol=5e-4)
        np.testing.assert_allclose(scores.margins, expected[0] - expected[1:], atol=1e-3)


def test_calibrated_pairs(model_directory):
    plain, bare, both = (
        list(scorer(model_directory, "pairwise", calibrate=c).score(e))
        for c, e in (
            (False, EXAMPLES),
            (False, [replace(e, history=(), disliked=None) for e in EXAMPLES]),
            (True, EXAMPLES),
        )
    )
    for a, b, c in zip(plain, bare, both, strict=True):
        np.testing.assert_allclose(c.margins, a.margins - b.margins, atol=1e-4)


@pytest.mark.parametrize("text", ["Yes.", "No."])
def test_spellings_are_disjoint_and_say_the_word(tokenizer, text):
    found = spellings(tokenizer, text)
    word = text.strip(".").lower()
    assert found and all(tokenizer.decode(list(s)).strip().lower() == word for s in found)
    assert not any(a != b and b[: len(a)] == a for a in found for b in found)
    with pytest.raises(UserError, match="spells"):
        yes_and_no(tokenizer, "Yes.", "yes!", ((), ()))


def test_spellings_of_a_real_tokenizer(shared):
    """Qwen3 has "Yes" and " Yes" in several cases, each one token."""
    from mlx_lm.tokenizer_utils import load

    tokenizer = load(shared / "models" / "qwen3-tokenizer")
    for text in ("Yes.", "No."):
        found = spellings(tokenizer, text)
        texts = {tokenizer.decode(list(s)) for s in found}
        word = text.strip(".")
        assert {word, " " + word, word.lower(), " " + word.lower(), word.upper()} <= texts
        assert sum(len(s) == 1 for s in found) >= 5


@each_form
def test_the_order_of_negatives_does_not_matter(model_directory, form):
    made = scorer(model_directory, form)
    example = EXAMPLES[0]
    reverse = replace(example, negatives=example.negatives[::-1])
    a, b = made.score([example, reverse])
    np.testing.assert_allclose(a.margins, b.margins[::-1], atol=5e-4)
    if form == "listwise":
        np.testing.assert_allclose(a.places, b.places, atol=1e-6)


@pytest.mark.parametrize("form", ["direct", "pointwise"])
@pytest.mark.parametrize("count", [1, 2, 60])
@pytest.mark.parametrize("calibrate", [False, True])
def test_items_equal_each_alone_in_parts_and_whole(model_directory, form, count, calibrate, monkeypatch):
    made = scorer(model_directory, form, calibrate=calibrate)
    rng = np.random.default_rng(0)
    titles = list(dict.fromkeys(" ".join(rng.choice(tiny.WORDS, rng.integers(1, 4))) for _ in range(3 * count)))[:count]
    whole = made.score_items(("river", "glass"), titles, "movie")
    assert whole.shape == (count,) and np.isfinite(whole).all()
    for i in rng.permutation(count)[:5]:
        np.testing.assert_allclose(made.score_items(("river", "glass"), [titles[i]], "movie"), whole[i], atol=5e-4)
    order = rng.permutation(count)
    again = made.score_items(("river", "glass"), [titles[i] for i in order], "movie")
    np.testing.assert_allclose(again, whole[order], atol=5e-4)
    monkeypatch.setattr(
        "mlx_dmpo.model.open.score_groups", lambda *a, **k: score_groups(*a[:5], **k | {"tokens": 200})
    )  # several parts
    made._without_history.cache_clear()
    np.testing.assert_allclose(made.score_items(("river", "glass"), titles, "movie"), whole, atol=5e-4)


def test_items_refuse_what_they_cannot_score(model_directory):
    made = scorer(model_directory, "direct")
    assert made.score_items(("river",), [], "movie").shape == (0,)
    with pytest.raises(UserError, match="'iron' is given twice"):
        made.score_items(("river",), ["iron", "echo", "iron"], "movie")
    with pytest.raises(UserError, match="does not score a title by itself"):
        scorer(model_directory, "pairwise").score_items(("river",), ["iron"], "movie")


def test_pieces_hold_every_branch_once_within_the_budget():
    rng = np.random.default_rng(3)
    for group in [*tiny.tree_groups(rng), *tiny.ragged_groups(rng)]:
        for budget in (1, 50, 70, 10**6):
            found = pieces(group, budget)
            assert sorted(np.concatenate(found).tolist()) == list(range(len(group.tails)))
            assert all(len(rows) == 1 or part(group, rows).shared_tokens <= budget for rows in found)
        assert len(pieces(group, 10**6)) == 1


def wide_group(count, shared_start):
    """One prompt with so many answers, many of which begin with the same tokens: one block of all would be enormous."""
    rng = np.random.default_rng(7)
    draw = lambda n: rng.integers(0, tiny.COMMON["vocab_size"], n).astype(np.int32)  # noqa: E731
    last, begin = draw(1), draw(4)
    tails = []
    for i in range(count):
        tails.append(np.concatenate([last, begin if i < shared_start else draw(0), draw(int(rng.integers(1, 5)))]))
    pairs = np.array([[0, r] for r in range(1, count)], np.int32)
    return EncodedGroup(draw(12), tuple(tails), tuple(len(t) - 1 for t in tails), pairs)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [0, 4])
def test_two_thousand_answers(bits):
    """Values and gradients; the plain scorer takes them in parts, whose gradients add up."""
    model = tiny.model(bits=bits)
    check_wide(model, wide_group(2000, 400))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_two_hundred_answers(checkpoint):
    check_wide(tiny.model(), wide_group(200, 60), checkpoint=checkpoint)


def check_wide(model, group, **how):
    R = len(group.tails)
    weights = mx.array(np.random.default_rng(0).normal(size=(1, R)).astype(np.float32))
    parameters = model.trainable_parameters()

    def weighted(score, rows, **how):
        batch = pad_groups([group if rows is None else part(group, rows)])
        w = weights if rows is None else weights[:, mx.array(rows)]

        def loss(parameters):
            model.update(parameters)
            logps = score(model, batch, **how)
            return (w * logps).sum(), logps

        (_, logps), found = mx.value_and_grad(loss)(parameters)
        mx.eval(logps, found)
        model.update(parameters)
        return np.array(logps)[0], tiny.leaves(found)

    shared, shared_gradient = weighted(shared_logps, None, **how)
    plain, plain_gradient = np.zeros(R), {k: 0.0 for k in shared_gradient}
    for rows in np.array_split(np.arange(R), -(-R // 100)):
        plain[rows], gradient = weighted(plain_logps, rows)
        plain_gradient = {k: plain_gradient[k] + gradient[k] for k in gradient}
    assert np.abs(shared - plain).max() <= 5e-4
    assert tiny.relative_error(shared_gradient, plain_gradient) <= 1e-4
    blocks = pad_groups([group]).block_index.shape
    assert blocks[2] <= 100, blocks  # answers that begin alike do not make one long block, to which all are padded


def test_rotations_put_each_candidate_into_each_place_once():
    example = EXAMPLES[0]
    every = rotations(example, 0, 5)
    assert [sorted(column) for column in zip(*every, strict=True)] == [[0, 1, 2, 3]] * 4
    assert rotations(example, 9, 5) == every and rotations(example, 2, 5) == every[:2]
    assert rotations(example, 2, 5, start=3) == [every[3], every[0]]
    assert len({tuple(rotations(example, 0, seed)) for seed in range(20)}) > 5


def test_disliked_titles_that_are_candidates_are_not_printed():
    """They would tell the answer."""
    template = built_in("pointwise")
    example = replace(EXAMPLES[2], disliked=("orchard", "echo"))
    text = build_group(example, [], template).branches[0].messages[0]["content"]
    assert 'User Unpreference: "echo"\n' in text and 'Preference: "moon", "paper"' in text
    none = build_group(replace(example, disliked=("orchard",)), [], template).branches[0].messages[0]["content"]
    assert "User Unpreference: none\n" in none


def test_old_titles_are_left_out_of_both_lists(tokenizer):
    example = RankingExample("u", "movie", tuple("abcd"), "p", ("n",), disliked=tuple("wxyz"), source="d:1")
    assert [(e.history, e.disliked) for e in (shortened(example, n) for n in (1, 2, 7))] == [
        (tuple("abcd"), tuple("xyz")),
        (tuple("bcd"), tuple("xyz")),
        (("d",), ()),
    ]
    whole = Encoder(tokenizer, 2048, built_in("pointwise")).encode(example, [])
    longest = len(whole.prefix) + max(map(len, whole.tails))
    cut = Encoder(tokenizer, longest - 3, built_in("pointwise")).encode(example, [])
    assert 0 < cut.dropped < 7 and len(cut.prefix) + max(map(len, cut.tails)) <= longest - 3
    with pytest.raises(UserError, match=r"d:1: .* with a single history item"):
        Encoder(tokenizer, longest - 200, built_in("pointwise")).encode(example, [])


TRAIN = ("--iters", "2", "--batch-size", "2", "--num-layers", "1", "--lora-rank", "2")


@pytest.fixture(scope="module", params=FORMS)
def chain(request, model_directory, data_directory, tmp_path_factory):
    """sft -> dmpo -> evaluate with --prompt on sft alone; (form, directory)."""
    form, out = request.param, tmp_path_factory.mktemp(request.param)
    common = ("--model", model_directory, "--data", data_directory)
    assert run("sft", *common, "--prompt", form, "--adapter-path", out / "sft", *TRAIN)[0] == 0
    more = ("--orders", "2") if form == "listwise" else ()
    code, printed = run(
        "dmpo", *common, "--start-adapter", out / "sft", "--adapter-path", out / "dmpo", *TRAIN, *more,
        "--steps-per-report", "1",
    )  # fmt: skip
    assert code == 0, printed
    code, printed = run("evaluate", *common, "--adapter-path", out / "dmpo", "--limit", "6")
    assert code == 0, printed
    return form, out


def test_the_chain_takes_its_prompt_from_the_adapter(chain, model_directory, data_directory):
    form, out = chain
    for stage in ("sft", "dmpo"):
        stored = json.loads((out / stage / "adapter_config.json").read_text())["prompt"]
        assert (stored["form"], stored["hash"]) == (form, built_in(form).hash)
    first = json.loads((out / "dmpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-5)
    manifest = json.loads((out / "dmpo" / "eval" / "manifest.json").read_text())
    assert manifest["prompt"]["hash"] == built_in(form).hash
    other = "direct" if form != "direct" else "pairwise"
    arguments = ("--model", model_directory, "--data", data_directory, "--adapter-path", out / "dmpo", "--limit", "2")
    code, printed = run("evaluate", *arguments, "--prompt", other, "--out", out / "other")
    assert code == 2 and f"was trained with prompt {form}" in printed.splitlines()[-1]
    assert not (out / "other").exists()
    arguments = (*arguments, "--prompt", other, "--allow-other-prompt", "--out", out / "other")
    assert run("evaluate", *arguments)[0] == 0
    assert json.loads((out / "other" / "manifest.json").read_text())["prompt"]["form"] == other
    assert run("evaluate", *arguments[:-5], "--prompt", form, "--out", out / "same")[0] == 0  # its own, named


def test_the_chains_files(chain):
    form, out = chain
    rows = [json.loads(line) for line in (out / "dmpo" / "eval" / "scores.jsonl").read_text().splitlines()]
    found = json.loads((out / "dmpo" / "eval" / "metrics.json").read_text())
    names = {"positive_first", "positive_second"} if form == "pairwise" else {"given"}
    again = metrics.ranking_metrics(rows)
    assert all(names <= set(row) for row in rows)
    for name in ("n", "ties", "pair_accuracy", "auc", "mean_margin", "position_bias", "place_wins"):
        assert found.get(name) == again.get(name)
    assert ("position_bias" in found) == (form in ("pairwise", "listwise"))
    assert ("auc_release" in found) == (form == "pairwise")
    if form == "listwise":
        assert sum(found["place_wins"][:2]) <= 2 and len(found["place_wins"]) == 1 + found["k"]
        assert all(sum(row["places"]) == pytest.approx(1) for row in rows)
    code, printed = run("report", out / "dmpo" / "eval", out / "dmpo", "--out", out / "report.html")
    assert code == 0, printed
    page = (out / "report.html").read_text()
    assert "pair accuracy" in page


def test_sample_speaks_each_form(chain, model_directory, data_directory):
    form, out = chain
    arguments = ("--model", model_directory, "--data", data_directory, "--adapter-path", out / "dmpo", "--limit", "2")
    code, printed = run("sample", *arguments, "--n", "2", "--max-tokens", "4", "--out", out / "s.jsonl", "--overwrite")
    assert code == 0, printed
    lines = [json.loads(line) for line in (out / "s.jsonl").read_text().splitlines()]
    field = {"pairwise": "ordering", "pointwise": "liked"}.get(form, "title")
    assert all({field, "right"} <= set(a) for line in lines for a in line["answers"])
    code, printed = run("sample", *arguments, "--score", "--out", out / "m.jsonl", "--overwrite")
    assert code == 0, printed
    scored = [json.loads(line)["margin"] for line in (out / "m.jsonl").read_text().splitlines()]
    assert scored and all(map(math.isfinite, scored))


def test_export_keeps_each_forms_scores(chain, model_directory, data_directory):
    form, out = chain
    arguments = ("--model", model_directory, "--data", data_directory, "--adapter-path", out / "dmpo")
    code, printed = run("export", *arguments, "--examples", "2", "--out", out / "mlx", "--overwrite")
    assert code == 0, printed
    words = {"listwise": "Choose the one", "direct": "Name one more", "pointwise": "User Preference"}
    assert words.get(form, "Rank the likelihood") in (out / "mlx" / "README.md").read_text()


@each_form
def test_check_and_plan_know_each_form(form, model_directory, data_directory):
    code, printed = run("check", data_directory, "--model", model_directory, "--prompt", form)
    assert code in (0, 1) and "tokens a prompt with answer" in printed
    for data in ((), ("--data", data_directory, "--tokenizer", model_directory)):
        code, printed = run("plan", "--prompt", form, "--tflops", "1", *data, "--json")
        assert code == 0 and json.loads(printed[printed.index("{") :])["groups"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "--prompt", "direct", "--orders", "2"), "--orders: prompt direct prints no list"),
        (("evaluate", "--prompt", "pairwise", "--per-token"), "--per-token: the answers of prompt pairwise"),
        (("evaluate", "--prompt", "pointwise", "--per-token"), "--per-token: the answers of prompt pointwise"),
        (("sft", "--orders", "2"), "--orders: prompt pairwise prints no list"),
        (("evaluate", "--prompt", "listwize"), 'did you mean "listwise"?'),
        (("check", "{data}", "--prompt", "direct"), "--prompt: has no effect without model"),
    ],
)
def test_flags_without_effect_are_refused(arguments, message, data_directory):
    arguments = [a.replace("{data}", str(data_directory)) for a in arguments]
    code, printed = run(*arguments)
    assert code == 2 and message in printed.splitlines()[-1], printed


def test_free_text_takes_no_prompt(model_directory, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "Name a river.", "chosen": "Amber.", "rejected": "No."}\n')
    arguments = ("--model", model_directory, "--data", tmp_path / "t.jsonl")
    code, printed = run("evaluate", *arguments, "--prompt", "direct", "--out", tmp_path / "e")
    assert code == 2 and "free text" in printed
    code, printed = run("evaluate", *arguments, "--calibrate", "--out", tmp_path / "e")
    assert code == 2 and "free text" in printed


def test_rows_of_each_form(model_directory):
    for form in FORMS:
        (scores,) = scorer(model_directory, form).score(EXAMPLES[:1])
        rows = list(rows_of(scores))
        assert len(rows) == 3 and all(math.isfinite(r["margin"]) for r in rows)
        for row in rows:
            orders = [row[n] for n in ("given", "positive_first", "positive_second") if n in row]
            assert sum(o["chosen_logp"] - o["rejected_logp"] for o in orders) == pytest.approx(row["margin"], abs=1e-9)


def test_an_adapter_of_before_forms_is_pairwise(model_directory, tmp_path):
    path = tiny.save_adapter(model_directory, tmp_path / "old")
    assert "prompt" not in json.loads((path / "adapter_config.json").read_text())
    assert choose_template(EvaluateSettings(), str(path)).form == "pairwise"


def test_redrawn_lists_have_every_reference(model_directory, data_directory, tmp_path):
    """--candidate-order epoch takes the next rotations each epoch; all of them are scored before training."""
    arguments = ("--model", model_directory, "--data", data_directory, "--prompt", "listwise", "--epochs", "3")
    arguments = (*arguments, "--candidate-order", "epoch", "--batch-size", "6", "--num-layers", "1")
    code, printed = run("dmpo", *arguments, "--adapter-path", tmp_path / "d")
    assert code == 0, printed
    assert Path(tmp_path / "d" / "manifest.json").exists()


ODD = [
    "Heat",
    "Heat 2",
    " spaced ",
    "a<b>",
    "[x]",
    "naïve Ünïcode 東京",
    "{history}",
    "x. y",
    "\tTab",
    "line\nbreak",
    "😀",
]


@pytest.mark.parametrize("name", ["tiny", "qwen3-tokenizer", "ml1m-qwen3"])
def test_many_answers_are_tokenized_as_each_alone(model_directory, shared, name, monkeypatch):
    """The short way for many answers to one prompt gives the tokens of the whole rendering."""
    from mlx_lm.tokenizer_utils import load

    from mlx_dmpo.model import encode

    tokenizer = load(model_directory if name == "tiny" else shared / "models" / name)
    rng = np.random.default_rng(0)
    titles = [*ODD, *(" ".join(rng.choice(tiny.WORDS, rng.integers(1, 5))) for _ in range(40))]
    titles = list(dict.fromkeys(titles))
    example = RankingExample("u", "movie", ("moon", "paper"), titles[0], tuple(titles[1:]))
    calls = []
    original = encode.Encoder._sequence
    monkeypatch.setattr(encode.Encoder, "_sequence", lambda *a: calls.append(1) or original(*a))
    found = Encoder(tokenizer, 2048, built_in("direct")).encode(example, [])
    slow, calls[:] = len(calls), []
    monkeypatch.setattr(encode, "MANY", 10**9)
    expected = Encoder(tokenizer, 2048, built_in("direct")).encode(example, [])
    assert slow < 15 and len(calls) == len(titles)  # the first, and those that a template might change
    assert found.answer_lengths == expected.answer_lengths
    for a, b in zip([found.prefix, *found.tails], [expected.prefix, *expected.tails], strict=True):
        assert a.tolist() == b.tolist()
