"""Checkpoints that survive: written aside and renamed, so a crash or a full disk leaves the last one whole; and with no
pickle in them, so that loading one runs no code.

A checkpoint folder holds the policy (an adapter with its lineage, or a whole model), `trainer_state.json`, and the
training state: the optimizer's and the generators' tensors as safetensors, their numbers as JSON. Samples need no
generator of ours: each has a seed of its own.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..errors import UnfeignError
from ..files import read_json, write_text

TENSORS, NUMBERS, RANDOM = "optimizer.safetensors", "optimizer.json", "random.safetensors"
ASIDE = ".saving"
KEPT = 2  # checkpoints that keep their training state; older ones keep the policy, for audits


def steps_of(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints in a folder, by step, oldest first. One that was never renamed is not among them."""
    found = [(int(p.name.rpartition("-")[2]), p) for p in folder.glob("checkpoint-*")]
    return sorted((step, p) for step, p in found if (p / "trainer_state.json").is_file())


def resumable(folder: Path) -> tuple[int, Path] | None:
    """The newest checkpoint that training can go on from."""
    able = [(step, p) for step, p in steps_of(folder) if (p / TENSORS).is_file() and (p / NUMBERS).is_file()]
    return able[-1] if able else None


@contextmanager
def aside(folder: Path, name: str) -> Iterator[Path]:
    """A scratch folder to write `folder/name` in: it is renamed when the block ends, and removed when it fails."""
    scratch = folder / ASIDE
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for path in (scratch / name).rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(folder / name, ignore_errors=True)
        (scratch / name).rename(folder / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for _, old in steps_of(folder)[:-KEPT]:
        for file in (TENSORS, NUMBERS, RANDOM):
            (old / file).unlink(missing_ok=True)


def save_training_state(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Write the optimizer and the learning-rate schedule."""
    state = optimizer.state_dict()
    tensors, numbers = {}, {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            target = tensors if isinstance(value, torch.Tensor) else numbers
            target[f"{index}.{key}"] = value.detach().cpu().contiguous() if target is tensors else value
    save_file(tensors, folder / TENSORS)
    plain = {"numbers": numbers, "groups": state["param_groups"], "scheduler": scheduler.state_dict()}
    write_text(folder / NUMBERS, json.dumps(plain, indent=1) + "\n")


def load_training_state(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Read what `save_training_state` wrote.

    Raises:
        UnfeignError: it was written for other parameters.
    """
    plain = read_json(folder / NUMBERS)
    own = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in plain["groups"]]
    if own != theirs:
        raise UnfeignError(f"a training state for {own} parameters", f"one for {theirs}", str(folder))
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*load_file(folder / TENSORS).items(), *plain["numbers"].items()]:
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": plain["groups"]})
    scheduler.load_state_dict(plain["scheduler"])


def save_random_state(folder: Path) -> None:
    """Write torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}
    save_file(states, folder / RANDOM)


def load_random_state(folder: Path) -> None:
    """Read what `save_random_state` wrote; a machine with other devices keeps their generators as they are."""
    if not (folder / RANDOM).is_file():
        return
    states = load_file(folder / RANDOM)
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and len(states) - 1 == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([states[f"cuda{i}"] for i in range(len(states) - 1)])
