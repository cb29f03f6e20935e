"""Text -> tokens, without making the same tokens again where texts begin alike.

The prompts of one user begin with the same history. Only where a tokenizer cuts every text between a letter and a space
before a letter, whatever stands around them, are the tokens of a beginning kept, and only what follows such a place is
tokenized. `cuts_between_words` says for which tokenizers that is so; all others make the tokens of whole texts.
"""

from __future__ import annotations

import json
import re
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Patterns of Qwen 2 to 3, Llama 3 and Qwen 3.5. Of each piece that they match, a run of letters is the end or all; no
# piece holds a space after a letter, none looks at what stands before it, and none more than one character after it.
PATTERNS = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_CUT = re.compile(r"[A-Za-z](?= [A-Za-z])")
LEAST = 64  # characters of a beginning that is worth keeping


def cuts_between_words(tokenizer: Any) -> bool:
    """Whether the tokens of any text are those of its two parts, cut between an ASCII letter and a space that an ASCII
    letter follows.

    So it is where the normalizer (none, or NFC) and the pre-tokenizer (GPT-2's, or one of PATTERNS) treat both parts
    alone, the model (BPE without dropout) sees one piece after another, and no added token reaches over such a place.
    """
    try:
        parts = json.loads(tokenizer._tokenizer.backend_tokenizer.to_str())
        steps = parts["pre_tokenizer"].get("pretokenizers", [parts["pre_tokenizer"]])
        *before, last = steps
        plain = (
            parts["model"]["type"] == "BPE"
            and not parts["model"].get("dropout")
            and (parts["normalizer"] is None or parts["normalizer"] == {"type": "NFC"})
            and parts["truncation"] is None
            and parts["padding"] is None
            and not any(
                t["rstrip"] or t["single_word"] or re.search("[A-Za-z] ", t["content"]) for t in parts["added_tokens"]
            )
        )
        by_regex = [s["pattern"].get("Regex") for s in before if s["type"] == "Split"]
        splits = all(
            s["type"] == "Digits" or (s["type"] == "Split" and s["behavior"] == "Isolated" and not s["invert"])
            for s in before
        )
        last_fits = last["type"] == "ByteLevel" and not last["add_prefix_space"]
        return bool(
            plain and splits and last_fits and all(p in PATTERNS for p in by_regex) and (last["use_regex"] or by_regex)
        )
    except (AttributeError, KeyError, TypeError, ValueError):  # a tokenizer of another kind
        return False


class Tokens:
    """`tokens(text)` is `tokenizer.encode(text, add_special_tokens=False)`, and faster for texts that begin alike."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._cuts = cuts_between_words(tokenizer)
        self._last = ""  # the text before
        self._begin, self._kept, self._at = "", [0][:0], 0  # a beginning up to the letter after the cut, its tokens

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def __call__(self, text: str) -> list[int]:
        if not self._cuts:
            return self._encode(text)
        if self._begin and text.startswith(self._begin):
            return self._kept + self._encode(text[self._at :])
        found = self._encode(text)
        at = _last_cut(text, self._last)
        if at >= max(LEAST, len(text) // 2):
            rest = self._encode(text[at:])
            if found[len(found) - len(rest) :] == rest:
                self._begin, self._kept, self._at = text[: at + 2], found[: len(found) - len(rest)], at
        self._last = text
        return found


def _last_cut(text: str, other: str) -> int:
    """Where the last cut of what two texts both begin with is; 0 for none."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[low:middle] == other[low:middle] else (low, middle - 1)
    start = max(0, low - 400)  # titles and wording have such a place before long
    return max((m.end() for m in _CUT.finditer(text, start, low)), default=0)
