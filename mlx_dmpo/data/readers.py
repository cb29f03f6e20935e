"""One row of data -> a RankingExample or a PreferenceGroup: one small function a format, and the table of them, FORMATS.

Rows whose titles can be recovered become RankingExamples; preferences in free text become PreferenceGroups of one prompt, one
chosen and K rejected answers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from ..prompts.pairwise import Domain, domain_of, parse_prompt, ranking_answer
from ..records import Branch, Example, Message, PreferenceGroup, RankingExample

Row = dict[str, Any]


class Unconvertible(UserError):
    """A sound row that holds no ranking pair. The message is the reason alone."""


@dataclass
class Context:
    """What a row is read with, and what a format remembers from row to row."""

    domains: Mapping[str, Domain]
    domain: str = ""  # as the user named it, for rows that name none
    window: frozenset[str] = frozenset()  # TALLRec: the last row's items and target
    user: str = ""
    unused: set[str] = field(default_factory=set)  # columns that the format does not know


def fail(source: str, what: str, mend: str) -> UserError:
    return UserError(f"{source}: {what}: {mend}")


def _text(row: Row, name: str, source: str, *, blank: bool = False) -> str:
    if row.get(name) is None and not blank:
        raise fail(source, f'field "{name}" is missing', f'add "{name}" to the object')
    value = row.get(name) or ""
    if not isinstance(value, str) or not (blank or value.strip()):
        raise fail(source, f'"{name}" is not a non-empty text', f"give {name} as text")
    return value


def _hash(parts: Sequence[str]) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=6).hexdigest()


def _history_user(domain: str, history: Sequence[str]) -> str:
    """Files without users: rows of one history are one user's."""
    return "history-" + _hash([domain, *history])


ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def _message(value: Any, name: str, source: str) -> Message:
    """One message, {"role", "content"} or {"from", "value"}."""
    if not isinstance(value, dict):
        raise fail(source, f'"{name}" holds a message that is no object', 'write {"role": "user", "content": "..."}')
    role, content = (value.get(k, value.get(other)) for k, other in (("role", "from"), ("content", "value")))
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(p["text"] for p in content)
    if not isinstance(role, str) or role not in ROLES:
        raise fail(
            source,
            f'"{name}" holds a message of the role {role!r}',
            "write system, user or assistant; tools are not supported",
        )
    if not isinstance(content, str) or not content.strip():
        raise fail(source, f'"{name}" holds a message without text', "give each message a text")
    return {"role": ROLES[role], "content": content}


