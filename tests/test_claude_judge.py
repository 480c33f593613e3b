"""The Claude judge through the real SDK, against a faulty server on a real socket: nothing lost, nothing paid twice."""

import asyncio
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from claude_server import CLEARING, LASTING, ClaudeServer

from unfeign.errors import UnfeignError
from unfeign.rewards.claude_batches import BATCH_SIZE
from unfeign.rewards.claude_judge import ClaudeJudge
from unfeign.rewards.judge import Case, load_judge, wait_for
from unfeign.rewards.ledger import PRICES
from unfeign.rewards.rubric import question, verdict
from unfeign.rewards.verdict import JudgeFailure, Verdict
from unfeign.rewards.verdict_cache import VerdictCache, cache_key

KEY = "sk-ant-a-key-that-nobody-may-ever-see-0123456789"
KINDS = {"refusal": "refusal", "max_tokens": "truncated", "schema": "invalid", "broken": "api"}
"""What a question's fault makes of it, where it doesn't clear by itself."""


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def cache() -> Iterator[Path]:
    """A cache file in memory if possible: SQLite waits for the disk at each reading, and a busy disk is slow."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder) / "cache.sqlite"


def cases(count: int, about: str = "case") -> list[Case]:
    return [
        Case("You are rated.", f"{about} {i}", f"I could go along, {i}.", "No.", (None, True, False)[i % 3])
        for i in range(count)
    ]


def judge(server: Any, cache: Any = False, **changes: Any) -> ClaudeJudge:
    return ClaudeJudge(
        **{"base_url": server.url, "cache": cache, "timeout": 30.0, "concurrency": 16, "poll_s": 0.02} | changes
    )


def spent(one: ClaudeJudge) -> dict[str, int]:
    ledger = one.ledger
    return {
        "input_tokens": ledger.input_tokens,
        "output_tokens": ledger.output_tokens,
        "cache_creation_input_tokens": ledger.cache_creation_tokens,
        "cache_read_input_tokens": ledger.cache_read_tokens,
    }


def agrees(server: Any, some: list[Case], found: list[Verdict | JudgeFailure], kinds: dict[str, str]) -> Counter[str]:
    """Check each answer against what the server said of its question; the failures by kind."""
    failures: Counter[str] = Counter()
    assert len(found) == len(some)
    for one, answer in zip(some, found, strict=True):
        kind = kinds.get(server.fault(question(one)))
        if kind:
            assert isinstance(answer, JudgeFailure)
            assert answer.kind == kind
            failures[kind] += 1
        else:
            assert answer == verdict(server.reading(question(one)), one)
    return failures


def test_a_thousand_transcripts_and_a_faulty_api(cache):
    """None lost, none scored twice, none scored by failure, tokens to the token, nothing asked again."""
    some = cases(1000)
    kinds = (*CLEARING, *LASTING, "429", "529", "500", "cut")
    with ClaudeServer(KEY, faults=0.3, kinds=kinds) as server:
        one = judge(server, cache, concurrency=24, timeout=1.0)
        found = asyncio.run(one(some))
        failures = agrees(server, some, found, KINDS)
        assert set(server.injected) == {*CLEARING, *LASTING}
        faulty = sum(server.fault(question(case)) is not None for case in some)
        assert 250 < faulty < 350
        assert min(failures.values()) > 10
        assert one.ledger.failures == failures
        assert one.ledger.calls == len(server.attempts) == 1000
        assert max(server.answered.values()) == 1
        assert spent(one) == server.bill()

        before = Counter(server.attempts)
        again = judge(server, cache, concurrency=24, timeout=1.0)
        second = asyncio.run(again(some))
        assert again.ledger.calls == failures.total()
        assert again.ledger.cached == 1000 - failures.total()
        for case, first, later in zip(some, found, second, strict=True):
            if isinstance(first, Verdict):
                assert later == first
                assert server.attempts[question(case)] == before[question(case)]
        assert {name: spent(one)[name] + spent(again)[name] for name in spent(one)} == server.bill()


def test_the_key_is_told_to_nobody(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    for name in ("anthropic", "httpx2", "httpcore2", "asyncio"):
        caplog.set_level(logging.DEBUG, logger=name)
    some = cases(40)
    told: list[str] = []
    with ClaudeServer(KEY, faults=0.5) as server, ClaudeServer("another key", faults=0.0) as stranger:
        for one in (
            judge(server, tmp_path / "cache.sqlite", timeout=0.5, max_retries=1),
            judge(server, tmp_path / "cache.sqlite", batch=True),
            judge(stranger),
            judge(stranger, tmp_path / "other.sqlite", batch=True),
            ClaudeJudge(base_url="http://127.0.0.1:9", cache=False, max_retries=0),
        ):
            found = asyncio.run(one(some))
            told += [answer.message for answer in found if isinstance(answer, JudgeFailure)]
            told += [repr(one), repr(vars(one)), repr(one.ledger), one.name, repr(pickle.dumps(one))]
        assert stranger.strangers == 41
    assert any("[key]" in text for text in told), "the server that quotes the key was not heard"
    assert not [text for text in told if KEY in text]
    assert any("HTTP Request" in record.getMessage() for record in caplog.records)
    assert KEY not in caplog.text
    assert not [record for record in caplog.records if KEY in repr(vars(record))]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 2
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize("bad", [None, "", f"{KEY}\n", f"{KEY} ", f"{KEY}\u00e9"])
def test_a_key_is_needed_and_never_quoted(bad, monkeypatch, caplog):
    """A malformed one is refused early: the HTTP library would print it."""
    caplog.set_level(logging.DEBUG)
    if bad is None:
        monkeypatch.delenv("ANTHROPIC_API_KEY")
    else:
        monkeypatch.setenv("ANTHROPIC_API_KEY", bad)
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "not asked for")
    with pytest.raises(UnfeignError) as error:
        ClaudeJudge()
    assert error.value.where == "ANTHROPIC_API_KEY"
    assert KEY not in str(error.value) + repr(error.value) + caplog.text


def test_the_key_is_no_argument():
    with pytest.raises(UnfeignError, match="arguments its class takes"):
        load_judge({"name": "claude", "api_key": "x"})


def test_a_budget_stops_cleanly(tmp_path):
    some = cases(120)
    with ClaudeServer(KEY, faults=0.2, kinds=LASTING) as server:
        one = judge(
            server,
            budget_usd=0.05,
            concurrency=4,
            prices={"input": 3, "output": 15, "cache_write": 3.75, "cache_read": 0.3},
        )
        found = asyncio.run(one(some))
        left = [a.kind == "budget" if isinstance(a, JudgeFailure) else False for a in found]
        assert 20 < sum(left) < 100
        assert left == sorted(left), "the first ones are asked first"
        assert one.ledger.failures["budget"] == sum(left)
        assert one.ledger.calls == server.attempts.total() == 120 - sum(left)
        assert spent(one) == server.bill(), "failed readings cost the same"
        bill = server.bill()
        usd = sum(bill[name] * price for name, price in zip(spent(one), (3, 15, 3.75, 0.3), strict=True)) / 1e6
        assert one.ledger.usd == pytest.approx(usd)
        most = 4 * one.ledger.usd / one.ledger.calls * 3
        assert 0.05 <= one.ledger.usd < 0.05 + most
        asyncio.run(one(cases(10, "late")))
        assert server.attempts.total() == 120 - sum(left)


def test_money_needs_prices():
    with pytest.raises(UnfeignError, match="prices"):
        ClaudeJudge(model="claude-unheard-of", budget_usd=1.0)
    with pytest.raises(UnfeignError, match="prices"):
        ClaudeJudge(prices={"input": 1})
    assert ClaudeJudge(model="claude-unheard-of").ledger.usd is None
    assert ClaudeJudge().model in PRICES


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": 0},
        {"max_tokens": 0},
        {"budget_usd": -1},
        {"timeout": 0},
        {"rubric": "v9"},
        {"batch": True, "cache": False},
    ],
)
def test_wrong_arguments(wrong):
    with pytest.raises(UnfeignError):
        ClaudeJudge(**wrong)


def test_many_event_loops():
    """Also from inside a running one, as in a notebook."""
    with ClaudeServer(KEY) as server:
        one = judge(server)

        async def inside() -> Any:
            return wait_for(one(cases(3, "nested")))

        for about in ("first", "second", "third"):
            some = cases(5, about)
            agrees(server, some, asyncio.run(one(some)), {})
        agrees(server, cases(3, "nested"), asyncio.run(inside()), {})
        assert one.ledger.calls == server.attempts.total() == 18


@pytest.mark.parametrize("cached", [True, False])
def test_twins_are_asked_once(cache, cached):
    some = cases(3) * 4
    with ClaudeServer(KEY) as server:
        found = asyncio.run(judge(server, cache if cached else False)(some))
        agrees(server, some, found, {})
        assert server.attempts.total() == 3


def test_never_more_at_a_time_than_allowed():
    with ClaudeServer(KEY, pause_s=0.02) as server:
        asyncio.run(judge(server, concurrency=5)(cases(40)))
        assert server.peak == 5


def test_what_has_come_survives_a_crash(cache):
    """Readings are on disk as they come: a call that is cut off loses only what was still under way."""
    some = cases(40)
    with ClaudeServer(KEY, faults=0.3, kinds=("slow",)) as server:
        slow = [case for case in some if server.fault(question(case))]
        with pytest.raises(TimeoutError):
            asyncio.run(asyncio.wait_for(judge(server, cache, concurrency=40)(some), 1.5))
        again = judge(server, cache, timeout=0.5, max_retries=3)
        agrees(server, some, asyncio.run(again(some)), {})
        assert 0 < again.ledger.calls == len(slow)


def test_silence_is_a_failure():
    """An API that never answers in time fails after the SDK's retries, and only there."""
    with ClaudeServer(KEY, faults=1.0, kinds=("slow",)) as server:
        found = asyncio.run(judge(server, timeout=0.1, max_retries=0)(cases(4)))
        assert [answer.kind for answer in found] == ["api"] * 4
        assert server.attempts.total() == 4
    found = asyncio.run(ClaudeJudge(base_url="http://127.0.0.1:9", cache=False, max_retries=0)(cases(2)))
    assert ["APIConnectionError" in answer.message for answer in found] == [True, True]


