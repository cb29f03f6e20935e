"""The command that measures baseline rankers: `baseline`"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from ..config.baseline import BASELINES, BaselineSettings, check_baseline
from ..machine import console
from .options import command_line, given, say_done, settings_of, settings_options


@click.command(short_help="Measure popularity, ALS, SASRec and other baselines.")
@click.argument("name", type=click.Choice(BASELINES), metavar="NAME")
@settings_options(BaselineSettings)
def baseline(name: str, config_file: str | None, **options: Any) -> None:
    """Measure a baseline ranker, and write the same files as `evaluate`.

    \b
    first-listed, popularity, like-ratio            counts of likes
    als, bpr, item-knn                              factors and neighbours of likes; they need the package implicit
    gru4rec, caser, sasrec, dros-sasrec             models of item sequences, trained here
    zero-shot, in-context                           --model as it is, alone or with worked examples in the prompt

    \b
    mlx-dmpo baseline popularity --data D --fit all
    mlx-dmpo baseline sasrec --data test.json --train-data train.json --match-titles short
    mlx-dmpo baseline in-context --model M --data D --prompt direct --shots 4
    """
    settings = settings_of(BaselineSettings, "baseline", config_file, options)
    from ..baselines.open import open_baseline
    from ..baselines.scorer import ItemScorer
    from ..judge.evaluate import output_directory, read_examples, write_evaluation
    from ..report import tables

    check_baseline(name, settings, given(options))
    settings = replace(settings, out=settings.out or f"runs/baselines/{name}")
    examples = read_examples(settings)
    scorer, facts = open_baseline(name, settings, examples)
    result = write_evaluation(scorer, examples, settings, command_line(), baseline=name, **facts)
    if isinstance(scorer, ItemScorer) and scorer.note():
        console.notice(scorer.note())
    out = output_directory(settings)
    say_done(f"{tables.results_table({name: result})}\ndone: {out}\nnext: mlx-dmpo report {out} --out report.html")
