"""The other commands: `sample`, `export`, `demo`, `plan`, `doctor`, `completion`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .. import config
from ..machine import console
from .options import command_line, settings_command, settings_of


@settings_command(config.SampleSettings, "Draw answers, or score candidate negatives.")
def sample(config_file: str | None, **options: Any) -> None:
    """Draw answers to each prompt, with log-probs; or, with --score, margins of all candidate negatives.

    \b
    mlx-dmpo sample --model M --data D --n 10 --temperature 0.8 --out samples.jsonl
    mlx-dmpo sample --model M --data D --score --out scores.jsonl
    mlx-dmpo prepare ... --negatives scores:scores.jsonl

    Each negative is one prompt, printed in one order (the file's, or drawn by seed). An answer that ranks the two
    titles is parsed; its log-prob is the policy's, in nats, before temperature, top-p and top-k.
    """
    settings = settings_of(config.SampleSettings, "evaluate", config_file, options)
    from ..tools.sample import sample as run

    path, summary = run(settings)
    click.echo(f"{summary}\ndone: {path}")


@settings_command(config.ExportSettings, "Make a model for mlx-lm or an adapter for PEFT.")
def export(config_file: str | None, **options: Any) -> None:
    """Export an adapter: as a fused model directory for mlx-lm (--to mlx), or as an adapter for PEFT (--to peft).

    A 4-bit base is dequantized and fused, unless --keep-quantized or --requantize says otherwise. The export is read
    back, and the difference of its log-probs from those of base and adapter is printed.
    """
    settings = settings_of(config.ExportSettings, "", config_file, options)
    from ..tools.export import export as run

    done = run(settings, command_line())
    click.echo(f"done: {console.printable(str(done.path))} (README.md is its model card)")
    click.echo(str(done.difference) if done.difference else "log-probs were not compared (--examples 0)")
    click.echo("to run it:")
    for line in done.commands:
        click.echo(f"  {console.printable(line)}")


@click.command(short_help="Run the whole chain on the embedded model and data.")
@click.option("--out", default="runs/demo", show_default=True, metavar="DIR", help="Directory to write.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of both training stages.")
@click.option(
    "--prompt", default="", metavar="FORM", help="Prompt form: pairwise (default), listwise, direct, pointwise."
)
def demo(out: str, seed: int, prompt: str) -> None:
    """Run sft, dmpo, evaluate and report on the embedded model and data, in a few minutes."""
    from ..tools.demo import demo as run

    run(Path(out).expanduser(), seed, prompt)


@settings_command(config.PlanSettings, "Estimate memory and time before training.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def plan(config_file: str | None, as_json: bool, **options: Any) -> None:
    """Estimate whether a training run fits and how long it takes: memory, FLOPs, time.

    \b
    mlx-dmpo plan --model qwen3-8b-4bit -k 5 --history 36 --batch-size 1
    mlx-dmpo plan --model M --data D --grad-checkpoint --tflops 10
    """
    settings = settings_of(config.PlanSettings, "", config_file, options)
    from ..tools.plan import format_plan, run

    found = run(settings)
    click.echo(json.dumps(found, indent=2, allow_nan=False) if as_json else format_plan(found))


@click.command(short_help="Show versions, device, speed, and what to fix.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, for a bug report.")
def doctor(as_json: bool) -> None:
    """Show what is installed, on which device it runs, what is slow here and how to fix it."""
    from ..tools.doctor import examine, format_report

    found = examine()
    click.echo(json.dumps(found, indent=2, allow_nan=False) if as_json else format_report(found))


INSTALL = {
    "bash": "echo 'eval \"$(mlx-dmpo completion bash)\"' >> ~/.bashrc",
    "zsh": "echo 'eval \"$(mlx-dmpo completion zsh)\"' >> ~/.zshrc",
    "fish": "mlx-dmpo completion fish > ~/.config/fish/completions/mlx-dmpo.fish",
}


@click.command(short_help="Print the script that completes commands and flags.")
@click.argument("shell", type=click.Choice(list(INSTALL)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands and flags in bash, zsh or fish. To install it:

    \b
    bash   echo 'eval "$(mlx-dmpo completion bash)"' >> ~/.bashrc
    zsh    echo 'eval "$(mlx-dmpo completion zsh)"' >> ~/.zshrc
    fish   mlx-dmpo completion fish > ~/.config/fish/completions/mlx-dmpo.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind
    script = kind(context.find_root().command, {}, "mlx-dmpo", "_MLX_DMPO_COMPLETE")
    click.echo(f"# To install: {INSTALL[shell]}")
    click.echo(script.source_template % script.source_vars())