def _messages(value: Any, name: str, source: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise fail(source, f'"{name}" is not a list of messages', 'write [{"role": "user", "content": "..."}, ...]')
    return [_message(v, name, source) for v in value]


def _answer(messages: Sequence[Message], name: str, source: str) -> str:
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise fail(
            source,
            f'"{name}" is not one assistant message after the prompt',
            "give one answer; earlier turns belong to the prompt",
        )
    return messages[0]["content"]


def _group(prompt: Sequence[Message], chosen: str, rejected: Sequence[str], source: str, context: Context) -> Example:
    """One prompt with its answers; a RankingExample where it is the release's ranking prompt."""
    for name, answer in (("chosen", chosen), *(("rejected", r) for r in rejected)):
        if not answer.strip():
            raise fail(source, f"the {name} answer is empty", "give an answer")
    if chosen in rejected:
        raise fail(source, "chosen and rejected are identical", "a pair needs two different answers")
    if len(set(rejected)) < len(rejected):
        raise fail(source, "a rejected answer is listed twice", "list each once")
    if not prompt or prompt[-1]["role"] != "user":
        raise fail(source, "the prompt does not end with a user's message", "end it with what is to be answered")
    if len(prompt) == 1 and len(rejected) <= 1:
        ranking = _ranking(prompt[0]["content"], [chosen, *rejected], source, context)
        if ranking:
            return ranking
    branches = tuple(Branch(tuple(prompt), answer) for answer in (chosen, *rejected))
    user = "prompt-" + _hash([part for m in prompt for part in m.values()])
    return PreferenceGroup(
        user, context.domain or "text", branches, tuple((0, r) for r in range(1, len(branches))), source
    )


def _ranking(prompt: str, answers: Sequence[str], source: str, context: Context) -> RankingExample | None:
    """(prompt, [chosen, rejected] or [chosen]) as an example with one negative; None where it is not in the release's wording."""
    parsed = parse_prompt(prompt, context.domains)
    if parsed is None:
        return None
    if context.domain:
        raise fail(source, f"names its own domain ({parsed.domain})", "leave --domain out")
    if not parsed.history:
        raise fail(source, "the history is empty", "give at least one title")
    orders = (ranking_answer(parsed.first, parsed.second), ranking_answer(parsed.second, parsed.first))
    if len(answers) == 1:  # the rejected answer is the same two titles swapped
        answers = [answers[0], orders[1] if answers[0] == orders[0] else orders[0]]
    if orders[0] == orders[1] or answers[0] == answers[1]:
        raise fail(source, "the pair is identical", "a pair needs two different titles")
    if sorted(answers) != sorted(orders):
        return None
    positive_first = answers[0] == orders[0]
    positive, negative = (parsed.first, parsed.second) if positive_first else (parsed.second, parsed.first)
    user = _history_user(parsed.domain, parsed.history)
    return RankingExample(user, parsed.domain, parsed.history, positive, (negative,), (positive_first,), source)


def _rejected(row: Row, source: str) -> list[Any]:
    """`rejected`, one answer or a list of them, or S-DPO's rejected1, rejected2, ..."""
    value = row.get("rejected")
    if value is None:
        numbered = sorted((k for k in row if REJECTED.fullmatch(k)), key=lambda k: int(k[8:]))
        return [row[k] for k in numbered]
    if value == []:
        raise fail(source, '"rejected" is empty', "give at least one rejected answer")
    conversation = isinstance(value, list) and all(isinstance(v, dict) for v in value)
    return value if isinstance(value, list) and not conversation else [value]


REJECTED = re.compile(r"rejected[0-9]{1,4}")


def _is_preference(row: Row) -> bool:
    return "chosen" in row and ("rejected" in row or any(REJECTED.fullmatch(k) for k in row))


def read_own(row: Row, source: str, context: Context) -> Example:
    if context.domain:
        raise fail(source, f"names its own domain ({row.get('domain')})", "leave --domain out")
    example = RankingExample.from_json(row, source)
    domain_of(example, context.domains)
    return example


def _alpaca_prompt(row: Row, source: str) -> list[Message]:
    """system, history and instruction, as LLaMA-Factory's alpaca converter joins them."""
    system = _text(row, "system", source, blank=True)
    messages: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
    history = row.get("history") or []
    if not isinstance(history, list) or any(
        not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(t, str) and t.strip() for t in turn)
        for turn in history
    ):
        raise fail(source, '"history" is not a list of [question, answer]', "write each earlier turn as two texts")
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    parts = [_text(row, "instruction", source), _text(row, "input", source, blank=True)]
    return [*messages, {"role": "user", "content": "\n".join(p for p in parts if p)}]


def read_alpaca(row: Row, source: str, context: Context) -> Example:
    """{instruction, input, output} of one answer, or [chosen, rejected, ...]; or {instruction, input, chosen, rejected}."""
    prompt = _alpaca_prompt(row, source)
    if _is_preference(row):
        answers = [row["chosen"], *_rejected(row, source)]
        name = "chosen" if not isinstance(row["chosen"], str) else "rejected"
    else:
        if row.get("output") is None:
            raise fail(source, 'field "output" is missing', 'add "output", or "chosen" and "rejected"')
        answers, name = row["output"] if isinstance(row["output"], list) else [row["output"]], "output"
    if not answers or not all(isinstance(a, str) for a in answers):
        raise fail(source, f'"{name}" is neither an answer nor a list of answers', "give texts")
    if isinstance(row.get("output"), list) and len(answers) < 2:
        raise fail(source, '"output" is neither an answer nor [chosen, rejected]', "give one text, or two")
    return _group(prompt, answers[0], answers[1:], source, context)


