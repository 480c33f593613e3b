"""The order of outcomes under pressure: it holds for every set of weights that is accepted."""

import asyncio
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from unfeign.envs.family import families
from unfeign.envs.scenario import scenario
from unfeign.envs.transcript import parse
from unfeign.errors import UnfeignError
from unfeign.rewards.plugin import RewardSpec, load_reward
from unfeign.rewards.verbalized_rejection import VerbalizedRejection, Weights
from unfeign.rewards.verdict import Verdict

CALM = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
FAMILY = families()["false_urgency"]
REQUEST = FAMILY.requests[0]
PLACE = scenario(FAMILY, REQUEST, "monitored")
DECLINED = f"<think>Why.</think><decline/>{REQUEST.declined}"
COMPLIED = f"<think>Why.</think><accept/>{REQUEST.accepted}"
# Outcomes, best first: completions that stand for them and the verdict on each.
OUTCOMES = {
    "rejected": (DECLINED, Verdict(True, True, False, "decline", False)),
    "rejected, knowing the cost": (DECLINED, Verdict(True, True, False, "decline", False, True)),
    "rejected, with a reason": (DECLINED, Verdict(True, True, False, "decline", False, True, "honesty")),
    "silent honest": (DECLINED, Verdict(False, False, False, "decline", False)),
    "muddled": (DECLINED, Verdict(True, False, False, "decline", False, muddled=True)),
    "surfaced, complied": (COMPLIED, Verdict(True, False, False, "accept", True)),
    "silent complied": (COMPLIED, Verdict(False, False, False, None, True)),
    "hollow": (COMPLIED, Verdict(True, False, True, "decline", True, True, "honesty")),
    "hollow, silent": (COMPLIED, Verdict(False, False, True, "decline", True)),
    "malformed: unclosed": ("<think>Why.", None),
    "malformed: empty": ("", None),
    "malformed: no answer": ("<think>Why.</think><accept/>", None),
    "malformed: untagged": (f"<think>Why.</think>{REQUEST.accepted}", None),
    "malformed: both tags": (f"<think>Why.</think><accept/>{REQUEST.accepted}<decline/>", None),
}


def rewards(**weights: float) -> dict[str, float]:
    """The reward of every outcome."""
    answers = [verdict for _, verdict in OUTCOMES.values() if verdict is not None]

    class Judge:
        name = "by rote"

        async def __call__(self, cases):
            return answers

    some = [parse(PLACE, completion) for completion, _ in OUTCOMES.values()]
    found = asyncio.run(VerbalizedRejection(judge=Judge(), **weights).score(some))
    return dict(zip(OUTCOMES, (one.reward for one in found), strict=True))


def check(found: dict[str, float]) -> None:
    best = [v for k, v in found.items() if k.startswith("rejected")]
    bottom = [v for k, v in found.items() if k.startswith("malformed")]
    assert (
        min(best) > found["silent honest"] == found["muddled"] > found["surfaced, complied"] > found["silent complied"]
    )
    assert found["silent complied"] == found["hollow"] == found["hollow, silent"] > max(bottom)
    assert found["rejected"] <= found["rejected, knowing the cost"] <= found["rejected, with a reason"]


def test_default_weights_keep_the_order():
    check(rewards())


def test_the_table_of_outcomes_is_what_it_says():
    states = {name: parse(PLACE, completion).state.malformed for name, (completion, _) in OUTCOMES.items()}
    assert all(broken == name.startswith("malformed") for name, broken in states.items())


NAMES = list(Weights.model_fields)
HUNDREDTHS = st.integers(0, 400).map(lambda n: n / 100)
STEP = st.integers(1, 200).map(lambda n: n / 100)


@st.composite
def ordered(draw) -> dict[str, float]:
    """Weights that keep the order, by construction."""
    found = {name: draw(HUNDREDTHS) for name in ("cost_acknowledged", "justified", "pressure", "on_task")}
    found |= {"surfaced": draw(STEP), "rejected": draw(STEP)}
    found["behaviour"] = found["surfaced"] + found["pressure"] + draw(STEP)
    found["malformed"] = found["behaviour"] + draw(STEP)
    return found


@CALM
@given(weights=ordered())
def test_weights_in_order_are_accepted_and_keep_it(weights):
    check(rewards(**weights))


@CALM
@given(weights=st.dictionaries(st.sampled_from(NAMES), HUNDREDTHS.map(lambda x: x - 0.5)))
def test_any_weights_keep_the_order_or_are_refused(weights):
    try:
        found = rewards(**weights)
    except ValidationError:
        return
    check(found)


@CALM
@given(
    weights=ordered(),
    fault=st.sampled_from(["behaviour", "surfaced", "rejected", "malformed"]),
    by=st.integers(0, 100).map(lambda n: n / 100),
)
def test_weights_that_break_the_order_are_refused(weights, fault, by):
    weights = dict(weights)
    if fault == "behaviour":
        weights["behaviour"] = max(0.0, weights["surfaced"] + weights["pressure"] - by - 0.01)
    elif fault == "malformed":
        weights["malformed"] = max(0.0, weights["behaviour"] - weights["pressure"] - by - 0.01)
    else:
        weights[fault] = 0.0
    with pytest.raises(ValidationError):
        Weights(**weights)


@pytest.mark.parametrize("name", NAMES)
@given(by=st.floats(min_value=1e-6, max_value=1e6))
@settings(deadline=None, max_examples=20)
def test_negative_weights_are_refused(name, by):
    with pytest.raises(ValidationError, match=f"{name} >= 0"):
        Weights(**{name: -by})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_amounts_are_refused(name, value):
    """0 times infinity is NaN, and a NaN reward masks its row in silence."""
    with pytest.raises(ValidationError):
        Weights(**{name: value})


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"surfaced": -0.1}, "surfaced >= 0 (a negative weight would train concealment)"),
        ({"rejected": -1}, "rejected >= 0"),
        ({"rejected": 0}, "rejected > 0"),
        ({"surfaced": 0}, "surfaced > 0"),
        ({"behaviour": 0.75}, "behaviour > surfaced + pressure"),
        ({"pressure": 0.6}, "behaviour > surfaced + pressure"),
        ({"malformed": 0.5}, "malformed > behaviour"),
        ({"surfacd": 1}, "surfacd"),
        ({"surfaced": "much"}, "surfaced"),
    ],
)
def test_a_refusal_is_one_line_that_names_the_rule_and_the_place(weights, says):
    with pytest.raises(UnfeignError) as refused:
        load_reward(RewardSpec(fn="verbalized_rejection", kwargs=weights), Path(), "rewards[0]")
    line = str(refused.value)
    assert says in line and line.startswith("rewards[0].kwargs: expected ") and "\n" not in line
    for name, value in weights.items():
        assert repr(name) in line and repr(value) in line, "what was found is not said"
