"""Rewards named in YAML: `{fn, weight, kwargs}`, from a name, a dotted path or a file.

`fn` is a built-in name (`verbalized_rejection`, `pressure`, `process_penalty`, `tier_parity`), `package.module:name`,
or `file.py:name` relative to the config file. What it names is a TRL-style function `f(prompts, completions,
completion_ids, **columns)`, sync or async, or a class of such callables. `kwargs` go to the class's constructor, or to
every call of a function.
"""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from ..errors import UnfeignError
from ..settings import Settings
from .comparators import Pressure, ProcessPenalty, TierParity
from .imports import imported
from .judge import load_judge
from .verbalized_rejection import VerbalizedRejection

BUILT_IN: dict[str, Callable[..., Any]] = {
    reward.name: reward for reward in (VerbalizedRejection, Pressure, ProcessPenalty, TierParity)
}


class RewardSpec(Settings):
    """One reward of a run."""

    fn: str
    """Built-in name, `package.module:name`, or `file.py:name`."""
    weight: float = Field(1.0, allow_inf_nan=True)  # refused by name when the reward is loaded
    """Multiplies its value in the sum; not zero."""
    name: str | None = None
    """Under which it is logged; by default the callable's own name."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    on: Literal["trainer", "workers"] = "trainer"
    """Where it runs: in the trainer's process, or on the rollout workers, a group of completions at a time."""


@dataclass(frozen=True)
class LoadedReward:
    """A reward ready to be called."""

    name: str
    weight: float
    fn: Callable[..., Any]


def load_reward(spec: RewardSpec, folder: Path, where: str = "rewards") -> LoadedReward:
    """Import and construct one reward.

    Args:
        spec: what the config says.
        folder: where relative files start: the config file's folder.
        where: key to name in errors.

    Raises:
        UnfeignError: unknown name, unreadable file, missing attribute, or arguments it refuses.
    """
    if spec.weight == 0 or not math.isfinite(spec.weight):
        raise UnfeignError("a finite weight other than 0", f"{spec.weight:g}", f"{where}.weight")
    if spec.fn in BUILT_IN:
        target: Any = BUILT_IN[spec.fn]
    else:
        if ":" not in spec.fn:
            raise UnfeignError(
                f"{', '.join(BUILT_IN)}, package.module:name or file.py:name", repr(spec.fn), f"{where}.fn"
            )
        target = imported(spec.fn, folder, f"{where}.fn")
    kwargs = dict(spec.kwargs)
    if inspect.isclass(target):
        if isinstance(kwargs.get("judge"), (str, dict)) and issubclass(target, tuple(BUILT_IN.values())):
            kwargs["judge"] = load_judge(kwargs["judge"], folder)
        try:
            fn = target(**kwargs)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
            raise UnfeignError(message, f"{key or 'kwargs'} in {spec.kwargs}", f"{where}.kwargs") from None
        except TypeError as error:
            raise UnfeignError("arguments its constructor takes", str(error), f"{where}.kwargs") from None
    else:
        fn = functools.partial(target, **kwargs) if kwargs else target
    if spec.weight < 0 and hasattr(fn, "score"):
        raise UnfeignError(
            "a weight above 0 (inverted, it would train concealment)", f"{spec.weight:g}", f"{where}.weight"
        )
    name = spec.name or getattr(fn, "name", None) or getattr(target, "__name__", spec.fn)
    return LoadedReward(name, spec.weight, fn)


def load_rewards(specs: list[RewardSpec], folder: Path, *, comparator: bool = False) -> list[LoadedReward]:
    """Load all rewards of a run.

    Raises:
        UnfeignError: none given, a name used twice, or a comparator's reward without `comparator: true`.
    """
    if not specs:
        raise UnfeignError("at least one reward", "none", "rewards")
    loaded = [load_reward(spec, folder, f"rewards[{i}]") for i, spec in enumerate(specs)]
    names = [reward.name for reward in loaded]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UnfeignError("reward names that differ (set `name`)", f"{name!r} twice", f"rewards[{i}]")
    for i, reward in enumerate(loaded):
        if getattr(reward.fn, "requires_comparator", False) and not comparator:
            raise UnfeignError(
                "comparator: true beside a reward that punishes the thought", "comparator: false", f"rewards[{i}]"
            )
    return loaded
