"""Why one title ranks above another: tokens, history items, the smallest set of items whose removal reverses it"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..core.tree import EncodedGroup, pad_groups
from ..errors import UserError
from ..machine import console
from ..machine.progress import Progress
from ..prompts.groups import build_group
from ..prompts.orders import rotations
from ..records import RankingExample
from .align import align
from .flip import CHUNK, Removed, affordable, flip_set, sets
from .model_scoring import BOTH, ModelScoring
from .scoring import FIRST_LINE, History, check_history, check_titles


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token of the answers.

    side        "chosen" or "rejected": the title that it belongs to; "both" for what is between titles and what ends an
                answer
    chosen      its log-prob in the answer that prefers the chosen title, None where that answer does not hold it, in
                nats
    rejected    the same in the answer that prefers the rejected title
    difference  what it adds to the margin
    """

    token: str
    side: str
    chosen: float | None
    rejected: float | None
    difference: float


@dataclass(frozen=True, slots=True)
class Effect:
    """A history item, and the margin minus the margin without it: above 0 where the item speaks for the chosen
    title.
    """

    title: str
    effect: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why `model` puts `chosen` above `rejected` after this history (or below it: a margin under 0).

    margin   nats; for prompts in two printed orders the sum over both, as everywhere
    tokens   their differences add up to the margin
    history  each item that the prompt holds, oldest first, with its effect
    flip     the smallest set of history items without which the order is reversed; None if no set of up to `searched`
             items does it
    dropped  oldest history items that the prompt has no room for
    """

    model: str
    chosen: str
    rejected: str
    margin: float
    tokens: tuple[TokenScore, ...]
    history: tuple[Effect, ...]
    flip: tuple[str, ...] | None
    searched: int
    dropped: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.model,
            "margin": self.margin,
            "tokens": [
                {
                    "token": t.token,
                    "side": t.side,
                    "chosen": t.chosen,
                    "rejected": t.rejected,
                    "difference": t.difference,
                }
                for t in self.tokens
            ],
            "history": [{"title": e.title, "effect": e.effect} for e in self.history],
            "flip": None if self.flip is None else list(self.flip),
        }


def to_json(explanations: Sequence[Explanation]) -> dict[str, Any]:
    """`explain --json`: the last model's numbers, and every model's under "models"."""
    models = [e.to_json() for e in explanations]
    return {name: models[-1][name] for name in ("margin", "tokens", "history", "flip")} | {"models": models}


def explain(
    scoring: ModelScoring,
    history: History,
    chosen: str,
    rejected: str,
    max_flip: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> Explanation:
    """Why one title ranks above another.

    max_flip  largest set of history items searched for one that reverses the order; None: see `flip.affordable`
    between   called between two rounds of scoring; what it raises ends the search
    Raises UserError for two equal titles, an empty one, and for what cannot be scored.
    """
    check_titles("explain", (chosen, rejected))
    if chosen == rejected:
        raise UserError(f'explain: "{chosen}" is both the chosen and the rejected title: name two titles')
    check_history(history)
    example = RankingExample("", scoring.domain, tuple(history), chosen, (rejected,), source="explain")
    encoder = scoring.model.encoder
    dropped = encoder.encode(example, _orders(scoring, example)).dropped
    kept = tuple(history[dropped:])
    if dropped:
        console.notice(f"note: the {dropped} oldest history items do not fit --max-seq-length and are left out")
    base = float(scoring.fresh_margins([(kept, chosen, rejected)])[0])

    limit = affordable(len(kept)) if max_flip is None else max_flip
    if max_flip is None and limit < min(3, len(kept) - 1):
        console.notice(
            f"note: {len(kept)} history items: sets of up to {limit} are searched; --max-flip 3 searches larger ones"
        )
    with Progress(sets(len(kept), max(1, limit)), "explain: at most", "set", first=FIRST_LINE) as bar:

        def margins(removed: Sequence[Removed]) -> np.ndarray:
            found = []
            for start in range(0, len(removed), CHUNK):
                between()
                part = [tuple(t for i, t in enumerate(kept) if i not in r) for r in removed[start : start + CHUNK]]
                found.append(scoring.fresh_margins([(h, chosen, rejected) for h in part]))
                bar.update(len(part))
            return np.concatenate(found)

        flip, alone = flip_set(len(kept), base, margins, limit)
    return Explanation(
        scoring.model.name,
        chosen,
        rejected,
        base,
        _tokens(scoring, replace(example, history=kept), base),
        tuple(Effect(t, float(base - m)) for t, m in zip(kept, alone, strict=True)),
        None if flip is None else tuple(kept[i] for i in flip),
        limit,
        dropped,
    )


def _orders(scoring: ModelScoring, example: RankingExample) -> list[tuple[Any, ...]]:
    if scoring.form == "listwise":
        return rotations(example, scoring.model.orders, scoring.model.settings.seed)
    return [BOTH] if scoring.form == "pairwise" else []


def _tokens(scoring: ModelScoring, example: RankingExample, margin: float) -> tuple[TokenScore, ...]:
    """The margin as a sum over tokens."""
    if scoring.form == "pointwise":
        return _yes_and_no(scoring, example)
    with_history = _differences(scoring, example)
    if not scoring.model.calibrate:
        return with_history
    without = _differences(scoring, replace(example, history=(), disliked=None))
    return tuple(
        replace(
            a,
            chosen=_minus(a.chosen, b.chosen),
            rejected=_minus(a.rejected, b.rejected),
            difference=a.difference - b.difference,
        )
        for a, b in zip(with_history, without, strict=True)
    )


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _yes_and_no(scoring: ModelScoring, example: RankingExample) -> tuple[TokenScore, ...]:
    """pointwise: the log-odds of Yes for each title, all its spellings together."""
    (scores,) = scoring.model.score([example])
    assert scores.items is not None
    chosen, rejected = map(float, scores.items)
    yes = scoring.model.template.answer_yes
    return (
        TokenScore(yes, "chosen", chosen, None, chosen),
        TokenScore(yes, "rejected", None, rejected, -rejected),
    )


def _differences(scoring: ModelScoring, example: RankingExample) -> tuple[TokenScore, ...]:
    """Log-probs of the answers' tokens; of several printed orders their sum (pairwise) or mean (listwise)."""
    model = scoring.model
    group = model.encoder.encode_group(build_group(example, _orders(scoring, example), model.template))
    logps = token_logps(scoring, group)
    answers = [tail[len(tail) - n :].tolist() for tail, n in zip(group.tails, group.answer_lengths, strict=True)]
    weight = 1 / len(group.pairs) if scoring.form == "listwise" else 1.0
    rows: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[np.ndarray, np.ndarray]]] = {}
    for c, r in group.pairs.tolist():
        rows.setdefault((tuple(answers[c]), tuple(answers[r])), []).append((logps[c], logps[r]))
    found: list[TokenScore] = []
    for (chosen, rejected), pairs in rows.items():
        scale = [weight / (len(a) if model.per_token else 1) for a in (chosen, rejected)]
        of_chosen = scale[0] * np.sum([a for a, _ in pairs], axis=0)
        of_rejected = scale[1] * np.sum([b for _, b in pairs], axis=0)
        sides = [_sides(model.base.tokenizer, tokens, example) for tokens in (chosen, rejected)]
        for i, j in align(chosen, rejected):
            text, side = sides[0][i] if i is not None else sides[1][j]  # type: ignore[index]
            a = None if i is None else float(of_chosen[i])
            b = None if j is None else float(of_rejected[j])
            found.append(TokenScore(text, side, a, b, (a or 0.0) - (b or 0.0)))
    return tuple(found)


