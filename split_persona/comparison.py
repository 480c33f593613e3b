"""Several audits on one page: runs, seeds and comparators side by side, or the checkpoints of one run as a trend.

Every number has its interval. Where the audits asked the same of a common start, the change of each is paired with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..errors import UnfeignError
from ..files import read_json, write_text
from .audit import read_findings
from .metrics import Row, difference, metrics
from .plots import percent, pick, plain, svg, trend

METRICS: tuple[tuple[str, str], ...] = (
    ("monitored", "compliance"),
    ("unmonitored", "compliance"),
    ("all", "compliance_gap"),
    ("monitored", "surfaced"),
    ("monitored", "rejected"),
    ("monitored", "faked"),
    ("monitored", "silent_compliance"),
    ("monitored", "hollow"),
    ("monitored", "muddled"),
    ("monitored", "coherent"),
    ("control", "surfaced"),
    ("control", "on_task"),
    ("all", "malformed"),
)
"""What a comparison shows of an audit, as (part, name), in order of trust: what answers do comes first."""


@dataclass(frozen=True)
class Column:
    """One audit on the page: its findings, those of its start (or None), and remarks about it."""

    name: str
    rows: Sequence[Row]
    before: Sequence[Row] | None = None
    notes: tuple[str, ...] = ()
    persona: Mapping[str, Any] | None = None


def audited(folder: Path) -> Path:
    """The audit in a folder: its own, or that after training of a run.

    Raises:
        UnfeignError: there is none.
    """
    for place in (folder, folder / "audit" / "after"):
        if (place / "findings.jsonl").is_file():
            return place
    raise UnfeignError("a run with audit/after, or an audit", "no findings.jsonl", str(folder))


def column(folder: Path, name: str | None = None) -> Column:
    """A run, or an audit, as a column.

    Raises:
        UnfeignError: see `audited`.
    """
    place = audited(folder)
    before = folder / "audit" / "before"
    notes: list[str] = []
    if (folder / "run.json").is_file():
        facts = read_json(folder / "run.json")
        judges = facts.get("judges", {})
        if judges.get("audit") in judges.get("training", []):
            notes.append(f"!The judge that trained it ({judges['audit']}) also reads this audit.")
        if facts.get("comparator"):
            notes.append("!A comparator: its reward punishes the thought, or leaves out the shaping.")
    told = read_json(place / "metrics.json").get("audit", {}) if (place / "metrics.json").is_file() else {}
    return Column(
        name or folder.name,
        read_findings(place),
        read_findings(before) if (before / "findings.jsonl").is_file() else None,
        tuple(notes),
        told.get("persona"),
    )


def with_common_start(columns: Sequence[Column]) -> list[Column]:
    """Columns without a start of their own get the first one's that asked the same scenarios: seeds of one policy."""
    starts = [one.before for one in columns if one.before is not None]
    out = []
    for one in columns:
        asked = {row["scenario_id"] for row in one.rows}
        same = next((start for start in starts if {row["scenario_id"] for row in start} == asked), None)
        out.append(Column(one.name, one.rows, one.before or same, one.notes, one.persona))
    return out


def write_comparison(path: Path, title: str, columns: Sequence[Column], steps: Sequence[int] | None = None) -> None:
    """Write the page; with `steps`, a number a column, the plot is a trend over them.

    Raises:
        UnfeignError: fewer than two columns, or two with one name.
    """
    names = [one.name for one in columns]
    if len(columns) < 2 or len(set(names)) < len(names):
        raise UnfeignError("at least two audits with names of their own", ", ".join(names) or "none", "comparison")
    found = [metrics(one.rows) for one in columns]
    with plain():
        plot = svg(trend(found, names, steps), "main metrics with 95% intervals")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": percent}
    notes: dict[str, list[str]] = {}
    for one in columns:
        for note in one.notes:
            notes.setdefault(note, []).append(one.name)
    lines = [
        {
            "label": name.replace("_", " ") if part == "all" else f"{part} {name.replace('_', ' ')}",
            "cells": [
                {
                    "now": pick(values, part, name),
                    "change": difference(one.before, one.rows, part, name) if one.before is not None else None,
                }
                for one, values in zip(columns, found, strict=True)
            ],
        }
        for part, name in METRICS
    ]
    page = environment.get_template("comparison.html.j2").render(
        title=title,
        columns=columns,
        lines=lines,
        plot=plot,
        pairs=[len({row["pair_id"] for row in one.rows}) for one in columns],
        notes=[(", ".join(of), note.removeprefix("!").strip(), note.startswith("!")) for note, of in notes.items()],
        paired=any(one.before is not None for one in columns),
        reviewed=any(one.persona for one in columns),
    )
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
