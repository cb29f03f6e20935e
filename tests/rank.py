"""One process of a run: `python rank.py [--at STEP kill|stop|term|nan] ARGUMENTS OF mlx-dmpo`, struck at a step when
asked.

As a server (`python rank.py serve`) it imports once, then forks a child for each line of JSON on its stdin (a file to
tell the phase in, environment, arguments of mlx-dmpo) and prints "pid PID" and later "end STATUS".
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hooks
import pytest
from mlx.utils import tree_map

from mlx_dmpo.cli.main import main
from mlx_dmpo.report import charts
from mlx_dmpo.train import checkpoint, reference, reporting, validation


def write_phase(file, phase):
    os.pwrite(file, f"{phase:<12}".encode(), 0)


def tell_phase(file, owner, name, phase):
    """Writes `phase` to `file` when the function begins, and "between" when it ends."""
    original = getattr(owner, name)

    def call(*arguments, **keywords):
        write_phase(file, phase)
        try:
            return original(*arguments, **keywords)
        finally:
            write_phase(file, "between")

    setattr(owner, name, call)


if sys.argv[1] == "serve":
    for line in sys.stdin:
        phases, environment, arguments = json.loads(line)
        child = os.fork()
        if not child:
            os.environ.update(environment)
            file = os.open(phases, os.O_RDWR | os.O_CREAT)
            for owner, name, phase in (
                (reference.Reference, "add", "reference"),
                (reporting.Report, "step_done", "between"),
                (validation.Validation, "run", "validate"),
                (checkpoint.Checkpoints, "save", "save"),
                (charts, "plot_training", "end"),
            ):
                tell_phase(file, owner, name, phase)
            hooks.before_steps(pytest.MonkeyPatch(), lambda model, step, file=file: write_phase(file, "step"))
            try:
                main(arguments)
            except SystemExit as stop:
                sys.stdout.flush()
                os._exit(stop.code)
        print(f"pid {child}", flush=True)
        print(f"end {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)
else:
    arguments = sys.argv[1:]
    if arguments[0] == "--at":
        at, what = int(arguments[1]), arguments[2]
        arguments = arguments[3:]
        now = [0]

        def strike(model, step):
            now[0] = step.number
            if step.number == at and what != "nan":
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[what])

        patch = pytest.MonkeyPatch()
        hooks.before_steps(patch, strike)
        if what == "nan":
            spoil = lambda outputs: tree_map(lambda a: a * float("nan"), outputs) if now[0] == at else outputs  # noqa: E731
            hooks.on_outputs(patch, spoil)
    main(arguments)
