"""The plan: its counts against a real model's, its memory against measured peaks, what it refuses; and the doctor."""

import gc
import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dmpo.cli.main import main
from mlx_dmpo.config import DmpoSettings
from mlx_dmpo.core.scorer import shared_logps
from mlx_dmpo.core.selfcheck import GroupScorer
from mlx_dmpo.core.tree import EncodedGroup, pad_groups
from mlx_dmpo.errors import UserError
from mlx_dmpo.model import calibrate, cost, fit
from mlx_dmpo.model import shape as model_shape
from mlx_dmpo.model.random import random_qwen3
from mlx_dmpo.train import objective
from mlx_dmpo.train import step as train_step

SMALL = model_shape.ModelShape(4, 256, 768, 4, 2, 64, 4096, True)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return end.value.code, *capsys.readouterr()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [4, 8, 32])
def test_counts_are_those_of_the_model(tied, bits):
    shape = replace(SMALL, tied=tied, bits=bits)
    model = random_qwen3(shape, mx.float32, rank=4)
    held = dict(tree_flatten(model.parameters()))
    adapter = {k: v for k, v in held.items() if ".lora_" in k}
    assert sum(v.size for v in adapter.values()) == cost.Training(4, rank=4).adapter_parameters(shape)
    assert sum(v.nbytes for k, v in held.items() if k not in adapter) == shape.weight_bytes(4)
    if bits == 32:
        assert sum(v.size for k, v in held.items() if k not in adapter) == shape.parameters


