"""The examples run as they stand, on the tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unfeign.cli import main
from unfeign.models import POLICY, load_base, resolve, stack
from unfeign.trainers.config import TrainConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = (
    "grpo.max_steps=1",
    "grpo.num_generations=2",
    "grpo.per_device_train_batch_size=2",
    "grpo.max_completion_length=6",
)
QUIET = ("audit.before=false", "audit.after=false")


def test_bare_grpo(tiny_model: Path, tmp_path: Path):
    """Our reward in TRL's own trainer, in a process of its own, and its adapter loads as what it was trained on."""
    out = tmp_path / "bare"
    command = [sys.executable, str(EXAMPLES / "bare_grpo.py"), "--model", str(tiny_model), "--steps", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--output", str(out)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "reward" in done.stdout
    base, adapters = resolve(str(out / "final"))
    assert (base, adapters) == (str(tiny_model), [out / "final" / POLICY])
    model, _ = stack(load_base(base), base, adapters)
    assert model.active_adapters == ["below0"]


def custom_config(tmp_path: Path, tiny_model: Path) -> list[str]:
    return [str(EXAMPLES / "custom_reward.yaml"), f"model={tiny_model}", "adapters=[]", f"output={tmp_path / 'run'}"]


def test_custom_reward_runs_in_the_loop(tiny_model: Path, tmp_path: Path):
    main(["train", *custom_config(tmp_path, tiny_model), *SMALL, *QUIET])
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert "rewards/brevity/mean" in row and "rewards/verbalized_rejection/mean" in row


def test_custom_reward_values():
    from unfeign.rewards.plugin import load_reward

    config = TrainConfig.load(EXAMPLES / "custom_reward.yaml")
    (spec,) = [spec for spec in config.rewards if "brevity" in spec.fn]
    reward = load_reward(spec.model_copy(update={"kwargs": {"words": 2}}), config.folder)
    texts = ["<think>a</think>one two", "<think>a</think>one two three four", "no reasoning closed", "<think>a</think>"]
    got = reward.fn(
        prompts=[None] * 4,
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        completion_ids=[[]] * 4,
        close_think=["</think>"] * 4,
    )
    assert got == pytest.approx([1.0, 0.5, 0.0, 0.0])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_config_parses(path: Path):
    assert TrainConfig.load(path).rewards
