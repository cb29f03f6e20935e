"""Answers sampled from a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..errors import UserError
from .device import on_cpu
from .loading import Loaded


@dataclass(frozen=True)
class Answer:
    """A sampled answer.

    logp is the policy's, in nats, of the tokens and the end-of-turn token, before temperature, top-p and top-k.
    """

    tokens: tuple[int, ...]  # without the end-of-turn token
    logp: float
    finished: bool  # the model ended it; else it was cut at max_tokens


def sample_answers(
    base: Loaded,
    prompts: Sequence[Sequence[int]],
    n: int,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    max_tokens: int,
    seed: int,
) -> list[list[Answer]]:
    """n answers to each prompt (of at least two tokens), through mlx-lm's batch generator, all at once; each prompt is
    read once.

    Raises UserError for a model whose caches mlx-lm cannot batch.
    """
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.sample_utils import make_sampler

    if on_cpu():  # compiling for the CPU needs a C++ compiler, which may be missing
        mx.disable_compile()
    try:
        mx.random.seed(seed)
        caches = []
        for prompt in prompts:
            cache = make_prompt_cache(base.model)
            base.model(mx.array(list(prompt[:-1]))[None], cache=cache)
            mx.eval([c.state for c in cache])
            caches += [cache] * n  # the generator merges them into its own
        generator = BatchGenerator(
            base.model,
            stop_tokens=[[t] for t in base.tokenizer.eos_token_ids],
            sampler=make_sampler(temperature, top_p, top_k=top_k),
            completion_batch_size=len(prompts) * n,
            prefill_batch_size=len(prompts) * n,
        )
        try:
            places = generator.insert(
                [[p[-1]] for p in prompts for _ in range(n)], [max_tokens] * (len(prompts) * n), caches=caches
            )
            tokens: dict[int, list[int]] = {uid: [] for uid in places}
            logps, finished = dict.fromkeys(places, 0.0), dict.fromkeys(places, False)
            while responses := generator.next_generated():
                for r in responses:
                    logps[r.uid] += float(r.logprobs[r.token].astype(mx.float32))
                    finished[r.uid] = r.finish_reason == "stop"
                    if not finished[r.uid]:
                        tokens[r.uid].append(r.token)
        except ValueError as error:
            raise UserError(
                f"{base.name}: mlx-lm cannot answer several prompts at once with it ({error}): name another model"
            ) from error
        finally:
            generator.close()
    finally:
        if on_cpu():
            mx.enable_compile()
    answers = [Answer(tuple(tokens[u]), logps[u], finished[u]) for u in places]
    return [answers[i : i + n] for i in range(0, len(answers), n)]
