"""The house plan, held by reading every module's imports: what may import what, and what may not be imported at all."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mlx_dmpo"

# A package imports only from packages above it here. "" is the package itself.
ORDER = [
    {"", "errors"},
    {"assets", "config", "records"},
    {"scores"},
    {"machine"},
    {"report"},
    {"core"},
    {"prompts"},
    {"data"},
    {"model"},
    {"train", "judge", "use", "baselines"},
    {"tools"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: height for height, floor in enumerate(ORDER) for name in floor}


def room(name):
    return name.split(".")[0]


HEAVY = {"mlx", "mlx_lm", "transformers", "tokenizers", "datasets", "pyarrow", "matplotlib"}
LIGHT_AT_IMPORT = {"", "assets", "cli", "config", "data", "errors", "prompts", "records", "report"}
FORBIDDEN = {"torch", "pickle", "cPickle", "dill", "cloudpickle", "joblib"}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
each_module = pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "mlx_dmpo")


def parse(name):
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def nodes(tree, at_import_only=False):
    """All nodes, or only those that run when the module is imported: not in functions, not under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if at_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from nodes(node, at_import_only)


def imports(tree, name, modules=MODULES, at_import_only=False):
    """(line, dotted name) of every import; the project's own modules as in FLOOR, with a leading dot."""
    is_package = name in modules and modules[name].name == "__init__.py"
    for node in nodes(tree, at_import_only):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = name.split(".") if name else []
                here = here[: len(here) - node.level + is_package]
                base = ".".join(["mlx_dmpo", *here, *([base] if base else [])])
            # `from . import losses` imports a module, `from .losses import dmpo` a name in one
            found = [
                f"{base}.{a.name}" if f"{base}.{a.name}".removeprefix("mlx_dmpo.") in modules else base
                for a in node.names
            ]
        else:
            continue
        for target in found:
            own = target == "mlx_dmpo" or target.startswith("mlx_dmpo.")
            yield node.lineno, "." + target.removeprefix("mlx_dmpo").removeprefix(".") if own else target


def outside(tree, name, **how):
    return [(line, target.split(".")[0]) for line, target in imports(tree, name, **how) if not target.startswith(".")]


def upward(tree, name, modules=MODULES):
    """Imports of a module that is not on a lower floor."""
    own = [(line, target[1:]) for line, target in imports(tree, name, modules) if target.startswith(".")]
    return [
        f"line {line}: {name} imports {target}"
        for line, target in own
        if room(target) != room(name) and FLOOR.get(room(target), len(ORDER)) >= FLOOR[room(name)]
    ]


def unsafe(tree):
    """`trust_remote_code` or `allow_pickle` that is not plainly False, `yaml.load` without a loader made from
    SafeLoader in the same file, text that is run, and archives that are unpacked whole (a member's name may lead out of
    the directory).
    """
    safe = {
        n.name
        for n in nodes(tree)
        if isinstance(n, ast.ClassDef) and any("SafeLoader" in ast.unparse(b) for b in n.bases)
    }
    safe |= {"yaml.SafeLoader", "yaml.CSafeLoader"}
    refused = [
        n.keys[i]
        for n in nodes(tree)
        if isinstance(n, ast.Dict)
        for i, v in enumerate(n.values)
        if ast.unparse(v) == "False"
    ]
    for node in nodes(tree):
        for name in ("trust_remote_code", "allow_pickle"):
            if getattr(node, "arg", None) == name and ast.unparse(getattr(node, "value", node)) != "False":
                yield f"line {node.lineno}: {name}"
            if getattr(node, "value", None) == name and node not in refused:  # {"trust_remote_code": False} says no
                yield f"line {node.lineno}: {name}"
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"extractall", "unpack_archive"}:
            yield f"line {node.lineno}: {ast.unparse(node.func)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "eval",
            "exec",
            "compile",
            "__import__",
            "os.system",
            "os.popen",
        }:
            yield f"line {node.lineno}: {ast.unparse(node.func)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"yaml.load", "yaml.load_all", "yaml.compose"}:
            loaders = [ast.unparse(a) for a in node.args[1:2]] + [
                ast.unparse(k.value) for k in node.keywords if k.arg == "Loader"
            ]
            if not loaders or loaders[0] not in safe:
                yield f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {
            "yaml.unsafe_load",
            "yaml.full_load",
            "yaml.UnsafeLoader",
            "yaml.FullLoader",
            "yaml.Loader",
        }:
            yield f"line {node.lineno}: {ast.unparse(node)}"


LINES_OF_A_FILE, LINES_OF_A_FUNCTION, FRAMES = 400, 80, 7


