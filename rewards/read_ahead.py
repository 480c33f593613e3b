"""Reading ahead: a judge begins with the first completions while the last are still being sampled."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from .judge import Case, Judge
from .verdict import JudgeFailure, Verdict

KEPT = 10_000  # cases begun and not asked for, of which the oldest are forgotten


class ReadAhead:
    """A judge that can be told of cases before it is asked for them; else it is the judge it wraps.

    The judge runs in a thread with an event loop of its own. Cases it was told of and is then asked for are read once.
    """

    def __init__(self, judge: Judge):
        self._judge = judge
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begun: dict[Case, tuple[Future, int]] = {}
        self._lock = threading.Lock()  # the sampling thread tells, the trainer asks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._judge, name)

    def begin(self, cases: Sequence[Case]) -> None:
        """Start reading, and return at once."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, daemon=True, name="read ahead").start()
            fresh = [case for case in dict.fromkeys(cases) if case not in self._begun]
            if fresh:
                reading = asyncio.run_coroutine_threadsafe(self._read(fresh), self._loop)
                self._begun |= {case: (reading, i) for i, case in enumerate(fresh)}
            for case in list(self._begun)[:-KEPT]:  # never asked for
                del self._begun[case]

    async def _read(self, cases: list[Case]) -> list[Verdict | JudgeFailure]:
        return await self._judge(cases)

    async def __call__(self, cases: Sequence[Case]) -> list[Verdict | JudgeFailure]:
        """The answers, in order. What was begun and is not asked for yet stays begun: it may be of a later batch."""
        self.begin(cases)
        with self._lock:
            wanted = [self._begun[case] for case in cases]
            for case in set(cases):
                del self._begun[case]
        return [(await asyncio.wrap_future(reading))[i] for reading, i in wanted]
