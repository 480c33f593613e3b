"""Two processes learn what one does: real processes over gloo, GRPO and PPO, an adapter and all weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

GRPO = {"max_steps": 2, "num_generations": 4, "max_completion_length": 8, "learning_rate": 1e-3, "logging_steps": 1}
RUN = "from unfeign.cli import main; main()"


def launch(config: Path, ranks: int, out: Path, *overrides: str) -> None:
    """Train as a user would with `torchrun`."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--no-python", sys.executable, "-c", RUN]
    if ranks == 1:
        command = [sys.executable, "-c", RUN]
    done = subprocess.run(
        [*command, "train", str(config), f"output={out}", *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
@pytest.mark.parametrize("trained", ["lora", "full"])
def test_two_ranks_learn_what_one_does(write_config, tmp_path, reward_source, tools, algorithm: str, trained: str):
    (tmp_path / "mine.py").write_text(reward_source.replace("0.1 * row", "0.1 * (row % 4)"))
    config = write_config(
        algorithm=algorithm,
        lora=tools.LORA if trained == "lora" else None,
        rewards=[{"fn": "mine.py:variety"}],
        audit={"before": False, "after": False},
        grpo=GRPO | {"optim": "sgd"},  # Adam would turn rounding of a tiny gradient into a whole step
    )
    launch(config, 1, tmp_path / "one", "grpo.per_device_train_batch_size=8")
    launch(config, 2, tmp_path / "two", "grpo.per_device_train_batch_size=4")
    one, two = (rows(tmp_path / name / "completions.jsonl") for name in ("one", "two"))
    assert [(r["sample_id"], r["completion"]) for r in one] == [(r["sample_id"], r["completion"]) for r in two]
    logged = [rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert [len(found) for found in logged] == [2, 2], "one process logs"
    for a, b in zip(*logged, strict=True):
        assert a["grad_norm"] > 0
        # DDP averages what ranks normalize by the whole batch, so this is the gradient itself
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    file = "policy/adapter_model.safetensors" if trained == "lora" else "model.safetensors"
    first, second = (load_file(tmp_path / name / "checkpoints" / "checkpoint-2" / file) for name in ("one", "two"))
    assert first.keys() == second.keys() and not [name for name in first if "value_head" in name]
    for name, value in first.items():
        assert (second[name] - value).abs().max() < 1e-6, name
    if algorithm == "ppo":
        heads = [
            load_file(tmp_path / name / "checkpoints" / "checkpoint-2" / "value_head.safetensors")
            for name in ("one", "two")
        ]
        assert heads[0]["weight"].abs().max() > 0
        assert all((heads[0][key] - heads[1][key]).abs().max() < 1e-6 for key in heads[0])
