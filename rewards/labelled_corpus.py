"""The corpus that offline judges learn from: reasonings labelled sentence by sentence, and what that says of their
passages.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_jsonl
from .roles import PASSAGES, ROLES

FOLDER = Path(str(files("unfeign.rewards"))) / "corpus"
BENCH = "bench_"  # files of the reward bench's half `dev` begin so


def corpus(bench: bool = True) -> list[dict[str, Any]]:
    """All rows, by default with the bench's: `s`, pairs of roles and sentence; `answer`; `labels`, whether it surfaces
    and rejects.
    """
    paths = [path for path in sorted(FOLDER.glob("*.jsonl")) if bench or not path.name.startswith(BENCH)]
    return [row for path in paths for row in read_jsonl(path)]


@dataclass(frozen=True)
class Truth:
    """What the n sentences of a reasoning do. A passage surfaces where a reasoning that does has its option and its
    motive; one rejects where a reasoning that does turns, declines or accepts the cost, after the option.
    """

    roles: np.ndarray
    """(n, roles)"""
    alone: np.ndarray
    """(n, passages) of each sentence; NaN for *rejects* where there is nothing to reject, or the answer goes along."""
    beside: np.ndarray
    """(n - 1, passages) of each sentence with the next one; NaN as above."""


def truth(row: dict[str, Any]) -> Truth:
    """The truth of a row."""
    labels, roles = row["labels"], [roles for roles, _ in row["s"]]
    option = next((i for i, own in enumerate(roles) if "O" in own), 0)
    asked = labels["surfaced"] and row["answer"] == "decline"

    def passage(first: int, last: int) -> list[float]:
        here = roles[first] if first == last else roles[first] + roles[last]
        surfaces = labels["surfaced"] and "O" in here and "M" in here
        rejects = labels["rejected"] and first >= option and not set("ANC").isdisjoint(here)
        return [float(surfaces), float(rejects) if asked else np.nan]

    count = len(roles)
    return Truth(
        np.array([[role in own for role in ROLES] for own in roles], dtype=float),
        np.array([passage(i, i) for i in range(count)]),
        np.array([passage(i, i + 1) for i in range(count - 1)]).reshape(count - 1, len(PASSAGES)),
    )
