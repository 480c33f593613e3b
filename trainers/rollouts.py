"""Rollouts: completions sampled from a named version of the policy.

A pool takes weights once per version and then generates. Every call names the version it needs; a pool that holds
another raises `StaleWeights`, so a late or restarted worker can never answer with old weights. This file holds the
interface and the in-process pool.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..folded import FoldedModel
from ..models import eos_ids
from ..sampling import Sample, sample


class StaleWeights(RuntimeError):
    """A pool holds another version of the weights than the call needs."""


class NoWorkers(RuntimeError):
    """Every worker of a pool was given up."""


class WorkerError(RuntimeError):
    """A call raised on a worker; names the worker."""


@dataclass(frozen=True)
class RolloutRequest:
    """One completion to sample: the prompt's token ids, and the seed that fixes it."""

    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How to sample: length limit in tokens, and temperature."""

    max_new_tokens: int
    temperature: float = 1.0


@dataclass
class Context:
    """What a task finds where a pool generates: the policy for generation, its tokenizer, the version of its weights,
    and a `cache` of its own that lives as long as this version.
    """

    model: Any
    tokenizer: Any
    version: int
    cache: dict[Any, Any] = field(default_factory=dict)


Task = Callable[[Context, Any], Any]


def row_seed(*parts: int) -> int:
    """A seed from (run seed, step, row), so that a sample drawn again is the same sample."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


Arrived = Callable[[Sequence[int], Sequence[Sample]], None]


def unheard(rows: Sequence[int], samples: Sequence[Sample]) -> None:
    """Arrivals that nobody waits for."""


class RolloutPool(Protocol):
    """What a trainer and an audit need of a pool."""

    counts: Counter[str]
    """What went wrong and was mended, by kind."""
    waited: float
    """Seconds that the caller stood still for workers."""

    def push(self, policy: Any, version: int) -> None:
        """Make the pool generate with `policy`'s present weights, under this version number."""

    def generate(
        self, requests: Sequence[RolloutRequest], version: int, sampling: Sampling, arrived: Arrived = unheard
    ) -> list[Sample]:
        """One completion a request, in order; raises `StaleWeights` when `version` is not the one pushed.

        `arrived` hears of rows as they are made: their numbers, and their samples.
        """

    def run(self, task: Task, items: Sequence[Any], aside: bool = False) -> list[Any]:
        """`task(context, item)` for every item, where the pool generates, with the weights pushed last; in order. With
        `aside`, an item that kills its worker again and again gives None; else it is an error.
        """

    def close(self) -> None: ...


class InProcessPool:
    """Generates in this process from a folded copy of the policy (see `unfeign.folded`).

    Args:
        tokenizer: names the end tokens.
        batch_size: rows decoded at once.
    """

    def __init__(self, tokenizer: Any, batch_size: int = 32):
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self._folded: FoldedModel | None = None
        self._policy: Any = None
        self._context: Context | None = None
        self.version = -1
        self.counts: Counter[str] = Counter()
        self.waited = 0.0

    def push(self, policy: Any, version: int) -> None:
        if policy is not self._policy or self._folded is None:
            self._policy, self._folded = policy, FoldedModel(policy)
        else:
            self._folded.refresh()
        self.version = version
        self._context = Context(self._folded.model, self._tokenizer, version)

    def generate(
        self, requests: Sequence[RolloutRequest], version: int, sampling: Sampling, arrived: Arrived = unheard
    ) -> list[Sample]:
        if self._folded is None or version != self.version:
            raise StaleWeights(f"in-process pool: expected weights version {version}, found {self.version}")
        ends = eos_ids(self._folded.model, self._tokenizer)
        out: list[Sample] = []
        for at in range(0, len(requests), self._batch_size):
            chunk = requests[at : at + self._batch_size]
            out += sample(
                self._folded.model,
                [r.prompt_ids for r in chunk],
                [r.seed for r in chunk],
                max_new_tokens=sampling.max_new_tokens,
                eos_ids=ends,
                temperature=sampling.temperature,
            )
            arrived(range(at, at + len(chunk)), out[at:])
        return out

    def run(self, task: Task, items: Sequence[Any], aside: bool = False) -> list[Any]:
        if self._context is None:
            raise StaleWeights("in-process pool: expected weights, found none")
        return [task(self._context, item) for item in items]

    def close(self) -> None:
        self._folded = self._policy = self._context = None
