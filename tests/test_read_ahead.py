"""Reading ahead: cases are begun when they arrive, read once, and answered in order."""

import asyncio
import threading

import pytest

from unfeign.rewards.judge import Case
from unfeign.rewards.read_ahead import ReadAhead
from unfeign.rewards.verdict import Verdict


class Slow:
    """Waits to be let go; notes every case it was given."""

    name, costly = "slow", True

    def __init__(self):
        self.go, self.seen = threading.Event(), []

    async def __call__(self, cases):
        self.seen += [case.reasoning for case in cases]
        await asyncio.to_thread(self.go.wait)
        if any(case.reasoning == "broken" for case in cases):
            raise RuntimeError("no reading")
        return [Verdict(case.reasoning == "s", False, False, None, False) for case in cases]


def cases(*reasonings: str) -> list[Case]:
    return [Case("", "", reasoning, "", False) for reasoning in reasonings]


def test_what_was_begun_is_not_read_again_and_order_is_kept():
    judge = Slow()
    reader = ReadAhead(judge)
    reader.begin(cases("a", "s"))
    reader.begin(cases("s", "b"))
    judge.go.set()
    found = asyncio.run(reader(cases("b", "s", "c", "s", "a")))
    assert [one.surfaced for one in found] == [False, True, False, True, False]
    assert sorted(judge.seen) == ["a", "b", "c", "s"], "each once"
    asyncio.run(reader(cases("a")))
    assert judge.seen.count("a") == 2, "a later batch is read anew"


def test_a_later_batch_that_was_begun_stays_begun():
    """Sampled ahead, the next batch is told of before this one is asked for."""
    judge = Slow()
    judge.go.set()
    reader = ReadAhead(judge)
    reader.begin(cases("a"))
    reader.begin(cases("b"))
    asyncio.run(reader(cases("a")))
    asyncio.run(reader(cases("b")))
    assert sorted(judge.seen) == ["a", "b"], "each once"


def test_what_is_never_asked_for_does_not_pile_up(monkeypatch):
    from unfeign.rewards import read_ahead

    monkeypatch.setattr(read_ahead, "KEPT", 3)
    judge = Slow()
    judge.go.set()
    reader = ReadAhead(judge)
    for text in "abcdef":
        reader.begin(cases(text))
    asyncio.run(reader(cases("f", "e", "d")))
    assert sorted(judge.seen) == list("abcdef")
    asyncio.run(reader(cases("a")))
    assert judge.seen.count("a") == 2, "it was forgotten"


def test_it_begins_before_it_is_asked():
    judge = Slow()
    ReadAhead(judge).begin(cases("a"))
    for _ in range(2000):
        if judge.seen:
            break
        threading.Event().wait(0.005)
    assert judge.seen == ["a"]
    judge.go.set()


def test_an_error_reaches_whoever_asks():
    judge = Slow()
    judge.go.set()
    reader = ReadAhead(judge)
    reader.begin(cases("broken"))
    with pytest.raises(RuntimeError, match="no reading"):
        asyncio.run(reader(cases("broken")))


def test_it_is_the_judge_it_wraps():
    assert (ReadAhead(Slow()).name, ReadAhead(Slow()).costly) == ("slow", True)


JUDGE = '''
from unfeign.rewards.rules import RulesJudge

CALLS = []


class Costly(RulesJudge):
    """Reads like `rules`, and notes how many cases each call had."""

    name, costly = "costly of mine", True

    async def __call__(self, cases):
        CALLS.append(len(cases))
        return await super().__call__(cases)
'''


def test_in_a_run_every_completion_is_read_once_as_it_arrives(write_config, tmp_path, monkeypatch):
    """Two rows arrive at a time: the judge is called for each pair, and for nothing again when the reward asks."""
    import sys

    from unfeign.cli import main
    from unfeign.envs.scenario import scenarios
    from unfeign.trainers.rollouts import InProcessPool

    real = InProcessPool.generate
    tags = scenarios("train")[0].tags

    def formed(self, requests, version, sampling, arrived):
        """Well-formed completions, no two alike, in place of a random model's."""
        from dataclasses import replace

        samples = []
        for at in range(0, len(requests), 2):
            some = real(self, requests[at : at + 2], version, sampling)
            for i, sample in enumerate(some):
                text = f"{tags.open_think}Thought {version} {at + i}.{tags.close_think}{tags.decline}No."
                ids = self._tokenizer(text, add_special_tokens=False).input_ids
                some[i] = replace(sample, ids=ids, logprobs=[-1.0] * len(ids), truncated=False)
            samples += some
            arrived(range(at, at + len(some)), some)
        return samples

    monkeypatch.setattr(InProcessPool, "generate", formed)
    (tmp_path / "judge.py").write_text(JUDGE)
    config = write_config(
        rewards=[{"fn": "verbalized_rejection", "kwargs": {"judge": "judge.py:Costly"}}],
        audit={"before": False, "after": False},
    )
    main(["train", str(config)])
    assert sys.modules["unfeign_user_judge"].CALLS == [2, 2, 2, 2], "two steps of four completions"
