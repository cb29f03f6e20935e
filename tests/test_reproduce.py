"""A comparison's file: its cells, what is wrong with it, and a small one run from end to end"""

import json
import subprocess
import sys

import pytest

from mlx_dmpo.cli.main import main
from mlx_dmpo.errors import UserError
from mlx_dmpo.machine import files
from mlx_dmpo.tools import reproduce, reproduce_data, results
from mlx_dmpo.tools.hours import step_hours

FILE = """
name: small
out: {out}
data:
  ratings: {data}
models:
  tiny: {model}
prompts: [pairwise, direct]
k: [1, 2]
seeds: [0, 1]
against: popularity
systems:
  - popularity
  - als
  - base
  - dmpo
  - boundary: {{loss: s-dpo, negatives_select: boundary, start: base}}
baseline: {{fit: all, neighbours: 7}}
dmpo: {{epochs: 2, lora_parameters: {{rank: 4}}, both_orders: true}}
"""


@pytest.fixture
def written(tmp_path, model_directory, data_directory):
    def write(text=FILE, **names):
        names = {"out": tmp_path / "out", "data": data_directory, "model": model_directory} | names
        (tmp_path / "file.yaml").write_text(text.format(**names))
        return tmp_path / "file.yaml"

    return write


def test_cells_by_hand(written, tmp_path):
    plan = reproduce.read(written())
    every = reproduce.cells(plan)
    names = [str(cell.path.relative_to(tmp_path / "out" / "ratings")) for cell in every]
    first = ["popularity", "als_s0"]
    for prompt in ("pairwise", "direct"):
        first += [f"tiny/{prompt}/{name}" for name in ("base", "sft_s0", "dmpo_k1_s0", "boundary_k1_s0")]
    assert names[: len(first)] == first  # one whole table of seed 0 and k = 1
    # 1 popularity, 2 als, 2 prompts x (1 base, 2 sft, 4 dmpo, 4 boundary)
    assert len(names) == len(set(names)) == 1 + 2 + 2 * (1 + 2 + 4 + 4)
    by_name = dict(zip(names, every, strict=True))
    dmpo, boundary = by_name["tiny/direct/dmpo_k2_s1"], by_name["tiny/direct/boundary_k2_s1"]
    assert dmpo.needs is not None and dmpo.needs.path.name == "sft_s1" and boundary.needs is None
    line = " ".join(dmpo.steps[0].arguments)
    assert "--prompt direct" in line and f"--start-adapter {dmpo.needs.path}" in line
    assert line.endswith("--epochs 2 --lora-rank 4 --both-orders --loss dmpo --num-negatives 2 --seed 1")
    assert "--start-adapter" not in boundary.steps[0].arguments
    assert "--negatives-select boundary" in " ".join(boundary.steps[0].arguments)


def test_shared_settings_reach_the_baselines_that_they_have_an_effect_on(written):
    cells = {cell.system: cell for cell in reproduce.cells(reproduce.read(written()))}
    for system in ("popularity", "als"):
        line = " ".join(cells[system].steps[0].arguments)
        assert "--fit all" in line and "--neighbours" not in line


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds: [0, 1]", "seeds: [0, -1]", '"seeds": is not a list of whole numbers'),
        ("seeds: [0, 1]", "seedz: [0, 1]", '"seedz": unknown setting'),
        ("  - popularity\n", "", "against"),
        ("against: popularity", "against: nobody", "'nobody' is none of the systems"),
        ("  - als", "  - popularity", "popularity is listed twice"),
        ("epochs: 2", "epochz: 2", "epochz: unknown setting"),
        ("loss: s-dpo", "loss: sdpo", "'sdpo' is not a choice"),
        ("start: base", "start: nowhere", "'nowhere' is not a choice"),
        ("  - base", "  - mystery", "'mystery' is not a choice"),
        ("data:\n", "date:\n", "unknown setting"),
        ("models:\n  tiny: {model}\n", "", '"models" is missing'),
    ],
)
def test_a_file_that_is_wrong(written, old, new, said):
    with pytest.raises(UserError) as error:
        reproduce.read(written(FILE.replace(old, new)))
    assert said in str(error.value) and "file.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--only", "popularity")])
