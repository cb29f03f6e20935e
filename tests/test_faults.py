"""Disks that refuse, processes that die, memory over a night.

The slow ones, in one command: scripts/test -m slow tests/test_faults.py
"""

import contextlib
import errno
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from hooks import before_steps
from test_distributed import RANK, adapter, flags
from test_resume import Crash, count_points, metrics, same, settings_of

from mlx_dmpo.errors import UserError
from mlx_dmpo.machine import files, run_directory
from mlx_dmpo.train import checkpoint, reporting
from mlx_dmpo.train import run as train_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("faults") / "ratings", users=8, negatives=2)


# --- disks that refuse


def refuse(number):
    def call(*arguments, **keywords):
        raise OSError(number, os.strerror(number))

    return call


def half_written(path, tree):
    Path(path).write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def lose_metrics(run):
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(run / "nowhere" / "metrics.jsonl")


# name: (what happens to the disk before step 4, what the line must say, how it is fixed)
DISKS = {
    "full, in a checkpoint": (
        lambda patch, run: patch.setattr(checkpoint, "save_arrays", half_written),
        "free some space",
        None,
    ),
    "quota, at a rename": (
        lambda patch, run: patch.setattr(checkpoint.os, "rename", refuse(errno.EDQUOT)),
        "free some space",
        None,
    ),
    "read-only": (lambda patch, run: patch.setattr(files.os, "replace", refuse(errno.EROFS)), "make it writable", None),
    "permission lost": (
        lambda patch, run: patch.setattr(files.os, "open", refuse(errno.EACCES)),
        "make it writable",
        None,
    ),
    "a link in the place of metrics": (
        lambda patch, run: lose_metrics(run),
        "remove the link",
        lambda run: (run / "metrics.jsonl").unlink(),
    ),
    "directory removed": (lambda patch, run: shutil.rmtree(run), "put it back", None),
}


@pytest.mark.parametrize("name", DISKS)
def test_a_disk_that_refuses(name, model_directory, data, tmp_path, monkeypatch):
    happens, output, repair = DISKS[name]
    settings = settings_of(
        "sft", model_directory, data, tmp_path / "run", save_every=1, val_batches=0, steps_per_report=2
    )

    def strike(model, step):
        if step.number == 4:
            happens(patch, tmp_path / "run")

    with (
        monkeypatch.context() as patch,
        pytest.raises(
            UserError, match=r"run/\S* ?.*cannot be written.*" + output + ".*, then continue with --resume"
        ) as error,
    ):
        before_steps(patch, strike)
        train_run.train(settings, "test")
    assert "\n" not in str(error.value)
    if name == "directory removed":
        assert not (tmp_path / "run").exists()
        return
    assert not list((tmp_path / "run").rglob(".partial-*"))
    readable(tmp_path / "run")
    assert checkpoint.newest(tmp_path / "run").state.step == 3
    if repair:
        repair(tmp_path / "run")
    path = train_run.train(replace(settings, resume=True), "test")
    whole = train_run.train(replace(settings, adapter_path=str(tmp_path / "whole")), "test")
    assert (path / "adapters.safetensors").read_bytes() == (whole / "adapters.safetensors").read_bytes()
    if not repair:
        same(path, whole)