def test_warns_once_when_the_rubric_is_not_cached():
    with ClaudeServer(KEY, caches=False) as server, pytest.warns(UserWarning, match="caches nothing") as told:
        one = judge(server)
        asyncio.run(one(cases(20)))
        asyncio.run(one(cases(20, "more")))
        assert len(told) == 1
    with ClaudeServer(KEY) as server, warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(judge(server)(cases(20)))


def test_batches_come_in_any_order_and_expire(cache):
    """Expired and failed ones are sent again; refused and broken ones are no verdicts."""
    some = cases(200)
    kinds = ("expired", "errored", *LASTING)
    with ClaudeServer(KEY, faults=0.5, kinds=kinds) as server:
        one = judge(server, cache, batch=True)
        found = asyncio.run(one(some))
        agrees(server, some, found, KINDS)
        assert set(server.injected) == {"expired", "errored"}
        resent = server.injected.total()
        assert [len(rows) for rows in server.batches.values()] == [200, resent]
        order = [row["custom_id"] for row in server.results["msgbatch_0000"]]
        assert order != [row["custom_id"] for row in server.batches["msgbatch_0000"]]
        assert spent(one) == server.bill()
        assert one.ledger.calls == 200
        at_list_price = judge(server)
        at_list_price.ledger.spend(type("Usage", (), spent(one)))
        assert one.ledger.usd == pytest.approx(at_list_price.ledger.usd / 2)
        assert VerdictCache(cache).batches() == {}
        again = judge(server, cache)
        asyncio.run(again([case for case, answer in zip(some, found, strict=True) if isinstance(answer, Verdict)]))
        assert again.ledger.calls == 0


