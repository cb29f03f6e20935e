"""Opens a model for scoring: load it, attach the adapter, choose the prompt, check the scorers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..config import CommonSettings, EvaluateSettings, TrainSettings
from ..core import family
from ..core.layout import PREFIX_CHUNK
from ..core.scorer import FrozenOutputs, frozen_layers
from ..core.selfcheck import GroupScorer, choose_scorer
from ..core.tree import BATCH_TOKENS, EncodedGroup
from ..errors import UserError
from ..machine import console
from ..prompts import template as prompts
from ..prompts.groups import build_group
from ..prompts.orders import rotations
from ..records import Example, PreferenceGroup, RankingExample
from ..scores import Scores
from . import adapters, cost, device, fit, loading, probe
from .encode import Encoder
from .frozen_cache import FrozenCache, cache_key
from .prefix_attention import chunk_for
from .score import score_groups
from .shape import ModelShape
from .spellings import Sequences, yes_and_no

COUNTED = ("qwen3", "qwen2", "llama", "mistral", "ministral3", "smollm3")  # model types whose memory `plan` counts
EVALUATED_ORDERS = 4  # listwise: printed orders over which a score is averaged, unless --orders says otherwise


class LanguageModelScorer:
    """A `Scorer`: a language model, with or without an adapter, behind a prompt template.

    calibrate  subtract from each score the same score without the history: what the model likes about the title alone
    per_token  divide the log-prob of a title by its answer's tokens (listwise, direct)
    orders     listwise: printed orders over which a score is averaged
    tokens     tokens run so far; what branches share is counted once where it is run once
    describe   name of the progress bar; none is shown for ""
    """

    def __init__(
        self,
        base: loading.Loaded,
        settings: CommonSettings,
        name: str = "",
        template: prompts.Template | None = None,
    ):
        self.base, self.settings, self.name = base, settings, name or base.name
        self.template = template or choose_template(settings)
        self.encoder = Encoder(base.tokenizer, settings.max_seq_length, self.template, base.date)
        self.calibrate = bool(getattr(settings, "calibrate", False))
        self.per_token = bool(getattr(settings, "per_token", False))
        self.orders = getattr(settings, "orders", None) or EVALUATED_ORDERS
        self.tokens, self.describe, self._said = 0, "evaluate", False
        check_options(settings, self.template)

    @functools.cached_property
    def groups(self) -> GroupScorer:
        """The shared-prefix scorer where it equals the plain one on this model, checked on first use."""
        if line := device.compiling():
            console.notice(f"note: {line}")
        model, scoring = self.base.model, self.settings.scoring
        chunk = chunk_for(model) if scoring == "auto" else PREFIX_CHUNK
        groups = choose_scorer(model, self.base.vocabulary, scoring, chunk)
        if not groups.shared:
            console.notice(f"note: every sequence is run alone, which is slower: {groups.reason}")
        return groups

    @functools.cached_property
    def frozen_cache(self) -> FrozenCache | None:
        """What --frozen-cache names, of this base and of the layers below this adapter.

        Raises UserError where no layer stays as it is in the base, or where each sequence is run alone.
        """
        directory = getattr(self.settings, "frozen_cache", "")
        if not directory:
            return None
        if isinstance(self.settings, EvaluateSettings) and self.settings.num_layers:
            for layer in family.decoder(self.base.model).model.layers[-self.settings.num_layers :]:
                layer.unfreeze()  # the base, cut where an adapter on its last layers would be
        layers = frozen_layers(self.base.model)
        if not layers or not self.groups.shared:
            why = f"sequences are run alone ({self.groups.reason})" if layers else f"{self.name} adapts every layer"
            raise UserError(f"--frozen-cache: {why}: leave it out, or train with --num-layers")
        key = cache_key(self.base.fingerprint, f"{layers} layers", True, device.environment())
        return FrozenCache(Path(directory) / key)

    @functools.cached_property
    def frozen(self) -> FrozenOutputs | None:
        """Read from the frozen cache, for scoring; nothing is kept in memory."""
        return FrozenOutputs(self.base.model, 0, 0, self.frozen_cache) if self.frozen_cache else None

    @functools.cached_property
    def shape(self) -> ModelShape:
        """The model's sizes. Raises UserError for a model of another kind."""
        shape, settings = ModelShape.of(self.base.path), self.settings
        if settings.quantize:
            shape = replace(shape, bits=settings.quantize, group_size=settings.quantize_group_size)
        return shape

    @property
    def counted(self) -> bool:
        """Whether `plan` counts the memory of this kind of model."""
        return getattr(self.base.model, "model_type", "") in COUNTED

    @property
    def activation_bytes(self) -> int:
        return int(self.base.dtype.size)

    def training(self, settings: TrainSettings) -> cost.Training:
        """What of a training's settings memory depends on, nothing recomputed."""
        return cost.Training(
            self.shape.layers if settings.num_layers < 0 else settings.num_layers,
            settings.lora_parameters.rank,
            settings.lora_parameters.keys,
            False,
            self.activation_bytes,
            cost.OPTIMIZER_STATES[settings.optimizer],
        )

    @functools.cached_property
    def scale(self) -> cost.Scale:
        """What the device at hand takes of the activations that `plan` counts."""
        settings = self.settings
        if isinstance(settings, TrainSettings):
            training = self.training(settings)
        else:
            training = cost.Training(self.shape.layers, activation_bytes=self.activation_bytes)
        return probe.scale_of(self.shape, training, self.groups)

    def beside(self, counted: float) -> float:
        """Bytes in use that `counted` bytes of weights leave out."""
        return probe.beside(self.base.model, counted)

    def tokens_at_once(self, groups: Sequence[EncodedGroup], batch_size: int) -> int:
        """Tokens that scoring these groups runs at once: BATCH_TOKENS, or what --memory auto finds to fit."""
        if self.settings.memory != "auto" or not self.groups.shared or not self.counted or not groups:
            return BATCH_TOKENS
        limit = fit.limit(self.settings.memory_limit)
        free = limit / fit.ROOM - self.beside(0.0)
        tokens, needed = fit.tokens_at_once(self.shape, groups, batch_size, free, self.activation_bytes, self.scale)
        if tokens < BATCH_TOKENS and not self._said:
            self._said = True
            console.notice(
                f"note: memory: at most {tokens:,} tokens at once in scoring (--memory auto); "
                f"{(limit / fit.ROOM - free + needed) / 1e9:.3g} GB planned of {limit / 1e9:.3g} GB"
            )
        return tokens

    def prompts_at_once(self, tokens: int, answers: int) -> int:
        """Prompts to which that many answers are drawn at once: --batch-size, or fewer under --memory auto.

        tokens  of the longest prompt with its longest answer. At a temperature other prompts beside it change the
        answers that are drawn to a prompt, so a smaller number is reported.
        """
        size = self.settings.batch_size
        if self.settings.memory != "auto" or family.unsupported(self.base.model) or not self.counted:
            return size
        free = fit.limit(self.settings.memory_limit) / fit.ROOM - self.beside(0.0)
        found = fit.prompts_at_once(
            self.shape, tokens, self.base.vocabulary, answers, size, free, self.activation_bytes
        )
        if found < size:
            console.notice(
                f"note: memory: answers are drawn to {found} prompts at once instead of {size} (--memory auto); with "
                f"--batch-size {found} the same answers are drawn anywhere"
            )
        return found

    def usable(self, examples: Sequence[Example], *, chosen_only: bool = False) -> list[Example]:
        """Under --skip-bad-rows, the examples whose tokens can be made, each other one named; else all of them.

        Raises UserError where none is left.
        """
        if not self.settings.skip_bad_rows:
            return list(examples)
        return self.encoder.usable(examples, console.notice, chosen_only=chosen_only)

    @functools.cached_property
    def spellings(self) -> tuple[Sequences, Sequences]:
        """Token sequences that say Yes, and those that say No, in this tokenizer."""
        example = RankingExample("", "", ("a",), "b", (), source=self.base.name)
        wordless = replace(self.template, domains={"": prompts.Domain(*["a"] * len(prompts.WORDS))})
        group = build_group(example, [], wordless)
        encoded = self.encoder.encode_group(group)
        yes, no = (
            tuple(int(t) for t in tail[len(tail) - n : -1])
            for tail, n in zip(encoded.tails, encoded.answer_lengths, strict=True)
        )
        return yes_and_no(self.base.tokenizer, self.template.answer_yes, self.template.answer_no, (yes, no))

    def score(self, examples: Sequence[Example]) -> Iterator[Scores]:
        """Pairwise: every pair in both printed orders; other forms: one score per candidate; free text in its one
        prompt.

        Raises UserError for an example that cannot be encoded, and for a score that is NaN or Inf.
        """
        refuse_for_free_text(self.settings, bool(examples) and isinstance(examples[0], PreferenceGroup))
        free_text = [e for e in examples if isinstance(e, PreferenceGroup)]
        if free_text:
            yield from self._score_text(free_text)
            return
        rankings = [e for e in examples if isinstance(e, RankingExample)]
        found = self._numbers(rankings, self.describe)
        bare = [replace(e, history=(), disliked=None) for e in rankings] if self.calibrate else []
        without = self._numbers(bare, self.describe and "without history") if bare else [np.zeros(())] * len(rankings)
        for example, numbers, prior in zip(rankings, found, without, strict=True):
            yield self._scores(example, numbers - prior)

    def score_items(
        self,
        history: Sequence[str],
        candidates: Sequence[str],
        domain: str,
        *,
        disliked: Sequence[str] | None = None,
        describe: str = "",
    ) -> np.ndarray:
        """One score per candidate after one history; a higher score ranks higher.  -> (N,) float64, nats.

        direct: log p(title); pointwise: log-odds of Yes. The candidates are one prefix tree, run in parts under the
        token budget; each score equals that of the candidate alone. `describe` names the progress bar.
        Raises UserError for another form, a candidate that is given twice, and for NaN or Inf.
        """
        if self.template.form not in ("direct", "pointwise"):
            raise UserError(f"--prompt: {self.template.form} does not score a title by itself: use direct or pointwise")
        if not candidates:
            return np.zeros(0)
        seen: set[str] = set()
        for title in candidates:
            if title in seen:
                raise UserError(f"candidates: {title[:60]!r} is given twice: give each title once")
            seen.add(title)
        first, *rest = candidates
        old = tuple(disliked) if disliked is not None else None
        example = RankingExample("", domain, tuple(history), first, tuple(rest), source="candidates", disliked=old)
        scores = self._numbers([example], describe)[0]
        if self.calibrate:
            scores = scores - self._without_history(domain, tuple(candidates))
        return scores[0]

    @functools.lru_cache(maxsize=4)  # noqa: B019  a catalogue's scores without history serve every user
    def _without_history(self, domain: str, candidates: tuple[str, ...]) -> np.ndarray:
        example = RankingExample("", domain, (), candidates[0], candidates[1:], source="candidates")
        return self._numbers([example], "")[0]

    def _numbers(self, examples: Sequence[RankingExample], describe: str) -> list[np.ndarray]:
        """What each example's scores are made of: pairwise (K, 2, 2) log-probs, else (printed orders, 1 + K) item
        scores.
        """
        form = self.template.form
        orders = [
            [(True, False)] * len(e.negatives)
            if form == "pairwise"
            else rotations(e, self.orders, self.settings.seed)
            if form == "listwise"
            else []
            for e in examples
        ]
        if form == "pointwise":
            yes, no = self.spellings
            encoded = [self.encoder.encode_spellings(e, [*yes, *no]) for e in examples]
        else:
            encoded = [self.encoder.encode(e, o) for e, o in zip(examples, orders, strict=True)]
        numbers: list[np.ndarray] = []
        for example, group, logps in zip(examples, encoded, self._logps(encoded, describe), strict=True):
            if form == "pairwise":  # branches: negative, printed order (positive first, then second), answer
                numbers.append(logps.reshape(len(example.negatives), 2, 2))
            elif form == "pointwise":
                by_spelling = logps.reshape(1, 1 + len(example.negatives), -1)
                numbers.append(_log_sum(by_spelling[..., : len(yes)]) - _log_sum(by_spelling[..., len(yes) :]))
            else:
                scaled = logps / np.array(group.answer_lengths) if self.per_token else logps
                numbers.append(scaled.reshape(-1, 1 + len(example.negatives)))
        return numbers

    def _logps(self, encoded: Sequence[EncodedGroup], describe: str) -> Iterator[np.ndarray]:
        """(R,) float64 of each group, in order."""
        self.tokens += sum(g.shared_tokens if self.groups.shared else g.separate_tokens for g in encoded)
        size = self.settings.batch_size
        tokens = self.tokens_at_once(encoded, size)
        found = score_groups(self.base.model, self.groups, encoded, size, describe, tokens, frozen=self.frozen)
        scored = {id(group): logps for group, logps in found}
        for group in encoded:
            logps = np.asarray(scored[id(group)], np.float64)
            if not np.isfinite(logps).all():
                raise UserError(
                    f"{group.source or group.user}: a log-prob is NaN or Inf: look at the adapter ({self.name}) "
                    "and at --dtype"
                )
            yield logps

    def _score_text(self, examples: Sequence[PreferenceGroup]) -> Iterator[Scores]:
        encoded = [self.encoder.encode(e, []) for e in examples]
        for example, logps in zip(examples, self._logps(encoded, self.describe), strict=True):
            by_pair = logps[np.array(example.pairs, np.int32).reshape(-1, 2)][:, None]  # (K, 1, 2)
            yield Scores(example, by_pair[:, 0, 0] - by_pair[:, 0, 1], by_pair)

    def _scores(self, example: RankingExample, numbers: np.ndarray) -> Scores:
        if self.template.form == "pairwise":
            return Scores(example, (numbers[..., 0] - numbers[..., 1]).sum(axis=1), numbers)
        items = numbers.mean(axis=0)
        by_pair = np.stack([np.broadcast_to(items[0], items[1:].shape), items[1:]], axis=-1)[:, None]
        places = None
        if self.template.form == "listwise":
            orders = np.array(rotations(example, self.orders, self.settings.seed))
            placed = np.take_along_axis(numbers, orders, axis=1)  # column p: the score of what is printed in place p
            best = placed == placed.max(axis=1, keepdims=True)
            places = (best / best.sum(axis=1, keepdims=True)).mean(axis=0)
        return Scores(example, items[0] - items[1:], by_pair, items, places)


