"""Every format, and which one a row has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...records import Example
from .alpaca import read_alpaca
from .chat import read_chat, read_sharegpt
from .common import Context, Row, fail, is_preference
from .ranking import read_own, read_released, read_s_dpo
from .tallrec import read_tallrec
from .trl import read_completion, read_trl


@dataclass(frozen=True)
class Format:
    """A format's name in messages, whether a row has its fields, and how a row is read.

    fields  the fields it reads, others are named in a note; None where the reader refuses unknown fields itself
    text    whether a row holds a prompt in free text, so that a column beside it may hold a part of the prompt
    """

    name: str
    fits: Callable[[Row], bool]
    read: Callable[[Row, str, Context], Example]
    fields: frozenset[str] | None = None
    text: bool = True


def _named(*names: str) -> frozenset[str]:
    return frozenset(names)


def _starts(row: Row, column: str, start: str) -> bool:
    return "instruction" in row and isinstance(row.get(column), str) and row[column].startswith(start)


def _trl(conversational: bool, explicit: bool) -> Callable[[Row], bool]:
    return lambda row: (
        is_preference(row) and isinstance(row["chosen"], list) == conversational and ("prompt" in row) == explicit
    )


_ALPACA = _named("instruction", "input", "output", "history", "system", "chosen", "rejected")


_SHAREGPT = _named("conversations", "system", "chosen", "rejected")


_TRL = _named("prompt", "chosen", "rejected", "system")


_OWN = _named("user", "domain", "history", "positive", "negatives")


_S_DPO = _named("historyList", "itemList", "trueSelection")


OWN, RELEASED, TALLREC, S_DPO = "ranking examples", "released DMPO JSON", "TALLRec JSON", "S-DPO candidate lists"


# The first that fits a row is its format.
FORMATS = (
    Format(S_DPO, lambda row: "trueSelection" in row, read_s_dpo, _S_DPO, text=False),
    Format(
        TALLREC,
        lambda row: _starts(row, "input", "User Preference:"),
        read_tallrec,
        _named("instruction", "input", "output"),
        text=False,
    ),
    Format(
        RELEASED,
        lambda row: (
            "output" in row
            and not is_preference(row)
            and _starts(row, "instruction", "You are an assistant working on ")
        ),
        read_released,
    ),
    Format(
        "LLaMA-Factory alpaca preferences",
        lambda row: "instruction" in row and (is_preference(row) or isinstance(row.get("output"), list)),
        read_alpaca,
        _ALPACA,
    ),
    Format("alpaca rows (SFT)", lambda row: "instruction" in row, read_alpaca, _ALPACA),
    Format("ShareGPT preferences", lambda row: "conversations" in row and is_preference(row), read_sharegpt, _SHAREGPT),
    Format("ShareGPT conversations (SFT)", lambda row: "conversations" in row, read_sharegpt, _SHAREGPT),
    Format("TRL preferences (conversational, prompt given)", _trl(True, True), read_trl, _TRL),
    Format("TRL preferences (conversational, implicit prompt)", _trl(True, False), read_trl, _TRL),
    Format("TRL preferences (standard, prompt given)", _trl(False, True), read_trl, _TRL),
    Format("TRL preferences (standard, implicit prompt)", _trl(False, False), read_trl, _TRL),
    Format("chat rows (SFT)", lambda row: "messages" in row, read_chat, _named("messages", "tools", "system")),
    Format(
        "completion rows (SFT)",
        lambda row: "prompt" in row and "completion" in row,
        read_completion,
        _named("prompt", "completion", "system"),
    ),
    Format(OWN, lambda row: bool(_OWN & set(row)), read_own),
)


def format_of(row: Any, source: str) -> Format:
    """Raises UserError for a row of no known format."""
    if not isinstance(row, dict):
        raise fail(source, "is not a row: a row is a JSON object", "write one as docs/data.md shows")
    if "kto_tag" in row or ("completion" in row and "label" in row):
        raise fail(
            source, "a single answer with a label (KTO) is not a pair", "give chosen and rejected answers to one prompt"
        )
    for form in FORMATS:
        if form.fits(row):
            return form
    columns = ", ".join(map(str, list(row)[:8])) + (", ..." if len(row) > 8 else "")
    raise fail(
        source,
        f"is not a row of any known format (its columns: {columns})",
        "write rows as docs/data.md shows, or name the columns in a dataset_info.json beside the file",
    )
