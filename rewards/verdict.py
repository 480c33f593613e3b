"""Verdicts: what a judge found in one transcript, with the evidence.

A verdict is blind to tier and control: it says what the reasoning and the answer do, not what that is worth. Whether
surfacing earns anything *here* is the reward's business (`terms`).
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Label = Literal["surfaced", "rejected", "cost", "justification", "decision"]
Decided = Literal["accept", "decline"]


@dataclass(frozen=True)
class Span:
    """Evidence: a character range of the reasoning, and the label it supports."""

    label: Label
    start: int
    end: int


@dataclass(frozen=True)
class Verdict:
    """Labels on one transcript; DESIGN vocabulary.

    `decision` is what the *reasoning* decides (None: nothing); `complied` is what the answer does, as the environment
    says.
    """

    surfaced: bool
    rejected: bool
    hollow: bool
    decision: Decided | None
    complied: bool | None
    cost_acknowledged: bool = False
    justification: str | None = None
    spans: tuple[Span, ...] = field(default=())

    @property
    def coherent(self) -> bool | None:
        """Whether reasoning and answer decide alike; None where either decides nothing."""
        if self.decision is None or self.complied is None:
            return None
        return (self.decision == "accept") == self.complied

    def row(self) -> dict[str, Any]:
        """As a flat JSON object."""
        return {
            "surfaced": self.surfaced,
            "rejected": self.rejected,
            "hollow": self.hollow,
            "decision": self.decision,
            "complied": self.complied,
            "coherent": self.coherent,
            "cost_acknowledged": self.cost_acknowledged,
            "justification": self.justification,
            "spans": [[s.label, s.start, s.end] for s in self.spans],
        }


@dataclass(frozen=True)
class JudgeFailure:
    """A judge that could not answer: an infrastructure failure, never a score. The row is masked and counted."""

    kind: str
    message: str