def test_a_config_file_and_a_built_in_name_give_the_same_shape(tmp_path):
    config = dict(
        model_type="qwen3", num_hidden_layers=36, hidden_size=4096, intermediate_size=12288, num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128, vocab_size=151936, tie_word_embeddings=False, quantization={"bits": 4, "group_size": 64},
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = model_shape.ModelShape.of("Qwen/Qwen3-8B-4bit")
    assert model_shape.ModelShape.of(tmp_path) == model_shape.ModelShape.of(tmp_path / "config.json") == expected
    assert expected.parameters == pytest.approx(8.19e9, rel=0.01)


def test_flops_of_one_sequence_by_hand():
    shape = replace(SMALL, layers=2)
    group = EncodedGroup(
        np.arange(10, dtype=np.int32), (np.arange(5, dtype=np.int32),), (3,), np.zeros((0, 2), np.int32)
    )
    work = cost.Work.of(pad_groups([group]))
    assert (work.tokens, work.rows, work.block_scores, work.row_scores) == (14, 3, 4 * 14, 3 * 14)
    linear = 256 * (256 + 2 * 128 + 256 + 3 * 768)
    keys_values = 2 * 256 * 128
    first = 2 * linear * 14 + 4 * 256 * (10 * 10 + 4 * 14)
    last = 2 * keys_values * 14 + 2 * (linear - keys_values) * 3 + 4 * 256 * 3 * 14
    assert cost.forward_flops(shape, work) == first + last + 2 * 256 * 4096 * 3


@pytest.mark.parametrize(
    ("change", "k", "history", "batch", "checkpoint"),
    [
        ({}, 5, 22, 1, False),
        ({"layers": 6}, 3, 40, 2, True),
        ({"vocabulary": 100_000}, 5, 10, 1, False),
        ({"bits": 4}, 1, 30, 3, False),
    ],
)
def test_memory_is_within_15_percent_of_the_measured_peak(change, k, history, batch, checkpoint):
    shape = replace(SMALL, **change)
    gc.collect()  # models of earlier tests
    nothing = mx.get_active_memory()
    model = random_qwen3(shape, mx.float32)
    groups = cost.assumed_groups(batch, k, history=history, vocabulary=shape.vocabulary)
    step = train_step.StepFunction(
        model, GroupScorer(shared_logps, True), objective.objective(DmpoSettings()), checkpoint
    )
    padded = pad_groups(groups)
    mx.reset_peak_memory()
    mx.eval(step(padded, np.zeros(padded.answer_mask.shape[:2], np.float32), 1 / batch, None))
    measured = mx.get_peak_memory() - nothing
    training = cost.Training(shape.layers, checkpoint=checkpoint, activation_bytes=4, optimizer_states=0)
    found = cost.memory(shape, cost.Work.of(padded), training)
    assert found["peak"] == pytest.approx(measured, rel=0.15)
    without = found["peak"] - found["weights"]
    assert without == pytest.approx(measured - shape.weight_bytes(4), rel=0.15)


def case(**change):
    settings = {"shape": model_shape.ModelShape.of("qwen3-8b"), "batch_size": 4} | change
    return fit.Case(training=cost.Training(36), groups=cost.assumed_groups(4, 5, history=36), **settings)


def test_the_largest_micro_batch_keeps_to_its_tokens():
    asked = case()
    size = max(g.shared_tokens for g in asked.groups)
    assert asked.largest.branches == 40 and replace(asked, batch_tokens=2 * size).largest.branches == 20
    assert (
        replace(asked, batch_tokens=1).largest == replace(asked, batch_size=1).largest
        and replace(asked, batch_tokens=1).peak() < asked.peak()
    )


def test_the_cheapest_change_is_told_and_suffices():
    asked = case()
    limits = [fit.usable(gb) for gb in fit.MACS]
    answers = [fit.cheapest(asked, limit) for limit in limits]
    assert fit.cheapest(asked, 1e9) is None and answers[-1] == ""
    for limit, answer in zip(limits, answers, strict=True):
        if answer:
            changed = next(c for what, c in fit.remedies(asked) if what == answer)
            assert changed.peak() <= limit < asked.peak()
    assert fit.remedies(asked)[1][0] == "--batch-size 1"
    peaks = [asked.peak(), *(c.peak() for _, c in fit.remedies(asked))]
    assert peaks == sorted(peaks, reverse=True)
    with pytest.raises(UserError, match=r"about .* GB will be needed.*--no-memory-check"):
        fit.check(asked, fit.usable(16))
    fit.check(asked, fit.usable(128))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_matrices_of_one_input_share_its_cast(checkpoint):
    """In 16 bits LoRA works in float32: on queries, keys and values with one copy of their input, and so on."""
    work = cost.Work.of(pad_groups(cost.assumed_groups(1, 3, vocabulary=SMALL.vocabulary)))

    def activations(*keys):
        training = cost.Training(SMALL.layers, keys=keys, checkpoint=checkpoint)
        return cost.memory(SMALL, work, training)["activations"]

    assert activations("self_attn.q_proj") == activations("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert activations("mlp.gate_proj") == activations("mlp.gate_proj", "mlp.up_proj")
    assert activations("mlp.gate_proj") < activations("mlp.gate_proj", "mlp.down_proj")


def test_qwen3_8b_in_4_bits_trains_on_a_16_gb_mac():
    """k = 5, 36-item histories, one group at a time, with as much to spare as --memory auto leaves: as it is on 16 GB,
    recomputed on 12.
    """
    asked = replace(case(shape=model_shape.ModelShape.of("qwen3-8b-4bit")), batch_size=1)
    assert fit.cheapest(asked, fit.usable(16) / fit.ROOM) == ""
    assert fit.cheapest(asked, fit.usable(12) / fit.ROOM) == "--grad-checkpoint"


def test_training_refuses_what_cannot_fit_unless_told_otherwise(
    model_directory, data_directory, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(fit, "machine_memory", lambda: 1e6)
    arguments = ["dmpo", "--model", str(model_directory), "--data", str(data_directory), "--iters", "1"]
    code, _, err = run(capsys, *arguments, "--adapter-path", str(tmp_path / "a"))
    assert code == 2 and "the leanest plan" in err and "--no-memory-check" in err
    code, _, err = run(capsys, *arguments, "--adapter-path", str(tmp_path / "a"), "--no-memory-check")
    assert code == 0, err


def test_the_command_tells_all(capsys):
    code, out, err = run(
        capsys, "plan", "--model", "qwen3-8b-4bit", "--history", "36", "--batch-size", "1", "--tflops", "5"
    )
    assert code == 0, err
    for word in (
        "weights",
        "optimizer",
        "activations",
        "logits",
        "peak",
        "16 GB",
        "recomputed",
        "TFLOP",
        "with every sequence alone",
    ):
        assert word in out
    code, out, _ = run(capsys, "plan", "--model", "qwen3-0.6b", "--stage", "sft", "--tflops", "5", "--json")
    found = json.loads(out)
    assert code == 0 and found["memory"]["peak"] == pytest.approx(
        sum(v for k, v in found["memory"].items() if k != "peak")
    )
    assert found["seconds_per_epoch"] == pytest.approx(found["flops_per_epoch"] / 5e12)
    assert set(found["fits"]) == {str(gb) for gb in fit.MACS}


def test_what_auto_chooses_on_each_mac(capsys):
    flags = [
        "plan",
        "--model",
        "qwen3-8b-4bit",
        "-k",
        "5",
        "--history",
        "36",
        "--groups",
        "4",
        "--tflops",
        "5",
        "--json",
    ]
    code, out, err = run(capsys, *flags)
    assert code == 0, err
    rows = json.loads(out)["fits"]
    chosen = {gb: (row["batch_tokens"], row["grad_checkpoint"]) for gb, row in rows.items()}
    assert chosen["8"][1] and chosen["128"] == (8192, False)
    assert chosen["16"][0] <= chosen["24"][0] < 8192 and not chosen["16"][1] and not chosen["24"][1]
    for row in rows.values():
        assert not row["with_room"] or fit.ROOM * row["peak"] <= row["usable"]
        assert row["fits"] == (row["peak"] <= row["usable"]) and row["seconds_per_epoch"] > 0
    assert rows["8"]["seconds_per_epoch"] > rows["24"]["seconds_per_epoch"]  # recomputation takes time
    code, out, _ = run(capsys, *flags, "--batch-tokens", "8192", "--no-grad-checkpoint")
    given = json.loads(out)["fits"]
    assert code == 0 and {(r["batch_tokens"], r["grad_checkpoint"]) for r in given.values()} == {(8192, False)}
    assert not given["24"]["fits"] and given["24"]["add"]


def test_lengths_are_measured_in_data(capsys, model_directory, data_directory):
    code, out, err = run(
        capsys, "plan", "--model", str(model_directory), "--data", str(data_directory), "--tflops", "1", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["groups"] == 12 and 0 < found["tokens_per_epoch"] < found["tokens_per_epoch_separate"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "qwen9-1b"], ["qwen9-1b", "qwen3-0.6b"]),
        (["--num-layers", "99"], ["--num-layers", "28 layers"]),
        (["--lora-keys", "mlp.gate"], ["--lora-keys", "gate_proj"]),
        (["--data", "nowhere"], ["nowhere", "no such file"]),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, expected):
    code, _, err = run(capsys, "plan", "--tflops", "1", *arguments)
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert all(part in err for part in expected)


def test_a_config_that_is_none_is_told(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    code, _, err = run(capsys, "plan", "--model", str(tmp_path), "--tflops", "1")
    assert code == 2 and "not the config.json of a decoder model" in err


def test_calibration_measures_a_rate():
    for shape in (
        SMALL,
        replace(SMALL, bits=4),
        model_shape.ModelShape.of("qwen3-0.6b"),
    ):  # the last, in a second, on a narrower model
        assert (
            calibrate.calibrate(
                shape, cost.Training(shape.layers, activation_bytes=4, checkpoint=shape.bits < 16), seconds=1.0
            )
            > 1e7
        )


def test_the_doctor_examines_this_machine(capsys):
    code, out, err = run(capsys, "doctor", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["versions"]["mlx"] == mx.__version__ and found["flops_per_second"]["float32"] > 0
    assert found["plan_beside_a_step"]["memory_mb"]["ratio"] == pytest.approx(1, abs=0.15)
    from mlx_dmpo.tools import doctor

    text = doctor.format_report(found)
    assert mx.__version__ in text and found["plan_beside_a_step"]["verdict"] in text


def test_the_doctor_says_whether_plan_agrees():
    from mlx_dmpo.tools import doctor

    def step(memory, seconds):
        return {"memory_mb": {"ratio": memory}, "seconds": {"ratio": seconds}}

    assert doctor.verdict(step(1.1, 0.7)) == "plan agrees with it"
    assert (
        "memory)" in doctor.verdict(step(1.2, 1))
        and "(time)" in doctor.verdict(step(1, 1.6))
        and "memory and time" in doctor.verdict(step(0.5, 0.1))
    )


def test_the_remedy_for_a_slow_cpu_is_one_line(monkeypatch):
    from mlx_dmpo.tools import doctor

    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr(doctor.device, "on_cpu", lambda: True)
    assert "LD_PRELOAD" in doctor.blas_remedy(3e9) and doctor.blas_remedy(100e9) == ""
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert doctor.blas_remedy(3e9) == ""
