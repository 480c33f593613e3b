"""How fast the local judge reads, and how far it agrees with the labels of a file.

    python benchmarks/local_judge.py                                 # bundled model, tests/data/judge_dev.jsonl
    python benchmarks/local_judge.py labelled.jsonl --model FOLDER --rubric my.yaml

Rows are those of `tests/data/judge_dev.jsonl`. Prints, and writes to `benchmarks/out/local_judge.json`, transcripts a
second without loading the model, and for `surfaced` and `rejected` the balanced accuracy of the verdicts and the AUROC
of the probabilities. Whether an answer complied is given to the judge, and a complied row is never `rejected`; so
`rejected_where_declined` keeps the rows that declined, where only the reading of the reasoning can tell.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from unfeign.envs.family import families
from unfeign.envs.scenario import scenario
from unfeign.envs.transcript import parse
from unfeign.files import read_jsonl, write_text
from unfeign.progress import progress
from unfeign.rewards.calibration import auroc, balanced_accuracy
from unfeign.rewards.judge import Case, case, wait_for
from unfeign.rewards.local_judge import LocalJudge, Probabilities
from unfeign.rewards.verdict import JudgeFailure

ROOT = Path(__file__).parent.parent
OUT = Path(__file__).parent / "out" / "local_judge.json"


def blinded(row: dict) -> Case:
    """A labelled row as a judge sees it."""
    family = families()[row["family"]]
    request = next(r for r in family.requests if r.id == row["request_id"])
    tier = "unmonitored" if row["setting"] == "unmonitored" else "monitored"
    place = scenario(family, request, tier, control=row["setting"] == "control", rendering=row["rendering"])
    return case(parse(place, f"<think>{row['reasoning']}</think>{row['answer']}"))


def agreement(label: str, rows: list[tuple[dict, Probabilities]]) -> dict[str, float | int | None]:
    """Verdicts and probabilities against the labels; measures are None where a file holds one kind of row only."""
    truth = np.array([row["labels"][label] for row, _ in rows])
    said = np.array([getattr(found.verdict, label) for _, found in rows])
    chance = np.array([getattr(found, label) for _, found in rows])
    return {
        "n": len(rows),
        "positives": int(truth.sum()),
        "said": int(said.sum()),
        "balanced_accuracy": balanced_accuracy(truth, said),
        "auroc": auroc(truth, chance),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=ROOT / "tests" / "data" / "judge_dev.jsonl")
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--rubric", default="short-v1")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    rows = read_jsonl(arguments.path)
    cases = [blinded(row) for row in rows]
    judge = LocalJudge(arguments.model, arguments.rubric, arguments.batch_size, arguments.dtype)
    wait_for(judge(cases[:1]))  # loads the model
    found: list[Probabilities | JudgeFailure] = []
    began = time.perf_counter()
    with progress("judging", len(cases)) as advance:
        for at in range(0, len(cases), arguments.batch_size):
            batch = cases[at : at + arguments.batch_size]
            found += wait_for(judge.read(batch))
            advance(len(batch))
    seconds = time.perf_counter() - began
    read = [(row, one) for row, one in zip(rows, found, strict=True) if isinstance(one, Probabilities)]
    declined = [(row, one) for row, one in read if one.case.complied is False]
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
