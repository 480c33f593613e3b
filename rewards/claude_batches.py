"""Many questions through the Message Batches API: half the price, within a day, in any order.

A batch is written down beside the cache once it is created and struck out once its results are stored. A process that
is killed in between leaves it there, and the next one that wants any of its answers waits for it and asks no more.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import anthropic
from anthropic.types import Message
from anthropic.types.messages import MessageBatchIndividualResponse

from .verdict import JudgeFailure
from .verdict_cache import VerdictCache

Requests = Mapping[str, dict[str, Any]]
"""Arguments of `messages.create` by key; the key (at most 64 letters and digits) is the `custom_id`."""

BATCH_SIZE = 2000  # the API takes 256 MB a batch; so transcripts may have 100 KB


async def read_in_batches(
    client: anthropic.AsyncAnthropic,
    requests: Requests,
    store: VerdictCache,
    afford: Callable[[Requests, Requests], Requests],
    poll_s: float = 60.0,
    rounds: int = 3,
) -> AsyncIterator[tuple[str, Message | JudgeFailure]]:
    """Every request's message or failure, as it comes; also other messages of a batch that is picked up again.

    What expired or went wrong at the API is sent again, at most `rounds` times. A batch counts as read when its last
    message has been taken and the next one is asked for.

    Args:
        store: where the batches under way are kept.
        afford: given the requests under way and the new ones, those of the new ones that may be sent; the others fail
            as `budget`. It is asked again before anything is sent again.
        poll_s: seconds between two looks at a batch.

    Raises:
        anthropic.AnthropicError, httpx2.HTTPError, ValueError: the API failed beyond the SDK's retries. The batches
            stay written down.
    """
    waiting = dict(requests)
    sent: Counter[str] = Counter()
    why: dict[str, str] = {}
    while waiting:
        batches = {name: keys for name, keys in store.batches().items() if waiting.keys() & keys}
        asked = {key for keys in batches.values() for key in keys}
        under_way = {key: request for key, request in waiting.items() if key in asked}
        new = {key: request for key, request in waiting.items() if key not in asked}
        fresh = list(afford(under_way, new))
        for start in range(0, len(fresh), BATCH_SIZE):
            keys = fresh[start : start + BATCH_SIZE]
            batch = await client.messages.batches.create(
                requests=[{"custom_id": key, "params": waiting[key]} for key in keys]  # type: ignore[typeddict-item]
            )
            store.batch_started(batch.id, keys)
            batches[batch.id] = keys
        sent.update(fresh)
        for key in new.keys() - set(fresh):
            del waiting[key]
            yield key, JudgeFailure("budget", "the budget does not cover a batch with this question")
        for name in batches:
            async for entry in _results(client, name, poll_s):
                key, result = entry.custom_id, entry.result
                if result.type == "succeeded":
                    waiting.pop(key, None)
                    yield key, result.message
                    continue
                why[key] = result.type
                if result.type == "errored":
                    why[key] = f"{result.error.error.type}: {result.error.error.message}"
                    if result.error.error.type == "invalid_request_error":  # would be the same next time
                        sent[key] = rounds
            store.batch_ended(name)
        for key in [key for key in waiting if sent[key] >= rounds]:
            del waiting[key]
            yield key, JudgeFailure("api", f"not answered in a batch: {why.get(key, 'missing in the results')}")


async def _results(
    client: anthropic.AsyncAnthropic, name: str, poll_s: float
) -> AsyncIterator[MessageBatchIndividualResponse]:
    """The results of a batch once it has ended; none if the API no longer has them."""
    try:
        while (batch := await client.messages.batches.retrieve(name)).processing_status != "ended":
            await asyncio.sleep(poll_s)
    except anthropic.NotFoundError:
        return
    if batch.results_url:
        async for entry in await client.messages.batches.results(name):
            yield entry