@pytest.mark.parametrize(
    ("names", "old", "new", "said"),
    [
        ({"data": "nowhere"}, "", "", "data.ratings.test: nowhere: no such file or directory: make it first"),
        ({}, "  - base", "  - mystery", "'mystery' is not a choice"),
        ({}, "epochs: 2", "epochz: 2", "epochz: unknown setting"),
        ({}, "seeds: [0, 1]", "seedz: [0, 1]", '"seedz": unknown setting'),
    ],
)
def test_faults_are_one_line_and_exit_code_2(written, names, old, new, said, more, tmp_path, capfd):
    file = written(FILE.replace(old, new) if old else FILE, **names)
    assert run(file, *more) == 2
    printed = capfd.readouterr()
    assert said in printed.err and len(printed.err.strip().splitlines()) == 1 and printed.out == ""
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "no.yaml", *more) == 2


def test_few_shot_sizes_are_nested(written, tmp_path):
    text = FILE.replace("k: [1, 2]", "k: [1]\nfew_shot: [4, 8]")
    plan = reproduce.read(written(text))
    reproduce_data.make_subsets(plan)
    rows = {n: files.read_lines(tmp_path / f"out/ratings/few-shot/dmpo-{n}/train.jsonl") for n in (4, 8)}
    users = {n: list(dict.fromkeys(r["user"] for r in rows[n])) for n in rows}
    assert (len(users[4]), len(users[8])) == (4, 8) and users[8][:4] == users[4]
    cells = [c for c in reproduce.cells(plan) if c.system == "dmpo" and c.few_shot == 4]
    assert str(tmp_path / "out/ratings/few-shot/dmpo-4") in cells[0].steps[0].arguments
    with pytest.raises(UserError, match=r"99, and .* has 12 examples"):
        reproduce_data.make_subsets(reproduce.read(written(FILE.replace("k: [1, 2]", "few_shot: [99]"))))


def test_flags():
    assert reproduce.flags({"a_b": True, "c": False, "d": [1, 2], "lora_parameters": {"rank": 4}}) == (
        ["--a-b", "--no-c", "--d", "1", "--d", "2", "--lora-rank", "4"]
    )


def test_hours_are_flops_over_the_rate(written):
    cells = {c.path.name: c for c in reproduce.cells(reproduce.read(written()))}
    step = cells["dmpo_k1_s0"].steps[0]
    once, twice = step_hours(step, 1e9), step_hours(step, 2e9)
    assert once > 0 and twice == pytest.approx(once / 2)
    longer = reproduce.Step(tuple("8" if a == "2" else a for a in step.arguments), step.directory)
    assert step_hours(longer, 1e9) > 2 * once
    assert step_hours(cells["popularity"].steps[0], 1e9) == 0


SMALL = """
name: small
out: {out}
data: {{"ratings": {data}}}
models: {{tiny: {model}}}
prompts: [direct]
k: [1]
against: popularity
systems: [popularity, base{more}]
baseline: {{fit: all, resamples: 100}}
evaluate: {{resamples: 100}}
sft: {{iters: 2}}
dmpo: {{iters: 2}}
"""


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", *map(str, arguments)])
    return stop.value.code


def test_a_frozen_cache_serves_the_base_too(written):
    text = SMALL.replace("evaluate: {{", "evaluate: {{frozen_cache: kept, ")
    file = written(text.replace("iters: 2", "num_layers: 1"), more=", sft, dmpo")
    cells = {c.system: c for c in reproduce.cells(reproduce.read(file))}
    assert {"--frozen-cache", "--num-layers"} <= set(cells["base"].steps[0].arguments)
    assert all("--frozen-cache kept" in " ".join(cells[s].steps[1].arguments) for s in ("sft", "dmpo"))
    (base,) = (c for c in reproduce.cells(reproduce.read(written(text, more=""))) if c.model)
    assert "--frozen-cache" not in base.steps[0].arguments  # every layer is adapted


