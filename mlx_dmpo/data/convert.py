"""A data file of any format whose titles can be recovered -> train, valid and test.jsonl of ranking examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..config import ConvertSettings
from ..errors import UserError
from ..machine import files, run_directory
from ..prompts import pairwise
from ..records import RankingExample
from . import formats
from .rows import data_file, hub_inputs


def split_users(
    examples: Sequence[RankingExample], valid: float, test: float, seed: int
) -> dict[str, list[RankingExample]]:
    """Disjoint users by seed: `valid` and `test` shares of them (rounded, at least one each where the share is not 0),
    the others train.

    Examples keep their order. Raises UserError where the users do not suffice.
    """
    users = list(dict.fromkeys(e.user for e in examples))
    counts = {
        name: max(1, round(share * len(users))) if share else 0 for name, share in (("valid", valid), ("test", test))
    }
    if sum(counts.values()) >= len(users):
        raise UserError(
            f"--valid, --test: {counts['valid']} + {counts['test']} of {len(users)} users leave none to train on: "
            "take smaller shares"
        )
    drawn = np.random.default_rng(seed).permutation(len(users))
    split_of = {
        users[i]: "test" if n < counts["test"] else "valid" for n, i in enumerate(drawn[: sum(counts.values())])
    }
    splits: dict[str, list[RankingExample]] = {"train": [], "valid": [], "test": []}
    for e in examples:
        splits[split_of.get(e.user, "train")].append(e)
    return splits


def convert(file: str, settings: ConvertSettings, command: str, notice: Callable[[str], None]) -> Path:
    """Writes the directory, the manifest last.

    Raises UserError for what the user can fix, before anything is written.
    """
    if not settings.out:
        raise UserError("--out: is missing: name the directory to write")
    for split in ("valid", "test"):
        if getattr(settings, f"{split}_data") and getattr(settings, split) != getattr(ConvertSettings, split):
            raise UserError(
                f"--{split}: a share does not apply where --{split}-data names the whole file: keep one of them"
            )
    domains = pairwise.with_domains(settings.domains)
    given = {"train": file, "valid": settings.valid_data, "test": settings.test_data}
    read = {
        split: formats.load_examples(name, split, domains, settings.skip_bad_rows, notice, settings.domain)
        for split, name in given.items()
        if name
    }
    valid, test = (
        0.0 if split in read else share for split, share in (("valid", settings.valid), ("test", settings.test))
    )
    splits = split_users(read["train"], valid, test, settings.seed) | {
        s: examples for s, examples in read.items() if s != "train"
    }
    with run_directory.RunDirectory(settings.out, command, settings, overwrite=settings.overwrite, flag="--out") as run:
        for name, split in ((n, s) for s, n in given.items() if n):
            if path := data_file(name, split):
                run.input(path)
            run.inputs |= hub_inputs(name, split)
        facts = {}
        for split, examples in splits.items():
            text = "".join(json.dumps(e.to_json(), ensure_ascii=False, allow_nan=False) + "\n" for e in examples)
            (run.path / f"{split}.jsonl").unlink(missing_ok=True)
            if examples:  # an empty file would be no split
                files.write_text(run.path / f"{split}.jsonl", text)
            facts[split] = {
                "examples": len(examples),
                "users": len({e.user for e in examples}),
                "pairs": sum(len(e.negatives) for e in examples),
            }
            print(
                f"{split + '.jsonl':<12} {facts[split]['examples']} examples, {facts[split]['users']} users, "
                f"{facts[split]['pairs']} pairs"
            )
        run.finish("cpu", splits=facts)
        return run.path
