"""`import mlx_dmpo`: light, typed, documented, and its documented example runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_dmpo
from mlx_dmpo.records import RankingExample

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def test_importing_it_loads_nothing_heavy():
    script = (
        "import sys, json, mlx_dmpo; dir(mlx_dmpo); print(json.dumps(sorted(m.split('.')[0] for m in sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {
        "mlx",
        "mlx_lm",
        "transformers",
        "tokenizers",
        "datasets",
        "pyarrow",
        "matplotlib",
        "numpy",
        "torch",
        "click",
    }
    assert heavy & set(json.loads(done.stdout)) == set()


def test_every_public_name_exists_and_says_what_it_is():
    for name in mlx_dmpo.__all__:
        assert (getattr(mlx_dmpo, name).__doc__ or "").strip(), name
    assert set(mlx_dmpo.__all__) <= set(dir(mlx_dmpo))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mlx_dmpo.nothing  # noqa: B018


def test_docs_list_every_public_name_and_every_method():
    """A name in `__all__`, and a public method of Ranker, is a heading or a table row of docs/python.md."""
    listed = set(re.findall(r"`(?:Ranker\.)?([A-Za-z_]+)(?:\(|`)", PAGE))
    methods = {name for name in vars(mlx_dmpo.Ranker) if not name.startswith("_")}
    assert set(mlx_dmpo.__all__) - listed == set()
    assert methods - listed == set()


def test_the_documented_example_runs_and_prints_what_it_says(tmp_path, monkeypatch):
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    assert "Ranker.load" in code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert printed and done.stdout == "".join(printed)


def test_it_is_typed(tmp_path):
    """What a type checker sees of the lazy names: a wrong argument is an error, the right ones are not."""
    mypy = pytest.importorskip("mypy.api")
    good = "from mlx_dmpo import Ranker, Ranking\nr: Ranking = Ranker.load('m').rank(['a'], ['b'], top=1)\n"
    bad = "from mlx_dmpo import Ranker\nRanker.load('m').rank(['a'], ['b'], top='one')\n"
    found = []
    for name, code in (("good", good), ("bad", bad)):
        (tmp_path / f"{name}.py").write_text(code)
        # the package without its dependencies' stubs: only what is public is looked at
        options = ["--follow-imports=silent", "--ignore-missing-imports", "--cache-dir", str(tmp_path / "cache")]
        found.append(mypy.run([*options, "--config-file", os.devnull, str(tmp_path / f"{name}.py")]))
    assert found[0][2] == 0, found[0]
    assert found[1][2] == 1 and '"top"' in found[1][0]


def test_train_and_evaluate_from_python(model_directory, data_directory, tmp_path):
    common = {"model": str(model_directory), "data": str(data_directory)}
    sft = mlx_dmpo.sft(mlx_dmpo.SftSettings(**common, adapter_path=str(tmp_path / "sft"), iters=1))
    dmpo = mlx_dmpo.dmpo(
        mlx_dmpo.DmpoSettings(**common, start_adapter=sft, adapter_path=str(tmp_path / "dmpo"), iters=1)
    )
    assert dmpo == str(tmp_path / "dmpo")
    result = mlx_dmpo.evaluate(mlx_dmpo.EvaluateSettings(**common, adapter_path=dmpo, limit=3))
    assert 0 <= result["pair_accuracy"]["value"] <= 1
    margins = mlx_dmpo.Ranker.load(str(model_directory), dmpo).score(["river"], [("amber", "iron")])
    assert margins.shape == (1,)


def test_scores_are_what_evaluate_writes(model_directory):
    ranker = mlx_dmpo.Ranker.load(model_directory)
    (scores,) = ranker.scoring.model.score([RankingExample("", "movie", ("river", "glass"), "amber", ("iron", "salt"))])
    found = ranker.score(["river", "glass"], [("amber", "iron"), ("amber", "salt")])
    assert found == pytest.approx(scores.margins, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"metod": "pairs"}, 'did you mean "method"'),
        ({"method": "best"}, "not a choice"),
        ({"method": "items"}, "only compares pairs"),
        ({"num_negatives": 2}, "leave it out"),
        ({"prompt": "direct", "budget": 3}, "--budget"),
    ],
)
def test_wrong_settings_are_refused_before_the_model_is_loaded(settings, said):
    with pytest.raises(mlx_dmpo.UserError, match=re.escape(said)):
        mlx_dmpo.Ranker.load("no/such/model/anywhere", **settings)
