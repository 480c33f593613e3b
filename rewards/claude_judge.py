"""`claude`: a model behind the Anthropic API reads each case by the rubric.

One question is one message: the rubric as a cached system block, the case as JSON, the labels as structured output. A
refusal, a reading cut at `max_tokens`, words that don't fit the schema, an API that does not answer and a spent budget
are five kinds of failure, and none of them is a score. Repeating is the SDK's business (`max_retries`); nothing is
repeated on top.

The key is read from ANTHROPIC_API_KEY whenever a client is made, and kept nowhere else.
"""

import asyncio
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anthropic
import httpx2
from anthropic.types import Message
from pydantic import ValidationError

from ..errors import UnfeignError
from .claude_batches import Requests, read_in_batches
from .judge import Case
from .ledger import BATCH_SHARE, Ledger, Prices, prices_of
from .rubric import Reading, load_rubric, question, verdict
from .verdict import JudgeFailure, Verdict
from .verdict_cache import VerdictCache, cache_key

KEY = "ANTHROPIC_API_KEY"
API_ERRORS = (anthropic.AnthropicError, httpx2.HTTPError, json.JSONDecodeError, UnicodeDecodeError)
CALLS_BEFORE_WARNING = 5

Answer = Reading | JudgeFailure


class ClaudeJudge:
    """A judge that asks Claude.

    `ledger` counts what was spent. A call makes its own client, so the judge works in any event loop, one after
    another. Equal cases of one call are asked once.

    Args:
        model: models that think before they answer count their thoughts in `max_tokens`: give those several thousand.
        rubric: a shipped rubric by name, or a `.txt` file.
        concurrency: messages under way at a time, in each call of the judge.
        max_tokens: of an answer.
        budget_usd: once that much is spent, what is left fails as `budget` without being asked. Messages under way then
            are still paid for, at most `concurrency` of them; a batch is sent only if it fits by its worst case.
        prices: USD per million tokens: `input`, `output`, `cache_write`, `cache_read`. None: those of `ledger.PRICES`.
        cache: the SQLite file of readings; None or True is the user's, False is none.
        batch: ask through the Message Batches API: half the price, hours instead of seconds.
        base_url: of another server; None is the SDK's choice.
        max_retries: by the SDK, of one message.
        timeout: seconds, of one attempt.
        sample: tells repeated readings of a case apart in the cache.
        poll_s: seconds between two looks at a batch.
        folder: where relative files start.

    Raises:
        UnfeignError: no usable key, unknown rubric, numbers out of range, a budget without prices, batches without a
            cache.
    """

    costly = True

    def __init__(
        self,
        model: str = "claude-sonnet-4-6",
        rubric: str = "v1",
        concurrency: int = 8,
        max_tokens: int = 1024,
        budget_usd: float | None = None,
        prices: Prices | Mapping[str, float] | None = None,
        cache: Path | str | bool | None = None,
        batch: bool = False,
        base_url: str | None = None,
        max_retries: int = 4,
        timeout: float = 120.0,
        sample: int = 0,
        poll_s: float = 60.0,
        folder: Path = Path(),
    ):
        where = "judge 'claude'"
        lowest = {"concurrency": (concurrency, 1), "max_tokens": (max_tokens, 1), "budget_usd": (budget_usd or 0, 0)}
        lowest |= {"max_retries": (max_retries, 0), "sample": (sample, 0)}
        for name, (value, least) in lowest.items():
            if value < least:
                raise UnfeignError(f"{name} of {least} or more", str(value), where)
        for name, seconds in {"timeout": timeout, "poll_s": poll_s}.items():
            if seconds <= 0:
                raise UnfeignError(f"{name} above 0 seconds", str(seconds), where)
        known = prices_of(model, prices)
        if budget_usd is not None and known is None:
            raise UnfeignError("prices, to keep a budget", f"none for {model!r}", where)
        if batch and cache is False:
            raise UnfeignError("a cache, where batches under way are kept", "cache: false", where)
        _key()
        self.model, self.rubric = model, load_rubric(rubric, folder)
        own = f"@{self.rubric.sha256[:8]}" if rubric.endswith(".txt") else ""
        nth = f" #{sample}" if sample else ""
        self.name = f"claude {model} {self.rubric.name}{own}{nth}"
        self.ledger, self.budget_usd = Ledger(known), budget_usd
        path = folder / cache if isinstance(cache, str | Path) else None
        self.store = None if cache is False else VerdictCache(path)
        self.batch, self.poll_s = batch, poll_s
        self.concurrency, self.max_tokens, self.sample = concurrency, max_tokens, sample
        self._connection = {"base_url": base_url, "max_retries": max_retries, "timeout": timeout}
        self._schema = anthropic.transform_schema(Reading)
        self._may_warn = True

    async def __call__(self, cases: Sequence[Case]) -> list[Verdict | JudgeFailure]:
        texts = [_sendable(question(case)) for case in cases]
        keys = [cache_key(self.model, self.rubric, text, self.sample) for text in texts]
        answers: dict[str, Answer] = {}
        if self.store:
            answers.update(self.store.get(set(keys)))
        self.ledger.count(cached=sum(key in answers for key in keys))
        wanted = {key: self._request(text) for key, text in zip(keys, texts, strict=True) if key not in answers}
        if wanted:
            ask = self._ask_in_batches if self.batch else self._ask
            async with anthropic.AsyncAnthropic(api_key=_key(), **self._connection) as client:  # type: ignore[arg-type]
                answers.update(await ask(client, wanted))
        found = [self._verdict(answers[key], case) for key, case in zip(keys, cases, strict=True)]
        for one in found:
            if isinstance(one, JudgeFailure):
                self.ledger.count(failure=one.kind)
        return found

    def _verdict(self, answer: Answer, case: Case) -> Verdict | JudgeFailure:
        return answer if isinstance(answer, JudgeFailure) else verdict(answer, case)

    def _request(self, text: str) -> dict[str, Any]:
        """Arguments of `messages.create`. (`messages.parse` raises on unfit words, and their usage would be lost.)"""
        return {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "system": [{"type": "text", "text": self.rubric.text, "cache_control": {"type": "ephemeral"}}],
            "messages": [{"role": "user", "content": text}],
            "output_config": {"format": {"type": "json_schema", "schema": self._schema}},
        }

    async def _ask(self, client: anthropic.AsyncAnthropic, wanted: Requests) -> dict[str, Answer]:
        """Ask each by itself."""
        limit = asyncio.Semaphore(self.concurrency)

        async def one(key: str, request: dict[str, Any]) -> Answer:
            async with limit:
                if self.budget_usd is not None and (self.ledger.usd or 0.0) >= self.budget_usd:
                    return JudgeFailure("budget", f"${self.budget_usd:g} are spent")
                self.ledger.count(calls=1)
                try:
                    message = await client.messages.create(**request)
                except API_ERRORS as error:
                    return JudgeFailure("api", _told(error))
                return self._taken(key, message)

        return dict(zip(wanted, await asyncio.gather(*(one(*item) for item in wanted.items())), strict=True))

    async def _ask_in_batches(self, client: anthropic.AsyncAnthropic, wanted: Requests) -> dict[str, Answer]:
        """Ask all through the Message Batches API."""
        answers: dict[str, Answer] = {}
        store = self.store or VerdictCache()
        try:
            async for key, message in read_in_batches(client, wanted, store, self._affordable, self.poll_s):
                if isinstance(message, JudgeFailure):
                    self.ledger.count(calls=message.kind != "budget")
                    answers[key] = JudgeFailure(message.kind, _line(message.message))
                else:
                    self.ledger.count(calls=1)
                    answers[key] = self._taken(key, message, BATCH_SHARE)
        except API_ERRORS as error:
            lost = JudgeFailure("api", f"{_told(error)}; batches under way are picked up by the next run")
            answers |= {key: lost for key in wanted if key not in answers}
        return answers

    def _affordable(self, under_way: Requests, fresh: Requests) -> Requests:
        """Those of the fresh requests, in order, that the budget covers by their worst case."""
        if self.budget_usd is None:
            return fresh
        left = self.budget_usd - (self.ledger.usd or 0.0) - sum(map(self._at_most, under_way.values()))
        within = {}
        for key, request in fresh.items():
            left -= self._at_most(request)
            if left < 0:
                break
            within[key] = request
        return within

    def _at_most(self, request: dict[str, Any]) -> float:
        """USD that a request of a batch can cost at most: tokens have two bytes or more, nearly always four."""
        p = self.ledger.prices
        if p is None:
            return 0.0
        size = len(json.dumps(request, ensure_ascii=False).encode())
        return BATCH_SHARE * (size / 2 * max(p.input, p.cache_write) + self.max_tokens * p.output) / 1e6

    def _taken(self, key: str, message: Message, share: float = 1.0) -> Answer:
        """Count what a message cost, and store its reading at once."""
        if getattr(message, "usage", None) is None:
            return JudgeFailure("api", "a response that is no message")
        self.ledger.spend(message.usage, share)
        self._watch_prompt_cache()
        answer = read_message(message)
        if self.store and isinstance(answer, Reading):
            self.store.put(key, answer)
        return answer

    def _watch_prompt_cache(self) -> None:
        ledger = self.ledger
        if self._may_warn and ledger.calls >= CALLS_BEFORE_WARNING:
            self._may_warn = False
            if not ledger.cache_creation_tokens and not ledger.cache_read_tokens:
                warnings.warn(
                    f"the API caches nothing of rubric {self.rubric.name!r}: every call pays for all of it "
                    f"(it may be shorter than the least that {self.model} caches)",
                    stacklevel=2,
                )


