"""Fine-tune a language model into a personal ranker with MLX: SFT, then DMPO; then evaluate it, rank and explain with
it.

    from mlx_dmpo import Ranker
    ranker = Ranker.load("models/qwen3-0.6b", "runs/dmpo")
    print(ranker.rank(["Heat (1995)", "Ronin (1998)"], ["Casino (1995)", "Babe (1995)"]))

Importing this loads neither mlx nor transformers: what is public is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DmpoSettings, EvaluateSettings, SftSettings
    from .errors import UserError
    from .use.explain import Effect, Explanation, TokenScore
    from .use.rank import Ranked, Ranking
    from .use.ranker import Ranker

__version__ = "0.1.0"

_PUBLIC = {
    "DmpoSettings": "config",
    "Effect": "use.explain",
    "EvaluateSettings": "config",
    "Explanation": "use.explain",
    "Ranked": "use.rank",
    "Ranker": "use.ranker",
    "Ranking": "use.rank",
    "SftSettings": "config",
    "TokenScore": "use.explain",
    "UserError": "errors",
}

__all__ = [
    "DmpoSettings",
    "Effect",
    "EvaluateSettings",
    "Explanation",
    "Ranked",
    "Ranker",
    "Ranking",
    "SftSettings",
    "TokenScore",
    "UserError",
    "dmpo",
    "evaluate",
    "sft",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


def sft(settings: SftSettings) -> str:
    """Stage one: trains an adapter by supervised fine-tuning. Returns its directory. Raises UserError."""
    return str(importlib.import_module(".train.run", __name__).train(settings, "mlx_dmpo.sft"))


def dmpo(settings: DmpoSettings) -> str:
    """Stage two: trains an adapter by DMPO (Bai et al., arXiv 2405.16127), or another loss.

    Returns its directory. Raises UserError.
    """
    return str(importlib.import_module(".train.run", __name__).train(settings, "mlx_dmpo.dmpo"))


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Measures a ranker on a split. Returns the metrics and writes the evaluation directory. Raises UserError."""
    result: dict[str, Any] = importlib.import_module(".judge.evaluate", __name__).evaluate(
        settings, "mlx_dmpo.evaluate"
    )
    return result
