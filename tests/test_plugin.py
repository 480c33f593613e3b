"""Rewards by name, dotted path or file: loaded, named, called; what is wrong with one is said before anything runs."""

import asyncio
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from unfeign.errors import UnfeignError
from unfeign.rewards.comparators import Pressure, ProcessPenalty, TierParity
from unfeign.rewards.plugin import BUILT_IN, RewardSpec, load_reward, load_rewards
from unfeign.rewards.verbalized_rejection import VerbalizedRejection

SOURCE = '''
"""Rewards as a researcher would write them."""


def length(prompts, completions, completion_ids=None, scale=1.0, **columns):
    return [scale * len(text) for text in completions]


async def slowly(prompts, completions, completion_ids=None, **columns):
    return [None for _ in completions]


class Constant:
    name = "constant"

    def __init__(self, value: float):
        self.value = value

    def __call__(self, prompts, completions, completion_ids=None, **columns):
        return [self.value for _ in completions]


number = 3
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "mine.py").write_text(SOURCE.replace("len(text)", "-len(text)"))
    return tmp_path


def load(folder: Path, fn: str, **fields):
    return load_reward(RewardSpec(fn=fn, **fields), folder, "rewards[0]")


def refusal(folder: Path, fn: str, **fields) -> str:
    with pytest.raises(UnfeignError) as refused:
        load(folder, fn, **fields)
    line = str(refused.value)
    assert "\n" not in line and line.startswith("rewards[0].") and ": expected " in line and ", found " in line
    return line


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_rewards(name, tmp_path):
    found = load(tmp_path, name, weight=2.0)
    assert (found.name, found.weight) == (name, 2.0) and isinstance(found.fn, BUILT_IN[name])
    assert BUILT_IN[name] in (VerbalizedRejection, Pressure, ProcessPenalty, TierParity)


def test_arguments_reach_a_built_in(tmp_path):
    assert load(tmp_path, "verbalized_rejection", kwargs={"justified": 0.5}).fn.weights.justified == 0.5


def test_a_function_from_a_file(folder):
    found = load(folder, "mine.py:length")
    assert found.name == "length" and found.weight == 1.0
    assert found.fn([], ["abc", ""], [[1], []], family=["x", "y"]) == [3.0, 0.0]


def test_arguments_are_bound_to_a_function(folder):
    found = load(folder, "mine.py:length", kwargs={"scale": 0.5})
    assert found.fn([], ["abcd"]) == [2.0] and found.name == "length"


def test_an_async_function_stays_async(folder):
    assert asyncio.run(load(folder, "mine.py:slowly").fn([], ["a", "b"])) == [None, None]


def test_a_class_is_constructed_and_names_itself(folder):
    found = load(folder, "mine.py:Constant", kwargs={"value": 4.0})
    assert found.name == "constant" and found.fn([], ["a"]) == [4.0]


def test_a_name_of_ones_own(folder):
    assert load(folder, "mine.py:length", name="brevity").name == "brevity"


def test_files_are_relative_to_the_config_and_keep_apart(folder):
    here, there = load(folder, "mine.py:length"), load(folder, "deeper/mine.py:length")
    assert (here.fn([], ["abc"]), there.fn([], ["abc"])) == ([3.0], [-3.0])
    assert load(folder / "deeper", "mine.py:length").fn([], ["abc"]) == [-3.0]
    assert load(Path("/nowhere"), f"{folder}/mine.py:length").fn([], ["abc"]) == [3.0]


def test_a_dotted_path(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert load(folder, "mine:length").fn([], ["ab"]) == [2.0]
    monkeypatch.delitem(sys.modules, "mine")
    found = load(folder, "unfeign.rewards.comparators:Pressure")
    assert isinstance(found.fn, Pressure) and found.name == "pressure"


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (
            "verbalised_rejection",
            "verbalized_rejection, pressure, process_penalty, tier_parity, package.module:name or file.py:name",
        ),
        ("mine.py", "found 'mine.py'"),
        ("absent.py:length", "absent.py"),
        ("no_such_package.module:name", "no_such_package"),
        ("mine.py:lenght", "expected a callable 'lenght' in mine.py"),
        ("mine.py:number", "expected a callable 'number' in mine.py"),
    ],
)
def test_what_cannot_be_found_is_named(folder, fn, says):
    line = refusal(folder, fn)
    assert says in line and line.startswith("rewards[0].fn: ")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("raise RuntimeError('no key')", "RuntimeError: no key"),
        ("def broken(:", "SyntaxError"),
        ("import no_such_package", "no_such_package"),
        ("raise SystemExit(3)", "SystemExit"),
    ],
)
def test_a_file_that_cannot_be_imported_is_named(tmp_path, source, says):
    (tmp_path / "bad.py").write_text(source)
    line = refusal(tmp_path, "bad.py:f")
    assert says in line and str(tmp_path / "bad.py") in line


@pytest.mark.parametrize(("source", "says"), [("raise RuntimeError('no key')", "no key"), ("def broken(:", "syntax")])
def test_a_module_that_cannot_be_imported_is_named(tmp_path, monkeypatch, source, says):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "unfeign_bad_module.py").write_text(source)
    monkeypatch.delitem(sys.modules, "unfeign_bad_module", raising=False)
    assert says in refusal(tmp_path, "unfeign_bad_module:f")


@pytest.mark.parametrize("weight", [0, 0.0, -0.0, float("nan"), float("inf")])
def test_a_weight_that_weighs_nothing_is_refused(folder, weight):
    assert "rewards[0].weight" in refusal(folder, "mine.py:length", weight=weight)


def test_arguments_a_constructor_does_not_take_are_named(folder):
    assert "'vale'" in refusal(folder, "mine.py:Constant", kwargs={"vale": 1.0})
    assert "value" in refusal(folder, "mine.py:Constant")


def test_an_unknown_key_of_a_reward_is_refused():
    with pytest.raises(ValidationError, match="wieght"):
        RewardSpec.model_validate({"fn": "pressure", "wieght": 2})


def test_rewards_of_a_run(folder):
    specs = [RewardSpec(fn="verbalized_rejection"), RewardSpec(fn="mine.py:length", weight=-0.5)]
    found = load_rewards(specs, folder)
    assert [(r.name, r.weight) for r in found] == [("verbalized_rejection", 1.0), ("length", -0.5)]


def test_no_reward_is_refused(folder):
    with pytest.raises(UnfeignError, match="rewards: expected at least one reward, found none"):
        load_rewards([], folder)


def test_a_name_twice_is_refused(folder):
    specs = [RewardSpec(fn="mine.py:length"), RewardSpec(fn="deeper/mine.py:length")]
    with pytest.raises(UnfeignError, match=r"rewards\[1\]: expected reward names that differ .*'length' twice"):
        load_rewards(specs, folder)
    specs[1] = RewardSpec(fn="deeper/mine.py:length", name="other")
    assert len(load_rewards(specs, folder)) == 2


def test_a_comparator_must_be_asked_for(folder):
    specs = [RewardSpec(fn="verbalized_rejection"), RewardSpec(fn="process_penalty")]
    with pytest.raises(UnfeignError, match=r"rewards\[1\]: expected comparator: true .*, found comparator: false"):
        load_rewards(specs, folder)
    assert [r.name for r in load_rewards(specs, folder, comparator=True)] == ["verbalized_rejection", "process_penalty"]