def read_released(row: Row, source: str, context: Context) -> Example:
    """An alpaca row in the release's ranking wording, which must be understood."""
    unknown = set(row) - {"instruction", "input", "output"}
    if unknown:
        raise fail(source, f'unknown field "{min(unknown)}"', "remove or rename it")
    if row.get("input"):
        raise fail(source, '"input" is not empty', "put the whole prompt into instruction")
    if parse_prompt(row["instruction"], context.domains) is None:
        raise fail(
            source,
            "the instruction is not the release's ranking prompt",
            "word it as docs/data.md shows, or add its domain under `domains:` in the config",
        )
    if isinstance(row["output"], list) and len(row["output"]) != 2:
        raise fail(source, '"output" is neither an answer nor [chosen, rejected]', "give one text, or two")
    example = read_alpaca(row, source, context)
    if not isinstance(example, RankingExample):
        raise fail(
            source,
            '"output" does not rank the two titles of the instruction',
            "name both titles, each once, as the instruction does",
        )
    return example


def read_sharegpt(row: Row, source: str, context: Context) -> Example:
    """{conversations, chosen, rejected, system}; without chosen and rejected the last turn is the answer."""
    system = _text(row, "system", source, blank=True)
    messages = _messages(row.get("conversations"), "conversations", source)
    if system.strip():
        messages = [{"role": "system", "content": system}, *messages]
    if not _is_preference(row):
        return _group(messages[:-1], _answer(messages[-1:], "conversations", source), [], source, context)

    def answer(value: Any, name: str) -> str:
        if isinstance(value, str):
            return value
        return _answer(_messages(value if isinstance(value, list) else [value], name, source), name, source)

    rejected = [answer(r, "rejected") for r in _rejected(row, source)]
    return _group(messages, answer(row["chosen"], "chosen"), rejected, source, context)


def _common(texts: Sequence[Sequence[Any]]) -> int:
    """Length of the prefix that all share."""
    return next(
        (n for n, column in enumerate(zip(*texts, strict=False)) if any(c != column[0] for c in column)),
        min(map(len, texts)),
    )


def read_trl(row: Row, source: str, context: Context) -> Example:
    """{prompt, chosen, rejected}; without a prompt it is what chosen and rejected begin with, as TRL's extract_prompt has it."""
    chosen, rejected = row["chosen"], _rejected(row, source)
    if chosen in rejected:
        raise fail(source, "chosen and rejected are identical", "a pair needs two different answers")
    conversational = isinstance(chosen, list)
    if any(isinstance(r, list) != conversational for r in rejected):
        raise fail(source, "chosen and rejected are not of one kind", "give texts, or lists of messages")
    given = row.get("prompt")
    if not conversational:
        if not all(isinstance(a, str) for a in (chosen, *rejected)):
            raise fail(source, "chosen or rejected is no text", "give texts, or lists of messages")
        if given is None:
            shared = _common([chosen, *rejected])
            shared -= chosen[shared - 1 : shared] == " "  # the space belongs to the answer
            given, chosen, rejected = chosen[:shared], chosen[shared:], [r[shared:] for r in rejected]
            if not given.strip():
                raise fail(source, "chosen and rejected share no prompt to begin with", 'add "prompt"')
        prompt = [{"role": "user", "content": given}] if isinstance(given, str) else _messages(given, "prompt", source)
        if not prompt[-1]["content"].strip():
            raise fail(source, '"prompt" is not a non-empty text', "give prompt as text")
        return _group(prompt, chosen, rejected, source, context)
    told = [_messages(m, name, source) for name, m in (("chosen", chosen), *(("rejected", r) for r in rejected))]
    prompt = (
        []
        if given is None
        else [{"role": "user", "content": given}]
        if isinstance(given, str)
        else _messages(given, "prompt", source)
    )
    shared = min(_common(told), min(map(len, told)) - 1)
    if shared:  # the conversations are whole; a prompt beside them only repeats their beginning
        if prompt and told[0][:shared][-len(prompt) :] != prompt:
            raise fail(source, "the prompt is not what chosen and rejected begin with", "give the prompt once")
        prompt = told[0][:shared]
    if not prompt:
        raise fail(source, "chosen and rejected share no prompt to begin with", 'add "prompt"')
    answers = [
        _answer(m[shared:], name, source)
        for m, name in zip(told, ["chosen", *["rejected"] * len(rejected)], strict=True)
    ]
    return _group(prompt, answers[0], answers[1:], source, context)