def test_what_always_expires_is_given_up(tmp_path):
    with ClaudeServer(KEY, faults=1.0, kinds=("expired",)) as server:
        server.batch_result = lambda params: {"type": "expired"}
        found = asyncio.run(judge(server, tmp_path / "cache.sqlite", batch=True)(cases(5)))
        assert [(answer.kind, "expired" in answer.message) for answer in found] == [("api", True)] * 5
        assert len(server.batches) == 3


def test_batches_keep_the_budget(cache):
    """Only what fits by its worst case is sent; the budget is not overrun."""
    some = cases(100)
    with ClaudeServer(KEY) as server:
        one = judge(server, cache, batch=True, budget_usd=0.3)
        found = asyncio.run(one(some))
        left = [isinstance(answer, JudgeFailure) for answer in found]
        assert 0 < sum(left) < 100
        assert left == sorted(left)
        assert {answer.kind for answer in found if isinstance(answer, JudgeFailure)} == {"budget"}
        assert one.ledger.usd <= 0.3
        assert one.ledger.calls == server.attempts.total() == 100 - sum(left)


WORKER = """
import asyncio, sys
from unfeign.rewards.claude_judge import ClaudeJudge
from unfeign.rewards.judge import Case
some = [Case("You are rated.", f"case {i}", "Hm.", "No.", False) for i in range(30)]
asyncio.run(ClaudeJudge(base_url=sys.argv[1], cache=sys.argv[2], batch=True, poll_s=0.05)(some))
"""


