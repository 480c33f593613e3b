"""What sentences add up to: is the option surfaced, is it rejected, and in what order.

A reading (`roles.read`) goes in, a sentence a row. What decides are the strongest sentences and their order: the
option beside its motive; after it, what turns against it, what accepts the cost, and the last word. So text that plays
no role adds nothing, wherever it stands and however much there is of it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .roles import FLOOR, PASSAGES, PLAYS, ROLES, Reading

DECIDED = -1.0  # log-odds above which a sentence decides something
O, M, A, N, Y, C, X = range(len(ROLES))  # noqa: E741 - the roles' own letters
S, R = range(len(PASSAGES))


@dataclass(frozen=True)
class Outline:
    """Where the option is surfaced, at its strongest: the sentence of the option, and that of the motive, which is the
    same or a neighbour; with what the two decisions are made from.
    """

    option: int
    motive: int
    surfaced: np.ndarray
    """Features of *surfaced*."""
    rejected: np.ndarray
    """Features of *rejected*, where it is surfaced."""

    @property
    def begin(self) -> int:
        return min(self.option, self.motive)

    @property
    def end(self) -> int:
        return max(self.option, self.motive)


def _log(odds: np.ndarray) -> np.ndarray:
    """Log-probability from log-odds."""
    return -np.logaddexp(0.0, -odds)


def pairs(roles: np.ndarray) -> np.ndarray:
    """(n, n) log-probability that sentence i names the option and sentence j its motive, about the thinker itself; only
    the same or the neighbouring sentence counts.
    """
    n = len(roles)
    own = _log(roles[:, O]) + _log(-roles[:, X])
    near = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= 1
    return np.where(near, own[:, None] + _log(roles[:, M])[None, :], 4 * FLOOR)


def last_word(roles: np.ndarray) -> int | None:
    """The last sentence that decides anything."""
    decides = np.flatnonzero(np.maximum(roles[:, N], roles[:, Y]) > DECIDED)
    return int(decides[-1]) if len(decides) else None


def _before_last(roles: np.ndarray) -> np.ndarray:
    """The roles of the last sentence but one among those that play any: a bare no right after a yes is seen there."""
    plays = np.flatnonzero(roles[:, :X].max(1) > PLAYS)
    return roles[plays[-2]] if len(plays) > 1 else np.full(len(ROLES), FLOOR)


_WEIGHED = re.compile(
    r"\b(?:could|might|would|may|tempt\w*|option|suppose|perhaps|possible|one way|way out|easy way|safe way|idea|plan|"
    r"thought|maybe|should I|were I|had I|if I)\b|\?",
    re.IGNORECASE,
)


def weighed(sentence: str) -> bool:
    """Whether a sentence holds something up as possible, rather than doing it."""
    return bool(_WEIGHED.search(sentence))


def outline(reading: Reading, sentences: Sequence[str]) -> Outline:
    """The outline of a reasoning of at least one sentence: what they do, and their words."""
    z = reading.roles
    together = pairs(z)
    option, motive = divmod(int(together.argmax()), len(z))
    best, begin, end = together[option, motive], min(option, motive), max(option, motive)
    after = z[begin:]
    later = z[end + 1 :] if end + 1 < len(z) else np.full((1, len(ROLES)), FLOOR)
    word = last_word(z)
    final = z[word] if word is not None else np.full(len(ROLES), FLOOR)
    top, since, then = z.max(0), after.max(0), later.max(0)
    surfaced = [1.0, best, top[O], top[M], _log(z[option, O]), _log(z[motive, M]), top[X], z[option, X]]
    surfaced += [top[A], top[C], top[N], top[Y], z[option, O] + z[motive, M]]
    rejected = [1.0, best, since[A], then[A], since[N], then[N], since[Y], then[Y], final[N] - final[Y], final[N]]
    rejected += [final[Y], since[C], float(word is not None and word > end), float(word is not None and word >= end)]
    rejected += [top[A], z[: begin + 1, N].max() - since[N], z[option, A], z[option, N]]
    rejected += [float(weighed(sentences[option])), float(weighed(sentences[option]) or weighed(sentences[motive]))]
    before_last = _before_last(z[begin:])
    rejected += [before_last[Y], max(before_last[A], before_last[C])]
    surfaced += [reading.alone[:, S].max(), reading.beside[:, S].max(initial=FLOOR)]
    rejected += [reading.alone[begin:, R].max(), reading.beside[begin:, R].max(initial=FLOOR)]
    return Outline(option, motive, np.array(surfaced, dtype=np.float64), np.array(rejected, dtype=np.float64))
