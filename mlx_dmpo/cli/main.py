"""The command line: `mlx-dmpo`, its commands, its exit codes"""

from __future__ import annotations

import os
import signal
import sys
import traceback

import click

from .. import __version__
from ..errors import Interrupted, UserError
from ..machine import console
from . import baseline, compare, data, evaluate, get_model, reproduce, tools, train, use
from .options import Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mlx-dmpo")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def cli(verbose: bool) -> None:
    """Fine-tune a language model into a personal ranker: SFT, then DMPO, then pairwise ranking evaluation.

    \b
    mlx-dmpo demo                                try the whole chain
    mlx-dmpo prepare  movielens ml-1m --out D    ratings -> examples
    mlx-dmpo sft      --model M --data D --adapter-path runs/sft
    mlx-dmpo dmpo     --model M --data D --start-adapter runs/sft
    mlx-dmpo evaluate --model M --data D --adapter-path runs/dmpo
    mlx-dmpo export   --model M --adapter-path runs/dmpo

    M is what mlx-lm loads: a directory, or a hub repository such as mlx-community/Qwen3-8B-4bit. D is a directory with
    train.jsonl, valid.jsonl and test.jsonl, one file in any of the formats of docs/data.md, or a data set of the hub.
    Without flags every command uses the embedded tiny model and its fictional data.

    `mlx-dmpo COMMAND --help` shows the flags that matter first, --help-all all of them.
    """


# In the order of `mlx-dmpo --help`; a new command file adds its line here.
for command in (
    data.prepare,
    train.sft,
    train.dmpo,
    evaluate.evaluate,
    baseline.baseline,
    compare.compare,
    data.check,
    tools.sample,
    evaluate.report,
    use.rank,
    use.explain,
    use.serve,
    tools.export,
    tools.demo,
    tools.plan,
    tools.doctor,
    get_model.get_model,
    reproduce.reproduce,
    tools.completion,
):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. Exit codes: 0 done; 2 something the user can fix, one line on stderr; 130, 143 stopped by
    Ctrl-C or SIGTERM; 141 nobody reads the output; 1 internal error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verbose = "--verbose" in arguments
    try:
        code = cli.main(arguments, prog_name="mlx-dmpo", standalone_mode=False)
        raise SystemExit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        raise SystemExit(0) from None
    except (UserError, click.ClickException) as error:
        if verbose:
            traceback.print_exc()
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        console.notice("error: " + " ".join(text.split()))
        raise SystemExit(2) from None
    except Interrupted as error:
        console.notice(str(error))
        raise SystemExit(128 + error.signal) from None
    except (KeyboardInterrupt, click.Abort):
        console.notice("interrupted")
        raise SystemExit(130) from None
    except BrokenPipeError:  # `mlx-dmpo ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        raise SystemExit(128 + signal.SIGPIPE) from None
    except Exception as error:
        if verbose:
            traceback.print_exc()
        console.notice(
            f"internal error: {type(error).__name__}: {error}: run again as `mlx-dmpo --verbose ...` and report it"
        )
        raise SystemExit(1) from None
