"""Rewards on rollout workers: one that is slow, or that may take its process down, runs where the policy generates.

A reward travels as what the config says of it, with the text of the user's own files it names, so a worker on another
machine needs no copy. Each worker makes it once and keeps it. Rows travel by whole groups: a reward that compares the
completions of a prompt still sees them together, one that compares groups does not.
"""

import inspect
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..envs.transcript import Transcript
from ..rewards.imports import user_file
from ..rewards.judge import wait_for
from ..rewards.plugin import LoadedReward, RewardSpec, load_reward
from ..rewards.terms import Score
from ..rewards.verdict import JudgeFailure

_made: dict[str, Callable[..., Any]] = {}  # of this process, by what they were made from
HERE = frozenset({"log_extra", "log_metric"})  # arguments of TRL's that reach back into the trainer


@dataclass(frozen=True)
class Parcel:
    """A reward as it travels: its spec as JSON, and name and text of every file of the user's that the spec names."""

    spec: str
    files: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, spec: RewardSpec, folder: Path) -> "Parcel":
        """Pack a reward; `folder` is where its relative files start."""
        files: list[tuple[str, str]] = []

        def file(path: str) -> str:
            name = f"{len(files)}/{Path(path).name}"  # where it is unpacked, whatever folders led to it here
            files.append((name, (folder / path).read_text(encoding="utf-8")))
            return name

        def packed(value: Any, key: str = "") -> Any:
            if isinstance(value, dict):
                return {name: packed(one, name) for name, one in value.items()}
            if isinstance(value, list):
                return [packed(one) for one in value]
            if isinstance(value, str) and (path := user_file(value)) is not None:
                return f"{file(path)}:{value.rpartition(':')[2]}"
            if isinstance(value, str) and key == "rubric" and (folder / value).is_file():
                return file(value)
            return value

        kwargs = spec.kwargs | ({"judge": packed(spec.kwargs["judge"])} if "judge" in spec.kwargs else {})
        return cls(
            spec.model_copy(update={"fn": packed(spec.fn), "kwargs": kwargs}).model_dump_json(),
            tuple(files),
        )

    def unpacked(self) -> Callable[..., Any]:
        """The reward, made in this process the first time."""
        key = repr(self)
        if key not in _made:
            folder = Path(tempfile.mkdtemp(prefix="unfeign-reward-"))
            for name, source in self.files:
                (folder / name).parent.mkdir()
                (folder / name).write_text(source, encoding="utf-8")
            _made[key] = load_reward(RewardSpec.model_validate_json(self.spec), folder).fn
        return _made[key]


def _score(context: Any, call: tuple[Parcel, list[Transcript]]) -> list[Score | JudgeFailure]:
    parcel, transcripts = call
    return wait_for(parcel.unpacked().score(transcripts))  # type: ignore[attr-defined]


def _values(context: Any, call: tuple[Parcel, dict[str, Any]]) -> list[float | None]:
    parcel, arguments = call
    found = parcel.unpacked()(**arguments)
    return wait_for(found) if inspect.isawaitable(found) else found


class RemoteReward:
    """A reward function, as TRL calls it, that runs on a pool's workers.

    Args:
        parcel: the reward.
        pool: runs tasks on its workers (`RayPool.run`).
        group: completions of one prompt, which stay together.
    """

    def __init__(self, parcel: Parcel, pool: Any, group: int):
        self._parcel, self._pool, self._group = parcel, pool, group

    def _parts(self, rows: int) -> list[slice]:
        return [slice(at, at + self._group) for at in range(0, rows, self._group)]

    def __call__(self, **arguments: Any) -> list[float | None]:
        rows = len(arguments["completions"])
        plain = {name: value for name, value in arguments.items() if name not in HERE}
        calls = [
            {name: value[part] if isinstance(value, list) else value for name, value in plain.items()}
            for part in self._parts(rows)
        ]
        return [value for part in self._pool.run(_values, [(self._parcel, call) for call in calls]) for value in part]


class RemoteScore(RemoteReward):
    """The same for a reward with a `score` method: its scores come back whole, so terms keep their segments."""

    async def score(self, transcripts: Sequence[Transcript]) -> list[Score | JudgeFailure]:
        calls = [(self._parcel, list(transcripts[part])) for part in self._parts(len(transcripts))]
        return [score for part in self._pool.run(_score, calls) for score in part]


def on_workers(loaded: LoadedReward, spec: RewardSpec, folder: Path, pool: Any, group: int) -> LoadedReward:
    """The same reward, run on the pool's workers."""
    kind = RemoteScore if hasattr(loaded.fn, "score") else RemoteReward
    return LoadedReward(loaded.name, loaded.weight, kind(Parcel.of(spec, folder), pool, group))
