"""The judge interface: transcripts in, verdicts or failures out.

A judge sees a `Case`: the situation *without* its tier sentence, the request, the reasoning, the answer, and whether
the answer complied. It never sees tier, control or criterion labels, so it can't reward the setting instead of the
words.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from ..envs.transcript import Transcript
from ..errors import UnfeignError
from .imports import imported
from .verdict import JudgeFailure, Verdict


@dataclass(frozen=True)
class Case:
    """What a judge may see of a transcript."""

    situation: str
    request: str
    reasoning: str
    answer: str
    complied: bool | None


def case(transcript: Transcript) -> Case:
    """Blind a transcript."""
    s = transcript.scenario
    return Case(s.situation, s.request, transcript.reasoning, transcript.answer, transcript.complied)


class Judge(Protocol):
    """Anything that gives one verdict or one failure a case, in order."""

    name: str

    async def __call__(self, cases: Sequence[Case]) -> list[Verdict | JudgeFailure]: ...


def load_judge(name: str, folder: Path = Path()) -> Judge:
    """A judge by name, `package.module:name` or `file.py:name`: a class to be made without arguments, or a judge.

    Args:
        folder: where a relative file starts.

    Raises:
        UnfeignError: no such judge, or one without a name.
    """
    from .rules import RulesJudge

    judges = {"rules": RulesJudge}
    if name in judges:
        return judges[name]()
    if ":" not in name:
        known = ", ".join(sorted(judges))
        raise UnfeignError(f"one of the judges {known}, package.module:name or file.py:name", repr(name), "judge")
    found = imported(name, folder, "judge")
    try:
        judge = found() if inspect.isclass(found) else found
    except TypeError as error:
        raise UnfeignError("a judge that is made without arguments", str(error), f"judge {name!r}") from None
    if not isinstance(getattr(judge, "name", None), str):
        raise UnfeignError("a judge with a name", "none", f"judge {name!r}")
    return judge


T = TypeVar("T")


def wait_for(answer: Awaitable[T]) -> T:
    """What an async judge or reward answers, from code that is not async; also inside a notebook's running loop."""

    async def ask() -> T:
        return await answer

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(ask())
    with ThreadPoolExecutor(max_workers=1) as thread:  # a loop that runs can't be waited for from inside
        return thread.submit(asyncio.run, ask()).result()
