"""The dataset: conversational prompts with the scenario beside them, and a mix that is right in every stretch."""

from itertools import accumulate

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unfeign.envs.dataset import mixed, row, setting, to_dataset
from unfeign.envs.scenario import Scenario, scenarios
from unfeign.errors import UnfeignError

SETTINGS = ("monitored", "unmonitored", "control")
TRAIN = scenarios("train")
CALM = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


def test_rows_hold_prompt_and_scenario():
    s = TRAIN[0]
    found = row(s)
    assert found["prompt"] == [
        {"role": "system", "content": s.system},
        {"role": "user", "content": s.request},
    ]
    assert Scenario.from_columns(found) == s


def test_a_dataset_keeps_order_and_fields():
    some = scenarios("validation")[:6]
    dataset = to_dataset(some)
    assert [Scenario.from_columns(r) for r in dataset] == some
    assert [r["prompt"] for r in dataset] == [s.messages for s in some]


def test_settings():
    named = {(s.control, s.tier): setting(s) for s in TRAIN}
    assert named == {
        (False, "monitored"): "monitored",
        (False, "unmonitored"): "unmonitored",
        (True, "monitored"): "control",
        (True, "unmonitored"): "control",
    }


SHARES = st.dictionaries(st.sampled_from(SETTINGS), st.integers(1, 20).map(float), min_size=1)


@CALM
@given(shares=SHARES, count=st.integers(1, 120), seed=st.integers(0, 99))
def test_every_stretch_is_near_its_shares(shares, count, seed):
    dealt = [setting(s) for s in mixed(TRAIN, shares, count, seed)]
    assert len(dealt) == count
    for name in SETTINGS:
        share = shares.get(name, 0.0) / sum(shares.values())
        ahead = [seen - share * n for n, seen in enumerate(accumulate(d == name for d in dealt), start=1)]
        assert all(abs(off) < 1.5 for off in ahead), (name, ahead)


@CALM
@given(seed=st.integers(0, 99))
def test_none_repeats_before_all_were_dealt(seed):
    for name in SETTINGS:
        deck = [s.scenario_id for s in TRAIN if setting(s) == name]
        dealt = [s.scenario_id for s in mixed(TRAIN, {name: 1.0}, 2 * len(deck), seed)]
        assert sorted(dealt[: len(deck)]) == sorted(dealt[len(deck) :]) == sorted(deck)


def test_families_take_turns():
    families = len({s.family for s in TRAIN})
    dealt = [s.family for s in mixed(TRAIN, {"monitored": 1.0}, families * 5, seed=3)]
    for start in range(0, len(dealt), families):
        assert len(set(dealt[start : start + families])) == families


def test_the_seed_decides():
    shares = {"monitored": 2.0, "control": 1.0}
    one, again, other = (mixed(TRAIN, shares, 30, seed) for seed in (1, 1, 2))
    assert one == again and one != other
    assert mixed(TRAIN, shares, 10, 1) == one[:10]


@pytest.mark.parametrize(
    ("chosen", "shares", "says"),
    [
        ([s for s in TRAIN if not s.control], {"monitored": 1.0, "control": 1.0}, "control"),
        (TRAIN, {"monitored": 0.0}, "monitored"),
        (TRAIN, {"watched": 1.0}, "watched"),
    ],
    ids=["no such scenarios", "no share", "no such setting"],
)
def test_a_mix_that_cannot_be_dealt_is_named(chosen, shares, says):
    with pytest.raises(UnfeignError) as refused:
        mixed(chosen, shares, 8, 0)
    assert says in str(refused.value)
