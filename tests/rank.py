"""One process of a run: `python rank.py [--at STEP kill|stop|term|nan] ARGUMENTS OF mlx-dmpo`, struck at a step when asked.

As a server (`python rank.py serve`) it imports once, then forks a child for each line of JSON on its stdin (a file to tell
the phase in, environment, arguments of mlx-dmpo) and prints "pid PID" and later "end STATUS".
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlx_dmpo.cli.main import main
from mlx_dmpo.report import charts
from mlx_dmpo.train import reference, trainer


def tell_phase(file, owner, name, phase):
    """Writes `phase` to `file` when the function begins, and "between" when it ends."""
    original = getattr(owner, name)

    def call(*arguments, **keywords):
        os.pwrite(file, f"{phase:<12}".encode(), 0)
        try:
            return original(*arguments, **keywords)
        finally:
            os.pwrite(file, f"{'between':<12}".encode(), 0)

    setattr(owner, name, call)


if sys.argv[1] == "serve":
    for line in sys.stdin:
        phases, environment, arguments = json.loads(line)
        child = os.fork()
        if not child:
            os.environ.update(environment)
            file = os.open(phases, os.O_RDWR | os.O_CREAT)
            trainer = trainer.Trainer
            for owner, name in (
                (reference.Reference, "add"),
                (trainer, "_step"),
                (trainer, "validate"),
                (trainer, "save"),
                (charts, "plot_training"),
            ):
                tell_phase(file, owner, name, {"add": "reference", "plot_training": "end"}.get(name, name.strip("_")))
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
        original = trainer.Trainer._step

        def struck(self, groups, step):
            if step == at and what == "nan":
                sound = self.step_function
                self.step_function = lambda *inputs: trainer.tree_map(lambda a: a * float("nan"), sound(*inputs))
                numbers = original(self, groups, step)
                self.step_function = sound
                return numbers
            if step == at:
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[what])
            return original(self, groups, step)

        trainer.Trainer._step = struck
    main(arguments)
