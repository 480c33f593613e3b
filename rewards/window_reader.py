"""The second of two readers: a small convolutional network over word vectors, in the way of Kim (2014). It reads a few
words in their order, and knows words that it never met in the corpus by those they are like.

The vectors begin as the bundled model's own, so that likeness comes from what that has read. The network runs in numpy:
reading needs no torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .roles import ROLES, Reading
from .word_reader import spelt_out

NOTHING, UNKNOWN = 0, 1  # rows of the vectors: beside a sentence, and any word that has none
FIRST = (-2, -1, 0, 1, 2)  # what the first layer sees of a word's neighbours
NEXT = ((-1, 0, 1), (-2, 0, 2))  # and the layers after it
EDGE = 2  # rows of nothing between sentences, so that no window reaches over
MEAN = 3.0  # what sums over a sentence are divided by, beside the root of its length

_WORD = re.compile(r'\w+|[?!:,"]')


def words(sentence: str) -> list[str]:
    """The words and marks of a sentence that are read."""
    return _WORD.findall(spelt_out(sentence))


@dataclass(frozen=True)
class Windows:
    """What the network learned."""

    names: tuple[str, ...]
    """The words that have vectors, from row 2 on."""
    arrays: Mapping[str, np.ndarray]
    """`vectors` (words + 2, d); weights (inputs, outputs) and biases of the layers `first`, `next0`, `next1`, of the
    hidden and the last one for a sentence (`sentence`, `does`), and for two (`pair`, `passes`).
    """

    @cached_property
    def rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names, UNKNOWN + 1)}

    def numbers(self, sentence: str) -> list[int]:
        """The rows of a sentence's words; of one without words, that of an unknown one."""
        return [self.rows.get(word, UNKNOWN) for word in words(sentence)] or [UNKNOWN]

    def known(self, sentence: str) -> float:
        """The share of a sentence's words that it knows."""
        numbers = self.numbers(sentence)
        return 1 - numbers.count(UNKNOWN) / len(numbers)

    def layer(self, name: str, inputs: np.ndarray) -> np.ndarray:
        return inputs @ self.arrays[f"{name}.weight"] + self.arrays[f"{name}.bias"]


def _windows(states: np.ndarray, offsets: Sequence[int]) -> np.ndarray:
    """(n - 2 * EDGE, len(offsets) * d): each row but those at the edges, with rows around it."""
    return np.concatenate([states[EDGE + at : len(states) - EDGE + at] for at in offsets], axis=1)


def read(sentences: Sequence[str], net: Windows) -> Reading:
    """Read at least one sentence."""
    flat = [NOTHING] * EDGE
    starts, sizes = [], []
    for sentence in sentences:
        numbers = net.numbers(sentence)
        starts.append(len(flat))
        sizes.append(len(numbers))
        flat += numbers + [NOTHING] * EDGE
    rows = np.array(flat)
    inner, real = slice(EDGE, -EDGE), (rows != NOTHING)[EDGE:-EDGE, None]
    vectors = net.arrays["vectors"][rows]
    states = np.zeros((len(rows), net.arrays["first.bias"].size), dtype=vectors.dtype)
    states[inner] = np.maximum(net.layer("first", _windows(vectors, FIRST)), 0) * real
    for i, offsets in enumerate(NEXT):
        states[inner] += np.maximum(net.layer(f"next{i}", _windows(states, offsets)), 0) * real
    mean = np.add.reduceat(states, starts) / (MEAN * np.sqrt(sizes, dtype=np.float32))[:, None]
    pooled = np.concatenate([np.maximum.reduceat(states, starts), mean], axis=1)  # states are never below zero
    does = net.layer("does", np.maximum(net.layer("sentence", pooled), 0))
    pairs = np.concatenate([pooled[:-1], pooled[1:]], axis=1)
    passes = net.layer("passes", np.maximum(net.layer("pair", pairs), 0))
    return Reading(does[:, : len(ROLES)], does[:, len(ROLES) :], passes)
