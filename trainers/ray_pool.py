"""Rollouts on Ray: workers that may die at any moment, and a pool that loses nothing when they do.

A worker is an actor that holds the policy (built from its recipe) and the in-process pool. Weights are pushed once a
version, through the object store; every call names the version it needs. What may happen, and what the pool does:

- A worker dies, or answers nothing in time: a new one takes its place, is given the weights, and the calls that were
  out are made again. A row's seed fixes its sample, so a sample drawn again is the same sample.
- The rows of a call that died are made again one by one. A row that is alone twice when its worker dies is set aside,
  and comes back with `failed` set: its reward is masked, not guessed.
- A worker that dies `RESTARTS` times with no answer between, in one call of the pool, is given up. When none is left:
  `NoWorkers`.
- A worker holds other weights than a call needs: `StaleWeights`; it is given the right ones, and asked again.
- A task raises: `WorkerError`, with the worker's name and the error's text.
"""

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)

from ..sampling import Sample
from .policy import PolicyRecipe, put, trained
from .rollouts import (
    Arrived,
    Context,
    InProcessPool,
    NoWorkers,
    RolloutRequest,
    Sampling,
    StaleWeights,
    Task,
    WorkerError,
    unheard,
)

RESTARTS = 3  # deaths of one worker in one call of the pool, with no answer between, before it is given up
STARTING = 900.0  # seconds a worker may take to load the policy, before the timeout of calls applies
WINDOW = 2  # calls out at once, a worker: one that runs, one that waits
TOLERANCE = {"float32": 1e-3, "bfloat16": 2.0}  # of log-probs after the first push, nats
ASIDE = "crashed its worker twice"
PROBE = "You are asked a plain question. Think first, then answer in one sentence."
# A worker is lost with its process, killed for want of memory or otherwise, its machine, or what it had answered.
DIED = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)


class WeightsDiffer(WorkerError):
    """A worker's log-probs differ from the trainer's after a push; names the worker."""


class Worker:
    """The actor. Its process builds the policy, takes weights, and generates from a folded copy."""

    def __init__(self, recipe: PolicyRecipe, batch_size: int, threads: int):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(threads)
        self._policy, self._tokenizer, _ = recipe.build()
        self._pool = InProcessPool(self._tokenizer, batch_size)

    def started(self) -> None:
        """Answers once the policy is built."""

    def load(self, weights: dict[str, Any], version: int) -> int:
        put(weights, self._policy)
        self._pool.push(self._policy, version)
        return version

    def generate(self, requests: Sequence[RolloutRequest], version: int, sampling: Sampling) -> list[Sample]:
        return self._pool.generate(requests, version, sampling)

    def run(self, task: Task, items: Sequence[Any], version: int) -> list[Any]:
        if self._pool.version != version:
            raise StaleWeights(f"expected weights version {version}, found {self._pool.version}")
        return self._pool.run(task, items)


def probe(model: Any, tokenizer: Any) -> list[float]:
    """Log-probs (nats) of the tokens of a fixed text: the same policy gives the same ones anywhere."""
    ids = torch.tensor([tokenizer(PROBE, add_special_tokens=False).input_ids])
    ids = ids.to(next(model.parameters()).device)
    with torch.no_grad():
        logps = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    return logps.gather(-1, ids[:, 1:, None]).flatten().tolist()


def _probe_task(context: Context, _: Any) -> list[float]:
    return probe(context.model, context.tokenizer)


@dataclass
class _Slot:
    """A worker's place in the pool: the actor that fills it now, its answer to having started, when it last answered,
    and how often actors died here since one did.
    """

    name: str
    actor: Any = None
    ready: Any = None
    heard: float = 0.0
    deaths: int = 0
    out: int = 0
    gone: bool = False
    error: str = ""

    def answered(self) -> None:
        self.heard, self.deaths = time.monotonic(), 0

    def started(self) -> bool:
        """Whether the actor has built its policy and taken the weights, alive or not by now."""
        try:
            ray.get(self.ready, timeout=0)
        except (GetTimeoutError, RayTaskError, *DIED):
            return False
        return True


@dataclass
class _Call:
    """Rows that travel together; `at` are their numbers in the whole."""

    at: list[int]
    slot: _Slot | None = None
    since: float = 0.0