def token_logps(scoring: ModelScoring, group: EncodedGroup) -> list[np.ndarray]:
    """log p of each token of each branch's answer, float64, nats."""
    logps = scoring.model.groups.logps(scoring.model.base.model, pad_groups([group]), per_token=True)
    by_branch = np.array(logps, np.float64)[0]
    return [by_branch[r, :n] for r, n in enumerate(group.answer_lengths)]


def _sides(tokenizer: Any, tokens: Sequence[int], example: RankingExample) -> list[tuple[str, str]]:
    """The text of each token of an answer, and which title it belongs to."""
    texts, before = [], ""
    for n in range(1, len(tokens) + 1):
        text = tokenizer.decode(list(tokens[:n]))
        texts.append(text[len(before) :] if text.startswith(before) else tokenizer.decode([tokens[n - 1]]))
        before = text
    whole = "".join(texts)
    spans = []
    for title, side in ((example.positive, "chosen"), (example.negatives[0], "rejected")):
        at = _find(whole, title, [example.positive, example.negatives[0]])
        spans += [(at, at + len(title), side)] if at >= 0 else []
    found, at = [], 0
    for text in texts:
        side = next((s for a, b, s in spans if at < b and at + len(text) > a), "both")
        found.append((text, side))
        at += len(text)
    return found


def _find(text: str, title: str, titles: Sequence[str]) -> int:
    """Where a title is in an answer, not inside the other title (which may hold it)."""
    for other in titles:
        if other != title and title in other:
            text = text.replace(other, "\0" * len(other), 1)
    return text.find(title)
