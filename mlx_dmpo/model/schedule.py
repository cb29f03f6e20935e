"""mlx-lm's learning-rate schedules."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..errors import UserError


def schedule_rate(form: dict[str, Any], step: int) -> float:
    """The learning rate of a 0-based step under mlx-lm's own form of a schedule: name, arguments, warmup, warmup_init.

    Raises UserError for a form that mlx-lm does not take.
    """
    from mlx_lm.tuner.utils import build_schedule

    try:
        return float(build_schedule(form)(mx.array(step)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"lr_schedule: {type(error).__name__}: {error}: write name, arguments and warmup as mlx-lm takes them"
        ) from None
