"""Settings of `rank`, `explain` and `serve`."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import CommonSettings, setting


@dataclass(frozen=True)
class UseSettings(CommonSettings):
    """What rank, explain and serve have in common."""

    data: str = setting("", "Data set with the catalogue and the users (embedded data when left out).", path=True)
    domain: str = setting("", "Domain of the titles (the data set's when left out, where it has one only; else movie).")
    method: str = setting(
        "",
        "items: each candidate scored by itself; pairs: candidates compared two by two, in both printed orders. "
        "When left out, pairs for the prompt pairwise and items for the others.",
        choices=("", "items", "pairs"),
    )
    budget: int = setting(
        0, "pairs: number of pairs to compare; 0 takes all pairs of up to 20 candidates, else about N log2 N.", low=0
    )
    start: str = setting(
        "random",
        "pairs with a budget: the first comparisons: a random tournament, or neighbours in the order that the "
        "direct prompt gives.",
        choices=("random", "items"),
    )
    batch_size: int = setting(8, "Groups run at once.", low=1)
    orders: int | None = setting(
        None, "listwise: printed orders of the candidates over which scores are averaged (4 when left out).", low=1
    )
    calibrate: bool = setting(
        False,
        "Subtract from each score the score without the history, which takes out the model's liking for the title "
        "itself.",
    )
    per_token: bool = setting(False, "direct and listwise: divide a title's log-prob by its tokens.")


@dataclass(frozen=True)
class RankSettings(UseSettings):
    adapter_path: str = setting("", "Adapter directory; without it the base model ranks.", path=True)
    history: tuple[str, ...] = setting((), "Title that the user liked, oldest first, or a file with one title a line.")
    user: str = setting("", "Instead: this user's history in --data.")
    candidates: tuple[str, ...] = setting(
        (),
        "Title to rank, or a file with one title a line or an items.jsonl (the catalogue without the history when "
        "left out).",
    )
    top: int = setting(0, "Print only the first N; 0 prints all.", low=0)
    out: str = setting("", "File to write the ranking to, as JSON.", path=True)


@dataclass(frozen=True)
class ExplainSettings(UseSettings):
    adapter_path: tuple[str, ...] = setting(
        (), "Adapter directory; several are explained side by side, and the last one ranks.", path=True
    )
    base: bool = setting(False, "Explain the base model beside the adapters.")
    history: tuple[str, ...] = setting((), "Title that the user liked, oldest first, or a file with one title a line.")
    user: str = setting("", "Instead: this user's history in --data.")
    chosen: str = setting("", "Title whose rank is explained (the first of the ranking when left out).")
    rejected: str = setting("", "Title that it is compared with (the best other one of the ranking when left out).")
    candidates: tuple[str, ...] = setting(
        (), "Title to rank, or a file of titles, where --chosen or --rejected is left out. As in rank."
    )
    max_flip: int | None = setting(
        None,
        "Largest set of history items searched for one that reverses the order (3 when left out; fewer where a long "
        "history has more than 5,000 such sets).",
        low=0,
        high=3,
    )
    out: str = setting("", "HTML file to write.", path=True)


@dataclass(frozen=True)
class ServeSettings(UseSettings):
    adapter_path: str = setting("", "Adapter directory; without it the base model ranks.", path=True)
    host: str = setting("127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines in.")
    port: int = setting(8765, "Port to listen on; 0 takes a free one.", low=0, high=65535)
    api_key: str = setting("", "Key that requests must send as `Authorization: Bearer KEY` (or MLX_DMPO_API_KEY).")
    max_body: int = setting(1_000_000, "Largest request body, in bytes.", low=1000)
    max_items: int = setting(2000, "Maximum number of titles per request, history and documents together.", low=2)
    max_request_tokens: int = setting(100_000, "Maximum number of tokens of all titles in a request.", low=16)
    max_queue: int = setting(64, "Maximum number of waiting requests; more get status 429.", low=1)