def read_message(message: Message) -> Answer:
    """The reading in a message, or why there is none."""
    if message.stop_reason == "refusal":
        why = getattr(message.stop_details, "category", None)
        return JudgeFailure("refusal", f"the model refused ({why})" if why else "the model refused")
    if message.stop_reason in ("max_tokens", "model_context_window_exceeded"):
        return JudgeFailure("truncated", f"stopped by {message.stop_reason} after {message.usage.output_tokens} tokens")
    text = "".join(block.text for block in message.content or [] if block.type == "text")
    try:
        return Reading.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the answer"
        return JudgeFailure("invalid", f"{place}: {first['msg']}")


def _key() -> str:
    """The API key. A malformed one is refused here, since the HTTP library would print it with its complaint."""
    key = os.environ.get(KEY, "")
    if not key:
        raise UnfeignError("an API key in the environment", "none", KEY)
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UnfeignError("an API key of visible ASCII characters", "one with spaces or others", KEY)
    return key


def _told(error: Exception) -> str:
    """An error, its kind first."""
    cause = f" ({type(error.__cause__).__name__})" if error.__cause__ else ""
    return _line(f"{type(error).__name__}{cause}: {error}")


def _line(text: str) -> str:
    """What a server said, in one line of at most 300 characters, without the key, whoever may have quoted it."""
    return " ".join(text.split()).replace(os.environ.get(KEY) or "\0", "[key]")[:300]


def _sendable(text: str) -> str:
    """Lone surrogates, which a tokenizer may leave, replaced: they have no UTF-8."""
    return text.encode("utf-8", "replace").decode()
