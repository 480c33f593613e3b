"""Scenarios as a `datasets.Dataset` that any TRL trainer takes: a conversational `prompt` column, and the scenario's
fields.
"""

import random
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import UnfeignError
from .scenario import Scenario


def row(scenario: Scenario) -> dict[str, Any]:
    """One dataset row."""
    return {"prompt": scenario.messages, **scenario.columns()}


def to_dataset(scenarios: Iterable[Scenario]) -> Any:
    """Rows in order, as a `datasets.Dataset`."""
    from datasets import Dataset

    return Dataset.from_list([row(scenario) for scenario in scenarios])


def setting(scenario: Scenario) -> str:
    """`control`, `monitored` or `unmonitored`: the three settings a training mix names."""
    return "control" if scenario.control else scenario.tier


def mixed(scenarios: Sequence[Scenario], shares: dict[str, float], count: int, seed: int) -> list[Scenario]:
    """`count` scenarios in training order, every stretch of it near `shares`.

    Settings are interleaved by largest deficit, so that each optimiser step sees its part of every setting; within a
    setting scenarios are dealt from a shuffled deck, families taking turns, and none repeats before all were dealt.
    """
    decks = {name: [(s,) for s in scenarios if setting(s) == name] for name in shares}
    return [s for unit in _dealt(decks, shares, count, seed) for s in unit]


def mixed_pairs(scenarios: Sequence[Scenario], shares: dict[str, float], count: int, seed: int) -> list[Scenario]:
    """As `mixed`, dealt by twos: both tiers of a pair side by side, or two controls. So an even number of neighbours,
    counted from the start, holds whole pairs.

    Raises:
        UnfeignError: an odd count, or tiers whose shares differ.
    """
    if count % 2:
        raise UnfeignError("an even number of prompts, for pairs", str(count), "mix")
    if (watched := shares.get("monitored", 0.0)) != shares.get("unmonitored", 0.0):
        raise UnfeignError("equal shares of monitored and unmonitored, for pairs", str(shares), "mix")
    twins: dict[str, list[Scenario]] = {}
    for s in scenarios:
        if not s.control:
            twins.setdefault(s.pair_id, []).append(s)
    controls = [s for s in scenarios if s.control]
    decks = {
        "pair": [tuple(both) for both in twins.values() if len(both) == 2],
        "control": list(zip(controls[::2], controls[1::2], strict=False)),
    }
    units = {"pair": 2 * watched, "control": shares.get("control", 0.0)}
    return [s for unit in _dealt(decks, units, count // 2, seed) for s in unit]


Unit = tuple[Scenario, ...]


def _dealt(decks: dict[str, list[Unit]], shares: dict[str, float], count: int, seed: int) -> list[Unit]:
    """`count` units in order, from the decks by their shares."""
    rng = random.Random(seed)
    left: dict[str, list[Unit]] = {name: [] for name in shares}
    dealt = dict.fromkeys(shares, 0)
    total = sum(shares.values())
    if total <= 0:
        raise UnfeignError("at least one share above 0", str(shares), "mix")
    for name in shares:
        if shares[name] > 0 and not decks[name]:
            raise UnfeignError(f"scenarios of the setting {name!r}", "none", "mix")
    out: list[Unit] = []
    for position in range(1, count + 1):
        due = {name: share / total * position - dealt[name] for name, share in shares.items()}
        name = max(due, key=lambda key: due[key])
        if not left[name]:
            left[name] = _by_turns(decks[name], rng)
        out.append(left[name].pop())
        dealt[name] += 1
    return out


def _by_turns(units: list[Unit], rng: random.Random) -> list[Unit]:
    """Shuffled, then arranged so that neighbours come from different families."""
    families: dict[str, list[Unit]] = {}
    for unit in rng.sample(units, len(units)):
        families.setdefault(unit[0].family, []).append(unit)
    order = rng.sample(sorted(families), len(families))
    longest = max(map(len, families.values()))
    return [families[name][i] for i in range(longest) for name in order if i < len(families[name])]