def test_a_line_that_fits_only_in_part_is_not_appended(tmp_path):
    """A file-size limit, as a full disk, takes the beginning of a write."""
    path = tmp_path / "metrics.jsonl"
    files.append_line(path, '{"step": 1}')
    code = f"""
import resource, pathlib
from mlx_dmpo import errors
from mlx_dmpo.machine import files
resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
try:
    files.append_line(pathlib.Path({str(path)!r}), '{{"step": 2, "loss": 0.5}}')
except errors.WriteError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "metrics.jsonl: cannot be written" in done.stdout and path.read_text() == '{"step": 1}\n'


def test_a_report_that_cannot_be_written_is_one_line(tmp_path, model_directory, data):
    from mlx_dmpo.report.page import write_report

    path = train_run.train(settings_of("sft", model_directory, data, tmp_path / "run", iters=1), "test")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/report.html: cannot be written"):
        write_report([path], tmp_path / "file" / "report.html")


def command(*arguments, limit=None):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    done = subprocess.run(
        [sys.executable, RANK, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=limited if limit else None,
    )
    return done.returncode, done.stdout + done.stderr


def one_line(output):
    assert "Traceback" not in output
    return next(line for line in output.splitlines() if line.startswith("error: "))


@pytest.mark.slow
def test_a_full_disk_and_a_read_only_one(model_directory, data, tmp_path):
    """A file-size limit; and where the tests may mount, a tmpfs of a megabyte that is filled, then made read-only."""
    whole, run = tmp_path / "whole", tmp_path / "mount" / "run"
    run.parent.mkdir()
    mounted = (
        os.geteuid() == 0
        and sys.platform == "linux"
        and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", run.parent]).returncode
    )
    try:
        arguments = flags("dmpo", model_directory, data, run, iters=6, save_every=1)
        assert command(*flags("dmpo", model_directory, data, whole, iters=6, save_every=1))[0] == 0
        assert command("--at", 3, "term", *arguments)[0] == 143
        code, output = command(
            *arguments, "--resume", limit=150_000
        )  # more than the adapter, less than the optimizer's state
        assert (
            code == 2
            and "cannot be written (File too large): free some space, then continue with --resume" in one_line(output)
        ), output
        readable(run)
        assert checkpoint.newest(run).state.step == 3
        if mounted:
            with open(run.parent / "ballast", "wb") as file:
                file.write(bytes(shutil.disk_usage(run.parent).free - 250_000))
            code, output = command(*arguments, "--resume")
            assert (
                code == 2
                and "cannot be written (No space left on device): free some space, then continue with --resume"
                in one_line(output)
            ), output
            readable(run)
            assert checkpoint.newest(run).state.step == 3
            (run.parent / "ballast").unlink()
            subprocess.run(["mount", "-o", "remount,ro", run.parent], check=True)
            code, output = command(*arguments, "--resume")
            assert code == 2 and "cannot be written (Read-only file system)" in one_line(output), output
            subprocess.run(["mount", "-o", "remount,rw", run.parent], check=True)
        else:
            print("not mounted: a tmpfs needs root on Linux")
        assert command(*arguments, "--resume")[0] == 0
        same(run, whole)
    finally:
        if mounted:
            subprocess.run(["umount", run.parent], check=True)


# --- processes that die


def readable(directory):
    """Every file under its final name is whole: parsed to its end.

    -> how many. One that is removed meanwhile is fine.
    """
    found = 0
    for place, names, found_files in os.walk(directory):
        names[:] = [name for name in names if not name.startswith(".")]
        if Path(place).parent.name == run_directory.CHECKPOINTS:  # it came whole, by a rename, and goes by one
            assert run_directory.MANIFEST in found_files or not Path(place).exists(), place
        for path in (Path(place) / name for name in found_files if not name.startswith(".")):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
            found += 1
            whole_file(path, data)
    return found


def whole_file(path, data):
    if path.suffix == ".safetensors":
        header = int.from_bytes(data[:8], "little")
        ends = [
            entry["data_offsets"][1]
            for name, entry in json.loads(data[8 : 8 + header]).items()
            if name != "__metadata__"
        ]
        assert len(data) == 8 + header + max(ends), path
    elif path.suffix == ".json":
        json.loads(data)
    elif path.suffix == ".jsonl":
        assert not data or data.endswith(b"\n"), path
        assert all(isinstance(json.loads(line), dict) for line in data.splitlines()), path
    elif path.suffix == ".yaml":
        assert data.endswith(b"\n"), path
    elif path.suffix == ".npz":
        with np.load(io.BytesIO(data)) as file:
            assert len(file["sequences"]) == len(file["logps"])
    elif path.name == "trained_on.txt":
        assert re.fullmatch(rb"([0-9a-f]{16}\n)+", data), path
    elif path.suffix == ".png":
        assert data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82"), path
    else:
        raise AssertionError(f"what is {path}?")


class Server:
    """Runs of mlx-dmpo as forks of one process that has imported everything."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, RANK, "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def start(self, phases, cache, arguments):
        phases.write_text(f"{'start':<12}")
        print(
            json.dumps([str(phases), {"MLX_DMPO_CACHE": str(cache)}, [str(a) for a in arguments]]),
            file=self.process.stdin,
            flush=True,
        )
        return int(self._answer("pid"))

    def end(self):
        return int(self._answer("end"))

    def _answer(self, word):
        for line in self.process.stdout:
            if line.startswith(word):
                return line.split()[1]
        raise AssertionError("the server is gone")


@pytest.fixture
def server():
    made = Server()
    yield made
    made.process.stdin.close()
    made.process.stdout.close()
    made.process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kills"), [("sft", 15), ("dmpo", 15)])
