"""Reading sentences: the mean of two readers, one that knows the words it has seen (`word_reader`) and one that knows
what words are like (`window_reader`). Where one is fooled, the other often is not. The second has as much of a say as
it knows of a sentence's words: in a language that it can't read, none.

Both are learned from `corpus/`: reasonings that people and language models wrote, or that trained policies left behind,
labelled sentence by sentence, in many voices, by readers who saw no reward code. `python -m
unfeign.rewards.role_training` learns them anew. Reading is deterministic and needs no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np

from . import window_reader, word_reader
from .roles import ROLES, Reading
from .window_reader import Windows

WEIGHTS = Path(str(files("unfeign.rewards"))) / "roles.npz"
LEAST, MOST = -4.0, 8.0  # of one reader's log-odds in the mean: it may be sure, but not drown the other
RARE = ROLES.index("C")  # told by the word reader alone: the other finds a quarter as much of it


@dataclass(frozen=True)
class Learned:
    """What both readers learned."""

    words: np.ndarray
    """(`word_reader.BUCKETS`, roles and passages)"""
    windows: Windows


@cache
def learned() -> Learned:
    """As shipped."""
    with np.load(WEIGHTS) as stored:
        words = stored["weights"].astype(np.float32) * stored["unit"]
        arrays = {name[8:]: stored[name].astype(np.float32) for name in stored.files if name.startswith("windows.")}
        names = tuple(stored["names"].tobytes().decode().split("\n"))
    arrays["vectors"] *= arrays.pop("unit")
    return Learned(words, Windows(names, arrays))


def to_arrays(what: Learned) -> dict[str, np.ndarray]:
    """What `learned` reads: tables in bytes, each column of the vectors by its own unit."""
    unit, vectors = np.abs(what.words).max() / 127, what.windows.arrays["vectors"]
    column = np.abs(vectors).max(0) / 127
    return {
        "weights": np.round(what.words / unit).astype(np.int8),
        "unit": np.float32(unit),
        "names": np.frombuffer("\n".join(what.windows.names).encode(), np.uint8),
        **{f"windows.{name}": array.astype(np.float16) for name, array in what.windows.arrays.items()},
        "windows.vectors": np.round(vectors / column).astype(np.int8),
        "windows.unit": column.astype(np.float32),
    }


def read_all(texts: Sequence[Sequence[str]], by: Learned | None = None) -> list[Reading]:
    """Read several texts of at least one sentence each, by the shipped weights or others. What stands in one changes
    nothing in another; together they take less time.
    """
    if not texts:
        return []
    by = learned() if by is None else by
    flat = [sentence for text in texts for sentence in text]
    one, other = word_reader.read(flat, by.words), window_reader.read(flat, by.windows)
    say = np.array([by.windows.known(sentence) for sentence in flat])[:, None] / 2
    roles, alone = _mean(one.roles, other.roles, say), _mean(one.alone, other.alone, say)
    roles[:, RARE] = one.roles[:, RARE]
    beside = _mean(one.beside, other.beside, np.minimum(say[:-1], say[1:]))
    ends = np.cumsum([len(text) for text in texts]).tolist()
    spans = zip([0, *ends], ends, strict=False)
    return [Reading(roles[a:b], alone[a:b], beside[a : b - 1]).clipped() for a, b in spans]


def _mean(one: np.ndarray, other: np.ndarray, say: np.ndarray) -> np.ndarray:
    return (1 - say) * np.clip(one, LEAST, MOST) + say * np.clip(other, LEAST, MOST)


def read(sentences: Sequence[str], by: Learned | None = None) -> Reading:
    """Read one text of at least one sentence."""
    return read_all([sentences], by)[0]
