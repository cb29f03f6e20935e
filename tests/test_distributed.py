"""Two ranks on the loopback interface: the same trajectory as one, and an end with a message when one is lost."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_dmpo.machine import files

RANK = Path(__file__).with_name("rank.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An odd number of groups: some steps give one rank more than the other, and some give one nothing."""
    return tiny.write_data(tmp_path_factory.mktemp("ranks") / "ratings", users=7, negatives=2)


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start(tmp_path, *rank_arguments):
    """One process a rank, as mlx.launch's ring backend starts them."""
    ring = tmp_path / "ring.json"
    ring.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(len(rank_arguments))]))
    return [
        subprocess.Popen(
            [sys.executable, str(RANK), *map(str, arguments)],
            env={**os.environ, "MLX_HOSTFILE": str(ring), "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, arguments in enumerate(rank_arguments)
    ]  # fmt: skip


def finish(processes, timeout=300):
    try:
        output = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], output


def two_ranks(tmp_path, *arguments):
    codes, output = finish(start(tmp_path, arguments, arguments))
    assert codes == [0, 0], output
    return output


def one_rank(*arguments):
    done = subprocess.run(
        [sys.executable, str(RANK), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def flags(command, model_directory, data, path, **change):
    given = dict(
        model=model_directory, data=data, adapter_path=path, batch_size=1, grad_accumulation_steps=3, iters=20,
        learning_rate=1e-3, steps_per_report=1, steps_per_eval=10, val_batches=5, save_every=5, optimizer="adamw",
    )  # fmt: skip
    return [
        command,
        *(text for name, value in {**given, **change}.items() for text in (f"--{name.replace('_', '-')}", value)),
    ]


def adapter(path):
    return {k: np.array(v) for k, v in mx.load(str(path / "adapters.safetensors")).items()}


def relative(a, b):
    a, b = adapter(a), adapter(b)
    assert a.keys() == b.keys()
    return float(np.sqrt(sum(((a[k] - b[k]) ** 2).sum() for k in b) / sum((b[k] ** 2).sum() for k in b)))


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def same_lines(a, b):
    assert [line.keys() for line in a] == [line.keys() for line in b]
    for key in (
        "step",
        "loss",
        "valid_loss",
        "margin",
        "valid_margin",
        "pair_accuracy",
        "valid_pair_accuracy",
        "learning_rate",
    ):
        np.testing.assert_allclose(
            [line[key] for line in a if key in line], [line[key] for line in b if key in line], rtol=1e-5, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "dmpo"])
def test_two_ranks_are_one(command, model_directory, data, tmp_path, monkeypatch):
    one, two, moved = (tmp_path / name for name in ("one", "two", "moved"))
    code, output = one_rank(*flags(command, model_directory, data, one))
    assert code == 0, output
    monkeypatch.setenv("MLX_DMPO_CACHE", str(tmp_path / "another"))  # the two score the reference themselves
    output = two_ranks(tmp_path, *flags(command, model_directory, data, two))
    assert "done:" in output[0] and "done:" not in output[1]  # one writes and talks
    print(f"relative difference of the adapters after 20 steps: {relative(two, one):.2e}")
    assert relative(two, one) <= 1e-5
    same_lines(lines(two), lines(one))
    assert files.read_json(two / "manifest.json")["ranks"] == 2
    # one rank stops at step 12, two go on
    code, output = one_rank("--at", 12, "term", *flags(command, model_directory, data, moved))
    assert code == 143 and "--resume" in output
    two_ranks(tmp_path, *flags(command, model_directory, data, moved), "--resume")
    assert relative(moved, one) <= 1e-5
    same_lines(lines(moved), lines(one))
    if command == "dmpo":  # evaluation is shared out too
        scores = []
        for name, run in (("e1", lambda *a: one_rank(*a)), ("e2", lambda *a: two_ranks(tmp_path, *a))):
            run(
                "evaluate",
                "--model",
                model_directory,
                "--data",
                data,
                "--adapter-path",
                one,
                "--out",
                tmp_path / name,
                "--batch-size",
                2,
            )
            scores.append([json.loads(line) for line in (tmp_path / name / "scores.jsonl").read_text().splitlines()])
        assert [s["user"] for s in scores[0]] == [s["user"] for s in scores[1]]
        np.testing.assert_allclose([s["margin"] for s in scores[0]], [s["margin"] for s in scores[1]], atol=1e-4)


def test_ranks_with_different_data_do_not_begin(model_directory, data, tmp_path):
    other = tiny.write_data(tmp_path / "other", users=7, negatives=2, seed=1)
    codes, output = finish(
        start(tmp_path, *(flags("sft", model_directory, d, tmp_path / "run", iters=2) for d in (data, other)))
    )
    assert codes == [2, 2] and all("give every machine the same model, data and settings" in t for t in output), output


def test_a_signal_to_one_rank_ends_both_with_all_saved(model_directory, data, tmp_path):
    arguments = flags("sft", model_directory, data, tmp_path / "run", iters=6)
    codes, output = finish(start(tmp_path, arguments, ["--at", 3, "term", *arguments]))
    assert codes == [143, 143] and "stopped at step 3 of 6, saved at 3" in output[0], output
    assert (tmp_path / "run" / "checkpoints" / "0000003" / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("how", ["kill", "stop"])  # stop: it keeps its connections, as a machine asleep does
def test_a_lost_rank_ends_the_run_with_a_message(lost, how, model_directory, data, tmp_path):
    arguments = flags("dmpo", model_directory, data, tmp_path / "run")
    struck = ["--at", 7, how, *arguments]
    processes = start(tmp_path, *([struck, arguments] if lost == 0 else [arguments, struck]))
    while not (tmp_path / "run" / "checkpoints" / "0000005").exists():
        assert all(p.poll() is None for p in processes)
        time.sleep(0.05)
    since = time.monotonic()
    left = processes[1 - lost]
    output = left.communicate(timeout=100)[0]
    seconds = time.monotonic() - since
    processes[lost].kill()
    processes[lost].communicate()
    print(f"rank {lost} lost by {how}: the other ended in {seconds:.1f} s")
    assert seconds < 60
    assert left.returncode == 2 and "was lost" in output and "--resume" in output and "Traceback" not in output, output
    code, output = one_rank(*arguments, "--resume")
    assert code == 0 and "resumed at step 5" in output, output


@pytest.mark.slow
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(model_directory, data, tmp_path):
    arguments = flags("sft", model_directory, data, tmp_path / "run", iters=4, save_every=1, keep_checkpoints=4)
    codes, output = finish(start(tmp_path, arguments, ["--at", 2, "nan", *arguments]))
    assert codes == [0, 0] and files.read_json(tmp_path / "run" / "manifest.json")["bad_steps"] == 1, output
    assert "step 2: NaN or Inf, skipped" in output[0] and "train.jsonl:" in next(
        t for t in output[1].splitlines() if "step 2: NaN or Inf" in t
    )
    first, second, third = (adapter(tmp_path / "run" / "checkpoints" / f"000000{n}") for n in (1, 2, 3))
    assert all(np.array_equal(first[k], second[k]) for k in first) and not all(
        np.array_equal(second[k], third[k]) for k in third
    )


@pytest.mark.slow
def test_mlx_launch_starts_it(model_directory, data, tmp_path):
    launch = Path(sys.executable).with_name("mlx.launch")
    port = free_ports(1)[0]
    done = subprocess.run(
        [launch, "-n", "2", "--backend", "ring", "--starting-port", str(port), "--python", sys.executable, RANK,
         *map(str, flags("sft", model_directory, data, tmp_path / "run", iters=4))],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and files.read_json(tmp_path / "run" / "manifest.json")["ranks"] == 2, (
        done.stdout + done.stderr
    )