def test_thirty_kills(kind, kills, server, model_directory, data, tmp_path):
    """SIGKILL at random moments, aimed in turn at each phase; the resumed run ends bit for bit like an
    undisturbed one.
    """
    rng = np.random.default_rng(len(kind))
    home = tmp_path / "home"
    home.mkdir()

    def arguments(path):
        return flags(
            kind,
            model_directory,
            data,
            path,
            iters=12,
            save_every=2,
            steps_per_eval=3,
            val_batches=4,
            steps_per_report=5,
        )

    begun = time.monotonic()
    server.start(tmp_path / "phase", home / "cache", arguments(home / "whole"))
    assert server.end() == 0
    seconds = time.monotonic() - begun

    failures, looks, over = [], [0], threading.Event()

    def watch():
        while not over.is_set():
            try:
                looks[0] += readable(home)
            except Exception as error:
                failures.append(repr(error))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    died, equal = Counter(), 0
    try:
        aims = [None, "step", "save", "validate", *(["reference"] if kind == "dmpo" else [])]
        for number in itertools.count():
            if died.total() == kills:
                break
            run, cache, phase = home / f"run{number}", home / f"cache{number}", tmp_path / f"phase{number}"
            aim = aims[number % len(aims)]
            pid = server.start(phase, cache, arguments(run))
            if aim is None:
                time.sleep(rng.uniform(0, seconds))
            else:
                deadline, wanted = time.monotonic() + rng.uniform(0, seconds / 2) * (aim != "reference"), False
                while not wanted and "end" not in phase.read_text():
                    wanted = time.monotonic() > deadline and phase.read_text().strip() == aim
                time.sleep(rng.uniform(0, 0.02))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            at = phase.read_text().strip()
            if server.end() == -signal.SIGKILL:
                died[at] += 1
            readable(home)
            server.start(
                phase, cache, [*arguments(run), "--resume"] if not run_directory.is_complete(run) else ["--version"]
            )
            assert server.end() == 0
            same(run, home / "whole")
            equal += died.total() > equal
            assert not list(run.rglob(".partial-*"))
            for path in (run, cache):  # out of the watcher's sight at once
                if path.exists():
                    shutil.rmtree(path.rename(home / f".{path.name}"))
    finally:
        over.set()
        watcher.join()
    print(
        f"{kind}: {equal} of {kills} equal bit for bit; killed in {dict(died)}; {looks[0]} files read meanwhile, "
        f"{len(failures)} unreadable"
    )
    assert equal == kills and not failures, failures[:3]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dmpo"])
def test_a_run_that_dies_at_any_point_goes_on(kind, model_directory, data, tmp_path, monkeypatch):
    """At every call of every function in `count_points`, one run after another."""
    change = dict(iters=3, save_every=1)
    whole = train_run.train(settings_of(kind, model_directory, data, tmp_path / "whole", **change), "test")
    with monkeypatch.context() as patch:
        passed = count_points(patch)
        train_run.train(settings_of(kind, model_directory, data, tmp_path / "counted", **change), "test")
    settings = settings_of(kind, model_directory, data, tmp_path / "broken", **change)
    for at in range(1, len(passed) + 1):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setenv("MLX_DMPO_CACHE", str(tmp_path / f"cache{at}"))
            count_points(patch, {at})
            train_run.train(replace(settings, overwrite=True), "test")
        same(train_run.train(replace(settings, resume=True), "test"), whole)
        shutil.rmtree(settings.adapter_path)
    print(f"{kind}: died at each of {len(passed)} points ({dict(Counter(passed))}), equal each time")


# --- a night


def resident_mb():
    return (
        int(
            subprocess.run(
                ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
            ).stdout
        )
        / 1024
    )


@pytest.mark.slow
def test_memory_stays_flat_over_2000_steps(model_directory, data, tmp_path, monkeypatch):
    """The peak of the last 500 steps is at most 1.02 x that of steps 100-500 in MLX's memory; the process's too."""
    peaks, resident = [], {}
    original = reporting.Report.step_done

    def measured(self, *arguments):
        peaks.append(mx.get_peak_memory())
        if self.state.step % 50 == 0:
            resident[self.state.step] = resident_mb()
        original(self, *arguments)

    before_steps(monkeypatch, lambda model, step: mx.reset_peak_memory())
    monkeypatch.setattr(reporting.Report, "step_done", measured)
    change = dict(
        iters=2000, grad_accumulation_steps=1, save_every=100, steps_per_eval=100, val_batches=2, steps_per_report=10
    )
    path = train_run.train(settings_of("dmpo", model_directory, data, tmp_path / "run", **change), "test")
    assert len(peaks) == 2000 and len(metrics(path)) == 220
    early, late = max(peaks[100:500]), max(peaks[1500:])
    before, after = (
        max(v for k, v in resident.items() if low <= k <= high) for low, high in ((100, 500), (1500, 2000))
    )
    print(
        f"MLX peak: steps 100-500 {early / 1e6:.2f} MB, last 500 {late / 1e6:.2f} MB ({late / early:.4f}); process "
        f"{before:.0f} -> {after:.0f} MB ({after / before:.3f})"
    )
    assert late <= 1.02 * early and after <= 1.05 * before
    assert len(adapter(path)) > 0
