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
