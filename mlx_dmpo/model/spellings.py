"""The token sequences that say Yes or No in a tokenizer's own spellings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import UserError

Sequences = list[tuple[int, ...]]


def _word(answer: str) -> str:
    """ "Yes." -> "yes": the answer without white space and punctuation around it."""
    word = answer.strip().casefold()
    while word and not word[0].isalnum():
        word = word[1:]
    while word and not word[-1].isalnum():
        word = word[:-1]
    return word


def _shortest(sequences: Iterable[tuple[int, ...]]) -> Sequences:
    """Without those that begin with another one: the rest are disjoint events, whose probabilities add up."""
    kept: Sequences = []
    for sequence in sorted({s for s in sequences if s}, key=lambda s: (len(s), s)):
        if not any(sequence[: len(k)] == k for k in kept):
            kept.append(sequence)
    return kept


def spellings(tokenizer: Any, answer: str, trained: tuple[int, ...] = ()) -> Sequences:
    """Token sequences with which an answer may begin: "Yes", "yes", " YES" and the like, each once.

    Every single token of the vocabulary that decodes to the answer's word, case and white space aside; the usual
    spellings as the tokenizer cuts them; and `trained`, the answer's tokens in the chat template. No sequence begins
    with another one.
    """
    word = _word(answer)
    near = [i for token, i in tokenizer.get_vocab().items() if word in token.casefold()]
    single = [(i,) for i in near if tokenizer.decode([i]).strip().casefold() == word]
    texts = [space + text for space in ("", " ") for text in (word, word.upper(), word.capitalize())]
    usual = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    return _shortest([*single, *usual, trained])


def yes_and_no(
    tokenizer: Any, yes: str, no: str, trained: tuple[tuple[int, ...], tuple[int, ...]]
) -> tuple[Sequences, Sequences]:
    """The spellings of both answers. Raises UserError where a tokenizer cannot tell them apart."""
    both = spellings(tokenizer, yes, trained[0]), spellings(tokenizer, no, trained[1])
    for a in both[0]:
        for b in both[1]:
            n = min(len(a), len(b))
            if a[:n] == b[:n]:
                raise UserError(
                    f"prompt pointwise: this model's tokenizer spells {yes!r} and {no!r} alike ({list(a)}, {list(b)}): "
                    "use another form, or other words for yes and no"
                )
    return both
