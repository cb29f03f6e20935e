"""What is said and done on a Mac, with programs of our own in place of macOS's: none of this needs one."""

import os
import stat
import time
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from test_resume import settings_of

from mlx_dmpo.config import DmpoSettings
from mlx_dmpo.core.scorer import shared_logps
from mlx_dmpo.core.selfcheck import GroupScorer
from mlx_dmpo.core.tree import by_length, pad_groups
from mlx_dmpo.machine import mac
from mlx_dmpo.model import device
from mlx_dmpo.model import open as open_model
from mlx_dmpo.model.score import score_groups
from mlx_dmpo.model.shape import ModelShape
from mlx_dmpo.tools import doctor
from mlx_dmpo.train import run as train_run
from mlx_dmpo.train.objective import objective
from mlx_dmpo.train.step import StepFunction

PMSET = """System-wide power settings:
Currently in use:
 standby              1
 Sleep On Power Button 1
 disksleep            10
 sleep                {sleep} (sleep prevented by coreaudiod)
 displaysleep         2
 lowpowermode         {low}
"""
LARGEST = 64 * 4 * 32  # weights of tiny's largest layer, its queries
SWAP = "total = 4096.00M  used = {used}M  free = 100.00M  (encrypted)"


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """put(name, script): a program of that name on PATH, beside the shell's own; this counts as a Mac."""
    directory = tmp_path / "bin"
    directory.mkdir()
    with monkeypatch.context() as only_here:  # elsewhere in the process it stays what it is
        only_here.setattr(mac.sys, "platform", "darwin")
        assert mac.here()
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    monkeypatch.setenv(mac.WATCHDOG, "1")
    monkeypatch.setattr(mac, "here", lambda: True)

    def put(name, script):
        path = directory / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return put


def settle(put, *, sleep=0, low=0, used="0.00", wired=0):
    put("pmset", f"cat <<'END'\n{PMSET.format(sleep=sleep, low=low)}\nEND")
    swap = SWAP.format(used=used)
    put("sysctl", f'case "$2" in vm.swapusage) echo "{swap}";; iogpu.wired_limit_mb) echo {wired};; esac')


def test_a_mac_with_nothing_to_fix_gets_no_line(tools):
    settle(tools)
    assert mac.notes(5e9) == mac.notes(5e9, awake=False) == []


def test_each_trouble_is_one_line_with_its_fix(tools, monkeypatch):
    monkeypatch.delenv(mac.WATCHDOG)
    settle(tools, sleep=15, low=1, used="1536.25", wired=4096)
    found = mac.notes(8 * 2**30, awake=False)
    for line, words in zip(
        found,
        [
            ("ImpactingInteractivity", "export AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1"),
            ("1.6 GB are in swap", "close other programs"),
            ("iogpu.wired_limit_mb is 4,096 MB, and this needs 8,192", "sudo sysctl iogpu.wired_limit_mb=0"),
            ("Low Power Mode", "System Settings"),
            ("sleeps after 15 idle minutes", "leave out --no-caffeinate"),
        ],
        strict=True,
    ):
        assert all(w in line for w in words) and "\n" not in line


def test_only_what_matters_is_said(tools):
    settle(tools, sleep=15, used="300.00", wired=8192)
    assert mac.notes(8 * 2**30) == []  # kept awake, little swap, a limit that suffices
    settle(tools, used="1024,50", wired=8191)
    assert [line.split()[0] for line in mac.notes(8 * 2**30)] == ["1.1", "iogpu.wired_limit_mb"]
    tools("pmset", "printf ' powermode 1\\n'")  # a Mac that has a High Power Mode too
    assert any("Low Power Mode" in line for line in mac.notes())
    tools("pmset", "printf ' powermode 2\\n lowpowermode 0\\n powermode_x 1\\n'")
    assert not any("Low Power Mode" in line for line in mac.notes())


@pytest.mark.parametrize(
    "script", ["sleep 20", "exit 3", "echo nonsense", "printf '\\377\\376'", "echo used = ,M", None, "directory"]
)
def test_a_tool_that_hangs_fails_or_is_missing_is_passed_over(tools, monkeypatch, script, tmp_path):
    monkeypatch.setattr(mac, "SECONDS", 0.3)
    for name in ("pmset", "sysctl"):
        if script == "directory":
            (tmp_path / "bin" / name).mkdir()
        elif script is not None:
            tools(name, script)
    begun = time.monotonic()
    assert mac.notes(1e12, awake=False) == []
    assert time.monotonic() - begun < 10


def test_another_system_starts_and_says_nothing(tools, monkeypatch, tmp_path):
    monkeypatch.setattr(mac, "here", lambda: False)
    monkeypatch.delenv(mac.WATCHDOG)
    for name in ("pmset", "sysctl", "caffeinate"):
        tools(name, f"touch {tmp_path}/called")
    with mac.awake():
        assert mac.notes(1e12, awake=False) == []
    assert not (tmp_path / "called").exists()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def waited_for(path):
    until = time.monotonic() + 20
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.02)
    return path.read_text().split()


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_caffeinate_lasts_as_long_as_the_block(tools, tmp_path, error):
    said = tmp_path / "said"
    tools("caffeinate", f'echo "$$ $@" > {said}.part; mv {said}.part {said}; exec sleep 60')
    try:
        with mac.awake():
            pid, *given = waited_for(said)
            assert given == ["-i", "-w", str(os.getpid())] and alive(int(pid))
            assert os.getsid(int(pid)) != os.getsid(0)  # Ctrl-C at the terminal does not reach it
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert not alive(int(pid))
    with mac.awake(False):
        pass
    assert waited_for(said)[0] == pid  # not started again


