"""Sampling ahead: who is sampled with which weights, what a changed order of prompts does, and a real run on Ray."""

import json
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unfeign.cli import main
from unfeign.trainers.lookahead import Lookahead, generation_number, prompts_of, step_of


class Pool:
    """Notes what it is asked to do, in order; sampling takes a while."""

    def __init__(self):
        self.counts, self.version, self.done = Counter(), -1, []
        self.weights: Any = None

    def snapshot(self, policy: list[int]) -> list[int]:
        return list(policy)

    def push(self, policy: list[int], version: int) -> None:
        self.load(self.snapshot(policy), version)

    def load(self, weights: list[int], version: int) -> None:
        self.weights, self.version = weights, version

    def generate(self, batch: Any, version: int) -> list[tuple[int, int]]:
        time.sleep(0.02)
        assert version == self.version
        self.done.append((batch.requests, version))
        return [(batch.requests, self.weights[0])]


def batch(number: int, last: int = 99) -> Any:
    return SimpleNamespace(requests=number) if number <= last else None


def learn(staleness: int, steps: int, asked: list[int] | None = None) -> tuple[Pool, list[Any]]:
    """Steps on a policy whose weight is the number of steps taken; returns what each step learned from."""
    pool, policy = Pool(), [0]
    ahead = Lookahead(pool, staleness)
    out = []
    for step in range(steps):
        number = asked[step] if asked else step
        out += ahead.samples(
            batch(number), policy, lambda behind, at=number: batch(at + behind, steps - 1), pool.generate
        )
        policy[0] += 1  # in place, as an optimizer does
    ahead.close()
    return pool, out


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_samples_come_from_the_policy_so_many_batches_earlier(staleness: int):
    pool, learned = learn(staleness, steps=7)
    assert learned == [(number, max(0, number - staleness)) for number in range(7)]
    assert [requests for requests, _ in pool.done] == list(range(7)), "each batch is sampled once, in order"
    assert not pool.counts


def test_another_order_of_prompts_is_sampled_anew():
    pool, learned = learn(1, steps=4, asked=[0, 1, 5, 6])
    assert [number for number, _ in learned] == [0, 1, 5, 6]
    assert learned[2] == (5, 2), "with the weights of now"
    assert pool.counts["sampled ahead in vain"] == 1


def test_an_error_of_the_pool_reaches_the_trainer():
    pool = Pool()
    ahead = Lookahead(pool, 1)

    def fail(one: Any, version: int) -> list[Any]:
        raise RuntimeError("no workers")

    with pytest.raises(RuntimeError, match="no workers"):
        ahead.samples(batch(0), [0], batch, fail)
    ahead.close()


def trainer(**facts: int) -> Any:
    """What the arithmetic of batches reads of a trainer."""
    args = SimpleNamespace(
        steps_per_generation=facts.get("per", 1),
        gradient_accumulation_steps=facts.get("each", 1),
        generation_batch_size=facts.get("size", 4),
    )
    rows = [row for row in range(20) for _ in range(2)]  # two completions a prompt
    size, apart = args.generation_batch_size, args.steps_per_generation
    order = [row for at in range(0, len(rows), size) for _ in range(apart) for row in rows[at : at + size]]
    return SimpleNamespace(
        args=args,
        num_iterations=1,
        state=SimpleNamespace(global_step=facts.get("step", 0)),
        _step=facts.get("micro", 0),
        accelerator=SimpleNamespace(num_processes=facts.get("ranks", 1), process_index=facts.get("rank", 0)),
        train_dataset=[{"prompt": row} for row in range(20)],
        _get_train_sampler=lambda: order,
    )


def test_numbers_of_batches():
    assert [generation_number(trainer(step=s)) for s in range(3)] == [0, 1, 2]
    assert [generation_number(trainer(step=s, per=2, each=2, micro=2 * s)) for s in range(3)] == [0, 1, 2]
    assert [generation_number(trainer(step=s, per=2)) for s in range(4)] == [0, 0, 1, 1], "a batch serves two steps"
    twice = [generation_number(trainer(step=m // 2, each=2, micro=m)) for m in range(4)]
    assert twice == [0, 1, 2, 3], "two batches in a step"
    uneven = [generation_number(trainer(step=m // 2, each=2, per=3, micro=m)) for m in range(12)]
    assert uneven == [m // 3 for m in range(12)], "steps and batches that are no multiples of each other"
    assert [step_of(trainer(each=2), n) for n in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [step_of(trainer(per=2), n) for n in range(3)] == [(0, 0), (2, 0), (4, 0)]


def test_prompts_of_a_batch_by_rank():
    assert prompts_of(trainer(), 1) == [2, 2, 3, 3]
    assert prompts_of(trainer(per=2), 1) == [2, 2, 3, 3]
    assert [prompts_of(trainer(size=8, ranks=2, rank=r), 1) for r in (0, 1)] == [[4, 4, 5, 5], [6, 6, 7, 7]]
    assert prompts_of(trainer(), 99) == []


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_on_ray_one_batch_ahead(write_config, tmp_path, reward_source):
    (tmp_path / "mine.py").write_text(reward_source)
    grpo = {
        "max_steps": 5,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "learning_rate": 0.01,
    }
    config = write_config(
        rollouts={"backend": "ray", "staleness": 1},
        rewards=[{"fn": "mine.py:variety"}],
        audit={"before": False, "after": True, "split": "validation", "max_new_tokens": 4},
        grpo=grpo,
    )
    main(["train", str(config)])
    steps = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]
    assert steps[0]["ratio/mean"] == pytest.approx(1, abs=1e-3), "the first batch is of the policy itself"
    assert any(abs(row["ratio/mean"] - 1) > 1e-4 for row in steps[1:]), "later ones are a step behind"
    assert all("overlap_seconds" in row and "failures/sampled_ahead_in_vain" not in row for row in steps)
    ledger = rows(tmp_path / "run" / "completions.jsonl")
    assert [row["sample_id"] for row in ledger] == [f"{step}/{row}" for step in range(5) for row in range(4)]


def test_workers_that_sample_ahead_score_nothing(write_config, refused):
    rewards = [{"fn": "verbalized_rejection", "on": "workers"}]
    config = write_config(rollouts={"backend": "ray", "staleness": 1}, rewards=rewards)
    assert "rewards on the trainer, while workers sample ahead" in refused("train", config, "--dry-run")


def test_sampling_ahead_needs_workers(write_config, refused):
    config = write_config(rollouts={"backend": "in_process", "staleness": 1})
    assert "rollouts.backend: ray, to sample ahead" in refused("train", config, "--dry-run")
