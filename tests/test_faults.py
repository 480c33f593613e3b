"""Processes killed at random moments, many times over: nothing is lost, nothing is counted twice, memory stays flat.

The trainer's kills go through a fork server that has the libraries loaded already, so a restart costs a second and not
ten; the processes, the signals and what they leave on the disk are real.
"""

import json
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from safetensors.torch import load_file

from unfeign.cli import main
from unfeign.trainers import checkpoint, launch
from unfeign.trainers.config import TrainConfig
from unfeign.trainers.plan import plan
from unfeign.trainers.run_folder import status

REWARD = '''
def variety(prompts, completions, completion_ids, **columns):
    """Varies within every group."""
    return [len(set(ids)) + 0.1 * row for row, ids in enumerate(completion_ids)]
'''
STEPS = 40


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ledger(out: Path) -> list[tuple]:
    """Every sample: its id, what was said, what it earned."""
    return [(r["sample_id"], r["completion"], round(r["reward"], 4)) for r in rows(out / "completions.jsonl")]


def learned(out: Path) -> list[tuple]:
    return [(r["step"], round(r["reward"], 4), round(r["loss"], 4)) for r in rows(out / "metrics.jsonl")]


def assert_same_run(out: Path, calm: Path) -> None:
    assert [sample for sample, _, _ in ledger(out)] == [f"{step}/{row}" for step in range(STEPS) for row in range(4)]
    assert ledger(out) == ledger(calm) and learned(out) == learned(calm)
    path = Path("checkpoints") / f"checkpoint-{STEPS}" / "policy" / "adapter_model.safetensors"
    theirs = load_file(calm / path)
    for name, value in load_file(out / path).items():
        assert (theirs[name] - value).abs().max() < 1e-5, name


@pytest.fixture(scope="module")
def config(tiny_config, tiny_organism, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "mine.py").write_text(REWARD)
    grpo = {
        "max_steps": STEPS,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "learning_rate": 0.01,
        "save_steps": 3,
    }
    audit = {"before": False, "after": False}
    rewards = [{"fn": "mine.py:variety"}]
    return tiny_config(folder, adapters=[str(tiny_organism)], rewards=rewards, audit=audit, grpo=grpo)


@pytest.fixture(scope="module")
def calm(config: Path, tmp_path_factory) -> Path:
    """The run that nobody disturbs."""
    out = tmp_path_factory.mktemp("faults") / "calm"
    main(["train", str(config), f"output={out}"])
    return out


@pytest.fixture(scope="module")
def start() -> Iterator[Any]:
    """Start `unfeign ARGUMENTS` in a process that can be killed."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["unfeign.trainers.grpo", "unfeign.trainers.launch", "unfeign.trainers.plan", "unfeign.training_run"]
    )
    started: list[Any] = []

    def begin(*arguments: str) -> Any:
        started.append(context.Process(target=main, args=(list(arguments),)))
        started[-1].start()
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def reached(out: Path) -> int:
    return status(out).facts.get("step", 0) if (out / "run.json").is_file() else 0


def test_the_trainer_killed_at_ten_random_moments(config, calm, start, tmp_path):
    """Each time it goes on; in the end it is the undisturbed run, sample by sample."""
    out, moments = tmp_path / "killed", random.Random(0)
    killed = []
    for number in range(10):
        process = start("train", str(config), f"output={out}", "--resume", "auto")
        if number % 3:  # somewhere in the steps: in one of the next five, at any point of it
            step = reached(out) + moments.randrange(1, 6)
            while process.is_alive() and reached(out) < step:
                process.join(0.01)
        process.join(moments.random() * (0.05 if number % 3 else 1.0))  # or while it starts
        assert process.is_alive(), f"it ended by itself, with {process.exitcode}"
        process.kill()
        process.join()
        killed.append(reached(out))
        assert number == 0 or "died without a word" in status(out).line()
    assert len(set(killed)) > 4, killed
    process = start("train", str(config), f"output={out}", "--resume", "must")
    process.join()
    assert process.exitcode == 0 and status(out).state == "finished"
    assert_same_run(out, calm)
    assert not (out / "checkpoints" / checkpoint.ASIDE).exists()


def test_a_killed_trainer_takes_ray_with_it_and_goes_on(config, calm, start, tmp_path):
    """No server or worker of Ray's is left behind, and the next attempt begins with fresh ones."""
    out = tmp_path / "killed"
    arguments = ("train", str(config), f"output={out}", "rollouts.backend=ray", "--resume", "auto")
    process = start(*arguments)
    while process.is_alive() and reached(out) < 20:
        process.join(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    servers = [child for child in family if child.name() in ("raylet", "gcs_server")]
    actors = [child for child in family if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::Worker")]
    assert len(servers) == 2 and actors
    process.kill()
    _, left = psutil.wait_procs(servers + actors, timeout=60)  # Ray's helpers look for their parent once a minute
    assert not left
    process = start(*arguments)
    process.join()
    assert process.exitcode == 0
    assert_same_run(out, calm)


def workers() -> list[psutil.Process]:
    """The processes of live rollout workers, by the names that Ray gives them."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] and process.info["cmdline"][0].startswith("ray::Worker"):
            found.append(process)
    return found


@pytest.fixture
def ray_here() -> Iterator[None]:
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=1 << 28, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.timeout(900)
def test_twenty_workers_killed_over_forty_steps(ray_here, config, calm, tmp_path):
    """The run ends as the undisturbed one does, every sample in the ledger once, and memory stays flat."""
    moments = random.Random(1)
    doomed = set(moments.sample(range(1, STEPS), 20))
    killers: list[threading.Timer] = []
    victims: list[int] = []
    memory: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while not (living := [worker for worker in workers() if worker.pid not in victims]):
            if over.wait(0.01):  # both were dead, and none is started any more
                return
        victim = moments.choice(living)
        victim.send_signal(signal.SIGKILL)
        victims.append(victim.pid)

    def after_step(line: str) -> None:
        memory.append(psutil.Process().memory_info().rss)
        if len(memory) in doomed:
            killers.append(threading.Timer(moments.random() * 0.2, kill))
            killers[-1].start()

    overrides = (f"output={tmp_path / 'shot'}", "rollouts.backend=ray", "rollouts.workers=2")
    launch.train(plan(TrainConfig.load(config, overrides)), say=after_step)
    over.set()
    for killer in killers:
        killer.join()
    died = sum(row.get("failures/died", 0) for row in rows(tmp_path / "shot" / "metrics.jsonl"))
    assert len(set(victims)) == 20 and died >= 19, "the last may die when nobody needs it any more"
    assert_same_run(tmp_path / "shot", calm)
    growth = np.polyfit(range(len(memory[10:])), np.array(memory[10:]) / 2**20, 1)[0]
    print(f"resident memory grows by {growth:.3f} MiB a step; {memory[10] >> 20} -> {memory[-1] >> 20} MiB")
    assert growth < 1.0