class RayPool:
    """A `RolloutPool` on Ray actors, local or on the cluster that `RAY_ADDRESS` names.

    Args:
        recipe: how workers build the policy.
        tokenizer: the trainer's.
        workers: how many actors.
        batch_size: rows of one call, and rows decoded at once.
        timeout: seconds a call may take before its worker counts as dead.
        threads: of each worker; by default the machine's cores, shared out.
    """

    worker: type = Worker

    def __init__(
        self,
        recipe: PolicyRecipe,
        tokenizer: Any,
        *,
        workers: int = 1,
        batch_size: int = 64,
        timeout: float = 600.0,
        threads: int | None = None,
    ):
        self._recipe, self._tokenizer, self._batch_size, self._timeout = recipe, tokenizer, batch_size, timeout
        self._threads = threads or max(1, torch.get_num_threads() // workers)
        self.counts: Counter[str] = Counter()
        self.waited = 0.0
        self.version = -1
        self._weights: Any = None
        self._compared = False
        self._own_ray = _start_ray(workers)
        self._remote = ray.remote(self.worker)
        self._slots = [_Slot(f"worker {i}") for i in range(workers)]
        for slot in self._slots:
            self._fill(slot)

    def _fill(self, slot: _Slot) -> None:
        """A fresh actor for a slot. Its calls run in order, so the weights come before whatever is asked next."""
        gpus = ray.cluster_resources().get("GPU", 0) / len(self._slots)
        slot.actor = self._remote.options(num_cpus=1, num_gpus=min(1, gpus), max_restarts=0).remote(
            self._recipe, self._batch_size, self._threads
        )
        slot.out, slot.heard = 0, time.monotonic()
        if self._weights is None:
            slot.ready = slot.actor.started.remote()
        else:
            slot.ready = slot.actor.load.remote(self._weights, self.version)

    def push(self, policy: Any, version: int) -> None:
        self.load(self.snapshot(policy), version)
        if not self._compared:
            self._compare(policy)
            self._compared = True

    def snapshot(self, policy: Any) -> Any:
        """The policy's present weights, copied into the object store, for `load`."""
        return ray.put(trained(policy))

    def load(self, weights: Any, version: int) -> None:
        """Give every worker the weights of a snapshot, under this version number."""
        self._weights, self.version = weights, version
        self._everywhere(lambda actor: actor.load.remote(weights, version))

    def _compare(self, policy: Any) -> None:
        """Once, after the first push: the workers' log-probs are the trainer's, to rounding."""
        training = policy.training
        policy.eval()
        expected = torch.tensor(probe(policy, self._tokenizer))
        policy.train(training)
        for slot, found in self._everywhere(lambda actor: actor.run.remote(_probe_task, [None], self.version)):
            worst = (torch.tensor(found[0]) - expected).abs().max().item()
            if worst > TOLERANCE[self._recipe.dtype]:
                raise WeightsDiffer(
                    f"{slot.name}: expected the trainer's log-probs within {TOLERANCE[self._recipe.dtype]:g}, "
                    f"found a difference of {worst:.3g}"
                )

    def _everywhere(self, call: Callable[[Any], Any]) -> list[tuple[_Slot, Any]]:
        """One call on every worker, at once; the dead are replaced (with the weights) and asked again."""
        answers: list[tuple[_Slot, Any]] = []
        waiting = [slot for slot in self._slots if not slot.gone]
        while waiting:
            calls = [(slot, call(slot.actor)) for slot in waiting]
            waiting = []
            for slot, ref in calls:
                try:
                    with self._waiting():
                        answers.append((slot, ray.get(ref, timeout=self._patience(slot))))
                    slot.answered()
                except GetTimeoutError:
                    self._replace(slot, "timeout", f"no answer in {self._patience(slot):g} s")
                    waiting += [] if slot.gone else [slot]
                except DIED as error:
                    self._replace(slot, "died", str(error))
                    waiting += [] if slot.gone else [slot]
                except RayTaskError as error:
                    raise WorkerError(f"{slot.name}: {error.cause!r}") from error
        return answers

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.waited += time.monotonic() - began

    def _patience(self, slot: _Slot) -> float:
        """Seconds that a slot may be silent."""
        return self._timeout if slot.started() else max(STARTING, self._timeout)

    def _replace(self, slot: _Slot, kind: str, error: str) -> None:
        """Put a fresh worker in the place of one that died, or give the place up.

        Raises:
            NoWorkers: the last place was given up.
        """
        self.counts[kind] += 1
        slot.deaths += 1
        slot.error = " ".join(error.split())[:300]
        ray.kill(slot.actor)
        if slot.deaths < RESTARTS:
            self._fill(slot)
            return
        slot.gone = True
        if all(other.gone for other in self._slots):
            raise NoWorkers(
                f"expected at least one of {len(self._slots)} rollout workers alive, found none "
                f"(each died {RESTARTS} times with no answer between; {dict(self.counts)}; last: {slot.error})"
            )

    def generate(
        self, requests: Sequence[RolloutRequest], version: int, sampling: Sampling, arrived: Arrived = unheard
    ) -> list[Sample]:
        """One completion a request, in order. A row that crashed its worker twice while alone has `failed` set."""
        if self._weights is None or version != self.version:
            raise StaleWeights(f"ray pool: expected weights version {version}, found {self.version}")
        samples = self._spread(
            requests, lambda actor, rows: actor.generate.remote(rows, version, sampling), self._batch_size, arrived
        )
        ends = self._tokenizer.eos_token_id
        return [Sample([ends], [0.0], False, failed=ASIDE) if s is ASIDE else s for s in samples]

    def run(self, task: Task, items: Sequence[Any], aside: bool = False) -> list[Any]:
        """`task(context, item)` for every item, on whichever worker is free; results in order.

        Args:
            task: anything that pickles; a function of a user's own file is shipped with its file.
            aside: whether an item that crashed its worker twice gives None.

        Raises:
            WorkerError: the task raised, or an item crashed its worker twice.
        """
        for name, module in list(sys.modules.items()):
            if name.startswith("unfeign_user_"):  # a user's own file travels by value: workers have no copy of it
                ray.cloudpickle.register_pickle_by_value(module)
        results = self._spread(items, lambda actor, some: actor.run.remote(task, some, self.version), 1)
        for number, result in enumerate(results):
            if result is ASIDE and not aside:
                raise WorkerError(f"item {number}: {ASIDE}")
        return [None if result is ASIDE else result for result in results]

    def _spread(
        self, items: Sequence[Any], call: Callable[[Any, list[Any]], Any], together: int, arrived: Arrived = unheard
    ) -> list[Any]:
        """Answers to all items, in order, from whichever workers live; `ASIDE` for an item that kills its worker. A
        call has at most so many items `together`.
        """
        alive = sum(not slot.gone for slot in self._slots)
        size = max(1, min(together, -(-len(items) // max(1, alive))))
        todo = deque(_Call(list(range(at, min(at + size, len(items))))) for at in range(0, len(items), size))
        answers: list[Any] = [None] * len(items)
        alone: Counter[int] = Counter()
        for slot in self._slots:  # what killed it before is not in these items
            slot.deaths = 0
        out: dict[Any, _Call] = {}

        def again(ref: Any, kind: str, error: str) -> None:
            """The worker of a call is dead: replace it, and ask for everything it had out once more."""
            slot = out[ref].slot
            assert slot is not None  # set when it was sent
            lost = [one for one, sent in out.items() if sent.slot is slot]
            running = min(lost, key=lambda one: out[one].since)
            for one in lost:
                sent = out.pop(one)
                if one is not running:  # it only waited behind the one that died
                    todo.appendleft(_Call(sent.at))
                    continue
                for row in sent.at:
                    alone[row] += len(sent.at) == 1 and slot.started()
                    if alone[row] >= 2:
                        self.counts["set aside"] += 1
                        answers[row] = ASIDE
                    else:
                        todo.append(_Call([row]))
            self._replace(slot, kind, error)

        def silent() -> list[Any]:
            """Calls whose worker has said nothing for longer than it may."""
            now = time.monotonic()
            return [
                ref
                for ref, sent in out.items()
                if sent.slot and now - max(sent.since, sent.slot.heard) > self._patience(sent.slot)
            ]

        try:
            while todo or out:
                for slot in self._slots:
                    while todo and not slot.gone and slot.out < WINDOW:
                        sent = todo.popleft()
                        sent.slot, sent.since = slot, time.monotonic()
                        out[call(slot.actor, [items[row] for row in sent.at])] = sent
                        slot.out += 1
                with self._waiting():
                    ready, _ = ray.wait(list(out), num_returns=1, timeout=min(5.0, self._timeout))
                if not ready:
                    if late := silent():
                        again(late[0], "timeout", f"no answer in {self._timeout:g} s")
                    continue
                ref = ready[0]
                slot = out[ref].slot
                assert slot is not None
                try:
                    found = ray.get(ref)
                except DIED as error:
                    again(ref, "died", str(error))
                    continue
                except RayTaskError as error:
                    sent = out.pop(ref)
                    slot.out -= 1
                    if not isinstance(error.cause, StaleWeights):
                        raise WorkerError(f"{slot.name}: {error.cause!r}") from error
                    self.counts["stale"] += 1
                    slot.actor.load.remote(self._weights, self.version)
                    todo.appendleft(_Call(sent.at))
                    continue
                sent = out.pop(ref)
                slot.out -= 1
                slot.answered()
                arrived(sent.at, found)
                for row, answer in zip(sent.at, found, strict=True):
                    answers[row] = answer
        finally:
            for slot in self._slots:  # after an error some calls are still out; nobody waits for them
                slot.out = 0
        return answers

    def close(self) -> None:
        for slot in self._slots:
            if slot.actor is not None and ray.is_initialized():
                ray.kill(slot.actor)
        self._slots, self._weights = [], None
        if self._own_ray:
            ray.shutdown()
            self._own_ray = False


def _start_ray(workers: int) -> bool:
    """Connect to Ray: to the cluster that `RAY_ADDRESS` names, or one started here, which gives True."""
    if ray.is_initialized():
        return False
    local: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        cpus = max(os.cpu_count() or 1, workers)
        # Ray's workers run at niceness 15: beside anything else that is busy they would hardly run at all.
        os.environ.setdefault("RAY_worker_niceness", "0")
        local = {"num_cpus": cpus, "object_store_memory": 1 << 30, "include_dashboard": False}
    ray.init(log_to_driver=False, logging_level="ERROR", configure_logging=False, **local)
    return True
