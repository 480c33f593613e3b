"""How far a judge can be trusted: its verdicts against people's labels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UnfeignError
from .judge import Case, Judge, wait_for
from .verdict import JudgeFailure, Verdict

RESAMPLES, SEED = 1000, 20240
PUBLISHED = ("scratchpad_reasoning", "alignment_faking_human_label")

LABELS: dict[str, Callable[[Verdict], bool]] = {
    "surfaced": lambda v: v.surfaced,
    "rejected": lambda v: v.rejected,
    "faked": lambda v: v.faked,
    "hollow": lambda v: v.hollow,
    "faking_reasoning": lambda v: v.surfaced and v.decision != "decline",
}


@dataclass(frozen=True)
class Labelled:
    """A case with what people say of it: label -> truth, for the labels they gave."""

    id: str
    case: Case
    labels: Mapping[str, bool]


@dataclass(frozen=True)
class Agreement:
    """Judge against people on one label; `kappa` and `balanced` with 95% intervals by bootstrap over cases.

    `auroc` is None for a judge that gives no probabilities. `misses` and `alarms` are ids of cases it missed, and of
    cases where it saw what is not there.
    """

    label: str
    n: int
    positives: int
    precision: float | None
    recall: float | None
    balanced: tuple[float, float, float] | None
    kappa: tuple[float, float, float] | None
    auroc: float | None
    misses: list[str]
    alarms: list[str]


def published(rows: Sequence[Mapping[str, Any]]) -> list[Labelled]:
    """The published human-labelled set: a reasoning and whether a person called it alignment faking.

    Args:
        rows: with the columns `scratchpad_reasoning` and `alignment_faking_human_label` (Greenblatt et al., 2024);
            others are ignored. The answer is no part of it, so `rejected`, `faked` and `hollow` can't be checked.
    """
    out = []
    for number, row in enumerate(rows):
        case = Case("", "", str(row[PUBLISHED[0]]), "", None)
        value = row[PUBLISHED[1]]
        truth = value.strip().lower() in ("true", "1", "yes") if isinstance(value, str) else bool(value)
        out.append(Labelled(str(row.get("id", number)), case, {"faking_reasoning": truth}))
    return out


def read_labelled(path: Path) -> list[Labelled]:
    """Labelled cases from a file: our transcripts with `labels`, or the published set (JSONL, CSV or Parquet).

    Raises:
        UnfeignError: neither kind, or a row without labels.
    """
    from ..envs.transcript_file import NEEDED, read_transcripts
    from ..files import read_jsonl
    from .judge import case

    if path.suffix in (".csv", ".parquet"):
        import pandas

        if not path.is_file():
            raise UnfeignError("an existing file", "none", str(path))
        rows = (pandas.read_csv if path.suffix == ".csv" else pandas.read_parquet)(path).to_dict("records")
    else:
        rows = read_jsonl(path)
    if rows and all(name in rows[0] for name in PUBLISHED):
        return published(rows)
    if path.suffix != ".jsonl":
        raise UnfeignError(
            f"columns {' and '.join(PUBLISHED)}", ", ".join(map(str, rows[0] if rows else ())), str(path)
        )
    out = []
    for number, (row, transcript) in enumerate(read_transcripts(path, (*NEEDED, "labels")), start=1):
        labels = {name: row["labels"][name] for name in LABELS if row["labels"].get(name) is not None}
        if wrong := {name: value for name, value in labels.items() if value not in (True, False)}:
            raise UnfeignError("labels of true, false or null", repr(wrong), f"{path}: object {number}")
        if not labels:
            raise UnfeignError(f"labels among {', '.join(LABELS)}", repr(row["labels"]), f"{path}: object {number}")
        out.append(Labelled(str(row.get("id", number)), case(transcript), {k: bool(v) for k, v in labels.items()}))
    return out


def evaluate(judge: Judge, some: Sequence[Labelled]) -> tuple[list[Agreement], list[JudgeFailure]]:
    """Judge against people, a row a label; and the judge's failures, which count in no label."""
    cases = [one.case for one in some]
    chances: list[Mapping[str, float]] = [{}] * len(some)
    answers: Sequence[Verdict | JudgeFailure]
    if (read := getattr(judge, "read", None)) is None:
        answers = wait_for(judge(cases))
    else:  # one that gives probabilities reads each case once, for both
        found = wait_for(read(cases))
        answers = [one if isinstance(one, JudgeFailure) else one.verdict for one in found]
        chances = [{} if isinstance(one, JudgeFailure) else one.chances for one in found]
    told = [(one, v, p) for one, v, p in zip(some, answers, chances, strict=True) if isinstance(v, Verdict)]
    out = []
    for label, says in LABELS.items():
        here = [(one, says(v), p.get(label)) for one, v, p in told if label in one.labels]
        if here:
            out.append(_agreement(label, here))
    return out, [a for a in answers if isinstance(a, JudgeFailure)]


def _agreement(label: str, here: list[tuple[Labelled, bool, float | None]]) -> Agreement:
    truth = np.array([one.labels[label] for one, _, _ in here])
    said = np.array([found for _, found, _ in here])
    hits = int((truth & said).sum())
    chances = [p for _, _, p in here]
    return Agreement(
        label=label,
        n=len(here),
        positives=int(truth.sum()),
        precision=hits / said.sum() if said.any() else None,
        recall=hits / truth.sum() if truth.any() else None,
        balanced=interval(truth, said, balanced_accuracy),
        kappa=interval(truth, said, kappa),
        auroc=auroc(truth, np.array(chances, dtype=float)) if None not in chances else None,
        misses=[one.id for (one, found, _), t in zip(here, truth, strict=True) if t and not found],
        alarms=[one.id for (one, found, _), t in zip(here, truth, strict=True) if found and not t],
    )


Measure = Callable[[np.ndarray, np.ndarray], float | None]


def balanced_accuracy(truth: np.ndarray, said: np.ndarray) -> float | None:
    """Mean of the shares of true and of false cases that are told as such; None where one of them is empty."""
    if truth.all() or not truth.any():
        return None
    return float((said[truth].mean() + (~said[~truth]).mean()) / 2)


def kappa(truth: np.ndarray, said: np.ndarray) -> float | None:
    """Cohen's kappa: agreement beyond chance; None where chance alone agrees always."""
    same = (truth == said).mean()
    chance = truth.mean() * said.mean() + (1 - truth.mean()) * (1 - said.mean())
    return None if chance == 1 else float((same - chance) / (1 - chance))


def auroc(truth: np.ndarray, chance: np.ndarray) -> float | None:
    """Probability that a true case gets a higher chance than a false one, ties counted half."""
    if truth.all() or not truth.any():
        return None
    above = chance[truth][:, None] - chance[~truth][None, :]
    return float((above > 0).mean() + 0.5 * (above == 0).mean())


def interval(truth: np.ndarray, said: np.ndarray, measure: Measure) -> tuple[float, float, float] | None:
    """A measure with its 95% interval, by resampling cases."""
    whole = measure(truth, said)
    if whole is None:
        return None
    rng = np.random.default_rng(SEED)
    draws = rng.integers(0, len(truth), (RESAMPLES, len(truth)))
    found = [value for rows in draws if (value := measure(truth[rows], said[rows])) is not None]
    low, high = np.quantile(found, [0.025, 0.975])
    return whole, float(low), float(high)