def test_without_caffeinate_a_run_starts_and_says_so(tools, capsys):
    with mac.awake():
        pass
    assert "caffeinate cannot be started (No such file or directory): keep this Mac awake" in capsys.readouterr().err


@pytest.mark.parametrize("caffeinate", [True, False])
def test_a_run_says_it_and_stays_awake(
    tools, monkeypatch, capsys, tmp_path, model_directory, data_directory, caffeinate
):
    monkeypatch.delenv(mac.WATCHDOG)
    settle(tools, sleep=15, wired=1)
    tools("caffeinate", f"echo started > {tmp_path}/started; exec sleep 60")
    settings = settings_of("dmpo", model_directory, data_directory, tmp_path / "run", iters=1, val_batches=0)
    train_run.train(replace(settings, caffeinate=caffeinate), "test")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    said = {word: any(word in line for line in lines) for word in ("Interactivity", "wired_limit", "sleeps after")}
    assert said == {"Interactivity": True, "wired_limit": True, "sleeps after": not caffeinate}
    assert (tmp_path / "started").exists() or not caffeinate


def test_the_doctor_says_it(tools, monkeypatch):
    settle(tools, low=1)
    step = {"memory_mb": {"ratio": 1, "plan": 1, "measured": 1}, "seconds": {"ratio": 1, "plan": 1, "measured": 1}}
    monkeypatch.setattr(doctor, "_plan_beside_a_step", lambda: step)
    monkeypatch.setattr(doctor, "_matmul_rate", lambda dtype: 1e12)
    monkeypatch.setattr(device, "device_name", lambda: "M")
    found = doctor.examine()
    assert [n for n in found["notes"] if "Low Power Mode" in n]
    assert "to fix: Low Power Mode is on" in doctor.format_report(found)


@pytest.fixture
def products(monkeypatch):
    """Floating-point operations of every product with a layer's weights, as they are asked for."""
    found = []

    def counted(kind):
        original = kind.__call__

        def call(self, x):
            if self.weight.shape[0] != tiny.COMMON["vocab_size"]:  # not the head, which has chunks of its own
                found.append(2 * x.size * self.weight.shape[0])
            return original(self, x)

        monkeypatch.setattr(kind, "__call__", call)

    counted(nn.Linear)
    counted(nn.QuantizedLinear)
    return found


@pytest.mark.parametrize("bits", [0, 4])
def test_no_product_is_larger_than_the_watchdog_allows(products, monkeypatch, bits):
    """A pass over many groups (the reference, a validation), a catalogue, and a step with recomputation."""
    model = tiny.model(bits=bits)
    scorer = GroupScorer(shared_logps, True)
    monkeypatch.setattr(device, "PRODUCT", 2 * LARGEST * 150)  # of 150 tokens
    assert device.tokens_per_product(model) == 150
    rng = np.random.default_rng(0)
    groups = tiny.ragged_groups(rng) * 4
    catalogue = tiny.group(rng, 40, [5] * 200, [4] * 200)
    assert catalogue.shared_tokens > 4 * 150 < sum(g.shared_tokens for g in groups)
    for some in (groups, [catalogue]):
        list(score_groups(model, scorer, some, 16, ""))
        assert 0.5 * device.PRODUCT < max(products) <= device.PRODUCT
        products.clear()
    step = StepFunction(model, scorer, objective(DmpoSettings(loss="simpo")), checkpoint=True)
    for rows in by_length(groups, 16, min(8192, device.tokens_per_product(model))):
        mx.eval(step(pad_groups([groups[i] for i in rows]), None, 1.0, None))
    assert 0.5 * device.PRODUCT < max(products) <= device.PRODUCT


def test_a_run_cuts_its_micro_batches_by_it(products, monkeypatch, tmp_path, model_directory, data_directory):
    settings = settings_of("sft", model_directory, data_directory, tmp_path / "run", batch_size=8, iters=2)
    monkeypatch.setattr(device, "PRODUCT", 2 * LARGEST * 400)
    settings = replace(settings, grad_accumulation_steps=1, scoring="auto", val_batches=1)
    monkeypatch.setattr(open_model, "choose_scorer", lambda *given, **how: GroupScorer(shared_logps, True))  # no probes
    train_run.train(settings, "test")
    assert 0.5 * device.PRODUCT < max(products) <= device.PRODUCT


def test_the_usual_tokens_fit_the_usual_models():
    """8,192 tokens at once up to 8B; 14B and 32B get fewer, on no machine too few for a group."""

    def tokens(name):
        shape = ModelShape.of(name)
        layer = nn.Linear(1, 1)
        layer.weight = mx.zeros((shape.intermediate, shape.hidden))
        return device.tokens_per_product(SimpleNamespace(layers=[layer]))

    found = [tokens(f"qwen3-{size}") for size in ("0.6b", "1.7b", "4b", "8b", "14b", "32b")]
    assert min(found[:4]) > 8192 > max(found[4:]) > min(found) > 2048
