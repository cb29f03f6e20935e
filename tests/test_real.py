"""Real inputs: MovieLens and Amazon files of the DMPO release, a Qwen3 pretrained on MovieLens, Qwen3's own tokenizer
and vocabulary.

They may not be redistributed and are no part of the repository: these tests skip where they are absent. By default the
first rows of each file are run; `scripts/test -m slow` runs whole files.
"""

import json
import shutil

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_dmpo.cli.main import main
from mlx_dmpo.data.rows import read_rows

HEAD = 6  # rows of a file in the quick tests


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 0


def chain(model, sft_data, dmpo_data, test_data, out, *more, training=()):
    """sft, dmpo, evaluate, as a user types them; the evaluation's metrics."""
    run("sft", "--model", model, "--data", sft_data, "--adapter-path", out / "sft", *training, *more)
    run(
        "dmpo",
        "--model",
        model,
        "--data",
        dmpo_data,
        "--start-adapter",
        out / "sft",
        "--adapter-path",
        out / "dmpo",
        *training,
        *more,
    )
    run("evaluate", "--model", model, "--data", test_data, "--adapter-path", out / "dmpo", *more)
    return json.loads((out / "dmpo" / "eval" / "metrics.json").read_text())


def head(file, directory, rows=HEAD):
    """The first rows of a released file, in the release's own form."""
    directory.mkdir(exist_ok=True)
    (directory / file.name).write_text(json.dumps([row for _, row in read_rows(file, "test")][:rows]))
    return directory / file.name


@pytest.mark.parametrize("kind", ["data_ml_1m", "Amazon_Movie"])
def test_released_files_on_a_movielens_model(shared, tmp_path, kind):
    release = shared / "data" / "dmpo-release"
    files = [
        head(release / f"rec_{kind}_{name}.json", tmp_path / "data")
        for name in ("sft_ranking", "dpo_ranking_3", "eval_ranking")
    ]
    found = chain(shared / "models" / "ml1m-qwen3", *files, tmp_path, training=("--epochs", "1"))
    assert (found["n"], found["k"]) == (HEAD, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data_ml_1m", "Amazon_Movie"])
def test_whole_released_files(shared, tmp_path, kind):
    """SFT, DMPO for every k, and the thousand evaluation pairs, as released."""
    model, release = shared / "models" / "ml1m-qwen3", shared / "data" / "dmpo-release"
    once = ("--model", model, "--epochs", "1")
    run("sft", *once, "--data", release / f"rec_{kind}_sft_ranking.json", "--adapter-path", tmp_path / "sft")
    for k in range(1, 6):
        out, data = tmp_path / f"dmpo-{k}", release / f"rec_{kind}_dpo_ranking_{k}.json"
        run("dmpo", *once, "--data", data, "--start-adapter", tmp_path / "sft", "--adapter-path", out)
        first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
        assert 0 < first["loss"] < 1
    run(
        "evaluate",
        "--model",
        model,
        "--data",
        release / f"rec_{kind}_eval_ranking.json",
        "--adapter-path",
        out,
        "--out",
        tmp_path / "eval",
    )
    found = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert found["n"] == 1000 and found["auc_release"]["value"] is not None


@pytest.fixture(scope="module")
def real_vocabulary(shared, tmp_path_factory):
    """Two random layers under Qwen3's own tokenizer and 151,936 columns: once in float32, once as `mlx_lm.convert`
    writes 4 bits.
    """
    from mlx_lm import convert
    from mlx_lm.models import qwen3

    config = {
        "model_type": "qwen3",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151_936,
        "max_position_embeddings": 4096,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "eos_token_id": 151_645,
    }
    directory = tmp_path_factory.mktemp("real") / "float32"
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copy(shared / "models" / "qwen3-tokenizer" / name, directory)
    mx.random.seed(0)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    mx.save_safetensors(
        str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
    (directory / "config.json").write_text(json.dumps(config))
    quantized = directory.parent / "4bit"
    convert(str(directory), str(quantized), quantize=True, q_bits=4, q_group_size=64)
    return {"float32": directory, "4bit": quantized}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("precision", ["float32", "4bit"])
def test_the_real_tokenizer_and_vocabulary(shared, real_vocabulary, tmp_path, precision, capsys):
    release = shared / "data" / "dmpo-release"
    names = ("sft_ranking", "dpo_ranking_2", "eval_ranking")
    files = [head(release / f"rec_data_ml_1m_{name}.json", tmp_path / "data", 4) for name in names]
    found = chain(real_vocabulary[precision], *files, tmp_path, training=("--iters", "1"))
    assert found["n"] == 4
    assert "every sequence is run alone" not in capsys.readouterr().err  # the shared-prefix scorer took it
    if precision == "4bit":
        assert "quantization" in json.loads((real_vocabulary["4bit"] / "config.json").read_text())
        with pytest.raises(SystemExit) as stop:
            main(
                [
                    "sft",
                    "--model",
                    str(real_vocabulary["4bit"]),
                    "--data",
                    str(files[0]),
                    "--quantize",
                    "4",
                    "--adapter-path",
                    str(tmp_path / "again"),
                ]
            )
        assert stop.value.code == 2 and "quantized already" in capsys.readouterr().err
