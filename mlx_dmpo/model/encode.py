"""Text -> tokens: chat template, shared prefix, tails, answers. Needs a tokenizer, no model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..core.tree import EncodedGroup
from ..errors import UserError
from ..prompts.groups import build_group, droppable
from ..prompts.pairwise import PAIRWISE
from ..prompts.template import Template
from ..records import Branch, Example, Message, PreferenceGroup, RankingExample


class Encoder:
    """Encodes groups through a tokenizer's own chat template, thinking off.

    An answer's tokens are what the template's full rendering has after the prompt, up to and with the end-of-turn
    token. That the prompt's tokens are a prefix of the full rendering's is checked on every branch.
    """

    def __init__(self, tokenizer: Any, max_seq_length: int = 2048, template: Template = PAIRWISE):
        self.tokenizer, self.max_seq_length, self.template = tokenizer, max_seq_length, template
        self._ends = frozenset(tokenizer.eos_token_ids)
        added = tokenizer.added_tokens_decoder.values()
        control = sorted((str(t.content) for t in added if t.content.strip()), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, control)) or r"(?!)")

    def _render(self, messages: Sequence[Message], **how: Any) -> list[int]:
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, enable_thinking=False, **how)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def prompt(self, branch: Branch, source: str) -> list[int]:
        """Tokens up to where the answer begins. Raises UserError for text that holds a control token."""
        for message in branch.messages:
            self._refuse_control(message["content"], source)
        return self._render(branch.messages, add_generation_prompt=True)

    def _refuse_control(self, text: str, source: str) -> None:
        found = self._control.search(text)
        if found:  # would be read as control, not as text: a title must not end the user's turn
            raise UserError(f"{source}: a title or text holds the model's control token {found[0]}: take it out")

    def _sequence(self, branch: Branch, prompt: list[int], source: str) -> list[int]:
        """Prompt, answer and end-of-turn token."""
        self._refuse_control(branch.answer, source)
        full = self._render([*branch.messages, {"role": "assistant", "content": branch.answer}])
        if full[: len(prompt)] != prompt:
            raise UserError(
                f"{source}: the chat template renders the prompt otherwise when an answer follows: use a model whose template does not"
            )
        for position in range(len(prompt), len(full)):
            if full[position] in self._ends:
                if position == len(prompt):
                    raise UserError(f"{source}: the answer is empty: give an answer of at least one token")
                return full[: position + 1]
        raise UserError(
            f"{source}: the chat template ends the answer with no end-of-turn token: use an instruction-tuned model"
        )

    def encode_group(self, group: PreferenceGroup, *, chosen_only: bool = False, dropped: int = 0) -> EncodedGroup:
        """Tokens of a group. `chosen_only` keeps the answers that SFT learns, each once, without pairs; without pairs all are learnt.

        Raises UserError, beginning with the group's source, for a template or a text that cannot be encoded.
        """
        targets = group.targets if group.targets is not None else [c for c, _ in group.pairs]
        chosen = list(dict.fromkeys(targets)) if chosen_only else []
        rows = chosen or range(len(group.branches))
        prompts: dict[tuple[str, ...], list[int]] = {}
        sequences, prompt_lengths = [], []
        for r in rows:
            branch = group.branches[r]
            key = tuple(m["content"] for m in branch.messages)
            if key not in prompts:
                prompts[key] = self.prompt(branch, group.source)
            sequences.append(np.array(self._sequence(branch, prompts[key], group.source), np.int32))
            prompt_lengths.append(len(prompts[key]))
        # the last prompt token stays with each tail: its position predicts the answer's first
        shared = _common_start(sequences, min(prompt_lengths) - 1)
        return EncodedGroup(
            sequences[0][:shared],
            tuple(s[shared:] for s in sequences),
            tuple(len(s) - n for s, n in zip(sequences, prompt_lengths, strict=True)),
            np.array([] if chosen_only else group.pairs, np.int32).reshape(-1, 2),
            group.user,
            group.domain,
            group.source,
            dropped,
            None if chosen_only else group.targets,
        )

    def encode(self, example: Example, orders: Sequence[tuple[Any, ...]], *, chosen_only: bool = False) -> EncodedGroup:
        """Tokens of an example's group (orders as in `build_group`), its oldest history items left out where it would not fit.

        Free text has no printed orders, and nothing of it is left out. Raises UserError where it, or even one history item with
        the question and the answer, exceeds `max_seq_length`.
        """
        if isinstance(example, PreferenceGroup):
            group = self.encode_group(example, chosen_only=chosen_only)
            if longest(group) > self.max_seq_length:
                raise UserError(
                    f"{example.source}: {longest(group)} tokens, and max_seq_length is {self.max_seq_length}: "
                    "raise --max-seq-length, or shorten or remove the row"
                )
            return group

        def attempt(drop: int) -> EncodedGroup:
            group = build_group(example, orders, self.template, drop)
            return self.encode_group(group, chosen_only=chosen_only, dropped=drop)

        return self._fitting(example, attempt)

    def encode_spellings(self, example: RankingExample, spellings: Sequence[Sequence[int]]) -> EncodedGroup:
        """Pointwise prompts of an example's candidates, each followed by each spelling as its answer, without end of turn.

        Branch c x S + s is candidate c with spelling s. Raises UserError as `encode` does.
        """

        def attempt(drop: int) -> EncodedGroup:
            group = build_group(example, [], self.template, drop)
            prompts = [np.array(self.prompt(b, group.source), np.int32) for b in group.branches[::2]]
            endings = [np.array(s, np.int32) for s in spellings]
            shared = _common_start(prompts, min(map(len, prompts)) - 1)
            tails = tuple(np.concatenate([p[shared:], ending]) for p in prompts for ending in endings)
            lengths = tuple(len(ending) for _ in prompts for ending in endings)
            empty = np.zeros((0, 2), np.int32)
            user, domain, source = group.user, group.domain, group.source
            return EncodedGroup(prompts[0][:shared], tails, lengths, empty, user, domain, source, drop)

        return self._fitting(example, attempt)

    def _fitting(self, example: RankingExample, attempt: Callable[[int], EncodedGroup]) -> EncodedGroup:
        """`attempt` with the fewest titles left out that fits `max_seq_length`."""
        group = attempt(0)
        if longest(group) <= self.max_seq_length:
            return group
        low, high = 0, droppable(example, self.template)  # low does not fit; does high?
        shortest = attempt(high)
        if longest(shortest) > self.max_seq_length:
            raise UserError(
                f"{example.source}: {longest(shortest)} tokens with a single history item, and max_seq_length is "
                f"{self.max_seq_length}: raise --max-seq-length"
            )
        while high - low > 1:
            middle = (low + high) // 2
            tried = attempt(middle)
            low, high, shortest = (
                (low, middle, tried) if longest(tried) <= self.max_seq_length else (middle, high, shortest)
            )
        return shortest


def _common_start(sequences: Sequence[np.ndarray], limit: int) -> int:
    """How many tokens, at most `limit`, all sequences begin with."""
    stacked = np.stack([s[:limit] for s in sequences])
    differs = np.flatnonzero((stacked != stacked[0]).any(axis=0))
    return int(differs[0]) if len(differs) else limit


def longest(group: EncodedGroup) -> int:
    """Tokens of the group's longest branch."""
    return len(group.prefix) + max(map(len, group.tails))
