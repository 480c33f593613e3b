"""Interrupted runs go on as if nothing had happened; killed ones too. Real processes, real signals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from unfeign.cli import main
from unfeign.trainers import checkpoint
from unfeign.trainers.run_folder import status

GRPO = {
    "max_steps": 6,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
    "learning_rate": 0.01,
    "save_steps": 1,
}
REWARD = '''
import os, signal

def variety(prompts, completions, completion_ids, trainer_state, **columns):
    """Varies within every group; kills its own process at the step that DIE_AT names."""
    if str(trainer_state.global_step) == os.environ.get("DIE_AT"):
        os.kill(os.getpid(), getattr(signal, os.environ.get("DIE_BY", "SIGKILL")))
    return [len(set(ids)) + 0.1 * row for row, ids in enumerate(completion_ids)]
'''


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def config(write_config, tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(REWARD)
    return write_config(rewards=[{"fn": "mine.py:variety"}], audit={"before": False, "after": False}, grpo=GRPO)


def run(config: Path, out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own, as a user starts it."""
    command = [sys.executable, "-c", "from unfeign.cli import main; main()", "train", str(config), f"output={out}"]
    return subprocess.run(
        [*command, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


def ledger(out: Path) -> list[tuple]:
    return [
        (r["step"], r["sample_id"], r["completion"], round(r["reward"], 5)) for r in rows(out / "completions.jsonl")
    ]


def learned(out: Path) -> list[tuple]:
    return [(r["step"], round(r["reward"], 5), round(r["loss"], 5), r["tokens"]) for r in rows(out / "metrics.jsonl")]


@pytest.fixture
def undisturbed(config: Path, tmp_path: Path) -> Path:
    main(["train", str(config), f"output={tmp_path / 'calm'}"])
    return tmp_path / "calm"


def weights(out: Path) -> dict[str, Any]:
    return load_file(out / "checkpoints" / "checkpoint-6" / "policy" / "adapter_model.safetensors")


def assert_same_run(out: Path, calm: Path) -> None:
    assert ledger(out) == ledger(calm) and learned(out) == learned(calm)
    for name, value in weights(calm).items():
        assert (weights(out)[name] - value).abs().max() < 1e-5, name


def test_every_sample_is_in_the_ledger_once(undisturbed):
    ids = [row["sample_id"] for row in rows(undisturbed / "completions.jsonl")]
    assert ids == [f"{step}/{row}" for step in range(6) for row in range(4)]


def test_sigterm_saves_after_the_step_and_says_how_to_go_on(config, undisturbed, tmp_path):
    out = tmp_path / "stopped"
    stopped = run(config, out, "grpo.save_steps=100", DIE_AT="2", DIE_BY="SIGTERM")
    assert stopped.returncode == 128 + signal.SIGTERM and "--resume auto" in stopped.stderr
    assert checkpoint.resumable(out / "checkpoints")[0] == 3
    assert "interrupted, step 3 of 6" in status(out).line() and "SIGTERM" in status(out).line()
    assert run(config, out, "grpo.save_steps=100", "--resume", "must").returncode == 0
    assert_same_run(out, undisturbed)


def test_resume_refusals(config, refused, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert "a run to resume" in refused("train", config, "--resume", "must")
    main(["train", str(config)])
    assert "choose another output, or --resume auto" in refused("train", config)
    assert "a finished one" in refused("train", config, "--resume", "auto")
    assert "another value of seed" in refused("train", config, "seed=9", "--resume", "auto")
    state = json.loads((out / "state.json").read_text())
    (out / "state.json").write_text(json.dumps(state | {"state": "running"}))
    assert f"running (process {os.getpid()})" in refused("train", config, "--resume", "auto")


def test_status_prints_a_line_a_run(config, capsys, tmp_path):
    main(["train", str(config)])
    capsys.readouterr()
    main(["status", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "finished, step 6 of 6" in said and "reward" in said


def test_old_checkpoints_keep_the_policy_and_drop_the_training_state(undisturbed):
    folders = dict(checkpoint.steps_of(undisturbed / "checkpoints"))
    assert list(folders) == [1, 2, 3, 4, 5, 6]
    assert all((folder / "policy" / "adapter_model.safetensors").is_file() for folder in folders.values())
    able = [step for step, folder in folders.items() if (folder / checkpoint.TENSORS).is_file()]
    assert able == [5, 6]
    assert not [p for p in undisturbed.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl")]


def test_a_full_disk_leaves_the_last_checkpoint_whole(config, monkeypatch, tmp_path):
    """The third save fails half-way, as a full disk does."""
    real, calls = checkpoint.save_training_state, []

    def full(folder: Path, *state: Any) -> None:
        calls.append(folder)
        if len(calls) == 3:
            (folder / checkpoint.TENSORS).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(folder, *state)

    monkeypatch.setattr(checkpoint, "save_training_state", full)
    with pytest.raises(OSError, match="No space left"):
        main(["train", str(config)])
    out = tmp_path / "run"
    assert [step for step, _ in checkpoint.steps_of(out / "checkpoints")] == [1, 2]
    assert checkpoint.resumable(out / "checkpoints")[0] == 2 and not (out / "checkpoints" / checkpoint.ASIDE).exists()
    assert "failed, step 3 of 6" in status(out).line() and "No space left" in status(out).line()
    monkeypatch.setattr(checkpoint, "save_training_state", real)
    main(["train", str(config), "--resume", "auto"])
    assert status(out).state == "finished"


BAD = """
from unfeign.rewards.comparators import Unread
from unfeign.rewards.terms import Score, Term

def values(rows):
    return [0.5] * (len(rows) - 1) + [float("{kind}")]

def function(completions, **columns):
    return values(completions)

class Method(Unread):
    name = "method"

    async def score(self, transcripts):
        return [Score((Term("x", v, 1.0, "answer"),), None, t) for v, t in zip(values(transcripts), transcripts)]
"""


@pytest.mark.parametrize("what", ["function", "Method"])
@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_reward_that_is_not_finite_stops_before_the_step(kind, what, write_config, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(BAD.format(kind=kind))
    grpo = GRPO | {"max_steps": 1}
    config = write_config(rewards=[{"fn": f"mine.py:{what}"}], audit={"before": False, "after": False}, grpo=grpo)
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(config)])
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        stopped.value.code == 1
        and f"reward {what.lower()!r}" in said
        and "rows [3]" in said
        and "no optimiser step" in said
    )
    saved = json.loads((tmp_path / "run" / "bad_batch.json").read_text())
    assert len(saved) == 4 and saved[3]["rewards"][what.lower()] in ("nan", "inf") and saved[0]["completion"]
    assert checkpoint.resumable(tmp_path / "run" / "checkpoints") is None


def test_no_workers_left_saves_a_checkpoint_and_exits_with_1(config, monkeypatch, tmp_path, capsys):
    from unfeign.trainers.rollouts import InProcessPool, NoWorkers

    real = InProcessPool.generate

    def dying(self, requests, version, sampling):
        if version == 2:
            raise NoWorkers("expected at least one of 1 rollout workers alive, found none")
        return real(self, requests, version, sampling)

    monkeypatch.setattr(InProcessPool, "generate", dying)
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(config), "grpo.save_steps=100"])
    assert stopped.value.code == 1 and "rollout workers alive" in capsys.readouterr().err
    assert checkpoint.resumable(tmp_path / "run" / "checkpoints")[0] == 2
    monkeypatch.setattr(InProcessPool, "generate", real)
    main(["train", str(config), "grpo.save_steps=100", "--resume", "must"])
    assert status(tmp_path / "run").state == "finished"


def test_a_row_whose_worker_failed_is_masked(write_config, tmp_path, monkeypatch):
    """Set aside, it counts in no mean; the others learn as usual."""
    from dataclasses import replace

    from unfeign.trainers.rollouts import InProcessPool

    real = InProcessPool.generate

    def failing(self, requests, version, sampling):
        samples = real(self, requests, version, sampling)
        return [replace(samples[0], failed="crashed its worker twice"), *samples[1:]]

    monkeypatch.setattr(InProcessPool, "generate", failing)
    (tmp_path / "mine.py").write_text(REWARD)
    config = write_config(
        rewards=[{"fn": "mine.py:variety"}], audit={"before": False, "after": False}, grpo=GRPO | {"max_steps": 2}
    )
    main(["train", str(config)])
    for row in rows(tmp_path / "run" / "metrics.jsonl"):
        assert row["failures/rollout"] == 1 and row["failures/judge"] == 0 and row["reward"] > 1
    failed = [row["failed"] for row in rows(tmp_path / "run" / "completions.jsonl")]
    assert [bool(f) for f in failed] == [True, False, False, False] * 2


def test_a_batch_that_serves_several_steps_is_never_cut(config, tmp_path):
    """Saved and stopped where a batch ends, a run goes on with the samples that an undisturbed one draws."""
    twice = ("grpo.num_iterations=2", "grpo.save_steps=1")
    main(["train", str(config), f"output={tmp_path / 'calm'}", *twice])
    steps = sorted(int(p.name.rpartition("-")[2]) for p in (tmp_path / "calm" / "checkpoints").glob("checkpoint-*"))
    assert steps == [2, 4, 6]
    died = run(config, tmp_path / "out", *twice, DIE_AT="4")
    assert died.returncode == -signal.SIGKILL
    assert run(config, tmp_path / "out", *twice, "--resume", "must").returncode == 0
    out, calm = tmp_path / "out", tmp_path / "calm"
    assert ledger(out) == ledger(calm)
    losses = [[round(r["loss"], 5) for r in rows(folder / "metrics.jsonl")] for folder in (out, calm)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