def _log_sum(logps: np.ndarray) -> np.ndarray:
    """log sum exp over the last axis."""
    largest: np.ndarray = logps.max(axis=-1)
    return largest + np.log(np.exp(logps - largest[..., None]).sum(axis=-1))


def choose_template(settings: CommonSettings, adapter: str = "") -> prompts.Template:
    """The prompt template of a command: the adapter's, --prompt's, or pairwise. Loads no model.

    Raises UserError where these do not fit each other, and for a setting that has no effect with the prompt's form.
    """
    stored = None
    if adapter:
        where = f"{adapter}/{adapters.ADAPTER_CONFIG}"
        stored = prompts.read_stored(adapters.read_adapter_config(adapter).get("prompt"), where)
    template = prompts.choose(settings.prompt, settings.domains, stored, adapter, settings.allow_other_prompt)
    check_options(settings, template)
    return template


def check_options(settings: CommonSettings, template: prompts.Template) -> None:
    """Raises UserError for a setting that has no effect with this prompt form."""
    if getattr(settings, "orders", None) and template.form != "listwise":
        raise UserError(f"--orders: prompt {template.name} prints no list of candidates: leave it out, or use listwise")
    if getattr(settings, "per_token", False) and template.form not in ("direct", "listwise"):
        raise UserError(f"--per-token: the answers of prompt {template.name} are not titles: leave it out")


def refuse_for_free_text(settings: CommonSettings, free_text: bool = True) -> None:
    """Raises UserError for a setting that speaks of titles, where the data is free text."""
    for name in ("prompt", "orders", "calibrate", "per_token") if free_text else ():
        if getattr(settings, name, None):
            raise UserError(
                f"--{name.replace('_', '-')}: does not apply to free text, which brings its own prompts: leave it out"
            )


def open_scorer(
    settings: CommonSettings, adapter: str = "", *, attach: Callable[[loading.Loaded], None] | None = None
) -> LanguageModelScorer:
    """The model that `settings` names, ready to score.

    adapter  adapter directory to load; its prompt is taken, unless --prompt names another
    attach   instead of loading it: a function that puts an adapter on the loaded base, to be trained
    Raises UserError for a model or adapter that cannot be loaded, and for a prompt that does not fit the adapter.
    """
    template = choose_template(settings, adapter)
    base = loading.load(settings)
    base.prompt = template.to_json()
    if attach:
        attach(base)
    else:
        if adapter:
            adapters.load_adapter(base, adapter)
        base.model.eval()
    return LanguageModelScorer(base, settings, adapter, template)
