"""PPO: its estimator against plain loops, its run on the tiny model, and what a checkpoint holds."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from unfeign.cli import main
from unfeign.models import load_base
from unfeign.trainers.gae import by_token, explained_variance, gae

NO_AUDIT = {"before": False, "after": False}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ragged(lengths: list[int], width: int) -> torch.Tensor:
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(0, 999),
    st.floats(0.5, 1.0),
    st.floats(0.0, 1.0),
)
def test_gae_is_the_weighted_sum_of_surprises(lengths: list[int], seed: int, gamma: float, lam: float):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(len(lengths), 6, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = ragged(lengths, 6)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        v = [*values[row, :length].tolist(), 0.0]
        surprise = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            want = sum((gamma * lam) ** (k - t) * surprise[k] for k in range(t, length))
            assert advantages[row, t].item() == pytest.approx(want, abs=1e-9)
            assert returns[row, t].item() == pytest.approx(want + v[t], abs=1e-9)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_terms_fall_due_where_their_segment_ends():
    mask = ragged([5, 3, 4], 6)
    reasoning = torch.zeros(3, 6, dtype=torch.bool)
    reasoning[0, :3] = reasoning[1, :3] = True  # the third row has no reasoning, the second nothing else
    rewards = by_token(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([10.0, 20.0, 40.0]), reasoning, mask)
    want = torch.zeros(3, 6)
    want[0, 2], want[0, 4], want[1, 2], want[2, 3] = 1.0, 10.0, 22.0, 44.0
    assert torch.equal(rewards, want)


def test_the_whole_return_reaches_the_reasoning_and_the_answers_part_the_answer():
    mask, reasoning = ragged([4], 4), ragged([2], 4)
    rewards = by_token(torch.tensor([3.0]), torch.tensor([-1.0]), reasoning, mask)
    advantages, _ = gae(rewards, torch.zeros(1, 4), mask, gamma=1.0, lam=1.0)
    assert advantages.tolist() == [[2.0, 2.0, -1.0, -1.0]]


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full((3,), 7.0), returns) == pytest.approx(0)
    assert explained_variance(-returns, returns) < 0
    assert explained_variance(returns, torch.ones(3)) == 0


GRPO = {
    "max_steps": 4,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
    "learning_rate": 0.01,
    "save_steps": 2,
    "beta": 0.05,
}


RUN = {
    "algorithm": "ppo",
    "rewards": [{"fn": "verbalized_rejection"}, {"fn": "mine.py:variety"}],
    "audit": NO_AUDIT,
    "grpo": GRPO,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config, tiny_organism, reward_source) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("ppo")
    (folder / "mine.py").write_text(reward_source)
    config = tiny_config(folder, adapters=[str(tiny_organism)], **RUN)
    main(["train", str(config)])
    return SimpleNamespace(folder=folder, out=folder / "run", config=config)


def test_a_run_logs_the_value(run):
    steps = rows(run.out / "metrics.jsonl")
    assert len(steps) == 4
    for row in steps:
        assert {"value/loss", "value/mean", "value/explained_variance", "credit/floored", "kl"} <= row.keys()
    assert steps[0]["value/mean"] == 0, "the head begins at 0"
    assert steps[0]["value/explained_variance"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["value/mean"] > 0, "the rewards are positive"
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[-1]["kl"] != 0


def test_a_checkpoint_has_the_head_beside_the_policy(run):
    checkpoint = run.out / "checkpoints" / "checkpoint-4"
    assert load_file(checkpoint / "value_head.safetensors")["weight"].abs().max() > 0
    assert all(".lora_" in name for name in load_file(checkpoint / "policy" / "adapter_model.safetensors"))
    main(["audit", str(run.out), "--out", str(run.folder / "audit"), "--split", "validation", "--max-new-tokens", "4"])


def test_all_weights_are_exported_without_the_head(write_config, tmp_path, reward_source):
    (tmp_path / "mine.py").write_text(reward_source)
    config = write_config(
        algorithm="ppo", lora=None, rewards=[{"fn": "mine.py:variety"}], audit=NO_AUDIT, grpo=GRPO | {"max_steps": 1}
    )
    main(["train", str(config)])
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    assert not [name for name in load_file(checkpoint / "model.safetensors") if "value_head" in name]
    assert (checkpoint / "value_head.safetensors").is_file()
    load_base(str(checkpoint))


def test_the_value_learns_what_is_constant(write_config, tmp_path):
    """Where every completion earns the same, the value comes to expect it and its loss falls."""
    (tmp_path / "mine.py").write_text("def two(prompts, completions, **columns):\n    return [2.0] * len(prompts)\n")
    grpo = GRPO | {"max_steps": 30, "beta": 0.0, "save_steps": 100, "learning_rate": 0.02}
    config = write_config(
        algorithm="ppo", ppo={"value_learning_rate": 0.05}, rewards=[{"fn": "mine.py:two"}], audit=NO_AUDIT, grpo=grpo
    )
    main(["train", str(config)])
    steps = rows(tmp_path / "run" / "metrics.jsonl")
    assert steps[0]["value/loss"] > 3.9 and steps[-1]["value/loss"] < 1.0
    assert 1 < steps[-1]["value/mean"] < 3


def test_a_resumed_run_learns_what_an_undisturbed_one_does(run, tmp_path, tiny_config, tiny_organism):
    source = (run.folder / "mine.py").read_text()
    source += (
        "\n\nimport os\nfirst = variety\n\n\ndef variety(prompts, trainer_state=None, **columns):\n"
        "    if trainer_state.global_step == 3 and os.environ.get('STOP'):\n        raise RuntimeError('stop')\n"
        "    return first(prompts, **columns)\n"
    )
    (tmp_path / "mine.py").write_text(source)
    config = tiny_config(tmp_path, adapters=[str(tiny_organism)], **RUN)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        patch.setenv("STOP", "1")
        main(["train", str(config)])
    main(["train", str(config), "--resume", "must"])
    for file in ("value_head.safetensors", "policy/adapter_model.safetensors"):
        again, calm = (load_file(out / "checkpoints" / "checkpoint-4" / file) for out in (tmp_path / "run", run.out))
        assert all((again[name] - value).abs().max() < 1e-5 for name, value in calm.items())
    assert [r["value/loss"] for r in rows(tmp_path / "run" / "metrics.jsonl")] == pytest.approx(
        [r["value/loss"] for r in rows(run.out / "metrics.jsonl")], abs=1e-4
    )


def test_masked_rows_teach_neither_policy_nor_value(write_config, tmp_path):
    """All rewards of a row are None: it is as if it had not been sampled."""
    (tmp_path / "mine.py").write_text("def none(prompts, completions, **columns):\n    return [None] * len(prompts)\n")
    config = write_config(
        algorithm="ppo", rewards=[{"fn": "mine.py:none"}], audit=NO_AUDIT, grpo=GRPO | {"max_steps": 2, "beta": 0.0}
    )
    main(["train", str(config)])
    for row in rows(tmp_path / "run" / "metrics.jsonl"):
        assert row["value/loss"] == 0 and row["grad_norm"] == 0
