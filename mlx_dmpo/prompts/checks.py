"""Checks of a template: its prompts and answers must be unambiguous. Each raises UserError with one line."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .placeholders import FORMS, SAMPLES, TITLES, WORDS, parts

if TYPE_CHECKING:
    from .template import Template

At = Callable[[str], str]  # key -> where it is, for messages


def check(template: Template, at: At) -> None:
    """Raises UserError for a template whose prompt or answer would be ambiguous."""
    needed, in_answer = FORMS[template.form]
    names = [name for _, name in parts(template.prompt, at("prompt")) if name]
    for name in names:
        if name not in (*needed, "disliked", *WORDS):
            raise UserError(
                f"{at('prompt')}: {{{name}}} is not a placeholder of form {template.form}: "
                f"known are {', '.join(('disliked', *needed, *WORDS))}"
            )
    for name in (*needed, "disliked"):
        if names.count(name) > 1:
            raise UserError(f"{at('prompt')}: {{{name}}} occurs twice: keep one")
        if name in needed and name not in names:
            raise UserError(f"{at('prompt')}: {{{name}}} is missing: form {template.form} needs it")
    if [name for _, name in parts(template.title, at("title")) if name] != ["title"]:
        raise UserError(f'{at("title")}: does not hold {{title}} once: write it as in "<{{title}}>"')
    title = [*parts(template.title, at("title")), ("", "")]
    _check_marks(title[0][0], title[1][0], at("title"), "title")
    prompt = [*parts(template.prompt, at("prompt")), ("", "")]
    for (before, name), (after, _) in itertools.pairwise(prompt):
        if name in TITLES:
            _check_marks(before, after, at("prompt"), name)
    if template.form == "pointwise":
        _check_yes_no(template, at)
    else:
        _check_answer(template, at, in_answer)
    check_words(template, at("domains"), list(template.domains))
    a, b = SAMPLES[:2]
    orders: list[dict[str, Any]] = []
    if template.form == "pairwise":
        orders = [{"first": a, "second": b}, {"first": b, "second": a}]
    elif template.form == "listwise":
        orders = [{"candidates": (a, b)}, {"candidates": (b, a)}]
    for domain in template.domains.values():
        printed = [template.message(domain, history=(a,), **places) for places in orders]
        if len(set(printed)) < len(printed):
            raise UserError(
                f"{at('prompt')}: prints the same text for both orders: place the titles so that the order shows"
            )


def _check_marks(before: str, after: str, where: str, name: str) -> None:
    """A title must stand between marks: else "Heat" and "Heat and Dust" cannot be distinguished in the prompt."""
    before, after = before.rstrip(), after.lstrip()
    if not before or before[-1].isalnum() or not after or after[0].isalnum():
        raise UserError(
            f"{where}: nothing marks where {{{name}}} begins and ends: put marks around it, such as <{{{name}}}> "
            "or "
            f'"{{{name}}}"'
        )


def _check_answer(template: Template, at: At, in_answer: Sequence[str]) -> None:
    if not template.answer.strip():
        raise UserError(f"{at('answer')}: is missing: form {template.form} needs the answer's wording")
    names = [name for _, name in parts(template.answer, at("answer")) if name]
    if sorted(names) != sorted(in_answer):
        wanted = " and ".join(f"{{{n}}}" for n in in_answer)
        raise UserError(f"{at('answer')}: form {template.form} needs {wanted} there, once: write it so")
    if template.form == "pairwise":
        marked = [*parts(template.answer, at("answer")), ("", "")]
        for (before, name), (after, _) in itertools.pairwise(marked):
            if name:
                _check_marks(before, after, at("answer"), name)
    known: dict[str, tuple[str, ...]] = {}
    for a in SAMPLES:
        for b in SAMPLES if template.form == "pairwise" else ("",):
            titles = (a, b)[: len(in_answer)]
            answer = " ".join(template.answer_of(*titles).split())
            if a != b and known.setdefault(answer, titles) != titles:
                raise UserError(
                    f"{at('answer')}: {answer!r} is the answer for both {known[answer]} and {titles}: "
                    "put marks between the titles"
                )


def _check_yes_no(template: Template, at: At) -> None:
    yes, no = (" ".join(text.casefold().split()) for text in (template.answer_yes, template.answer_no))
    for key, text in (("answer_yes", yes), ("answer_no", no)):
        if not any(c.isalnum() for c in text):
            raise UserError(f"{at(key)}: is missing: form pointwise needs answer_yes and answer_no")
    if yes.startswith(no) or no.startswith(yes):
        raise UserError(
            f"{at('answer_no')}: {template.answer_yes!r} and {template.answer_no!r} begin alike: give two different "
            "answers"
        )


def check_words(template: Template, where: str, names: Sequence[str]) -> None:
    used = list(dict.fromkeys(template.words_used))
    for name in names:
        missing = [word for word in used if not getattr(template.domains[name], word).strip()]
        if missing:
            raise UserError(
                f"{where}.{name}: wording is not complete: prompt {template.name} uses {', '.join(used)}: "
                f"add {', '.join(missing)} as text"
            )