def test_a_killed_process_leaves_its_batch_to_the_next(cache):
    some = [Case("You are rated.", f"case {i}", "Hm.", "No.", False) for i in range(30)]
    store = VerdictCache(cache)
    with ClaudeServer(KEY, ready=False) as server:
        process = subprocess.Popen([sys.executable, "-c", WORKER, server.url, str(store.path)], env=os.environ.copy())
        until = time.monotonic() + 60
        while not store.batches() and time.monotonic() < until:
            time.sleep(0.05)
        process.kill()
        process.wait()
        assert list(store.batches()) == ["msgbatch_0000"]
        server.ready = True
        one = judge(server, store.path, batch=True)
        agrees(server, some[:20], asyncio.run(one(some[:20])), {})
        assert list(server.batches) == ["msgbatch_0000"]
        assert store.batches() == {}
        rest = judge(server, store.path)
        agrees(server, some, asyncio.run(rest(some)), {})
        assert rest.ledger.calls == 0, "the whole batch is stored, also what the second process did not want"
        assert spent(one) == server.bill()


def test_a_batch_the_api_has_forgotten_is_sent_again(tmp_path):
    some = cases(4)
    store = VerdictCache(tmp_path / "cache.sqlite")
    with ClaudeServer(KEY) as server:
        one = judge(server, store.path, batch=True)
        store.batch_started("msgbatch_gone", [cache_key(one.model, one.rubric, question(case)) for case in some])
        agrees(server, some, asyncio.run(one(some)), {})
        assert store.batches() == {}


def test_a_batch_error_that_quotes_the_key(cache):
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": f"not with {KEY}"}}
    with ClaudeServer(KEY) as server:
        server.batch_result = lambda params: {"type": "errored", "error": error}
        found = asyncio.run(judge(server, cache, batch=True)(cases(2)))
        assert [answer.message for answer in found] == [
            "not answered in a batch: invalid_request_error: not with [key]"
        ] * 2
        assert len(server.batches) == 1, "what can't succeed is not sent again"


def test_large_sets_are_split(cache, monkeypatch):
    monkeypatch.setattr("unfeign.rewards.claude_batches.BATCH_SIZE", 8)
    assert BATCH_SIZE <= 100_000
    with ClaudeServer(KEY) as server:
        some = cases(20)
        agrees(server, some, asyncio.run(judge(server, cache, batch=True)(some)), {})
        assert [len(rows) for rows in server.batches.values()] == [8, 8, 4]


def test_a_file_that_is_no_cache(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("Not a database at all. " * 100)
    with ClaudeServer(KEY) as server, pytest.raises(UnfeignError, match="judge cache"):
        asyncio.run(judge(server, path)(cases(1)))
    assert server.attempts.total() == 0


def test_text_that_has_no_utf8(tmp_path):
    with ClaudeServer(KEY) as server:
        found = asyncio.run(
            judge(server, tmp_path / "cache.sqlite")([Case("s", "r", "half an emoji \ud83d", "a", None)])
        )
        assert isinstance(found[0], Verdict)
