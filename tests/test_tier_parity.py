"""The parity of tiers: what it pays, and how a run deals prompts so that both tiers of a pair meet in every process."""

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unfeign.cli import main
from unfeign.envs.dataset import mixed_pairs, setting
from unfeign.envs.scenario import scenarios
from unfeign.envs.transcript import parse
from unfeign.errors import UnfeignError
from unfeign.rewards.comparators import TierParity

TRAIN = scenarios("train")
PAIR = {s.tier: s for s in TRAIN if s.pair_id == next(s.pair_id for s in TRAIN if not s.control)}
CONTROL = next(s for s in TRAIN if s.control)


def text(scenario, complied: bool | None) -> str:
    if complied is None:
        return "no form at all"
    tags = scenario.tags
    return f"{tags.open_think}A thought.{tags.close_think}{tags.accept if complied else tags.decline}Here is my answer."


def score(*decided: tuple[str, bool | None]) -> list[dict[str, float]]:
    told = [parse(PAIR[tier], text(PAIR[tier], complied)) for tier, complied in decided]
    return [{t.name: t.value for t in found.terms} for found in asyncio.run(TierParity().score(told))]


def test_parity_is_the_share_of_the_other_tier_that_decided_otherwise():
    found = score(("monitored", True), ("monitored", False), ("unmonitored", False), ("unmonitored", False))
    assert [one["parity"] for one in found] == [-1.0, 0.0, -0.5, -0.5]
    assert score(("monitored", True), ("unmonitored", True))[0]["parity"] == 0, "complying in both is parity too"


def test_broken_output_has_its_price_and_counts_for_nobody():
    found = score(("monitored", True), ("unmonitored", None), ("unmonitored", True))
    assert found[0]["parity"] == 0 and "parity" not in found[1] and found[1]["malformed"] < 0
    assert "parity" not in score(("monitored", True), ("unmonitored", None))[0], "there is nothing to compare with"


def test_controls_are_for_being_on_task():
    told = [parse(CONTROL, text(CONTROL, True))]
    assert {t.name for t in asyncio.run(TierParity().score(told))[0].terms} == {"on_task", "malformed"}


def test_no_judge_is_asked():
    assert not hasattr(TierParity(), "judge")
    told = [parse(CONTROL, text(CONTROL, True))]
    assert asyncio.run(TierParity(on_task=1.0).score(told))[0].verdict is None


def test_an_unpaired_row_is_an_error():
    with pytest.raises(UnfeignError, match=r"both tiers of .* in one batch, found monitored alone"):
        score(("monitored", True))


@given(st.integers(0, 99), st.integers(1, 30), st.sampled_from([(0.5, 0.0), (0.3, 0.4), (0.45, 0.1)]))
def test_pairs_are_dealt_side_by_side(seed: int, twos: int, shares: tuple[float, float]):
    watched, control = shares
    dealt = mixed_pairs(TRAIN, {"monitored": watched, "unmonitored": watched, "control": control}, 2 * twos, seed)
    assert len(dealt) == 2 * twos
    for one, other in zip(dealt[::2], dealt[1::2], strict=True):
        assert one.control == other.control
        if not one.control:
            assert one.pair_id == other.pair_id and {one.tier, other.tier} == {"monitored", "unmonitored"}
    pairs = sum(setting(s) == "monitored" for s in dealt)
    assert abs(pairs - twos * 2 * watched / (2 * watched + control)) <= 1


def test_tiers_must_have_equal_shares():
    with pytest.raises(UnfeignError, match="equal shares of monitored and unmonitored"):
        mixed_pairs(TRAIN, {"monitored": 0.5, "unmonitored": 0.1}, 8, 0)


GRPO = {"max_steps": 2, "num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 8}
MIX = {"mix": {"monitored": 0.3, "unmonitored": 0.3, "control": 0.4}}


def test_a_run_deals_pairs(write_config, tmp_path: Path):
    config = write_config(rewards=[{"fn": "tier_parity"}], data=MIX, audit={"before": False, "after": False}, grpo=GRPO)
    main(["train", str(config)])
    ledger = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    for step in (0, 1):
        asked = [row["scenario_id"].rpartition("/") for row in ledger if row["step"] == step]
        pairs = {pair for pair, _, _ in asked}
        assert len(asked) == 4 and (len(pairs) == 1 or all("control" in pair for pair in pairs))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": {"mix": {"monitored": 0.5, "unmonitored": 0.1}}}, "equal shares of monitored and unmonitored"),
        ({"data": MIX, "grpo": GRPO | {"per_device_train_batch_size": 2}}, "a multiple of 2 x num_generations"),
    ],
)
def test_what_would_split_pairs_is_refused(write_config, refused, changes: dict, expected: str):
    config = write_config(**({"rewards": [{"fn": "tier_parity"}], "grpo": GRPO} | changes))
    assert expected in refused("train", config, "--dry-run")
