"""Whatever stands in a file, its reader returns or raises UserError: no other exception reaches a user.

Half of the inputs are arbitrary, half are sound ones with a few parts replaced. A few hundred by default; `-m slow`
runs 10,000.
"""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_dmpo import config
from mlx_dmpo.data import formats
from mlx_dmpo.errors import UserError
from mlx_dmpo.model import adapters
from mlx_dmpo.prompts import pairwise
from mlx_dmpo.records import RankingExample
from mlx_dmpo.report import page as report_page
from mlx_dmpo.report import read, tables
from mlx_dmpo.tools import export

text = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates too, which JSON can spell
number = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, -1, 10**400, 1e308, float("nan"), float("inf")]))
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), number, text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=8,
)


@st.composite
def near(draw, sound):
    """A sound object with up to three parts replaced or removed, at any depth, and now and then one too many."""
    changed = json.loads(json.dumps(sound))
    for _ in range(draw(st.integers(0, 3))):
        place = changed
        while True:
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.booleans()):
                place = place[key]
                continue
            if draw(st.booleans()):
                place[key] = draw(junk)
            else:
                del place[key]
            break
    if isinstance(changed, dict) and draw(st.integers(0, 4)) == 0:
        changed[draw(text)] = draw(junk)
    return changed


def spoiled(sound):
    """Bytes: arbitrary, or JSON of a value near one of the sound ones, now and then cut short."""
    made = st.one_of([near(value) for value in sound]).map(json.dumps)
    lines = st.lists(made, min_size=1, max_size=3).map("\n".join)
    cut = st.tuples(lines, st.integers(0, 400)).map(lambda pair: pair[0][: pair[1]])
    return st.one_of(
        st.binary(max_size=60),
        text.map(lambda t: t.encode("utf-8", "surrogatepass")),
        lines.map(str.encode),
        cut.map(str.encode),
    )


OWN = {
    "user": "u",
    "domain": "movie",
    "history": ["a", "b"],
    "positive": "p",
    "negatives": ["c", "d"],
    "positive_first": [True, False],
}
EXAMPLE = RankingExample("u", "movie", ("a", "b"), "p", ("c",))
PROMPT = pairwise.pair_prompt(EXAMPLE, "c", True, pairwise.DOMAINS["movie"])
RELEASED = {
    "instruction": PROMPT,
    "input": "",
    "output": [pairwise.ranking_answer("p", "c"), pairwise.ranking_answer("c", "p")],
}
SETTINGS = {
    "model": "m",
    "batch_size": 4,
    "beta": 0.1,
    "learning_rate": 1e-4,
    "lr_schedule": {"name": "cosine_decay", "arguments": [1e-5, 10]},
    "lora_parameters": {"rank": 8, "scale": 2.0, "keys": ["self_attn.q_proj"]},
    "optimizer_config": {"betas": [0.9, 0.99]},
    "domains": {"song": {"topic": "music", "items": "songs", "consumed": "listened to", "consuming": "listening to"}},
    "seed": 0,
    "reference_free": True,
    "num_layers": -1,
}
ADAPTER = {
    "model": "m",
    "fine_tune_type": "lora",
    "num_layers": -1,
    "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
}
METRIC = {"value": 0.5, "low": 0.4, "high": 0.6}
METRICS = {"n": 2, "k": 1, "users": 2, "ties": 0, **{name: METRIC for name, _, _ in tables.COLUMNS}}
LOGPS = {"chosen_logp": -1.0, "rejected_logp": -2.0}
SCORE = {
    "user": "u",
    "positive": "p",
    "negative": "n",
    "positive_first": LOGPS,
    "positive_second": LOGPS,
    "margin": 2.0,
}
TRAINING = {"step": 1, "epoch": 0.5, "loss": 0.6, "margin": 0.1, "pair_accuracy": 0.5, "valid_loss": 0.7}
MANIFEST = {
    "command": "mlx-dmpo sft",
    "config": {"seed": 0, "quantize": 4, "quantize_mode": "affine"},
    "adapter": "a",
    "seconds": 1.5,
}


def read_config(directory, data):
    (directory / "c.yaml").write_bytes(data)
    found = config.resolve(config.DmpoSettings, directory / "c.yaml", {})
    pairwise.with_domains(found.domains)


def read_rows(directory, data):
    (directory / "d.jsonl").write_bytes(data)
    domains = pairwise.DOMAINS
    for example in formats.load_examples(directory / "d.jsonl", domains=domains):
        pairwise.build_group(example, [(True, False)] * len(example.negatives), domains)


def read_rows_past_bad_ones(directory, data):
    (directory / "d.json").write_bytes(data)
    formats.load_examples(directory / "d.json", skip_bad_rows=True)


def read_adapter(directory, data):
    (directory / "adapter_config.json").write_bytes(data)
    (directory / "adapters.safetensors").write_bytes(b"")
    stored = adapters.read_adapter_config(directory)
    (directory / "manifest.json").write_bytes(data)
    export._base_of(config.ExportSettings(adapter_path=str(directory), model="m"), stored)


def read_manifest(directory, data):
    (directory / "manifest.json").write_bytes(data)
    export._base_of(config.ExportSettings(adapter_path=str(directory), model="m"), ADAPTER)


def read_metrics(directory, data):
    (directory / "metrics.json").write_bytes(data)
    (directory / "manifest.json").write_text(json.dumps(MANIFEST))
    tables.results_table({"e": read.read_evaluation(directory)[0]})


def read_scores(directory, data):
    (directory / "scores.jsonl").write_bytes(data)
    read._read(directory / "scores.jsonl", read._score)


READERS = {
    read_config: [SETTINGS],
    read_rows: [OWN, RELEASED, [RELEASED]],
    read_rows_past_bad_ones: [OWN, RELEASED, [OWN, OWN], [RELEASED, RELEASED]],
    read_adapter: [ADAPTER],
    read_manifest: [MANIFEST],
    read_metrics: [METRICS],
    read_scores: [SCORE],
}


def fuzz(read, inputs, count):
    outcomes = {"read": 0, "refused": 0}

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count < 500,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(inputs)
    def run(data):
        with tempfile.TemporaryDirectory() as directory:
            try:
                read(Path(directory), data)
                outcomes["read"] += 1
            except UserError as error:
                assert ": " in str(error)
                outcomes["refused"] += 1

    run()
    assert min(outcomes.values()) > count // 200, outcomes  # neither all refused nor all let through


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
@pytest.mark.parametrize("count", [100, pytest.param(1500, marks=pytest.mark.slow)])
def test_readers(read, count):
    fuzz(read, spoiled(READERS[read]), count)


def write_report(directory, files):
    for name, data in files.items():
        (directory / name).write_bytes(data)
    report_page.write_report([directory], directory / "report.html")


def as_lines(sound):
    return st.lists(near(sound), min_size=1, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())


def as_json(sound):
    return near(sound).map(lambda value: json.dumps(value).encode())


@pytest.mark.parametrize("count", [25, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "files",
    [{"metrics.json": as_json(METRICS), "scores.jsonl": as_lines(SCORE)}, {"metrics.jsonl": as_lines(TRAINING)}],
    ids=["evaluation", "training"],
)
def test_report_pages(files, count):
    """Reader, tables and pictures together."""
    fuzz(write_report, st.fixed_dictionaries({**files, "manifest.json": as_json(MANIFEST)}), count)
