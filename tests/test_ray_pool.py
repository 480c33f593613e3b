"""Ray workers, real processes: they give what the in-process pool gives, and dying loses nothing."""

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError

from unfeign.trainers.policy import PolicyRecipe, put, trained
from unfeign.trainers.ray_pool import RayPool, WeightsDiffer, Worker
from unfeign.trainers.rollouts import (
    Context,
    InProcessPool,
    NoWorkers,
    RolloutRequest,
    Sampling,
    StaleWeights,
    WorkerError,
    row_seed,
)

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import a test module
SAMPLING = Sampling(max_new_tokens=12, temperature=0.9)


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, tiny_organism: Path, tools) -> PolicyRecipe:
    return PolicyRecipe(str(tiny_model), (str(tiny_organism),), lora=tools.LORA)


@pytest.fixture(scope="module")
def policy(recipe: PolicyRecipe, tools) -> Any:
    model, _, _ = recipe.build()
    tools.shake(model, ".policy.", seed=4)
    return model


class Mortal(Worker):
    """Dies on a prompt that begins with token 13, and hangs on one that begins with 14."""

    def generate(self, requests, version, sampling):
        if any(r.prompt_ids[0] == 13 for r in requests):
            os.kill(os.getpid(), signal.SIGKILL)
        if any(r.prompt_ids[0] == 14 for r in requests):
            threading.Event().wait()
        return super().generate(requests, version, sampling)


class MortalPool(RayPool):
    worker = Mortal


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=1 << 28, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pool(ray_here, recipe: PolicyRecipe, policy, tokenizer) -> Iterator[RayPool]:
    """Two workers with the policy's weights as version 1."""
    made = MortalPool(recipe, tokenizer, workers=2, batch_size=3, timeout=60.0, threads=1)
    made.push(policy, 1)
    yield made
    made.close()


