"""Votes: a label a majority, failures that do not count as votes, agreement reported."""

import asyncio
from pathlib import Path

import pytest

from unfeign.errors import UnfeignError
from unfeign.rewards.judge import Case, load_judge
from unfeign.rewards.verdict import JudgeFailure, Verdict

SOURCE = '''
from unfeign.rewards.verdict import JudgeFailure, Verdict


class Moody:
    """Sample by sample: surfaces, rejects, or fails, as the reasoning spells out: `sr`, `s`, `-` or `!` for each."""

    def __init__(self, sample: int = 0):
        self.name, self.sample = "moody", sample

    async def __call__(self, cases):
        said = [case.reasoning.split()[self.sample] for case in cases]
        return [
            JudgeFailure("api", "gone") if s == "!" else Verdict("s" in s, "r" in s, False, "decline", False)
            for s in said
        ]
'''


@pytest.fixture
def vote(tmp_path: Path):
    (tmp_path / "moody.py").write_text(SOURCE)

    def ask(said: str, **arguments) -> Verdict | JudgeFailure:
        judge = load_judge({"name": "vote", "judge": "moody.py:Moody"} | arguments, tmp_path)
        ask.judge = judge
        return asyncio.run(judge([Case("", "", said, "", False)]))[0]

    return ask


@pytest.mark.parametrize(
    ("said", "surfaced", "rejected"),
    [
        ("sr sr -", True, True),
        ("sr s -", True, False),
        ("s - -", False, False),
        ("sr ! sr", True, True),
        ("! s s", True, False),
    ],
)
def test_the_majority_decides(vote, said, surfaced, rejected):
    found = vote(said)
    assert (found.surfaced, found.rejected) == (surfaced, rejected)


def test_a_threshold_can_ask_for_more(vote):
    assert vote("s s -", threshold=0.6).surfaced and not vote("s s -", threshold=0.7).surfaced


def test_no_majority_of_votes_is_a_failure(vote):
    found = vote("! ! sr")
    assert isinstance(found, JudgeFailure) and found.kind == "api" and "2 of 3" in found.message


def test_agreement_is_reported(vote):
    vote("sr sr -")
    assert vote.judge.agreement["surfaced"] == pytest.approx(1 / 3) and vote.judge.agreement["hollow"] == 1


def test_several_judges_can_vote(tmp_path):
    (tmp_path / "moody.py").write_text(SOURCE)
    judge = load_judge({"name": "vote", "judges": ["rules", "moody.py:Moody"]}, tmp_path)
    assert "rules" in judge.name and "moody" in judge.name and len(judge.judges) == 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"judge": "rules"}, "a judge that samples"),
        ({}, "either judge or judges"),
        ({"judges": ["rules"]}, "at least two votes"),
        ({"judges": ["rules", "rules"], "threshold": 1.0}, "threshold"),
    ],
)
def test_votes_that_make_no_sense_are_refused(arguments, part):
    with pytest.raises(UnfeignError, match=part):
        load_judge({"name": "vote"} | arguments)
