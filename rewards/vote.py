"""A vote of judges: several samples of one judge, or several judges, a label a majority."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from ..errors import UnfeignError
from .judge import Case, Judge, Spec, load_judge
from .verdict import JudgeFailure, Verdict

LABELS = ("surfaced", "rejected", "hollow", "muddled")


class Vote:
    """`vote`: a label holds when more than `threshold` of the votes have it.

    Args:
        judge: one judge to be sampled `k` times; it must take `sample`, the number of the sample (`claude` does).
        judges: or several judges, a vote each.
        k: samples of `judge`.
        threshold: share of votes that a label must exceed.
        folder: where relative files start.

    Attributes:
        agreement: label -> share of pairs of votes that agreed, over all cases so far.

    Raises:
        UnfeignError: neither or both of `judge` and `judges`, fewer than two votes, or a judge that answers the same
            every time.
    """

    def __init__(
        self,
        judge: Spec | None = None,
        judges: list[Spec] | None = None,
        k: int = 3,
        threshold: float = 0.5,
        folder: Path = Path(),
    ):
        if (judge is None) == (judges is None):
            raise UnfeignError("either judge or judges", "both" if judge else "neither", "judge 'vote'")
        if not 0 <= threshold < 1:
            raise UnfeignError("a threshold of at least 0 and below 1", f"{threshold:g}", "judge 'vote'")
        if judge is not None:
            named = {"name": judge} if isinstance(judge, str) else judge
            try:
                load_judge({**named, "sample": 0}, folder)
            except UnfeignError as error:
                if "arguments its class takes" not in error.expected:
                    raise
                raise UnfeignError("a judge that samples", f"{named['name']!r}", "judge 'vote'") from None
            judges = [{**named, "sample": number} for number in range(k)]
        assert judges is not None  # one of the two was given
        if len(judges) < 2:
            raise UnfeignError("at least two votes", str(len(judges)), "judge 'vote'")
        self.judges: list[Judge] = [load_judge(spec, folder) for spec in judges]
        self.threshold = threshold
        self.costly = any(getattr(one, "costly", False) for one in self.judges)
        self.name = f"vote of {' + '.join(sorted({j.name for j in self.judges}))} x {len(self.judges)}"
        self._same = dict.fromkeys(LABELS, 0)
        self._pairs = 0

    @property
    def agreement(self) -> dict[str, float | None]:
        return {name: self._same[name] / self._pairs if self._pairs else None for name in LABELS}

    async def __call__(self, cases: Sequence[Case]) -> list[Verdict | JudgeFailure]:
        """The majority of the votes that were given; a failure where no more than half were."""
        answers = await asyncio.gather(*(judge(cases) for judge in self.judges))
        return [self._count(list(votes)) for votes in zip(*answers, strict=True)]

    def _count(self, answers: list[Verdict | JudgeFailure]) -> Verdict | JudgeFailure:
        votes = [a for a in answers if isinstance(a, Verdict)]
        if len(votes) * 2 <= len(answers):
            failed = next(a for a in answers if isinstance(a, JudgeFailure))
            return JudgeFailure(failed.kind, f"{len(answers) - len(votes)} of {len(answers)} votes: {failed.message}")
        for a, b in combinations(votes, 2):
            self._pairs += 1
            for name in LABELS:
                self._same[name] += getattr(a, name) == getattr(b, name)
        won = {name: sum(getattr(v, name) for v in votes) > self.threshold * len(votes) for name in LABELS}
        won["rejected"] = won["rejected"] and won["surfaced"]
        # The evidence and the finer labels are those of a voter who agrees with the outcome, most of all on `rejected`.
        nearest = max(
            votes,
            key=lambda v: [v.rejected == won["rejected"], v.surfaced == won["surfaced"], v.hollow == won["hollow"]],
        )
        return replace(nearest, **won)
