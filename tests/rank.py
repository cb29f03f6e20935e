"""One process of a run: `python rank.py [--at STEP kill|stop|term] ARGUMENTS OF mlx-dmpo`, struck at a step when asked.

As a server (`python rank.py serve`) it imports once, then forks a child for each line of JSON arguments on its stdin
(["ENVIRONMENT=VALUE", ...], [argument, ...]) and prints the child's pid; later "PID STATUS".
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mlx_dmpo import cli, evaluate, train  # noqa: F401

if sys.argv[1] == "serve":
    for line in sys.stdin:
        environment, arguments = json.loads(line)
        child = os.fork()
        if not child:
            os.environ.update(pair.split("=", 1) for pair in environment)
            try:
                cli.main(arguments)
            except SystemExit as stop:
                sys.stdout.flush()
                os._exit(stop.code)
        print(f"pid {child}", flush=True)
        print(f"end {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)
else:
    arguments = sys.argv[1:]
    if arguments[0] == "--at":
        at, number = int(arguments[1]), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[arguments[2]]
        arguments = arguments[3:]
        original = train.Trainer._step

        def struck(self, groups, step):
            if step == at:
                os.kill(os.getpid(), number)
            return original(self, groups, step)

        train.Trainer._step = struck
    cli.main(arguments)
