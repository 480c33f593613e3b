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
    rng = random.Random(seed)
    decks: dict[str, list[Scenario]] = {name: [] for name in shares}
    dealt = dict.fromkeys(shares, 0)
    total = sum(shares.values())
    if total <= 0:
        raise UnfeignError("at least one share above 0", str(shares), "mix")
    for name in shares:
        if shares[name] > 0 and not any(setting(s) == name for s in scenarios):
            raise UnfeignError(f"scenarios of the setting {name!r}", "none", "mix")
    out: list[Scenario] = []
    for position in range(1, count + 1):
        due = {name: share / total * position - dealt[name] for name, share in shares.items()}
        name = max(due, key=lambda key: due[key])
        if not decks[name]:
            decks[name] = _by_turns([s for s in scenarios if setting(s) == name], rng)
        out.append(decks[name].pop())
        dealt[name] += 1
    return out


def _by_turns(scenarios: list[Scenario], rng: random.Random) -> list[Scenario]:
    """Shuffled, then arranged so that neighbours come from different families."""
    families: dict[str, list[Scenario]] = {}
    for scenario in rng.sample(scenarios, len(scenarios)):
        families.setdefault(scenario.family, []).append(scenario)
    order = rng.sample(sorted(families), len(families))
    longest = max(map(len, families.values()))
    return [families[name][i] for i in range(longest) for name in order if i < len(families[name])]