def test_cells_are_run_once_and_the_table_says_what_they_measured(written, tmp_path, capfd):
    file = written(SMALL, more="")
    assert run(file, "--dry-run", "--tflops", "0.001") == 0
    printed = capfd.readouterr().out
    assert "to do" in printed or " h  " in printed
    assert "2 cells, 2 to do" in printed
    assert run(file) == 0
    assert capfd.readouterr().err.count("$ mlx-dmpo") == 2
    table = json.loads((tmp_path / "out" / "small-ratings.json").read_text())
    popularity, base = table["rows"]
    measured = json.loads((tmp_path / "out/ratings/tiny/direct/base/eval/metrics.json").read_text())
    assert base["pair_accuracy"] == measured["pair_accuracy"] and base["minutes"] is not None and base["peak_gb"] > 0
    assert (popularity["system"], popularity["fit"], table["missing"]) == ("popularity", "all", [])
    assert "paired" not in popularity and set(base["paired"]) == {"against", "pairs", "difference", "low", "high", "p"}
    values = base["pair_accuracy"]["value"] - popularity["pair_accuracy"]["value"]
    assert base["paired"]["difference"] == pytest.approx(values)
    text = (tmp_path / "out" / "small-ratings.md").read_text()
    assert "minus popularity, paired" in text and "mlx-dmpo evaluate --model" in text
    assert run(file) == 0  # nothing is left to do
    assert "$ mlx-dmpo" not in capfd.readouterr().err


def test_a_page_escapes_what_it_is_given(written, tmp_path):
    plan = reproduce.read(written(SMALL.replace("name: small", 'name: "<b>&"'), more=""))
    row = {"system": "<script>", "users": 1, "minutes": None, "peak_gb": None, "commands": []}
    made = results.page(plan, {"ratings": [row]}, {"ratings": []}, [])
    assert "<script>" not in made and "&lt;script&gt;" in made and "<h1>&lt;b&gt;&amp;</h1>" in made
    assert "a \\| b" in results.markdown(plan, "ratings", [row | {"system": "a | b"}], [], [])


SEEDS = """
name: seeds
out: {out}
data:
  ratings: {data}
models:
  tiny: {model}
prompts: [direct]
few_shot: [0, 16]
seeds: [0, 1]
against: sft
systems: [popularity, als, base, in-context, sft, dmpo]
"""


def all_done(file):
    """The cells of a file, as if each had run."""
    every = reproduce.cells(reproduce.read(file))
    for cell in every:
        for step in cell.steps:
            step.directory.mkdir(parents=True, exist_ok=True)
            (step.directory / "manifest.json").write_text("{}")
    return every


def test_each_cell_is_compared_with_its_own_seed_and_users(written, tmp_path):
    """What a cell has, its opponent has too; the system itself is compared with nothing, nor with its other seeds."""
    every = all_done(written(SEEDS))
    named = {cell.path.name: results.opponent(cell, every, "sft") for cell in every}
    found = {name: other.path.name if other else None for name, other in named.items()}
    for seed in (0, 1):
        assert found[f"dmpo_k5_s{seed}"] == found[f"als_s{seed}"] == f"sft_s{seed}"
        assert found[f"dmpo_k5_n16_s{seed}"] == found[f"als_n16_s{seed}"] == f"sft_n16_s{seed}"
        assert found[f"in-context_s{seed}"] == f"sft_s{seed}" and found[f"sft_s{seed}"] is None
    assert found["base"] == found["popularity"] == "sft_s0" and found["popularity_n16"] == "sft_n16_s0"
    first = next(cell for cell in every if cell.path.name == "sft_s1")
    (first.steps[0].directory / "manifest.json").unlink()
    assert results.opponent(next(c for c in every if c.path.name == "dmpo_k5_s1"), every, "sft") is None
    rows = {cell.path.name: cell.seed for cell in every}
    assert (rows["popularity"], rows["base"], rows["in-context_s1"], rows["als_s1"]) == (None, None, 1, 1)