def read_chat(row: Row, source: str, context: Context) -> Example:
    """{messages}: the last turn is the answer, everything before it the prompt."""
    if row.get("tools"):
        raise fail(source, '"tools" are not supported', "remove them")
    messages = _messages(row["messages"], "messages", source)
    return _group(messages[:-1], _answer(messages[-1:], "messages", source), [], source, context)


def read_completion(row: Row, source: str, context: Context) -> Example:
    """{prompt, completion}, both texts or both lists of messages."""
    prompt, completion = row["prompt"], row.get("completion")
    if isinstance(completion, list):
        answer = _answer(_messages(completion, "completion", source), "completion", source)
    else:
        answer = _text(row, "completion", source)
    messages = (
        _messages(prompt, "prompt", source)
        if isinstance(prompt, list)
        else [{"role": "user", "content": _text(row, "prompt", source)}]
    )
    return _group(messages, answer, [], source, context)


TALLREC_INPUT = re.compile(
    r"User Preference: ?(?P<liked>.*)\nUser Unpreference: ?(?P<disliked>.*)\nWhether the user will like the target (?P<domain>\w+) \"(?P<target>.*)\"\?"
)


def read_tallrec(row: Row, source: str, context: Context) -> Example:
    """A window of liked and disliked titles and a target, answered Yes. or No.

    Yes: the target is the positive, the liked are the history, the disliked the negatives.
    No: the target is the one negative, the last liked is the positive, those before it the history.
    A row whose window is the last one's, less one item, with its target, goes on with the same user.
    """
    found = TALLREC_INPUT.fullmatch(row["input"])
    answer = row.get("output")
    if not found or answer not in ("Yes.", "No."):
        what = '"output" is neither "Yes." nor "No."' if found else '"input" is not worded as TALLRec words it'
        raise fail(source, what, "word it as docs/data.md shows")
    liked, disliked = (tuple(re.findall(r'"(.*?)"(?=, "|$)', found[side].strip())) for side in ("liked", "disliked"))
    target = found["target"]
    items = frozenset((*liked, *disliked))
    if not context.user or not items or not items <= context.window:
        context.user = "tallrec-" + _hash([*liked, "", *disliked, "", target])
    context.window = items | {target}
    if target in items:
        raise Unconvertible("the target stands in the window already")
    if answer == "Yes.":
        history, positive, negatives = liked, target, tuple(dict.fromkeys(t for t in disliked if t not in liked))
    else:
        history, positive, negatives = liked[:-1], liked[-1] if liked else "", (target,)
    history = tuple(t for t in history if t != positive)
    if not history:
        raise Unconvertible(
            "no liked title to be the history" if liked or answer == "Yes." else "no liked title to be the positive"
        )
    if not negatives:
        raise Unconvertible("no disliked title to be a negative")
    return _checked(context.user, context.domain or found["domain"], history, positive, negatives, source, context)


def _checked(
    user: str,
    domain: str,
    history: Sequence[str],
    positive: str,
    negatives: Sequence[str],
    source: str,
    context: Context,
) -> RankingExample:
    row = {"user": user, "domain": domain, "history": list(history), "positive": positive, "negatives": list(negatives)}
    example = RankingExample.from_json(row, source)
    domain_of(example, context.domains)
    return example


def read_s_dpo(row: Row, source: str, context: Context) -> Example:
    """{historyList, itemList, trueSelection}: the candidates other than the true one are the negatives."""
    positive = _text(row, "trueSelection", source)

    def listed(name: str) -> list[str]:
        value = row.get(name)
        value = value.split("::") if isinstance(value, str) else value
        if not isinstance(value, list) or not value or any(not isinstance(t, str) or not t.strip() for t in value):
            raise fail(
                source, f'"{name}" is not a list of titles', 'write a list, or one text with "::" between the titles'
            )
        return [t.strip() for t in value]

    history, items = listed("historyList"), listed("itemList")
    if positive.strip() not in items:
        raise fail(source, "the true selection is not among the items", "list it in itemList")
    if not context.domain:
        raise fail(
            source,
            "names no domain",
            f"say what the items are by --domain, one of {', '.join(context.domains)}, or word one in a config",
        )
    negatives = [t for t in items if t != positive.strip()]
    user = _history_user(context.domain, history)
    return _checked(user, context.domain, history, positive.strip(), negatives, source, context)