def requests(count: int, first: int | None = None) -> list[RolloutRequest]:
    """Prompts of different lengths, two rows each; the fourth begins with `first`."""
    prompts = [[20 + i // 2, *range(40, 44 + i // 2)] for i in range(count)]
    if first is not None:
        prompts[3] = [first, *prompts[3][1:]]
    return [RolloutRequest(ids, row_seed(0, i)) for i, ids in enumerate(prompts)]


def here(policy: Any, tokenizer: Any, asked: list[RolloutRequest]) -> list[Any]:
    pool = InProcessPool(tokenizer)
    pool.push(policy, 0)
    return pool.generate(asked, 0, SAMPLING)


def same(some: list[Any], others: list[Any]) -> bool:
    return [s.ids for s in some] == [s.ids for s in others] and all(
        a == pytest.approx(b, abs=1e-4)
        for s, o in zip(some, others, strict=True)
        for a, b in zip(s.logprobs, o.logprobs, strict=True)
    )


def kill(slot: Any) -> None:
    """SIGKILL a worker's process, as the kernel does when memory runs out."""
    os.kill(ray.get(slot.actor.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)


def test_samples_are_those_of_the_in_process_pool(pool, policy, tokenizer):
    heard: list[tuple] = []
    found = pool.generate(requests(10), 1, SAMPLING, lambda *some: heard.append(some))
    assert same(found, here(policy, tokenizer, requests(10)))
    assert len(heard) == 4, "calls of at most three rows"
    assert {row: sample.ids for rows, some in heard for row, sample in zip(rows, some, strict=True)} == dict(
        enumerate(sample.ids for sample in found)
    )


def test_a_push_changes_what_is_sampled(pool, policy, tokenizer, tools):
    before = pool.generate(requests(6), 1, SAMPLING)
    tools.shake(policy, ".policy.", seed=5, scale=0.5)
    pool.push(policy, 2)
    after = pool.generate(requests(6), 2, SAMPLING)
    assert not same(before, after) and same(after, here(policy, tokenizer, requests(6)))
    with pytest.raises(StaleWeights, match="expected weights version 1, found 2"):
        pool.generate(requests(1), 1, SAMPLING)
    tools.shake(policy, ".policy.", seed=4)
    pool.push(policy, 1)


def test_a_stale_worker_is_caught_and_mended(pool, policy, tokenizer):
    stale = pool._slots[0]
    weights = ray.put(trained(policy))
    ray.get(stale.actor.load.remote(weights, 77))
    pool.counts.clear()
    assert same(pool.generate(requests(8), 1, SAMPLING), here(policy, tokenizer, requests(8)))
    assert pool.counts["stale"] >= 1 and set(pool.counts) == {"stale"}


def test_killed_workers_are_replaced_and_nothing_changes(pool, policy, tokenizer):
    pool.counts.clear()
    for slot in pool._slots:
        kill(slot)
    assert same(pool.generate(requests(10), 1, SAMPLING), here(policy, tokenizer, requests(10)))
    assert pool.counts["died"] == 2 and not any(slot.gone for slot in pool._slots)


@pytest.mark.parametrize(
    "error", [OutOfMemoryError("no memory"), NodeDiedError("no machine"), ObjectLostError("00", "", "")], ids=repr
)
def test_a_worker_lost_in_another_way(pool, policy, tokenizer, monkeypatch, error):
    """Ray has errors of their own for these; raised here in the place of an answer that real workers gave."""
    get, left = ray.get, [error]

    def lossy(ref: Any, **settings: Any) -> Any:
        found = get(ref, **settings)
        if left and isinstance(found, list):
            raise left.pop()
        return found

    monkeypatch.setattr(ray, "get", lossy)
    pool.counts.clear()
    assert same(pool.generate(requests(10), 1, SAMPLING), here(policy, tokenizer, requests(10)))
    assert pool.counts["died"] == 1 and not left


def test_a_killed_worker_is_replaced_at_the_next_push(pool, policy, tokenizer):
    kill(pool._slots[1])
    pool.push(policy, 3)
    assert same(pool.generate(requests(6), 3, SAMPLING), here(policy, tokenizer, requests(6)))
    pool.push(policy, 1)


def test_a_row_that_kills_its_worker_is_set_aside_and_the_others_are_not(pool, policy, tokenizer):
    pool.counts.clear()
    asked = requests(8, first=13)
    found = pool.generate(asked, 1, SAMPLING)
    assert [s.failed is not None for s in found] == [row == 3 for row in range(8)]
    assert "twice" in found[3].failed and pool.counts["set aside"] == 1
    kept = [row for row in range(8) if row != 3]
    assert same([found[row] for row in kept], here(policy, tokenizer, [asked[row] for row in kept]))


def test_a_worker_that_hangs_counts_as_dead(ray_here, recipe, policy, tokenizer):
    pool = MortalPool(recipe, tokenizer, workers=2, batch_size=4, timeout=15.0, threads=1)
    pool.push(policy, 1)
    pool._timeout = 2.0
    found = pool.generate(requests(4, first=14), 1, SAMPLING)
    assert [s.failed is not None for s in found] == [False, False, False, True]
    assert pool.counts["timeout"] >= 2
    pool.close()


def describe(context: Context, item: int) -> tuple[int, int]:
    """Counts its calls in the worker's cache, and adds to the item something only the worker's model knows."""
    context.cache["calls"] = context.cache.get("calls", 0) + 1
    return context.cache["calls"], item + context.model.config.vocab_size


def test_a_task_runs_on_a_workers_context(pool, tokenizer):
    found = pool.run(describe, list(range(7)))
    assert [value for _, value in found] == [item + len(tokenizer) for item in range(7)]
    assert max(calls for calls, _ in found) > 1, "the cache should live from call to call"


def test_a_function_of_the_users_own_file_is_shipped(pool, tmp_path):
    (tmp_path / "mine.py").write_text("SHIFT = 5\n\ndef shift(context, item):\n    return item + SHIFT\n")
    spec = importlib.util.spec_from_file_location("unfeign_user_mine", tmp_path / "mine.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    (tmp_path / "mine.py").unlink()
    assert pool.run(module.shift, [1, 2]) == [6, 7]


def test_an_error_names_the_worker(pool):
    def broken(context: Context, item: int) -> int:
        raise ValueError("no such thing")

    with pytest.raises(WorkerError, match=r"worker \d: ValueError\('no such thing'\)"):
        pool.run(broken, [1])


def test_no_workers_left_is_said(ray_here, recipe, policy, tokenizer):
    pool = RayPool(recipe, tokenizer, workers=1, batch_size=2, timeout=60.0, threads=1)
    pool.push(policy, 1)

    def deadly(context: Context, item: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(NoWorkers, match="expected at least one of 1 rollout workers alive, found none"):
        pool.run(deadly, list(range(8)))
    pool.close()


def test_workers_with_another_policy_are_noticed_at_the_first_push(ray_here, tiny_model, recipe, tokenizer, tools):
    other = PolicyRecipe(str(tiny_model), lora=tools.LORA)  # the organism is missing below it
    pool = RayPool(other, tokenizer, workers=1, timeout=60.0, threads=1)
    model, _, _ = recipe.build()
    with pytest.raises(WeightsDiffer, match="worker 0: expected the trainer's log-probs within"):
        pool.push(model, 0)
    pool.close()


def test_bf16_workers_sample_for_an_fp32_trainer(ray_here, recipe, policy, tokenizer):
    half = PolicyRecipe(recipe.model, recipe.adapters, "bfloat16", recipe.lora)
    pool = RayPool(half, tokenizer, workers=1, timeout=60.0, threads=1)
    pool.push(policy, 1)
    found = pool.generate(requests(4), 1, SAMPLING)
    assert all(s.failed is None and s.ids for s in found)
    pool.close()


def test_weights_travel_as_numpy_and_arrive_whole(recipe, policy):
    weights = trained(policy)
    assert weights and all(".policy." in name for name in weights)
    twin, _, _ = recipe.build()
    put(weights, twin)
    for (name, a), (_, b) in zip(policy.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="expected weights"):
        put({"other": next(iter(weights.values()))}, twin)


def test_bf16_weights_travel_as_their_bits():
    model = torch.nn.Linear(3, 2).to(torch.bfloat16)
    weights = trained(model)
    assert {array.dtype.name for array in weights.values()} == {"int16"}
    twin = torch.nn.Linear(3, 2)
    put(weights, twin)
    assert torch.equal(twin.weight, model.weight.float())


def test_a_run_on_ray_is_the_run_in_process(ray_here, tiny_config, tiny_organism, reward_source, tmp_path):
    """Same samples, same rewards, same losses; and a worker killed on the way changes nothing."""
    import json

    from unfeign.trainers import launch
    from unfeign.trainers.config import TrainConfig
    from unfeign.trainers.plan import plan

    (tmp_path / "mine.py").write_text(reward_source)
    config = tiny_config(
        tmp_path,
        adapters=[str(tiny_organism)],
        rewards=[{"fn": "mine.py:variety"}],
        audit={"before": False, "after": False},
    )
    logs = {}
    for backend in ("in_process", "ray"):
        out = tmp_path / backend
        run = plan(TrainConfig.load(config, (f"rollouts.backend={backend}", f"output={out}", "grpo.max_steps=3")))

        def lose_a_worker(model: Any, tokenizer: Any, pool: Any, lineage: Any) -> None:
            if isinstance(pool, RayPool):
                kill(pool._slots[0])

        launch.train(run, before=lose_a_worker, say=lambda line: None)
        logs[backend] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for here_row, ray_row in zip(logs["in_process"], logs["ray"], strict=True):
        for key in ("step", "reward", "loss", "tokens", "grad_norm"):
            assert ray_row[key] == pytest.approx(here_row[key], abs=1e-4), key
    assert sum(row.get("failures/died", 0) for row in logs["ray"]) == 1


REMOTE = '''
import os
from pathlib import Path

from unfeign.rewards.rules import RulesJudge


class Reader(RulesJudge):
    """A judge of the user's own; notes where it read."""

    name = "reader"

    async def __call__(self, cases):
        with Path(os.environ["NOTES"]).open("a") as file:
            file.write(f"{os.getpid()} {len(cases)}\\n")
        return await super().__call__(cases)


def variety(prompts, completions, completion_ids, trainer_state, **columns):
    """Notes where it ran, and how many completions of how many prompts it saw."""
    with Path(os.environ["NOTES"]).open("a") as file:
        file.write(f"{os.getpid()} {len(completions)} {len({str(p) for p in prompts})} {trainer_state.global_step}\\n")
    return [len(set(ids)) for ids in completion_ids]
'''


def test_rewards_and_judges_of_a_users_file_run_on_workers(ray_here, tiny_config, tiny_organism, tmp_path, monkeypatch):
    """They are told of in the config, shipped with their file, see whole groups, and earn what they earn at home."""
    import json

    from unfeign.trainers import launch, remote_reward
    from unfeign.trainers.config import TrainConfig
    from unfeign.trainers.plan import plan

    notes = tmp_path / "notes.txt"
    (tmp_path / "mine.py").write_text(REMOTE.replace('os.environ["NOTES"]', repr(str(notes))))
    logs = {}
    for where in ("trainer", "workers"):
        rewards = [
            {"fn": "mine.py:variety", "on": where},
            {"fn": "verbalized_rejection", "kwargs": {"judge": {"name": "mine.py:Reader"}}, "on": where},
        ]
        config = tiny_config(
            tmp_path, adapters=[str(tiny_organism)], rewards=rewards, audit={"before": False, "after": False}
        )
        overrides = ("rollouts.backend=ray", "rollouts.workers=2", f"output={tmp_path / where}")
        run = plan(TrainConfig.load(config, overrides))
        notes.unlink()  # of the two rows that the plan let them score
        launch.train(run, say=lambda line: None)
        seen = [[int(part) for part in line.split()] for line in notes.read_text().splitlines()]
        assert {pid == os.getpid() for pid, *_ in seen} == {where == "trainer"}
        groups = sorted(rest for _, *rest in seen if len(rest) == 3)
        assert groups == {"trainer": [[4, 2, 0], [4, 2, 1]], "workers": [[2, 1, step] for step in (0, 0, 1, 1)]}[where]
        logs[where] = [json.loads(line) for line in (tmp_path / where / "metrics.jsonl").read_text().splitlines()]
    for here_row, there_row in zip(logs["trainer"], logs["workers"], strict=True):
        for key in ("reward", "loss", "terms/malformed/raw", "rewards/variety/mean"):
            assert there_row[key] == pytest.approx(here_row[key], abs=1e-4), key
    assert not remote_reward._made, "nothing was made for a worker in the trainer's own process"
