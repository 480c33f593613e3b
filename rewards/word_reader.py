"""The first of two readers: a linear one, over words, neighbouring words and parts of words. It knows what it has seen,
misspelt words and all; what a word means it does not know.
"""

import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from .roles import ROLES, Reading

BUCKETS = 1 << 18

_WORD = re.compile(r"\w+|[?!:]")
_TURN = re.compile(
    r",?\s+(?=(?:but|yet|however|though|although|still,)\b)|,\s+(?=(?:so|and so|no|then)\b)", re.IGNORECASE
)
_APOSTROPHES = str.maketrans("\u2018\u2019", "''")
_SHORT = {"n't": " not", "'ll": " will", "'d": " would", "'ve": " have", "'re": " are", "'m": " am"}
_ENDINGS = ("ings", "ing", "edly", "ed", "es", "s", "ly", "er", "est")


def spelt_out(sentence: str) -> str:
    """A sentence in lower case, what is contracted in it written out."""
    text = sentence.lower().translate(_APOSTROPHES)
    if "'" in text:
        for short, long in _SHORT.items():
            text = text.replace(short, long)
    return text


def _hash(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "replace")) % BUCKETS


@lru_cache(maxsize=50_000)
def _word(word: str) -> tuple[str, tuple[int, ...]]:
    """A word's stem, and the features of the word by itself: the stem and its runs of four letters."""
    ending = next((e for e in _ENDINGS if word.endswith(e) and len(word) - len(e) >= 3), "")
    stem = word.removesuffix(ending)
    edged = f"<{word}>"
    return stem, (_hash(f"w {stem}"), *(_hash(f"c {edged[i : i + 4]}") for i in range(max(0, len(edged) - 3))))


def features(sentence: str) -> list[int]:
    """Numbers of the features a sentence has: words, neighbouring words, words one apart, parts of words, length."""
    words = [_word(word) for word in _WORD.findall(spelt_out(sentence))]
    stems = ["^", *(stem for stem, _ in words), "$"]
    length = next((i for i, most in enumerate((2, 5, 11, 19)) if len(words) <= most), 4)
    found = {_hash(f"n {length}"), _hash("always")}
    found.update(number for _, own in words for number in own)
    found.update(_hash(f"2 {a} {b}") for a, b in pairwise(stems))
    found.update(_hash(f"s {a} {b}") for a, b in zip(stems[1:-1], stems[3:-1], strict=False))
    return sorted(found)


def scale(count: Any) -> Any:
    """What a sum of `count` weights (a number, or an array of them) is multiplied by, so that long sentences are not
    surer than short ones.
    """
    return 4.0 / count**0.5


def read(sentences: Sequence[str], table: np.ndarray) -> Reading:
    """Read at least one sentence by a (BUCKETS, roles and passages) table of weights. A sentence has the roles of the
    clauses that are surest of them.
    """
    parts: list[list[int]] = []
    wholes = []
    for sentence in sentences:
        wholes.append(len(parts))
        parts.append(features(sentence))
        clauses = _TURN.split(sentence)
        if len(clauses) > 1:
            parts += [features(clause) for clause in clauses if clause.strip()]
    counts = np.array([len(numbers) for numbers in parts])
    sums = np.add.reduceat(table[np.concatenate(parts)], np.cumsum(counts) - counts)
    roles = np.maximum.reduceat(sums[:, : len(ROLES)] * scale(counts)[:, None], wholes)
    whole, count = sums[wholes, len(ROLES) :], counts[wholes]
    beside = (whole[:-1] + whole[1:]) * scale(count[:-1] + count[1:])[:, None]
    return Reading(roles, whole * scale(count)[:, None], beside)
