"""A prompt template: text with placeholders, its answers, and the words of each domain. Checked when it is loaded."""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..config import read_yaml
from ..errors import UserError
from .checks import check, check_words
from .placeholders import FORMS, LISTS, SAMPLES, WORDS, Domain, filled, parts

__all__ = [
    "FORMS",
    "SAMPLES",
    "WORDS",
    "Domain",
    "Template",
    "built_in",
    "built_in_domains",
    "choose",
    "load",
    "read_stored",
]

_HERE = Path(__file__).resolve().parent


def same_text(a: str, b: str) -> bool:
    """Whether two texts are equal but for white space."""
    return a.split() == b.split()


@dataclass(frozen=True)
class Template:
    """A prompt form and its wording. Build it with `load` or `Template.build`, which check it.

    form       pairwise, listwise, direct or pointwise
    prompt     the user's message, with placeholders
    more_prompts  further wordings of it, as S-DPO has ten: all examples of a user take one (see `worded_for`)
    title      how each title of a list is printed, with {title}; `separator` goes between two of them
    empty      what an empty list prints
    answer     the assistant's message with {title}, or {first} and {second} (pairwise)
    answer_yes, answer_no  the two answers of pointwise
    domains    name -> words
    """

    name: str
    form: str
    prompt: str
    title: str
    separator: str = ""
    empty: str = "none"
    answer: str = ""
    answer_yes: str = ""
    answer_no: str = ""
    domains: Mapping[str, Domain] = None  # type: ignore[assignment]  # set by build
    more_prompts: tuple[str, ...] = ()

    @classmethod
    def build(
        cls, values: Mapping[str, Any], where: str, name: str = "", lines: Mapping[str, int] | None = None
    ) -> Template:
        """A checked template of a mapping, from a YAML file or an adapter's config. Raises UserError, `where` first."""

        def at(key: str) -> str:
            return f'{where}:{lines[key]}: "{key}"' if lines and key in lines else f'{where}: "{key}"'

        known = [f.name for f in fields(cls)]
        more = values.get("more_prompts", ())
        if not isinstance(more, list | tuple) or any(not isinstance(text, str) for text in more):
            raise UserError(
                f"{at('more_prompts')}: is not a list of texts: write each on a line of its own, after a dash"
            )
        for key, value in values.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                fix = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(known)}"
                raise UserError(f"{at(key)}: is not part of a template: {fix}")
            if key not in ("domains", "more_prompts") and not isinstance(value, str):
                raise UserError(f"{at(key)}: is not text: put it in quotes")
        for key in ("form", "prompt", "title"):
            if not str(values.get(key, "")).strip():
                raise UserError(f'{where}: "{key}" is missing: a template has form, prompt, title and an answer')
        if values["form"] not in FORMS:
            raise UserError(f"{at('form')}: {values['form']!r} is not a prompt form: give one of {', '.join(FORMS)}")
        unused = ("answer",) if values["form"] == "pointwise" else ("answer_yes", "answer_no")
        for key in unused:
            if values.get(key):
                raise UserError(f"{at(key)}: has no effect in form {values['form']}: leave it out")
        domains = _domains(values.get("domains"), at("domains"))
        named = {"name": values.get("name") or name, "domains": domains, "more_prompts": tuple(more)}
        template = cls(**{**values, **named})
        check(replace(template, more_prompts=()), at)
        for text in more:
            check(
                replace(template, prompt=text, more_prompts=()),
                lambda key: at("more_prompts" if key == "prompt" else key),
            )
        return template

    def worded_for(self, user: str) -> Template:
        """The template with the one prompt that this user's examples have: drawn by a hash of the name."""
        if not self.more_prompts:
            return self
        digest = hashlib.blake2b(user.encode(), digest_size=8).digest()
        return self._worded[int.from_bytes(digest, "big") % len(self._worded)]

    @functools.cached_property
    def _worded(self) -> list[Template]:
        return [replace(self, prompt=text, more_prompts=()) for text in (self.prompt, *self.more_prompts)]

    def with_domains(self, extra: Mapping[str, Mapping[str, str]] | None, where: str = "domains") -> Template:
        """The template with a config's own domains. Raises UserError for words that are unknown or missing."""
        if not extra:
            return self
        template = replace(self, domains={**self.domains, **_domains(extra, where, built_in=False)})
        check_words(template, where, list(extra))
        return template

    @property
    def hash(self) -> str:
        """16 hexadecimal digits of everything that all domains share. Two templates of one hash print alike."""
        shared = {k: v for k, v in self._stored().items() if k not in ("name", "domains")}
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """What an adapter's config keeps; `read_stored` reads it."""
        return {**self._stored(), "hash": self.hash}

    def _stored(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "more_prompts" or v}

    def domain(self, name: str, source: str) -> Domain:
        """A domain's words. Raises UserError where there are none and the prompt uses any."""
        if name in self.domains:
            return self.domains[name]
        if not self.words_used:
            return Domain()
        raise UserError(
            f'{source}: no wording for domain "{name}" (known: {", ".join(sorted(self.domains))}): '
            "add it under `domains:` in the config"
        )

    @functools.cached_property
    def _prompt_parts(self) -> list[tuple[str, str]]:
        return parts(self.prompt, self.name)

    @functools.cached_property
    def _title_parts(self) -> list[tuple[str, str]]:
        return parts(self.title, self.name)

    @functools.cached_property
    def _answer_parts(self) -> list[tuple[str, str]]:
        return parts(self.answer, self.name)

    @functools.cached_property
    def _printed(self) -> list[Any]:
        """The list of titles that was printed last, and its text."""
        return [None, ""]

    @functools.cached_property
    def _known_ends(self) -> dict[Domain, dict[str, set[str]]]:
        return {}

    @functools.cached_property
    def words_used(self) -> list[str]:
        """The domain's words that a prompt prints."""
        return [name for _, name in self._all_parts if name in WORDS]

    @property
    def _all_parts(self) -> list[tuple[str, str]]:
        return [*self._prompt_parts, *(part for text in self.more_prompts for part in parts(text, self.name))]

    @property
    def prints_disliked(self) -> bool:
        """Whether a prompt has a place for disliked titles."""
        return any(name == "disliked" for _, name in self._all_parts)

    def printed(self, titles: Sequence[str]) -> str:
        """A list of titles as the prompt prints it."""
        if not titles:
            return self.empty
        key = tuple(titles)
        if key != self._printed[0]:  # the prompts of one example print one history
            self._printed[:] = key, self.separator.join(filled(self._title_parts, {"title": t}) for t in titles)
        text: str = self._printed[1]
        return text

    def message(self, domain: Domain, source: str = "", **places: str | Sequence[str]) -> str:
        """The user's message. `places`: a title, or titles for a list, for each placeholder of the form.

        Raises UserError, beginning with `source`, for a title that holds the text which ends its place.
        """
        if domain not in self._known_ends:
            self._known_ends[domain] = self._ends(domain)
        ends = self._known_ends[domain]
        for name, value in places.items():
            for title in [value] if isinstance(value, str) else value:
                for end in ends.get(name, ()):
                    if end in title:
                        raise UserError(
                            f"{source or 'a title'}: the title {title[:60]!r} holds {end[:40]!r}, which ends a title's "
                            f"place in prompt {self.name}: rename the title"
                        )
        values = {word: getattr(domain, word) for word in WORDS}
        values |= {"disliked": self.empty}
        values |= {name: value if isinstance(value, str) else self.printed(value) for name, value in places.items()}
        return filled(self._prompt_parts, values)

    def _ends(self, domain: Domain) -> dict[str, set[str]]:
        """For each placeholder of titles, the texts that would end one title's place and open what follows."""
        words = {word: getattr(domain, word) for word in WORDS}
        flat: list[list[str]] = [["", ""]]  # literal and placeholder, domain words filled in
        for literal, name in self._prompt_parts:
            flat[-1][0] += literal
            if name in WORDS:
                flat[-1][0] += words[name]
            elif name:
                flat[-1][1] = name
                flat.append(["", ""])
        left, right = self._title_parts[0][0], self._title_parts[1][0] if len(self._title_parts) > 1 else ""
        found: dict[str, set[str]] = {}
        for (_, name), (after, _) in itertools.pairwise(flat):
            ends = {right + self.separator + left, right + after} if name in LISTS else {after}
            found[name] = {end for end in ends if end.strip()}
        return found

    def answer_of(self, *titles: str) -> str:
        """The answer that names one title, or (pairwise) the first title before the second."""
        return filled(self._answer_parts, dict(zip(FORMS[self.form][1], titles, strict=True)))

    def which(self, answer: str, answers: Sequence[str]) -> int | None:
        """Which of the possible answers a drawn one is, white space aside; None where it is none of them."""
        return next((i for i, known in enumerate(answers) if same_text(answer, known)), None)


