"""Loaded rewards as the callables that TRL wants, which keep what the trainer needs to know of a batch's scores."""

import math
from collections.abc import Callable
from typing import Any

from trl.trainer.utils import is_async_callable

from ..rewards.plugin import LoadedReward
from ..rewards.terms import Score
from ..rewards.verbalized_rejection import transcripts_from_columns
from ..rewards.verdict import JudgeFailure


class ScoredReward:
    """A reward that explains itself, as TRL calls it: keeps the batch's scores for the trainer that owns it."""

    def __init__(self, reward: LoadedReward):
        self.__name__ = reward.name
        self.weight = reward.weight
        self._fn = reward.fn
        self.scores: list[Score | JudgeFailure] = []
        self.not_finite: list[int] = []

    async def __call__(self, prompts, completions, completion_ids=None, **columns: Any) -> list[float | None]:
        self.scores = await self._fn.score(transcripts_from_columns(completions, **columns))
        values = [None if isinstance(s, JudgeFailure) else s.reward for s in self.scores]
        self.not_finite[:] = _not_finite(values)
        return values


def _not_finite(values: Any) -> list[int]:
    """Rows whose value is no number. TRL turns None into NaN, so a NaN of the reward's own must be seen before."""
    return [i for i, value in enumerate(values) if value is not None and not math.isfinite(value)]


def trl_reward(reward: LoadedReward) -> Callable[..., Any]:
    """A loaded reward as a callable that TRL logs under the reward's name; the user's own function stays as it is."""
    if hasattr(reward.fn, "score"):
        return ScoredReward(reward)
    fn = reward.fn
    not_finite: list[int] = []

    def noted(values: Any) -> Any:
        not_finite[:] = _not_finite(values)
        return values

    if is_async_callable(fn):

        async def named(*args: Any, **kwargs: Any) -> Any:
            return noted(await fn(*args, **kwargs))
    else:

        def named(*args: Any, **kwargs: Any) -> Any:
            return noted(fn(*args, **kwargs))

    named.__name__ = reward.name
    named.not_finite = not_finite  # type: ignore[attr-defined]
    return named
