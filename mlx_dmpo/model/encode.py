"""Text -> tokens: chat template, shared prefix, tails, answers. Needs a tokenizer, no model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import date, datetime
from typing import Any

import numpy as np
from jinja2 import TemplateError

from ..core.tree import EncodedGroup
from ..errors import UserError
from ..prompts.groups import build_group, droppable
from ..prompts.orders import printed_orders
from ..prompts.pairwise import PAIRWISE
from ..prompts.template import Template
from ..records import Branch, Example, Message, PreferenceGroup, RankingExample
from .tokens import Tokens


def prints_date(tokenizer: Any) -> bool:
    """Whether a tokenizer's chat template prints the date of the day, as Llama 3.1's does."""
    return "strftime_now" in str(tokenizer.chat_template)


# A chat template's `strftime_now`, of a given day. transformers takes no function from a caller, so it is a macro that
# stands before the template; the line break after it is not printed (transformers sets trim_blocks).
STRFTIME = (
    "{%- macro strftime_now(format) -%}{%- set filled = namespace(text=format) -%}"
    "{%- for directive, value in strftime_values.items() -%}"
    "{%- set filled.text = filled.text.replace(directive, value) -%}{%- endfor -%}"
    "{{- filled.text -}}{%- endmacro %}\n"
)

_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*\Z")  # what thinking off ends a prompt with


class Encoder:
    """Encodes groups through a tokenizer's own chat template, thinking off.

    An answer's tokens are what the template's full rendering has after the prompt, up to and with the end-of-turn
    token. The prompt's tokens are a prefix of each branch: where the tokenizer would join the prompt's last token with
    the answer's first characters, as in two line breaks, prompt and answer are tokenized separately, since a model that
    answers has the prompt's tokens before it.

    date  day (YYYY-MM-DD) that a template prints where it prints today's; "" takes today. `self.date` is "" where the
          template prints none. Kept with an adapter, so that its prompts are the same on every later day.
    """

    def __init__(self, tokenizer: Any, max_seq_length: int = 2048, template: Template = PAIRWISE, date: str = ""):
        self.tokenizer, self.max_seq_length, self.template = tokenizer, max_seq_length, template
        self.date = (date or today()) if prints_date(tokenizer) else ""
        if self.date:
            day = datetime.fromisoformat(self.date)
            self._values = {f"%{c}": day.strftime(f"%{c}") for c in "aAbBcdfGHIjmMpSuUVwWxXyY"}
            self._values |= {f"%-{c}": day.strftime(f"%{c}").lstrip("0") for c in "djm"}
            self._dated = STRFTIME + tokenizer.get_chat_template()
        self._tokens = Tokens(tokenizer)
        self._dropped: tuple[Any, int] = (None, 0)  # history and disliked titles met last, how many were left out
        self._ends = frozenset(tokenizer.eos_token_ids)
        added = tokenizer.added_tokens_decoder.values()
        control = sorted((str(t.content) for t in added if t.content.strip()), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, control)) or r"(?!)")

    def _render(self, messages: Sequence[Message], source: str, **how: Any) -> str:
        """Raises UserError where the template refuses the messages: a role or an order of turns it does not have."""
        if self.date:
            how |= {"chat_template": self._dated, "strftime_values": self._values}
        try:
            text: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, enable_thinking=False, **how)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raised = f'"{why}"' if isinstance(error, TemplateError) else f"{type(error).__name__}, {why}"
            roles = ", ".join(m["role"] for m in messages)
            raise UserError(
                f"{source}: the model's chat template refuses these turns ({roles}; {raised}): change the row (put a "
                "system text into the first user message, begin with the user), or use another model"
            ) from None
        return text

    def prompt(self, branch: Branch, source: str) -> list[int]:
        """Tokens up to where the answer begins. Raises UserError for text that holds a control token."""
        return self._tokens(self._prompt_text(branch, source))

    def _prompt_text(self, branch: Branch, source: str) -> str:
        for message in branch.messages:
            self._refuse_control(message["content"], source)
        text = self._render(branch.messages, source, add_generation_prompt=True)
        if branch.messages[-1]["content"].strip() not in text:
            raise UserError(
                f"{source}: the model's chat template does not print the text of the last turn as it is: use a model "
                "for plain text"
            )
        return text

    def _refuse_control(self, text: str, source: str) -> None:
        found = self._control.search(text)
        if found:  # would be read as control, not as text: a title must not end the user's turn
            raise UserError(f"{source}: a title or text holds the model's control token {found[0]}: take it out")

    def _sequence(self, branch: Branch, text: str, prompt: list[int], source: str) -> list[int]:
        """Prompt, answer and end-of-turn token. `text` is the prompt, `prompt` its tokens."""
        self._refuse_control(branch.answer, source)
        whole = self._render([*branch.messages, {"role": "assistant", "content": branch.answer}], source)
        thought = _EMPTY_THOUGHT.search(text)
        if thought and not whole.startswith(text) and whole.startswith(text[: thought.start()]):
            whole = text + whole[thought.start() :]  # the template prints it in the prompt alone
        full = self._tokens(whole)
        if full[: len(prompt)] != prompt and whole.startswith(text):
            full = next((t for t in self._apart(prompt, whole[len(text) :]) if self._same_text(t, full)), full)
        if full[: len(prompt)] != prompt:
            raise UserError(
                f"{source}: the chat template renders the prompt differently when an answer follows: use another model"
            )
        end = self._end(full, len(prompt))
        if end == len(prompt):
            raise UserError(f"{source}: the answer is empty: give an answer of at least one token")
        if end is not None:
            return full[: end + 1]
        raise UserError(
            f"{source}: the chat template ends the answer with no end-of-turn token: use an instruction-tuned model"
        )

    def _end(self, tokens: list[int], start: int) -> int | None:
        """Where the first end-of-turn token from `start` on stands."""
        return next((i for i in range(start, len(tokens)) if tokens[i] in self._ends), None)

    def _apart(self, prompt: list[int], answer: str) -> Iterator[list[int]]:
        """The prompt's tokens and the answer's, which are made on their own: as a text, and as a text after a control
        token, since some tokenizers put a space before the beginning of a text."""
        yield prompt + self._tokens(answer)
        control = str(self.tokenizer.eos_token)
        alone = self._tokens(control)
        yield prompt + self._tokens(control + answer)[len(alone) :]

    def _same_text(self, tokens: list[int], others: list[int]) -> bool:
        return bool(self.tokenizer.decode(tokens) == self.tokenizer.decode(others))

    def usable(
        self, examples: Sequence[Example], notice: Callable[[str], None], *, chosen_only: bool = False
    ) -> list[Example]:
        """The examples whose tokens can be made in every printed order; the errors of the others go to
        `notice` (--skip-bad-rows).

        Raises UserError where none is left.
        """
        kept: list[Example] = []
        reason = ""
        for example in examples:
            orders = printed_orders(example, 0, both=True, redraw=False, seed=0, form=self.template.form)
            try:
                self.encode(example, orders, chosen_only=chosen_only)
                kept.append(example)
            except UserError as error:
                reason = str(error)
                notice(f"left out: {reason}")
        if not kept and reason:
            raise UserError(f"{reason} (none of the {len(examples)} rows can be used)")
        if reason:
            notice(
                f"note: {len(examples) - len(kept)} of {len(examples)} rows were left out: no tokens can be made of "
                "them"
            )
        return kept

    def encode_group(self, group: PreferenceGroup, *, chosen_only: bool = False, dropped: int = 0) -> EncodedGroup:
        """Tokens of a group. `chosen_only` keeps the answers that SFT learns, each once, without pairs; without pairs
        all are learnt.

        Raises UserError, beginning with the group's source, for a template or a text that cannot be encoded.
        """
        targets = group.targets if group.targets is not None else [c for c, _ in group.pairs]
        chosen = list(dict.fromkeys(targets)) if chosen_only else []
        rows = chosen or range(len(group.branches))
        prompts: dict[tuple[str, ...], _Prompt] = {}
        answers = Counter(tuple(m["content"] for m in group.branches[r].messages) for r in rows)
        sequences, prompt_lengths = [], []
        for r in rows:
            branch = group.branches[r]
            key = tuple(m["content"] for m in branch.messages)
            if key not in prompts:
                text = self._prompt_text(branch, group.source)
                prompts[key] = _Prompt(self, text, self._tokens(text), many=answers[key] >= MANY)
            sequences.append(np.array(prompts[key].sequence(branch, group.source), np.int32))
            prompt_lengths.append(len(prompts[key].tokens))
        for chosen_row, rejected_row in () if chosen_only else group.pairs:
            if np.array_equal(sequences[chosen_row], sequences[rejected_row]):
                raise UserError(
                    f"{group.source}: chosen and rejected are the same tokens in this model's chat template: give "
                    "answers that differ in more than white space"
                )
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
            None if chosen_only else group.utilities,
        )

    def encode(self, example: Example, orders: Sequence[tuple[Any, ...]], *, chosen_only: bool = False) -> EncodedGroup:
        """Tokens of an example's group (orders as in `build_group`), its oldest history items left out to fit.

        Free text has no printed orders, and nothing of it is left out. Raises UserError where it, or even one history
        item with the question and the answer, exceeds `max_seq_length`.
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
        """Pointwise prompts of an example's candidates, each followed by each spelling as its answer, without end of
        turn.

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
        """`attempt` with the fewest titles left out that fits `max_seq_length`.

        Begins where the same history ended before, or, where that is long, with a single title, and doubles its steps,
        so that no prompt is much longer than what fits.
        """
        most, key = droppable(example, self.template), (example.history, example.disliked)
        at = self._dropped[1] if key == self._dropped[0] else 0 if most <= FEW else most
        at = min(at, most)
        tried = attempt(at)
        low, high, step = -1, most + 1, 1  # low does not fit, high does
        kept = tried
        while True:
            if longest(tried) <= self.max_seq_length:
                high, kept = at, tried
            elif at == most:
                raise UserError(
                    f"{example.source}: {longest(tried)} tokens with a single history item, and max_seq_length is "
                    f"{self.max_seq_length}: raise --max-seq-length"
                )
            else:
                low = at
            if high - low <= 1:
                break
            if low < 0:
                at = max(0, high - step)
            elif high > most:
                at = min(most, low + step)
            else:
                at = (low + high) // 2
            step *= 2
            tried = attempt(at)
        self._dropped = key, high
        return kept


FEW = 500  # titles up to which all of them are tried first
MANY = 8  # answers to one prompt from which on `_Prompt` tokenizes the answers alone


class _Prompt:
    """A prompt's text and tokens, and the tokens of its answers.

    Tokenizers cut a text at control tokens first and make tokens of each part on its own. So of many answers to one
    prompt only what comes after the prompt's last control token is tokenized for each. That this gives the same tokens
    is checked on the first answer; an answer that a chat template might change (white space around it, brackets) is
    rendered and tokenized whole.
    """

    def __init__(self, encoder: Encoder, text: str, tokens: list[int], many: bool):
        self.encoder, self.text, self.tokens, self.many = encoder, text, tokens, many
        self.fast: tuple[str, list[int], str] | None = None  # text and tokens around an answer, once known

    def sequence(self, branch: Branch, source: str) -> list[int]:
        """As `Encoder._sequence`."""
        plain = branch.answer == branch.answer.strip() and not re.search(r"[<>{}|\[\]]", branch.answer)
        if plain and self.fast:
            before, start, after = self.fast
            self.encoder._refuse_control(branch.answer, source)
            full = start + self.encoder._tokens(before + branch.answer + after)
            end = self.encoder._end(full, len(self.tokens))
            if end is not None and end > len(self.tokens) and full[: len(self.tokens)] == self.tokens:
                return full[: end + 1]
        sequence = self.encoder._sequence(branch, self.text, self.tokens, source)
        if plain and self.many:
            self.many = False  # tried once
            self._learn(branch, sequence, source)
        return sequence

    def _learn(self, branch: Branch, sequence: list[int], source: str) -> None:
        """Finds what surrounds this answer, and keeps it if the short way gives the same sequence."""
        encoder, cuts = self.encoder, [m.start() for m in self.encoder._control.finditer(self.text)]
        whole = encoder._render([*branch.messages, {"role": "assistant", "content": branch.answer}], source)
        if not cuts or not whole.startswith(self.text + branch.answer):
            return
        before, after = self.text[cuts[-1] :], whole[len(self.text + branch.answer) :]
        own = encoder._tokens(before)
        start = self.tokens[: len(self.tokens) - len(own)]
        full = start + encoder._tokens(before + branch.answer + after)
        if start + own == self.tokens and full[: len(sequence)] == sequence:
            self.fast = before, start, after


def _common_start(sequences: Sequence[np.ndarray], limit: int) -> int:
    """How many tokens, at most `limit`, all sequences begin with."""
    stacked = np.stack([s[:limit] for s in sequences])
    differs = np.flatnonzero((stacked != stacked[0]).any(axis=0))
    return int(differs[0]) if len(differs) else limit


def today() -> str:
    return date.today().isoformat()


def longest(group: EncodedGroup) -> int:
    """Tokens of the group's longest branch."""
    return len(group.prefix) + max(map(len, group.tails))
