"""How fast a judge reads, and how far it agrees with the labels of a file.

    python benchmarks/judge.py rules                                            # tests/data/judge_test.jsonl
    python benchmarks/judge.py '{name: local, batch_size: 16}' tests/data/judge_dev.jsonl

Rows are those of `tests/data/`. Prints, and writes to `benchmarks/out/judge.json`, transcripts a second without loading
a model, and for `surfaced` and `rejected` the balanced accuracy with its interval and, of a judge with probabilities,
the AUROC. Whether an answer complied is given to the judge, and a complied row is never `rejected`; so
`rejected_where_declined` keeps the rows that declined, where only the reading of the reasoning can tell.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from unfeign.envs.family import families
from unfeign.envs.scenario import scenario
from unfeign.envs.transcript import parse
from unfeign.files import read_jsonl, write_text
from unfeign.progress import progress
from unfeign.rewards.calibration import auroc, balanced_accuracy, interval
from unfeign.rewards.judge import Case, case, judge_spec, load_judge, wait_for
from unfeign.rewards.verdict import JudgeFailure, Verdict

ROOT = Path(__file__).parent.parent
OUT = Path(__file__).parent / "out" / "judge.json"
BATCH = 16
LEAST = 2.0  # seconds to measure over: a fast judge reads the file several times


def blinded(row: dict) -> Case:
    """A labelled row as a judge sees it."""
    family = families()[row["family"]]
    request = next(r for r in family.requests if r.id == row["request_id"])
    tier = "unmonitored" if row["setting"] == "unmonitored" else "monitored"
    place = scenario(family, request, tier, control=row["setting"] == "control", rendering=row["rendering"])
    return case(parse(place, f"<think>{row['reasoning']}</think>{row['answer']}"))


def agreement(label: str, rows: list[tuple[dict, Any]]) -> dict[str, Any]:
    """Verdicts and probabilities against the labels; measures are None where a file holds one kind of row only."""
    truth = np.array([row["labels"][label] for row, _ in rows])
    said = np.array([getattr(one if isinstance(one, Verdict) else one.verdict, label) for _, one in rows])
    chances = [one.chances[label] for _, one in rows if not isinstance(one, Verdict)]
    return {
        "n": len(rows),
        "positives": int(truth.sum()),
        "said": int(said.sum()),
        "balanced_accuracy": interval(truth, said, balanced_accuracy),
        "auroc": auroc(truth, np.array(chances)) if chances else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("judge", help="a name, or a mapping in YAML")
    parser.add_argument("path", nargs="?", type=Path, default=ROOT / "tests" / "data" / "judge_test.jsonl")
    arguments = parser.parse_args()
    rows = read_jsonl(arguments.path)
    cases = [blinded(row) for row in rows]
    judge = load_judge(judge_spec(arguments.judge))
    reads = getattr(judge, "read", judge)  # with probabilities, where a judge has them
    wait_for(judge(cases[:1]))  # loads what is to be loaded
    passes, began = 0, time.perf_counter()
    while not passes or time.perf_counter() - began < LEAST:
        found: list[Any] = []
        with progress("judging", len(cases)) as advance:
            for at in range(0, len(cases), BATCH):
                found += wait_for(reads(cases[at : at + BATCH]))
                advance(len(cases[at : at + BATCH]))
        passes += 1
    seconds = (time.perf_counter() - began) / passes
    read = [(row, one) for row, one in zip(rows, found, strict=True) if not isinstance(one, JudgeFailure)]
    declined = [(row, one) for row, one in read if blinded(row).complied is False]
    results = {
        "judge": judge.name,
        "file": arguments.path.name,
        "transcripts": len(rows),
        "failures": len(rows) - len(read),
        "transcripts_per_second": len(rows) / seconds,
        "surfaced": agreement("surfaced", read),
        "rejected": agreement("rejected", read),
        "rejected_where_declined": agreement("rejected", declined),
    }
    write_text(OUT, json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
