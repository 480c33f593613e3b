"""Sampling ahead: while one batch is learned from, workers sample the next, from the policy as it was before.

With a staleness of k, the completions of a batch come from the policy k batches earlier (fewer at the start, where
there was none). That is off-policy by a known amount, which the importance ratio corrects (`importance`). Nothing is
guessed: the order of prompts is TRL's own sampler's, read ahead, and a batch that turns out to hold other prompts is
sampled anew.

One thread does what concerns the pool, in order: take these weights, then sample. Weights are copied in the trainer's
thread, so that no step can change them on the way.
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from ..sampling import Sample


def _batches_apart(trainer: Any) -> int:
    """Micro-steps for which one generated batch serves."""
    return trainer.args.steps_per_generation * trainer.num_iterations


def generation_number(trainer: Any) -> int:
    """How many batches were generated before the present one, since the run began."""
    each = trainer.args.gradient_accumulation_steps
    return (trainer.state.global_step * each + trainer._step % each) // _batches_apart(trainer)


def step_of(trainer: Any, number: int) -> tuple[int, int]:
    """At which optimiser step a batch is generated, and how many were before it in the same step."""
    apart, each = _batches_apart(trainer), trainer.args.gradient_accumulation_steps
    step = number * apart // each
    return step, number - -(-step * each // apart)


def prompts_of(trainer: Any, number: int) -> list[Any]:
    """This process's prompts of a batch, each as often as it is sampled; none past the end of the data."""
    size = trainer.args.generation_batch_size
    begin = number * _batches_apart(trainer) * size
    rows = list(islice(trainer._get_train_sampler(), begin, begin + size))
    each = len(rows) // trainer.accelerator.num_processes
    own = rows[trainer.accelerator.process_index * each :][:each]
    return [trainer.train_dataset[row]["prompt"] for row in own]


class Lookahead:
    """Samples `staleness` batches ahead of what is asked for.

    Args:
        pool: one that can copy weights (`snapshot`) and take them later (`load`).
        staleness: batches, at least 1.
    """

    def __init__(self, pool: Any, staleness: int):
        self._pool, self._staleness = pool, staleness
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampling")
        self._ahead: deque[tuple[Any, Future[tuple[list[Sample], float, float]]]] = deque()
        self._version = -1
        self.seconds = {"push_seconds": 0.0, "generate_seconds": 0.0, "wait_seconds": 0.0, "overlap_seconds": 0.0}

    def samples(
        self,
        batch: Any,
        policy: Any,
        upcoming: Callable[[int], Any],
        generate: Callable[[Any, int], list[Sample]],
    ) -> list[Sample]:
        """Samples for a batch, most often made already; begins those of the batch `staleness` after it.

        Args:
            batch: what is asked for now.
            policy: with its present weights.
            upcoming: the batch so many after this one, or None.
            generate: samples of a batch by the weights of this version.
        """
        began = time.perf_counter()
        found = self._ahead.popleft() if self._ahead else None
        if found is not None and found[0].requests != batch.requests:
            found = None
            self._pool.counts["sampled ahead in vain"] += 1 + len(self._ahead)
            self._drop()
        self._version += 1
        version = self._version
        weights = None
        if version == 0:
            self._pool.push(policy, version)  # which compares the workers with the policy, once
        else:
            weights = self._pool.snapshot(policy)
        mine = found[1] if found is not None else self._begin(batch, weights, version, generate)
        for behind in range(len(self._ahead) + 1, self._staleness + 1):
            if (later := upcoming(behind)) is not None:
                self._ahead.append((later, self._begin(later, weights, version, generate)))
        samples, pushing, generating = mine.result()
        waited = time.perf_counter() - began
        self.seconds["push_seconds"] += pushing
        self.seconds["generate_seconds"] += generating
        self.seconds["wait_seconds"] += waited
        self.seconds["overlap_seconds"] += max(0.0, pushing + generating - waited)
        return samples

    def _begin(self, batch: Any, weights: Any, version: int, generate: Callable[[Any, int], list[Sample]]) -> Future:
        def work() -> tuple[list[Sample], float, float]:
            began = time.perf_counter()
            if self._pool.version != version:
                self._pool.load(weights, version)
            loaded = time.perf_counter()
            return generate(batch, version), loaded - began, time.perf_counter() - loaded

        return self._thread.submit(work)

    def _drop(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def close(self, wait: bool = True) -> None:
        """Forget what is sampled ahead; `wait` for what is being sampled now, after which the pool is free."""
        self._drop()
        self._thread.shutdown(wait=wait, cancel_futures=True)
