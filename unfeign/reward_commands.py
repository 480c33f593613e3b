"""The commands `reward` and `judge`: what a reward pays for, what it gives to transcripts, how far a judge is right."""

import inspect
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from .errors import UnfeignError

Positional = tyro.conf.Positional
Spec = Annotated[Positional[str], tyro.conf.arg(metavar="SPEC")]


def _reward(spec: str, judge: str | None) -> Any:
    from .rewards.judge import judge_spec
    from .rewards.plugin import BUILT_IN, RewardSpec, load_reward

    reads = spec in BUILT_IN and "judge" in inspect.signature(BUILT_IN[spec]).parameters
    kwargs = {"judge": judge_spec(judge or "rules")} if reads or judge is not None else {}
    return load_reward(RewardSpec(fn=spec, kwargs=kwargs), Path(), "SPEC")


def check(spec: Spec, judge: str | None = None, out: Path | None = None) -> None:
    """Attack a reward with the bench: does it pay for tricks, and for the real thing? Exits with 1 when a class fails.

    Args:
        spec: verbalized_rejection, another built-in, package.module:name, or file.py:name.
        judge: who reads the reasoning, for rewards that take a judge: a name, or a mapping in YAML.
        out: a JSON file to write everything to.
    """
    from rich.console import Console
    from rich.table import Table

    from .files import write_text
    from .rewards import bench

    reward = _reward(spec, judge)
    if getattr(reward.fn, "needs_pairs", False):
        raise UnfeignError(
            "a reward that can be asked about one completion", f"{reward.name}, which compares tiers", "SPEC"
        )
    outcomes = bench.check(reward)
    rows = bench.table(outcomes)
    if out is not None:
        write_text(out, bench.dump(reward, outcomes))
    shown = Table(title=f"{reward.name}: cases it gets right")
    for column in ("class", "n", "passed", "dev", "unseen", "bar", "worst case", "by"):
        shown.add_column(column, justify="left" if column in ("class", "worst case") else "right")
    for row in rows:
        halves = ["-" if share is None else f"{share:.0%}" for share in row.halves.values()]
        worst = (row.worst, f"{row.excess:+.2f}") if row.passed < 1 else ("", "")
        style = None if row.met else "red"
        shown.add_row(row.kind, str(row.n), f"{row.passed:.0%}", *halves, f"{row.bar:.0%}", *worst, style=style)
    Console().print(shown)
    flips = bench.injection_flips(outcomes)
    print(f"injection flips: {len(flips)}" + (f" ({', '.join(flips)})" if flips else ""))
    for line in bench.label_lines(outcomes):
        print(line)
    if failed := [row.kind for row in rows if not row.met]:
        print(f"below the bar: {', '.join(failed)}")
        sys.exit(1)


def score(spec: Spec, transcripts: Positional[Path], judge: str | None = None) -> None:
    """Score transcripts: one JSON line each on standard output, and nothing else there.

    Args:
        spec: verbalized_rejection, another built-in, package.module:name, or file.py:name.
        transcripts: a transcripts.jsonl.
        judge: who reads the reasoning, for rewards that take a judge.
    """
    from .envs.transcript_file import NEEDED, read_transcripts
    from .rewards.judge import wait_for
    from .rewards.terms import Score

    rows = read_transcripts(transcripts, ("id", *NEEDED))
    reward = _reward(spec, judge)
    if hasattr(reward.fn, "score"):
        found = wait_for(reward.fn.score([transcript for _, transcript in rows]))
    else:
        from .rewards.bench import values

        found = values(reward, [(t.scenario, t.completion) for _, t in rows])
    for (row, _), one in zip(rows, found, strict=True):
        line: dict[str, Any] = {"id": row["id"], "verdict": None, "terms": None, "reward": one}
        if isinstance(one, Score):
            line["verdict"] = one.verdict and one.verdict.row()
            line["terms"] = {t.name: {"raw": t.raw, "weight": t.weight, "value": t.value} for t in one.terms}
            line["reward"] = one.reward
        elif hasattr(one, "kind"):
            line |= {"reward": None, "failure": {"kind": one.kind, "message": one.message}}
        print(json.dumps(line, ensure_ascii=False))


def evaluate(
    judge: Annotated[Positional[str], tyro.conf.arg(metavar="JUDGE")], labels: Positional[Path], show: int = 10
) -> None:
    """Compare a judge with people's labels: precision, recall, balanced accuracy, AUROC, kappa, the confusing cases.

    Args:
        judge: a name, or a mapping in YAML.
        labels: transcripts with labels (JSONL), or the published human-labelled set (JSONL, CSV or Parquet).
        show: how many confusing cases of each kind to name.
    """
    from rich.console import Console
    from rich.table import Table

    from .rewards.calibration import evaluate as compare
    from .rewards.calibration import read_labelled
    from .rewards.judge import judge_spec, load_judge

    reader = load_judge(judge_spec(judge))
    some = read_labelled(labels)
    if not some:
        raise UnfeignError("at least one labelled case", "none", str(labels))
    found, failures = compare(reader, some)

    def number(value: float | tuple[float, float, float] | None) -> str:
        if value is None:
            return "-"
        return f"{value:.2f}" if isinstance(value, float) else f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"

    table = Table(title=f"{reader.name} against {labels.name}, {len(some)} cases")
    for column in ("label", "n", "true", "precision", "recall", "balanced accuracy", "AUROC", "kappa"):
        table.add_column(column, justify="left" if column == "label" else "right")
    for one in found:
        numbers = map(number, (one.precision, one.recall, one.balanced, one.auroc, one.kappa))
        table.add_row(one.label.replace("_", " "), str(one.n), str(one.positives), *numbers)
    Console().print(table)
    for one in found:
        for what, ids in (("missed", one.misses), ("seen where it is not", one.alarms)):
            if ids:
                more = f" and {len(ids) - show} more" if len(ids) > show else ""
                print(f"{one.label.replace('_', ' ')}, {what}: {', '.join(ids[:show])}{more}")
    if failures:
        kinds = sorted({f.kind for f in failures})
        print(f"failed on {len(failures)}: {', '.join(kinds)}; they count in no label")