@each_module
def test_files_and_functions_are_short(name):
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= LINES_OF_A_FILE
    functions = [n for n in nodes(parse(name)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f"line {n.lineno}: {n.name}": n.end_lineno - n.lineno + 1 for n in functions}
    assert {f: n for f, n in lengths.items() if n > LINES_OF_A_FUNCTION} == {}


@pytest.mark.parametrize("name", [n for n in MODULES if room(n) == "core" or n == "train.loop"], ids=str)
def test_the_method_and_the_loop_know_no_settings(name):
    own = {target[1:].split(".")[0] for _, target in imports(parse(name), name) if target.startswith(".")}
    assert not own & {"config"}
    if room(name) == "core":
        assert own <= {"core", "errors"}
    assert "settings" not in {n.id for n in nodes(parse(name)) if isinstance(n, ast.Name)}


def cycle(graph):
    """A cycle of a graph {node: its successors}, as a list; [] where there is none."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done or node not in graph:
            return []
        path.append(node)
        found = next(filter(None, map(visit, sorted(graph[node]))), [])
        path.pop()
        done.add(node)
        return found

    return next(filter(None, map(visit, sorted(graph))), [])


def test_no_modules_import_each_other():
    """At import time. A package's `__init__` names its parts, which may name the package's siblings."""
    graph = {
        name: {t[1:] for _, t in imports(parse(name), name, at_import_only=True) if t.startswith(".")} - {name, ""}
        for name in MODULES
        if name
    }
    assert cycle(graph) == []
    assert cycle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]


def test_frames_from_the_command_to_the_loss(tmp_path, monkeypatch, model_directory, data_directory):
    """In a step of `mlx-dmpo dmpo`, where the loss is entered: our own frames, `main` and the loss included."""
    from mlx_dmpo.cli.main import main
    from mlx_dmpo.core import losses

    stacks, original = [], losses.REDUCTIONS["dmpo"]

    def counted(*arguments, **keywords):
        frame, found = sys._getframe(), ["dmpo of core/losses.py"]
        while frame := frame.f_back:
            if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
                place = Path(frame.f_code.co_filename).relative_to(PACKAGE)
                found.append(f"{frame.f_code.co_name} of {place}")
        stacks.append(found[::-1])
        return original(*arguments, **keywords)

    monkeypatch.setitem(losses.REDUCTIONS, "dmpo", counted)
    flags = dict(model=model_directory, data=data_directory, adapter_path=tmp_path / "run", iters=1, val_batches=0)
    with pytest.raises(SystemExit) as end:
        main(["dmpo", *(str(word) for flag, value in flags.items() for word in (f"--{flag.replace('_', '-')}", value))])
    assert end.value.code == 0 and stacks
    assert max(map(len, stacks)) <= FRAMES, stacks[0]


def test_every_room_has_its_place():
    assert {room(name) for name in MODULES} == set(FLOOR), "put new rooms in ORDER, and take removed ones out"


@each_module
def test_imports_point_downwards(name):
    if name:  # the package itself offers what is above it, by name and when it is first used
        assert upward(parse(name), name) == []


def test_the_package_imports_nothing_of_its_own_when_imported():
    own = [target for _, target in imports(parse(""), "", at_import_only=True) if target.startswith(".")]
    assert own == []


@each_module
def test_nothing_forbidden(name):
    tree = parse(name)
    assert [(line, target) for line, target in outside(tree, name) if target in FORBIDDEN] == []
    assert list(unsafe(tree)) == []


@each_module
def test_mlx_lm_lives_in_model(name):
    if room(name) != "model":
        assert [(line, target) for line, target in outside(parse(name), name) if target == "mlx_lm"] == []


@pytest.mark.parametrize(
    "name", [n for n in MODULES if room(n) in {"config", "data", "prompts", "records", "report"}], ids=str
)
def test_what_needs_no_model_imports_none(name):
    banned = {"mlx", "mlx_lm", "transformers", "tokenizers"}
    assert [(line, target) for line, target in outside(parse(name), name) if target in banned] == []


@pytest.mark.parametrize("name", [n for n in MODULES if room(n) in LIGHT_AT_IMPORT], ids=lambda n: n or "mlx_dmpo")
def test_imports_nothing_heavy_when_imported(name):
    heavy = HEAVY - ({"pyarrow"} if name.startswith("data.sources") else set())  # imported when `prepare` runs
    assert [(line, target) for line, target in outside(parse(name), name, at_import_only=True) if target in heavy] == []


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("core.losses", "from ..train.run import train", ["line 1: core.losses imports train.run"]),
        ("core.losses", "from ..train import run", ["line 1: core.losses imports train.run"]),
        ("train.run", "from ..judge import metrics", ["line 1: train.run imports judge.metrics"]),  # beside, not below
        ("core.losses", "def f():\n    import mlx_dmpo.train.run", ["line 2: core.losses imports train.run"]),
        ("core.losses", "from .. import __version__, records\nfrom .tree import pad_groups", []),
        ("data.formats", "from ..core.scorer import shared_logps", []),
        ("core.losses", "from ..machine import files\nfrom ..errors import UserError", []),
    ],
)
def test_the_reader_of_imports_sees_upward_ones(name, source, found):
    assert upward(ast.parse(source), name) == found


UNSAFE = """
import yaml
class Mine(yaml.SafeLoader): pass
yaml.safe_load(text)
yaml.load(text, Loader=Mine)
yaml.load(text)
load(model, trust_remote_code=True)
load(model, **{"trust_remote_code": True})
load(model, trust_remote_code=False, config={"trust_remote_code": False})
numpy.load(path, allow_pickle=True)
numpy.load(path, allow_pickle=False)
archive.extractall(path)
eval(text)
model.eval()
"""


def test_the_reader_of_imports_sees_unsafe_calls():
    assert list(unsafe(ast.parse(UNSAFE))) == [
        "line 6: yaml.load(text)",
        "line 7: trust_remote_code",
        "line 8: trust_remote_code",
        "line 10: allow_pickle",
        "line 12: archive.extractall",
        "line 13: eval",
    ]


HELP = """
import json, sys
from mlx_dmpo.cli.main import main
try:
    main(["--help"])
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def test_help_loads_nothing_heavy():
    """`mlx-dmpo --help` answers at once: no array library, no tokenizer, no plots."""
    run = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "evaluate" in run.stdout
    loaded = {module.split(".")[0] for module in json.loads(run.stderr.splitlines()[-1])}
    assert loaded & (HEAVY | FORBIDDEN - {"pickle"}) == set()  # pickle: the standard library's own modules may use it


def test_python_m_is_the_command():
    run = subprocess.run([sys.executable, "-m", "mlx_dmpo", "--version"], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("mlx-dmpo")
