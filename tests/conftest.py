import os
from pathlib import Path

import pytest
import tiny


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    """No test meets another's reference cache, or the user's; nothing is fetched."""
    monkeypatch.setenv("MLX_DMPO_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


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
