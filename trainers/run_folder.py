"""The run folder: who may write to it, what state it is in, and where an interrupted run goes on.

A folder that holds files is never overwritten. With `--resume auto` a run goes on where it stopped, or begins when
there is nothing to go on from; with `must` it goes on or is refused; with `never`, the default, only a new folder will
do. Going on drops the log rows after the checkpoint, since those steps are taken again, with the same samples.

`state.json` is rewritten at every step, so `unfeign status RUN` can tell a live run from one that died without a word.
"""

import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from ..errors import UnfeignError
from ..files import read_json, read_text, read_yaml, write_jsonl, write_text
from .checkpoint import resumable
from .ranks import first

Resume = Literal["auto", "never", "must"]
State = Literal["running", "finished", "interrupted", "failed"]
LOGS = {
    "metrics.jsonl": 0,
    "completions.jsonl": 1,
}  # name -> what a row's step counts from: steps done, or generated at


@dataclass(frozen=True)
class Start:
    """Where a run begins: at step 0 in a new folder, or after a checkpoint."""

    step: int = 0
    checkpoint: Path | None = None
    again: bool = False
    """Whether the folder held an earlier part of this run."""


def find_start(out: Path, resolved: dict[str, Any], resume: Resume) -> Start:
    """Where this run may begin; touches nothing.

    Raises:
        UnfeignError: the folder belongs to something else, to another config, or to a run that is finished or alive; or
            there is nothing to go on from, and `resume` is `must`.
    """
    where = f"output: {out}"
    if out.exists() and not out.is_dir():
        raise UnfeignError("a folder", "a file", where)
    if not out.exists() or not any(out.iterdir()):
        if resume == "must":
            raise UnfeignError("a run to resume", "no run in this folder", where)
        return Start()
    if resume == "never":
        raise UnfeignError("a new run folder (choose another output, or --resume auto)", "one that holds a run", where)
    if not (out / "config.yaml").is_file() or not (out / "run.json").is_file():
        raise UnfeignError("a run folder with config.yaml and run.json", "other files", where)
    before = read_yaml(out / "config.yaml")
    if differs := _difference(before, resolved | {"output": before.get("output")}):  # a folder has many paths
        raise UnfeignError("the config that the run began with", f"another value of {differs}", where)
    seen = status(out)
    if seen.alive:
        raise UnfeignError("a run that stopped", f"one that is running (process {seen.facts.get('pid')})", where)
    if seen.state == "finished":
        raise UnfeignError("a run to go on with", "a finished one", where)
    found = resumable(out / "checkpoints")
    if found is None:
        if resume == "must":
            raise UnfeignError("a checkpoint to resume from", "none", f"{out / 'checkpoints'}")
        return Start(again=True)
    return Start(*found, again=True)


def _difference(before: Any, now: Any, key: str = "") -> str:
    """The first key under which two configs differ, or nothing."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            if found := _difference(before.get(name), now.get(name), f"{key}.{name}".lstrip(".")):
                return found
        return ""
    return "" if before == now else key or "everything"


def prepare(out: Path, resolved: dict[str, Any], facts: dict[str, Any], start: Start) -> None:
    """Write the config and facts of a new run, or cut the logs of an old one back to its checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    if not start.again:
        write_text(out / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
        write_text(out / "run.json", json.dumps(facts, indent=2) + "\n")
    for name, offset in LOGS.items():
        if (out / name).exists():
            rows = _whole_rows(out / name)
            write_jsonl(out / name, [row for row in rows if row["step"] <= start.step - offset])


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, without a last line that is still being written or was cut short by a crash."""
    whole, _, _ = read_text(path).rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def write_state(out: Path, state: State, step: int, steps: int, note: str = "") -> None:
    """Say in `state.json` what the run is doing, and which process does it (the first, of several)."""
    if not first():
        return
    process = psutil.Process()
    facts = {
        "state": state,
        "step": step,
        "steps": steps,
        "note": note,
        "pid": process.pid,
        "process_started": process.create_time(),
        "host": socket.gethostname(),
        "updated": time.time(),
    }
    write_text(out / "state.json", json.dumps(facts, indent=2) + "\n")


@dataclass(frozen=True)
class Status:
    """`state` as written; `alive` when the process that wrote it still runs on this machine."""

    state: str
    alive: bool
    facts: dict[str, Any]
    last: dict[str, Any]
    """The newest row of `metrics.jsonl`."""
    checkpoint: Path | None

    def line(self) -> str:
        """In one line, for a person."""
        if not self.facts:
            return "no state.json: not started, or made by an early version"
        said = self.state
        if said == "running" and not self.alive:
            elsewhere = self.facts["host"] != socket.gethostname()
            said = f"running on {self.facts['host']}, as far as it last said" if elsewhere else "died without a word"
        ago = time.time() - self.facts["updated"]
        line = f"{said}, step {self.facts['step']} of {self.facts['steps']}, {ago:.0f} s ago"
        if "reward" in self.last:
            line += f"; reward {self.last['reward']:+.2f}"
        if self.facts["note"]:
            line += f"; {self.facts['note']}"
        if self.state != "finished" and not self.alive:
            line += f"; resumes from {self.checkpoint.name}" if self.checkpoint else "; no checkpoint to resume from"
        return line


def status(out: Path) -> Status:
    """The state of a run folder.

    Raises:
        UnfeignError: not a run folder.
    """
    if not (out / "run.json").is_file():
        raise UnfeignError("a run folder with run.json", "none", str(out))
    facts = read_json(out / "state.json") if (out / "state.json").is_file() else {}
    rows = _whole_rows(out / "metrics.jsonl") if (out / "metrics.jsonl").is_file() else []
    found = resumable(out / "checkpoints")
    return Status(facts.get("state", "unknown"), _alive(facts), facts, rows[-1] if rows else {}, found and found[1])


def _alive(facts: dict[str, Any]) -> bool:
    """Whether the process that wrote the state still runs: the same number with another start is another process."""
    if facts.get("state") != "running" or facts.get("host") != socket.gethostname():
        return False
    try:
        process = psutil.Process(facts["pid"])
        return process.is_running() and abs(process.create_time() - facts["process_started"]) < 1
    except psutil.NoSuchProcess:
        return False
