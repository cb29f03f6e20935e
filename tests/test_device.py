"""What a run knows of the device at hand. CUDA is pretended."""

from types import SimpleNamespace

import pytest

from mlx_dmpo.config import EvaluateSettings
from mlx_dmpo.model import device, fit
from mlx_dmpo.model.open import open_scorer


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """An empty directory of compiled kernels, on a machine with a CUDA device of 80 GB."""
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(device.mx, "cuda", SimpleNamespace(is_available=lambda: True))
    monkeypatch.setattr(device.mx, "device_info", lambda: {"device_name": "a GPU", "total_memory": 80_000_000_000})
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "ptx"))
    (tmp_path / "ptx").mkdir()
    return tmp_path / "ptx"


def test_a_run_may_take_the_gpus_memory_not_the_machines(cuda):
    assert fit.machine_memory() == 80e9
    assert fit.limit(0) == 80e9 and fit.limit(24) == 24e9


def test_kernels_are_said_to_be_compiled_until_there_are_some(cuda):
    assert str(cuda) in device.compiling()
    (cuda / "kernel.ptx").touch()
    assert device.compiling() == ""


def test_nothing_is_said_on_a_cpu(monkeypatch):
    monkeypatch.setattr(device.mx, "cuda", SimpleNamespace(is_available=lambda: True))
    assert device.compiling() == ""


def test_whoever_opens_a_model_reads_it(monkeypatch, capsys, model_directory):
    monkeypatch.setattr("mlx_dmpo.model.device.compiling", lambda: "kernels are compiled")
    assert open_scorer(EvaluateSettings(model=str(model_directory))).groups.shared
    assert capsys.readouterr().err.count("note: kernels are compiled") == 1