def _domains(value: Any, where: str, built_in: bool = True) -> dict[str, Domain]:
    found = dict(built_in_domains()) if built_in else {}
    if value is None:
        return found
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: is not a mapping: write name: {{topic: ..., items: ..., ...}}")
    for name, words in value.items():
        if not isinstance(words, Mapping) or any(not isinstance(v, str) for v in words.values()):
            raise UserError(f"{where}.{name}: wording is not complete: give {', '.join(WORDS)}, each as text")
        unknown = [word for word in words if word not in WORDS]
        if unknown:
            raise UserError(f'{where}.{name}: unknown word "{unknown[0]}": known are {", ".join(WORDS)}')
        found[str(name)] = Domain(**words)
    return found


@functools.cache
def built_in_domains() -> dict[str, Domain]:
    """The domains of domains.yaml."""
    values, _ = read_yaml(_HERE / "domains.yaml")
    return {name: Domain(**words) for name, words in values.items()}


@functools.cache
def built_in(name: str) -> Template:
    """A template that comes with the package: pairwise, listwise, direct or pointwise."""
    values, lines = read_yaml(_HERE / f"{name}.yaml")
    return Template.build(values, f"{name}.yaml", name, lines)


def load(prompt: str) -> Template:
    """The template that --prompt names: a built-in one, or a YAML file. Raises UserError."""
    if prompt in FORMS:
        return built_in(prompt)
    if not prompt.lower().endswith((".yaml", ".yml")):
        near = difflib.get_close_matches(prompt, FORMS, n=1)
        hint = f'did you mean "{near[0]}"?' if near else f"give {', '.join(FORMS)}, or a YAML file (NAME.yaml)"
        raise UserError(f"--prompt: {prompt!r} is not a prompt form: {hint}")
    values, lines = read_yaml(prompt)
    return Template.build(values, prompt, Path(prompt).stem, lines)


