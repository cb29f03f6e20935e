"""A package that is missing: one line with a command that installs it, whether mlx-dmpo itself is installed or not."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from test_bad_input import run
from test_commands import pasted

from mlx_dmpo.machine import extras

ROOT = Path(__file__).resolve().parents[1]
find_spec = importlib.util.find_spec


@pytest.mark.parametrize(
    ("command", "missing", "packages"),
    [
        (["serve"], "starlette", extras.SERVE),
        (["serve"], "uvicorn", extras.SERVE),
        (["baseline", "als"], "implicit", extras.BASELINES),
        (["baseline", "item-knn", "--fit", "all"], "implicit", extras.BASELINES),
        (["sft", "--report-to", "wandb"], "wandb", ("wandb",)),
        (["sft", "--report-to", "tensorboard"], "tensorboard", ("tensorboard",)),
    ],
)
def test_the_hint_names_packages_of_the_index(command, missing, packages, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # so that importing it fails
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == missing else find_spec(name, *a))
    code, out, err = run(capsys, *command)
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith("error: ") and f"{missing} is not installed: run " in line
    words = pasted(line.partition("is not installed: run ")[2])
    assert words == [sys.executable, "-m", "pip", "install", *packages]
    assert "mlx-dmpo" not in line  # it is on no index


def test_without_pip_the_hint_is_for_uv(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    words = pasted(str(extras.not_installed("serve", "uvicorn", extras.SERVE)).partition(": run ")[2])
    assert words == ["uv", "pip", "install", "--python", sys.executable, *extras.SERVE]


def test_the_packages_are_those_of_the_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["serve"] == list(extras.SERVE)
    assert project["optional-dependencies"]["baselines"] == list(extras.BASELINES)


@pytest.mark.skipif(find_spec("pip") is None, reason="this environment has no pip")
@pytest.mark.parametrize("packages", [extras.SERVE, extras.BASELINES])
def test_pip_takes_the_command(packages):
    """With the packages there, pip has nothing to fetch and says so."""
    for name in packages:
        pytest.importorskip(name.partition(">")[0])
    words = pasted(str(extras.not_installed("x", "y", packages)).partition(": run ")[2])
    done = subprocess.run([*words, "--no-index", "--disable-pip-version-check"], capture_output=True, text=True)
    assert done.returncode == 0 and "already satisfied" in done.stdout, done.stderr


def test_no_text_tells_to_install_an_extra_of_the_index():
    """`pip install 'mlx-dmpo[serve]'` asks the index for mlx-dmpo, which is not there; a clone's is `.[serve]`."""
    texts = [*(ROOT / "mlx_dmpo").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    texts = [p for p in texts if p.name not in ("LOG.md", "cli.md")]  # cli.md is made of the help texts
    found = [str(p) for p in texts if re.search(r"pip install '?mlx.dmpo", p.read_text(encoding="utf-8"))]
    assert found == []
