"""What a judge has spent: tokens as the API reported them, and dollars by a price list."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from ..errors import UnfeignError

BATCH_SHARE = 0.5  # what the Message Batches API asks of the price list


@dataclass(frozen=True)
class Prices:
    """USD per million tokens."""

    input: float
    output: float
    cache_write: float
    cache_read: float


PRICES = {
    "claude-opus-5-5": Prices(4, 20, 5, 0.20),
    "claude-opus-5": Prices(5, 25, 6.25, 0.50),
    "claude-opus-4-6": Prices(5, 25, 6.25, 0.50),
    "claude-sonnet-5-5": Prices(2, 10, 2.50, 0.10),
    "claude-sonnet-5": Prices(2, 10, 2.50, 0.20),
    "claude-sonnet-4-6": Prices(3, 15, 3.75, 0.30),
    "claude-haiku-5-5": Prices(0.10, 0.50, 0.125, 0.01),  # prompts of up to 100,000 tokens
    "claude-haiku-4-5": Prices(1, 5, 1.25, 0.10),
}
"""List prices of November 2026, five-minute cache writes. They change: give `prices` where a budget matters."""


def prices_of(model: str, given: Prices | Mapping[str, float] | None = None) -> Prices | None:
    """The prices given, else those of the list, else None.

    Raises:
        UnfeignError: prices that aren't four numbers of 0 or more.
    """
    if given is None or isinstance(given, Prices):
        return given or PRICES.get(model)
    wanted = list(Prices.__dataclass_fields__)
    if not isinstance(given, Mapping) or set(given) != set(wanted):
        raise UnfeignError(f"USD per million tokens of {', '.join(wanted)}", repr(given), "prices")
    if not all(isinstance(usd, int | float) and usd >= 0 for usd in given.values()):
        raise UnfeignError("prices of 0 or more", repr(given), "prices")
    return Prices(**given)


_LOCK = Lock()  # of the module, so that a ledger can be copied and pickled


@dataclass
class Ledger:
    """Counts since the judge was made. Failed readings are in it: they cost the same.

    Tokens are those of whole responses. What an attempt cost that timed out, was cut off or came back garbled is known
    to the API alone, so its bill may be higher.

    calls: questions put to the API, however often the SDK sent each
    usd: None where no price is known
    cached: cases answered from the cache
    failures: `JudgeFailure`s handed out, by kind
    """

    prices: Prices | None = None
    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_creation_tokens: int = 0
    usd: float | None = None
    cached: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.prices:
            self.usd = self.usd or 0.0

    def count(self, calls: int = 0, cached: int = 0, failure: str | None = None) -> None:
        with _LOCK:
            self.calls += calls
            self.cached += cached
            self.failures.update([failure] if failure else [])

    def spend(self, usage: Any, share: float = 1.0) -> None:
        """Add the usage of one response, at a share of the list price."""
        tokens = (
            usage.input_tokens or 0,
            usage.output_tokens or 0,
            usage.cache_creation_input_tokens or 0,
            usage.cache_read_input_tokens or 0,
        )
        with _LOCK:
            self.input_tokens += tokens[0]
            self.output_tokens += tokens[1]
            self.cache_creation_tokens += tokens[2]
            self.cache_read_tokens += tokens[3]
            if self.prices:
                p = self.prices
                each = zip(tokens, (p.input, p.output, p.cache_write, p.cache_read), strict=True)
                self.usd = (self.usd or 0.0) + share * sum(n * price for n, price in each) / 1e6

    def row(self) -> dict[str, Any]:
        """As a flat JSON object."""
        return {
            "calls": self.calls,
            "cached": self.cached,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "cache_read_tokens": self.cache_read_tokens,
            "cache_creation_tokens": self.cache_creation_tokens,
            "usd": self.usd,
            **{f"failures/{kind}": count for kind, count in sorted(self.failures.items())},
        }