@dataclass(frozen=True)
class Format:
    """A format's name in messages, whether a row has its fields, how a row is read, and the fields it knows (None: it objects itself)."""

    name: str
    fits: Callable[[Row], bool]
    read: Callable[[Row, str, Context], Example]
    fields: frozenset[str] | None = None


def _named(*names: str) -> frozenset[str]:
    return frozenset(names)


def _instruction(row: Row, start: str) -> bool:
    return isinstance(row.get("instruction"), str) and row["instruction"].startswith(start)


def _trl(conversational: bool, explicit: bool) -> Callable[[Row], bool]:
    return lambda row: (
        _is_preference(row) and isinstance(row["chosen"], list) == conversational and ("prompt" in row) == explicit
    )


_ALPACA = _named("instruction", "input", "output", "history", "system", "chosen", "rejected")


_SHAREGPT = _named("conversations", "system", "chosen", "rejected")


_TRL = _named("prompt", "chosen", "rejected")


OWN, RELEASED, TALLREC, S_DPO = "ranking examples", "released DMPO JSON", "TALLRec JSON", "S-DPO candidate lists"


# The first that fits a row is its format.
FORMATS = (
    Format(S_DPO, lambda row: "trueSelection" in row, read_s_dpo, _named("historyList", "itemList", "trueSelection")),
    Format(
        TALLREC,
        lambda row: (
            "instruction" in row and isinstance(row.get("input"), str) and row["input"].startswith("User Preference:")
        ),
        read_tallrec,
        _named("instruction", "input", "output"),
    ),
    Format(
        RELEASED,
        lambda row: (
            "output" in row and not _is_preference(row) and _instruction(row, "You are an assistant working on ")
        ),
        read_released,
    ),
    Format(
        "LLaMA-Factory alpaca preferences",
        lambda row: "instruction" in row and (_is_preference(row) or isinstance(row.get("output"), list)),
        read_alpaca,
        _ALPACA,
    ),
    Format("alpaca rows (SFT)", lambda row: "instruction" in row, read_alpaca, _ALPACA),
    Format(
        "ShareGPT preferences", lambda row: "conversations" in row and _is_preference(row), read_sharegpt, _SHAREGPT
    ),
    Format("ShareGPT conversations (SFT)", lambda row: "conversations" in row, read_sharegpt, _SHAREGPT),
    Format("TRL preferences (conversational, prompt given)", _trl(True, True), read_trl, _TRL),
    Format("TRL preferences (conversational, implicit prompt)", _trl(True, False), read_trl, _TRL),
    Format("TRL preferences (standard, prompt given)", _trl(False, True), read_trl, _TRL),
    Format("TRL preferences (standard, implicit prompt)", _trl(False, False), read_trl, _TRL),
    Format("chat rows (SFT)", lambda row: "messages" in row, read_chat, _named("messages", "tools")),
    Format(
        "completion rows (SFT)",
        lambda row: "prompt" in row and "completion" in row,
        read_completion,
        _named("prompt", "completion"),
    ),
    Format(
        OWN,
        lambda row: bool({"user", "domain", "history", "positive", "negatives"} & set(row)),
        read_own,
    ),
)


def format_of(row: Any, source: str) -> Format:
    """Raises UserError for a row of no known format."""
    if isinstance(row, dict):
        if "kto_tag" in row or ("completion" in row and "label" in row):
            raise fail(
                source,
                "a single answer with a label (KTO) is no pair",
                "give chosen and rejected answers to one prompt",
            )
        for form in FORMATS:
            if form.fits(row):
                return form
    raise fail(
        source, "neither a ranking example nor a row of another format that is known", "write one as docs/data.md shows"
    )