def test_systems_over_their_seeds(written, monkeypatch):
    """What runs with several seeds is compared with its opponent of each; what has one seed, or one missing, is not."""
    every = all_done(written(SEEDS))
    asked = []

    def compared(*evaluations):
        asked.append([path.parent.name for path in evaluations])
        row = {"metric": "pair_accuracy", "difference": 0.25, "low": 0.125, "high": 0.375, "p": 0.5}
        return {"differences": [row], "pooled": {"a": {"seeds": 2, "pair_accuracy": {"mean": 0.75, "spread": 0.0}}}}

    monkeypatch.setattr(results, "_compared", compared)
    rows = results.over_seeds(every, "ratings", "sft")
    assert ["dmpo_k5_s0", "dmpo_k5_s1", "sft_s0", "sft_s1"] in asked
    assert ["dmpo_k5_n16_s0", "dmpo_k5_n16_s1", "sft_n16_s0", "sft_n16_s1"] in asked
    assert not any(name in ("base", "popularity") for names in asked for name in names)
    head, *lines = results.seed_rows(rows, "sft")
    assert [line[0] for line in lines].count("dmpo") == 2 and all(line[head.index("seeds")] == "2" for line in lines)
    assert lines[0][head.index("pair accuracy, minus sft")] == "+0.250 [+0.125, +0.375]"
    next(c for c in every if c.path.name == "dmpo_k5_s1").steps[-1].directory.joinpath("manifest.json").unlink()
    assert len(results.over_seeds(every, "ratings", "sft")) == len(rows) - 1


def test_a_cell_that_fails_does_not_stop_the_others(written, tmp_path, capfd):
    """Nor is what starts from it tried; the end names them all."""
    file = written(SMALL, more=", sft, dmpo, als", model=tmp_path / "nowhere")
    assert run(file) == 2
    err = capfd.readouterr().err
    assert err.count("$ mlx-dmpo sft") == 1 and "$ mlx-dmpo dmpo" not in err and "sft_s0 failed" in err
    assert "error: 3 of 5 cells failed (" in err and "Traceback" not in err
    done = {cell.path.name for cell in reproduce.cells(reproduce.read(file)) if cell.done}
    assert done == {"popularity", "als_s0"}
    assert [row["system"] for row in json.loads((tmp_path / "out" / "small-ratings.json").read_text())["rows"]] == [
        "popularity",
        "als",
    ]


def test_a_cell_that_fails_stays_undone(written, tmp_path, capfd):
    file = written(
        SMALL.replace("[popularity, base", "[{{base: {{limit: 3}}}}").replace("against: popularity\n", ""),
        more="",
        model="nowhere",
    )
    assert run(file) == 2
    assert "ended with 2" in capfd.readouterr().err
    assert not any(cell.done for cell in reproduce.cells(reproduce.read(file)))


@pytest.mark.slow
def test_training_cells_from_end_to_end(written, tmp_path):
    file = written(SMALL.replace("against: popularity", "against: sft\nseeds: [0, 1]"), more=", sft, dmpo, mppo")
    done = subprocess.run([sys.executable, "-m", "mlx_dmpo", "reproduce", str(file)], check=False)
    assert done.returncode == 0
    table = json.loads((tmp_path / "out" / "small-ratings.json").read_text())
    systems = ["popularity", "base", "sft", "dmpo", "mppo", "sft", "dmpo", "mppo"]
    assert [row["system"] for row in table["rows"]] == systems
    assert all(row["paired"]["pairs"] == row["pairs"] for row in table["rows"] if row["system"] != "sft")
    dmpo, mppo = table["over_seeds"]
    assert (dmpo["system"], mppo["system"], dmpo["seeds"]) == ("dmpo", "mppo", [0, 1])
    alone = [row["paired"]["difference"] for row in table["rows"] if row["system"] == "dmpo"]
    assert dmpo["minus"]["pair_accuracy"]["difference"] == pytest.approx(sum(alone) / 2)
    assert "Over the seeds" in (tmp_path / "out" / "small-ratings.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        "smollm2-ml-1m",
        "ml-100k",
        "k-sweep",
        "tallrec",
        "tallrec-ml1m-qwen3",
        "s-dpo-lastfm",
        "smollm2-few-shot",
        "smollm2-k",
    ],
)
def test_the_files_of_the_repository_read(name):
    from pathlib import Path

    plan = reproduce.read(Path(__file__).resolve().parents[1] / "configs" / "reproduce" / f"{name}.yaml")
    every = reproduce.cells(plan)
    assert every and len({cell.path for cell in every}) == len(every)
    for cell in every:
        for step in cell.steps:
            command = step.arguments[0]
            from mlx_dmpo.cli.main import cli

            cli.commands[command].make_context(command, list(step.arguments[1:]))  # raises for a flag that there is not
