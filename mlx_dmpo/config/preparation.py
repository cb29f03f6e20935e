"""Settings of `prepare`, `convert` and `check`."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import setting


@dataclass(frozen=True)
class PrepareSettings:
    out: str = setting("", "Directory to write: train, valid, test and items.jsonl, summary.png, manifest.", path=True)
    recipe: str = setting(
        "",
        "paper: the paper's sizes, 100 training, 100 validation and 1000 test users, one example each.",
        choices=("", "paper"),
    )
    examples_per_user: str = setting(
        "",
        "Examples per user, or all. Each has a different liked item as the positive, and the items liked before it as "
        "the history (1; all for a single person).",
    )
    split: str = setting(
        "",
        "How train, valid and test are separated: by user (different people) or time (each person's earlier items "
        "train); time for a single person, else user.",
        choices=("", "user", "time"),
    )
    domains: str = setting("", "Name of each PATH's domain, comma-separated (the source's own name when left out).")
    train_domains: str = setting(
        "", "Domains that training and validation users come from, comma-separated (all when left out)."
    )
    test_domains: str = setting("", "Domains that test users come from, comma-separated (all when left out).")
    liked_above: float | None = setting(
        None,
        "Ratings above this are liked, the others disliked (3 on a scale up to 5; else the midpoint of the ratings' "
        "own scale).",
    )
    liked_quantile: float | None = setting(
        None,
        "Instead: ratings above this quantile of the user's own are liked (lastfm, scrobbles: 0.5, the user's median "
        "play count).",
        above=0,
        high=0.99,
    )
    unrated: float | None = setting(
        None, 'A rating that means "not rated", such as 0 or -1: these rows are left out and counted.'
    )
    max_interactions: int = setting(40, "Number of the latest interactions that an example uses; 0 takes all.", low=0)
    min_liked: int = setting(5, "Minimum number of liked items per user.", low=2)
    min_disliked: int = setting(5, "Minimum number of disliked items per user.", low=0)
    order: str = setting(
        "",
        "Order of a user's interactions (time where the file has timestamps, else file; random for lastfm, whose "
        "file is sorted by plays).",
        choices=("", "time", "file", "random"),
    )
    train_users: int | None = setting(None, "Training users of each domain (all that are not in valid or test).", low=0)
    valid_users: int | None = setting(
        None, "Validation users of each domain (a tenth of the eligible, at most 100).", low=0
    )
    test_users: int | None = setting(None, "Test users of each domain (a fifth of the eligible, at most 1000).", low=0)
    few_shot: int = setting(
        0,
        "Use only the first N training users; 16, 64 and 256 are nested, and valid and test stay as they are. 0 "
        "takes all.",
        low=0,
    )
    num_negatives: int = setting(5, "Negatives per example; 0 takes all disliked items.", low=0)
    negatives: str = setting(
        "disliked",
        "Where negatives come from: disliked; uniform or popularity (drawn from items that the user has not seen); "
        "scores:FILE (disliked items with the smallest margins first; JSON lines of user, positive, negative, margin).",
        path=True,
    )
    catalogue: str = setting(
        "",
        "File of more titles, with their popularity where a column has it (items.jsonl of another prepared directory, "
        "or a table). Negatives are drawn from them too, and rankings include them.",
        path=True,
    )
    encoding: str = setting(
        "", "Encoding of the text files, such as cp1252 or shift_jis (UTF-8, and Windows-1252 for titles of old dumps)."
    )
    date_order: str = setting(
        "",
        "Whether dates such as 11/09/2004 begin with the month or the day (as other rows show; else month-first).",
        choices=("", "month-first", "day-first"),
    )
    title_articles: bool = setting(True, 'Put a title\'s article first: "Sixth Sense, The" becomes "The Sixth Sense".')
    title_years: bool = setting(True, 'Keep the year that ends a title: "(1999)".')
    skip_bad_rows: bool = setting(
        False, "Leave out rows that cannot be read, counting them, instead of stopping at the first."
    )
    seed: int = setting(0, "Seed of everything random: which users, which negatives, random order.", low=0)
    overwrite: bool = setting(False, "Replace a finished directory in --out.")


@dataclass(frozen=True)
class MovielensSettings(PrepareSettings):
    recipe: str = setting(
        "",
        "paper: the paper's sizes, 100 training, 100 validation and 1000 test users. dmpo-release: write the seven "
        "MovieLens-1M files of the DMPO release instead, byte for byte; it fixes every other rule.",
        choices=("", "paper", "dmpo-release"),
    )


@dataclass(frozen=True)
class TableSettings(PrepareSettings):
    items: str = setting(
        "", "File of titles, one row per item (else a title column of PATH, or the item itself).", path=True
    )
    user_column: str = setting(
        "", "Column of the user in PATH, by name or place (guessed from the names when left out, as are the others)."
    )
    item_column: str = setting("", "Column of the item in PATH.")
    rating_column: str = setting("", "Column of the rating.")
    time_column: str = setting("", "Column of the time: a number or a date.")
    title_column: str = setting("", "Column of the title, in --items or in PATH.")
    items_id_column: str = setting("", "Column of the item in --items (the same as in PATH, else guessed).")


@dataclass(frozen=True)
class CheckSettings:
    model: str = setting(
        "",
        "Model whose tokenizer counts tokens: a directory or hub repository (no token counts when left out).",
        path=True,
    )
    max_seq_length: int = setting(2048, "Maximum length of prompt plus answer, in tokens.", low=16)
    num_negatives: int = setting(0, "Negatives used of each example; 0 takes all.", low=0)
    prompt: str = setting(
        "",
        "Prompt form whose tokens are counted: pairwise (when left out), listwise, direct, pointwise, or a YAML file.",
    )
    domain: str = setting("", "Domain of rows that name none, such as S-DPO's.")
    domains: dict[str, dict[str, str]] = setting(
        dict, "Wording of further domains: name -> topic, items, consumed, consuming (YAML only)."
    )


@dataclass(frozen=True)
class ConvertSettings:
    out: str = setting("", "Directory to write: train, valid and test.jsonl, manifest.", path=True)
    valid: float = setting(0.1, "Share of the users that goes to valid.jsonl.", low=0, high=0.9)
    test: float = setting(0.1, "Share of the users that goes to test.jsonl.", low=0, high=0.9)
    valid_data: str = setting("", "File that becomes valid.jsonl whole, instead of a share of FILE.", path=True)
    test_data: str = setting("", "File that becomes test.jsonl whole, instead of a share of FILE.", path=True)
    domain: str = setting(
        "",
        "Domain of rows that name none, such as S-DPO's: a built-in one (movie, game, ...), or one worded under "
        "`domains:`.",
    )
    skip_bad_rows: bool = setting(
        False, "Continue without rows that cannot be read, naming each, rather than stop at the first."
    )
    seed: int = setting(0, "Seed of which users go to which split.", low=0)
    overwrite: bool = setting(False, "Replace a finished directory in --out.")
    domains: dict[str, dict[str, str]] = setting(
        dict, "Wording of further domains: name -> topic, items, consumed, consuming (YAML only)."
    )
