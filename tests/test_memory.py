"""Limits that are put back, and a step whose result does not depend on how its micro-batches are split."""

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from test_resume import adapter, settings_of

from mlx_dmpo.config import EvaluateSettings
from mlx_dmpo.errors import UserError
from mlx_dmpo.machine import memory
from mlx_dmpo.train import run as train_run
from mlx_dmpo.train import step as train_step

MESSAGES = [  # as MLX's Metal, CUDA and CPU allocators word it
    "[metal::malloc] Attempting to allocate 8000000000 bytes which is greater than the maximum allowed buffer "
    "size of 4000000000 bytes.",
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "[malloc] Unable to allocate 8000000000 bytes.",
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
]


@pytest.fixture
def settings(model_directory, data_directory, tmp_path):
    change = dict(batch_size=4, iters=2, val_batches=1, optimizer="sgd", learning_rate=0.1, warmup=0.0)
    return settings_of("dmpo", model_directory, data_directory, tmp_path / "run", **change)


def too_large(monkeypatch, groups, message, failed):
    """Micro-batches of more than `groups` groups do not fit."""
    original = train_step.StepFunction.prepare

    def prepare(self, micro_batch, weight):
        if len(micro_batch.batch.groups) > groups:
            failed.append(len(micro_batch.batch.groups))
            raise RuntimeError(message)
        return original(self, micro_batch, weight)

    monkeypatch.setattr(train_step.StepFunction, "prepare", prepare)


def test_allocation_failures_are_known_by_their_words():
    assert all(
        memory.is_allocation_failure(RuntimeError(message)) for message in MESSAGES
    ) and memory.is_allocation_failure(MemoryError())
    assert not memory.is_allocation_failure(
        RuntimeError("[matmul] shapes do not match")
    ) and not memory.is_allocation_failure(ValueError(MESSAGES[0]))


def test_a_micro_batch_that_does_not_fit_is_split_and_the_step_is_the_same(settings, tmp_path, monkeypatch):
    whole = adapter(train_run.train(replace(settings, adapter_path=str(tmp_path / "whole")), "test"))
    failed = []
    too_large(monkeypatch, 2, MESSAGES[2], failed)
    split = adapter(train_run.train(settings, "test"))
    assert failed == [4, 4]  # the first micro-batch, then a shorter one; the longer one between them is not tried
    assert max(float(np.abs(whole[k] - split[k]).max()) for k in whole) < 1e-6


def test_what_still_does_not_fit_is_told_with_what_helps(settings, monkeypatch):
    too_large(monkeypatch, 1, MESSAGES[0], [])
    with pytest.raises(
        UserError,
        match=r"memory: this needs about 8\.0 GB .*: try, in this order, --batch-size 2 --grad-accumulation-steps 4, ",
    ) as error:
        train_run.train(settings, "test")
    flags = ["--batch-size", "--num-negatives", "--grad-checkpoint", "--num-layers", "--max-seq-length"]
    places = [str(error.value).index(flag) for flag in flags]
    assert places == sorted(places)
    least = replace(settings, batch_size=1, num_negatives=1, grad_checkpoint=True, num_layers=1)
    assert memory.advice(least) == "--max-seq-length 1024"
    assert memory.advice(EvaluateSettings()) == "--batch-size 4, --num-negatives 1, --max-seq-length 1024"


def test_memory_limit_is_kept(settings, tmp_path):
    """The CPU's allocator counts too: a limit that a micro-batch of 1 keeps and one of 4 does not."""
    settings = replace(settings, memory="fixed")
    peaks = {}
    for size in (1, 4):
        mx.reset_peak_memory()
        train_run.train(
            replace(
                settings,
                batch_size=size,
                grad_accumulation_steps=8 // size,
                val_batches=0,
                adapter_path=str(tmp_path / f"{size}"),
            ),
            "test",
        )
        peaks[size] = mx.get_peak_memory() / 1e9
    assert peaks[1] < 0.6 * peaks[4]
    before = mx.get_memory_limit()
    with pytest.raises(UserError, match=r"memory: this needs about .* GB .*--memory-limit is .*: try"):
        train_run.train(replace(settings, memory_limit=0.9 * peaks[1]), "test")
    assert mx.get_memory_limit() == before
    path = train_run.train(
        replace(settings, memory_limit=0.95 * peaks[4], adapter_path=str(tmp_path / "split")), "test"
    )
    whole, split = adapter(tmp_path / "4"), adapter(path)
    assert max(float(np.abs(whole[k] - split[k]).max()) for k in whole) < 1e-6


def test_another_error_is_no_matter_of_memory(settings, monkeypatch):
    too_large(monkeypatch, 0, "[matmul] shapes do not match", [])
    with pytest.raises(RuntimeError, match="shapes"):
        train_run.train(settings, "test")


@pytest.mark.parametrize("gigabytes", [0.0, 8.0])
@pytest.mark.parametrize("error", [None, ValueError])
def test_limits_are_below_the_recommended_and_put_back(gigabytes, error, monkeypatch):
    """Metal's side of it, with MLX's setters replaced: there is no Metal where this runs."""
    now = {"wired": 0, "cache": 100, "memory": 30}
    recommended = 20_000_000_000

    def setter(name):
        def put(value):
            old, now[name] = now[name], value
            return old

        return put

    monkeypatch.setattr(memory.mx, "metal", SimpleNamespace(is_available=lambda: True))
    monkeypatch.setattr(memory.mx, "device_info", lambda: {"max_recommended_working_set_size": recommended})
    for name in now:
        monkeypatch.setattr(memory.mx, f"set_{name}_limit", setter(name))
    before = dict(now)
    try:
        with memory.limits(gigabytes):
            assert 0 < now["wired"] < (gigabytes * 1e9 or recommended) and 0 < now["cache"] < recommended
            assert now["memory"] == (8_000_000_000 if gigabytes else 30)
            if error:
                raise error
    except ValueError:
        pass
    assert now == before


def test_waiting_never_raises_the_limit_that_was_given():
    """--memory fixed plans for the machine; MLX must keep to a lower --memory-limit all the same."""
    before = mx.set_memory_limit(3 << 30)
    try:
        for size, kept in ((2e9, 2_000_000_000), (8e9, 3 << 30), (0.0, 3 << 30), (-1e9, 3 << 30)):
            with memory.waiting_at(size):
                assert mx.set_memory_limit(kept) == kept
            assert mx.set_memory_limit(3 << 30) == 3 << 30
    finally:
        mx.set_memory_limit(before)
