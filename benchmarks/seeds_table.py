"""Before/after table of several runs, as Markdown, with paired differences: what docs/results.md shows.

    python benchmarks/seeds_table.py runs/quickstart-0 runs/quickstart-1 runs/quickstart-2

A run without an `audit/before` of its own (`audit.before=false`) is compared with the first run's: the organism and the
sampling seed are the same, so that audit would be the same.
"""

import sys
from pathlib import Path

from unfeign.split_persona.audit import read_findings
from unfeign.split_persona.comparison import METRICS
from unfeign.split_persona.metrics import difference, metrics
from unfeign.split_persona.plots import pick


def cell(value: dict, sign: str = "") -> str:
    if value["mean"] is None:
        return "-"
    return f"{100 * value['mean']:{sign}.0f} [{100 * value['low']:{sign}.0f}, {100 * value['high']:{sign}.0f}]"


def main(folders: list[Path]) -> None:
    own = [f for f in folders if (f / "audit" / "before" / "findings.jsonl").exists()]
    start = read_findings(own[0] / "audit" / "before")
    befores = [read_findings(f / "audit" / "before") if f in own else start for f in folders]
    afters = [read_findings(f / "audit" / "after") for f in folders]
    print("| percent [95%] | before |" + "".join(f" {f.name} | change |" for f in folders))
    print("|---|---|" + "---|---|" * len(folders))
    first, found = metrics(befores[0]), [metrics(rows) for rows in afters]
    for part, name in METRICS:
        label = name.replace("_", " ") if part == "all" else f"{part} {name.replace('_', ' ')}"
        line = f"| {label} | {cell(pick(first, part, name))} |"
        for before, after, values in zip(befores, afters, found, strict=True):
            change = difference(before, after, part, name)
            line += f" {cell(pick(values, part, name))} | {cell(change, '+')} |"
        print(line)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