def read_stored(stored: Any, where: str) -> Template | None:
    """The template in an adapter's config; None for an adapter without one. Raises UserError for a damaged one."""
    if stored is None:
        return None
    if not isinstance(stored, dict):
        raise UserError(f'{where}: "prompt" is not a template: take the adapter as sft or dmpo wrote it')
    template = Template.build({k: v for k, v in stored.items() if k != "hash"}, where)
    if stored.get("hash") != template.hash:
        raise UserError(
            f'{where}: the hash of "prompt" does not fit its wording: take the adapter as sft or dmpo wrote it'
        )
    return template


def choose(
    prompt: str,
    domains: Mapping[str, Mapping[str, str]] | None,
    stored: Template | None = None,
    adapter: str = "",
    allow_other: bool = False,
) -> Template:
    """The template of a command: the adapter's own, else what --prompt names, else pairwise.

    Raises UserError where --prompt or `domains:` words a prompt otherwise than the adapter was trained with, unless
    `allow_other`.
    """
    if stored is None:
        return load(prompt or "pairwise").with_domains(domains)
    named = load(prompt) if prompt else stored
    if named.hash != stored.hash and not allow_other:
        same = named.form == stored.form
        raise UserError(
            f"--prompt: {adapter} was trained with prompt {stored.name}, and {prompt} is "
            f"{'worded otherwise' if same else 'another form'}: "
            "leave --prompt out, or add --allow-other-prompt"
        )
    if named.hash == stored.hash:
        named = replace(stored, domains={**named.domains, **stored.domains})
    chosen = named.with_domains(domains)
    for name in domains or ():
        if name in stored.domains and chosen.domains[name] != stored.domains[name] and not allow_other:
            raise UserError(
                f"domains.{name}: {adapter} was trained with another wording of it: leave it out, or add "
                "--allow-other-prompt"
            )
    return chosen
