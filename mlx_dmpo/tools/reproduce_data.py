"""The data of a comparison: that they are here, and the training data of its few-shot sizes"""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from itertools import product
from pathlib import Path

import numpy as np

from ..data import formats
from ..data.rows import hub_name
from ..errors import UserError
from ..machine import console, files
from .reproduce import Comparison, Data, subset


def check_data(plan: Comparison) -> None:
    """Raises UserError where data are not here: before the first cell, not hours later."""
    for name, given in plan.data.items():
        for part in (f.name for f in fields(Data)):
            for path in {getattr(given, part).replace("{k}", str(k)) for k in plan.k} - {""}:
                if not Path(path).exists() and not hub_name(path):
                    raise UserError(
                        f"data.{name}.{part}: {path}: no such file or directory: make it first (the head of the "
                        "file may say how), or correct the path"
                    )


def make_subsets(plan: Comparison) -> None:
    """Writes the training data of each few-shot size: the first so many examples of one draw, so that sizes are nested.

    Drawn, since neighbours in a file of sliding windows, as TALLRec's is, belong to one user.
    """
    for (name, given), few in product(plan.data.items(), plan.few_shot):
        for stage in ("sft", "dmpo") if few else ():
            target = subset(plan, name, few, stage)
            if (target / "train.jsonl").exists():
                continue
            source = (given.sft if stage == "sft" and given.sft else given.train).replace("{k}", str(max(plan.k)))
            examples = formats.load_examples(source, "train", notice=console.notice)
            if len(examples) < few:
                raise UserError(f"few_shot: {few}, and {source} has {len(examples)} examples: lower few_shot")
            rows = [examples[i].to_json() for i in np.random.default_rng(0).permutation(len(examples))[:few]]
            target.mkdir(parents=True, exist_ok=True)
            if (valid := Path(source) / "valid.jsonl").is_file():
                shutil.copyfile(valid, target / valid.name)
            text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
            files.write_text(target / "train.jsonl", text)
