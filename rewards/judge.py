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
from typing import Any, Protocol, TypeVar

import yaml

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
    """Anything that gives one verdict or one failure a case, in order. One that costs money or needs a model says so by
    `costly = True`; one that counts what it spends has a `ledger`.
    """

    name: str
    """Two judges of one name read alike."""

    async def __call__(self, cases: Sequence[Case]) -> list[Verdict | JudgeFailure]: ...


Spec = str | dict[str, Any]


def judge_spec(text: str) -> Spec:
    """What the command line names a judge by: a name, or a mapping in YAML: `{name: claude, rubric: mine.txt}`."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UnfeignError("a name, or a mapping in YAML", str(error).splitlines()[0], "judge") from None
    return found if isinstance(found, dict) else text


JUDGES = {
    "rules": "unfeign.rewards.rules:RulesJudge",
    "local": "unfeign.rewards.local_judge:LocalJudge",
    "claude": "unfeign.rewards.claude_judge:ClaudeJudge",
    "vote": "unfeign.rewards.vote:Vote",
}


def load_judge(spec: Spec, folder: Path = Path()) -> Judge:
    """A judge as a config names it.

    Args:
        spec: one of `JUDGES`, `package.module:name` or `file.py:name` (a class, or a judge); or a mapping with that
            under `name`, whose other keys are arguments for the class.
        folder: where relative files start.

    Raises:
        UnfeignError: no such judge, arguments it does not take, or a judge without a name.
    """
    name, arguments = (spec, {}) if isinstance(spec, str) else (spec.get("name"), {**spec})
    arguments.pop("name", None)
    if not isinstance(name, str) or (name not in JUDGES and ":" not in name):
        known = ", ".join(sorted(JUDGES))
        raise UnfeignError(f"one of the judges {known}, package.module:name or file.py:name", repr(name), "judge")
    found = imported(JUDGES.get(name, name), folder, "judge")
    where = f"judge {name!r}"
    if inspect.isclass(found):
        if "folder" in inspect.signature(found).parameters:
            arguments["folder"] = folder
        try:
            judge = found(**arguments)
        except TypeError as error:
            raise UnfeignError("arguments its class takes", str(error), where) from None
    elif arguments:
        raise UnfeignError("a class, to take arguments", f"a {type(found).__name__}", where)
    else:
        judge = found
    if not isinstance(getattr(judge, "name", None), str):
        raise UnfeignError("a judge with a name", "none", where)
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
