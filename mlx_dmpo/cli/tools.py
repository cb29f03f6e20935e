"""The other commands: `sample`, `export`, `demo`, `plan`, `doctor`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import config
from ..errors import UserError
from ..machine import console
from .options import command_line, given, settings_of, settings_options


@click.command()
@settings_options(config.SampleSettings)
def sample(config_file: str | None, **options: Any) -> None:
    """Draw answers to each prompt, with log-probs; or, with --score, margins of all candidate negatives.

    \b
    mlx-dmpo sample --model M --data D --n 10 --temperature 0.8 --top-p 0.95 --top-k 50 --out samples.jsonl
    mlx-dmpo sample --model M --data D --score --out scores.jsonl      then: mlx-dmpo prepare ... --negatives scores:scores.jsonl

    Each negative is one prompt, printed in one order (the file's, or drawn by seed). An answer that ranks the two titles is parsed;
    its log-prob is the policy's, in nats, before temperature, top-p and top-k.
    """
    given = [name for name in ("n", "temperature", "top_p", "top_k", "max_tokens") if options[name] is not None]
    settings = settings_of(config.SampleSettings, "evaluate", config_file, options)
    if settings.score and given:
        raise UserError(
            f"--{given[0].replace('_', '-')}: does not apply with --score, which draws no answers: leave one of them out"
        )
    if options["scoring"] is not None and not settings.score:
        raise UserError("--scoring: applies with --score only: leave it out")
    from ..tools.sample import sample as run

    path, told = run(settings)
    click.echo(f"{told}\ndone: {path}")


@click.command()
@settings_options(config.ExportSettings)
def export(config_file: str | None, **options: Any) -> None:
    """Hand an adapter to other tools: a fused model directory for mlx-lm (--to mlx), or an adapter for PEFT (--to peft).

    A 4-bit base is dequantised and fused, unless --keep-quantized or --requantize says otherwise. What was written is read back,
    and the difference of its log-probs from those of base and adapter is printed.
    """
    settings = config.resolve(config.ExportSettings, config_file, given(options))
    from ..tools.export import export as run

    done = run(settings, command_line())
    click.echo(f"done: {console.printable(str(done.path))} (README.md is its model card)")
    click.echo(str(done.difference) if done.difference else "log-probs were not compared (--examples 0)")
    click.echo("to run it:")
    for line in done.commands:
        click.echo(f"  {console.printable(line)}")


@click.command()
@click.option("--out", default="runs/demo", show_default=True, metavar="DIR", help="Directory to write.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of both training stages.")
def demo(out: str, seed: int) -> None:
    """The whole chain on the embedded model and data, in a few minutes: sft, dmpo, evaluate, report."""
    from ..tools.demo import demo as run

    run(Path(out), seed)


@click.command()
@click.option("--model", default="qwen3-0.6b", show_default=True, help="Built-in name (qwen3-0.6b to qwen3-32b, -4bit or -8bit at the end), model directory, or config.json.")  # fmt: skip
@click.option("--data", default="", metavar="D", help="Measure the lengths of this data with --tokenizer's tokens (default: assumed lengths).")  # fmt: skip
@click.option("--tokenizer", default="", metavar="DIR", help="Directory of the tokenizer for --data (default: --model, where it is a directory).")  # fmt: skip
@click.option(
    "--history",
    default=22,
    show_default=True,
    type=click.IntRange(1),
    help="Assumed items of a history, without --data.",
)
@click.option(
    "--title-tokens",
    default=5,
    show_default=True,
    type=click.IntRange(1),
    help="Assumed tokens of a title, without --data.",
)
@click.option(
    "--groups", default=100, show_default=True, type=click.IntRange(1), help="Assumed training groups, without --data."
)
@click.option(
    "-k", "--num-negatives", default=5, show_default=True, type=click.IntRange(1), help="Negatives of a group."
)
@click.option(
    "--prompt", default="", metavar="FORM", help="pairwise (default), listwise, direct, pointwise, or a YAML file."
)
@click.option("--stage", default="dmpo", show_default=True, type=click.Choice(["sft", "dmpo"]), help="What is trained.")
@click.option("--batch-size", default=config.TrainSettings().batch_size, show_default=True, type=click.IntRange(1), help="Groups run at once.")  # fmt: skip
@click.option("--batch-tokens", default=config.TrainSettings().batch_tokens, show_default=True, type=click.IntRange(1), help="Tokens run at once.")  # fmt: skip
@click.option("--max-seq-length", default=config.TrainSettings().max_seq_length, show_default=True, type=click.IntRange(16), help="Longest prompt with answer, in tokens, with --data.")  # fmt: skip
@click.option("--num-layers", default=-1, show_default=True, type=click.IntRange(-1), help="Adapt this many of the last layers; -1 adapts all.")  # fmt: skip
@click.option(
    "--lora-rank",
    default=config.Lora().rank,
    show_default=True,
    type=click.IntRange(1),
    help="Rank of the LoRA matrices.",
)
@click.option(
    "--lora-keys", multiple=True, metavar="NAME", help="Linear layers to adapt (default: all). May be repeated."
)
@click.option("--optimizer", default="adamw", show_default=True, type=click.Choice(["adamw", "adam", "sgd", "adafactor", "muon", "lion"]), help="Optimiser.")  # fmt: skip
@click.option("--grad-checkpoint", is_flag=True, help="Recompute each layer in the backward pass.")
@click.option("--dtype", default="16", show_default=True, type=click.Choice(["16", "32"]), help="Bits of an activation, and of an unquantised weight.")  # fmt: skip
@click.option(
    "--epochs", default=3.0, show_default=True, type=click.FloatRange(0, min_open=True), help="Passes over the groups."
)
@click.option("--tflops", default=0.0, type=click.FloatRange(0), help="The rate that a step reaches; without it a few seconds of this machine's own matrix products tell.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def plan(**options: Any) -> None:
    """Will it fit, and how long will it take: memory, FLOPs and time of a training run before it starts.

    \b
    mlx-dmpo plan --model qwen3-8b-4bit -k 5 --history 36 --batch-size 1
    mlx-dmpo plan --model M --data D --grad-checkpoint --tflops 10
    """
    from ..tools.plan import run, told

    found = run(**options)
    if options["as_json"]:
        import json

        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(told(found))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, for a bug report.")
def doctor(as_json: bool) -> None:
    """What is installed, on which device it runs, what is slow here and how to mend it."""
    from ..tools.doctor import examine, told

    found = examine()
    if as_json:
        import json

        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(told(found))
