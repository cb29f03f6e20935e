"""An export in the zip archive that it came in; UTF-16 beside the ratings; a model that serve cannot open."""

import os
import subprocess
import sys
import zipfile

import exports
import numpy as np
import pytest
from test_prepare import run

from mlx_dmpo import config
from mlx_dmpo.data import sources
from mlx_dmpo.data.sources import zipped
from mlx_dmpo.errors import UserError


def read(path):
    return sources.SOURCES["letterboxd"](path, config.PrepareSettings(), sources.BadRows(False))


def archive(path, members, folder=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(folder + name, data)
    return path


@pytest.mark.parametrize("folder", ["", "letterboxd-me-2024/"])
def test_an_archive_reads_as_the_folder(folder, tmp_path):
    raw = exports.letterboxd(tmp_path / "raw", number=40, unrated=5)
    members = {"deleted/ratings.csv": "Date,Name,Year,Letterboxd URI,Rating\n2020-01-01,Deleted,1950,u,1\n"}
    members |= {p.name: p.read_bytes() for p in raw.iterdir()} | {"../../outside.csv": "x"}
    path = archive(tmp_path / "it's an éxport.zip", members, folder)
    found, plain = read(path), read(raw)
    assert found.files == [path] and found.titles == plain.titles and found.seen == plain.seen
    assert np.array_equal(found.interactions.rating, plain.interactions.rating)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["raw", path.name])


def test_errors_name_the_archive(tmp_path):
    text = "Date,Name,Year,Letterboxd URI,Rating\n2020-01-01,A,1950,u,good\n"
    path = archive(tmp_path / "x.zip", {"ratings.csv": text})
    with pytest.raises(UserError, match=r"x\.zip/ratings\.csv:2: the rating is not a finite number"):
        read(path)
    bad = sources.BadRows(True)
    archive(path, {"ratings.csv": text + "2020-01-02,B,1950,u,4\n"})
    sources.SOURCES["letterboxd"](path, config.PrepareSettings(), bad)
    assert list(bad.first.values()) == [f"{path}/ratings.csv:2"]
    with pytest.raises(UserError, match=r"x\.zip: holds no ratings\.csv"):
        read(archive(path, {"notes.txt": "x"}))


def test_a_damaged_archive(tmp_path):
    raw = exports.letterboxd(tmp_path / "raw", number=40, unrated=5)
    path = archive(tmp_path / "x.zip", {"ratings.csv": (raw / "ratings.csv").read_bytes()})
    data = bytearray(path.read_bytes())
    data[100:140] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.zip: not a valid zip archive"):
        read(path)


def test_a_file_that_unpacks_too_far(tmp_path, monkeypatch):
    monkeypatch.setattr(zipped, "LIMIT", 1 << 20)
    path = archive(tmp_path / "x.zip", {"ratings.csv": b"\n" * (3 << 20)})
    with pytest.raises(UserError, match=r"x\.zip/ratings\.csv: is larger than 1 MB"):
        read(path)


def test_utf16_items_are_named_as_such(tmp_path, capsys):
    (tmp_path / "r.csv").write_text("user,item,rating\n" + "".join(f"1,{n},{n % 5 + 1}\n" for n in range(9)))
    (tmp_path / "i.csv").write_text("item,title\n" + "".join(f"{n},Amélie {n}\n" for n in range(9)), encoding="utf-16")
    flags = ["--items", tmp_path / "i.csv", "--out", tmp_path / "out"]
    code, _, err = run(capsys, "prepare", "table", tmp_path / "r.csv", *flags)
    assert code == 2 and "i.csv: is UTF-16 text: save it as UTF-8" in err and not (tmp_path / "out").exists()


def test_serve_ends_with_2_where_the_model_cannot_be_opened(tmp_path):
    command = [sys.executable, "-m", "mlx_dmpo", "serve", "--model", "./missing", "--port", "0"]
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "./missing: no such file or directory" in done.stderr
    assert "terminate" not in done.stderr and not list(tmp_path.iterdir())
