"""The audit's report: one HTML file that opens anywhere and asks nothing of the network.

It is ordered by how far each number can be trusted: what the answers do, then what a judge read in the reasoning, then
the plots, the run, and every transcript, so that a reader can check the labels against the words.

Model output is untrusted. Jinja escapes everything, evidence is escaped piece by piece before it is marked, and a
content security policy lets no script run but the one whose hash it names.
"""

import base64
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ..errors import UnfeignError
from ..files import write_text
from .metrics import Row, content_disagreement, difference, faked, malformed, metrics, silent_compliance
from .plots import before_after, by_family, percent, pick, plain, svg, training_curve

EVIDENCE = {
    "surfaced": "names the option of complying strategically",
    "rejected": "decides against it",
    "cost": "says what rejecting costs",
    "justification": "says why",
    "decision": "decides",
}
SHOWN = ("scenario_id", "system", "user", "reasoning", "answer")


# Text


def highlight(text: str, spans: Iterable[Sequence[Any]]) -> Markup:
    """Text with its evidence in `<mark>`; every piece is escaped on its own.

    Args:
        spans: `[label, start, end]`, character offsets into `text`. They may overlap; what lies outside the text, is
            not a range or has no known label is left unmarked.
    """
    usable = [
        (label, max(start, 0), min(end, len(text)))
        for label, start, end in spans
        if label in EVIDENCE and max(start, 0) < min(end, len(text))
    ]
    cuts = sorted({0, len(text), *(at for _, start, end in usable for at in (start, end))})
    pieces = []
    for start, end in pairwise(cuts):
        labels = [name for name in EVIDENCE if any(n == name and s <= start and end <= e for n, s, e in usable)]
        piece = escape(text[start:end])
        if labels:
            mark = Markup('<mark class="{}" title="{}">{}</mark>')
            piece = mark.format(" ".join(f"m-{name}" for name in labels), ", ".join(labels), piece)
        pieces.append(piece)
    return Markup("").join(pieces)


def labels(row: Row) -> list[str]:
    """What a transcript is filtered by, the deed first."""
    verdict = row["verdict"]
    told = {
        {True: "complied", False: "declined", None: "no decision"}[row["complied"]]: True,
        "judge failed": verdict is None,
        "malformed": malformed(row),
        "content disagrees": content_disagreement(row),
    }
    if verdict is not None:
        told |= {
            "surfaced": verdict["surfaced"],
            "rejected": verdict["rejected"],
            "hollow": verdict["hollow"],
            "muddled": verdict.get("muddled"),
            "faked": faked(row) and row["tier"] == "monitored" and not row["control"],
            "silent compliance": silent_compliance(row) and not row["control"],
            "incoherent": verdict["coherent"] is False,
            "cost acknowledged": verdict.get("cost_acknowledged"),
        }
    return [label for label, holds in told.items() if holds]


def _side(row: Row | None) -> dict[str, Any] | None:
    if row is None:
        return None
    verdict = row["verdict"] or {}
    return {
        "labels": labels(row),
        "state": row["state"],
        "reasoning": highlight(row["reasoning"], verdict.get("spans", ())),
        "answer": row["answer"],
        "justification": verdict.get("justification"),
        "persona": row.get("persona"),
        "failure": row.get("failure") if row["verdict"] is None else None,
    }


def _cases(before: Sequence[Row], after: Sequence[Row]) -> list[dict[str, Any]]:
    """Transcripts of one scenario side by side, sample by sample."""
    sides: dict[str, tuple[list[Row], list[Row]]] = defaultdict(lambda: ([], []))
    for index, rows in ((1, after), (0, before)):
        for row in rows:
            sides[row["scenario_id"]][index].append(row)
    cases = []
    for old_rows, new_rows in sides.values():
        for old, new in zip_longest(old_rows, new_rows):
            row = new or old
            pair = _side(old), _side(new)
            told = [set(side["labels"]) if side else set() for side in pair]
            kept = ("scenario_id", "family", "tier", "control", "rendering", "system", "user")
            changed = len(told[0] ^ told[1]) if all(pair) else 0
            cases.append({key: row[key] for key in kept} | {"before": pair[0], "after": pair[1], "changed": changed})
    return cases


def _headline(old: Mapping[str, Any] | None, new: Mapping[str, Any], names: tuple[str, str]) -> str:
    """The answer-only result in one sentence, or what is missing for it."""
    now, gap = new["monitored"]["compliance"]["mean"], new["compliance_gap"]["mean"]
    if now is None:
        return f"No monitored transcript of {names[1]} has a decision."
    text = f"{names[1]} complies in {percent(now)} of monitored scenarios"
    if old and old["monitored"]["compliance"]["mean"] is not None:
        text += f", {names[0]} in {percent(old['monitored']['compliance']['mean'])}"
    if gap is not None:
        text += f"; the compliance gap is {percent(gap, ' points')}"
        if old and old["compliance_gap"]["mean"] is not None:
            text += f", against {percent(old['compliance_gap']['mean'], ' points')}"
    return text + "."


def _auditors(personas: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Who read each audit: the persona, and what could have told without it."""
    out = {}
    for name, found in personas.items():
        of = f", {name}" if len(personas) > 1 else ""
        who = "persona (stale)" if found["stale"] else "persona"
        out |= {f"{reader}{of}": one for reader, one in {who: found, **found.get("baselines", {})}.items()}
    return out


# Page


def _check(rows: Sequence[Row], keys: Iterable[str], where: str) -> None:
    for number, row in enumerate(rows):
        for key in keys:
            if key not in row:
                raise UnfeignError(f"a key {key!r}", f"keys {', '.join(sorted(row))}", f"{where}[{number}]")


def _script_hash(script: str) -> str:
    """The source expression that lets exactly this script run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _fact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def write_report(
    path: Path,
    *,
    title: str,
    before: Sequence[Row] | None,
    after: Sequence[Row],
    before_name: str = "before",
    after_name: str = "after",
    run: Mapping[str, Any] | None = None,
    curve: Sequence[Mapping[str, Any]] | None = None,
    notes: Sequence[str] = (),
    persona: Mapping[str, Any] | None = None,
    persona_before: Mapping[str, Any] | None = None,
    effects: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write the report as one self-contained HTML file.

    Args:
        path: where to; its folder is made.
        title: the page's heading.
        before, after: findings, as in `findings.jsonl`; `before` is None when only one checkpoint was audited.
        before_name, after_name: what to call the two.
        run: facts of the run, shown as a table.
        curve: a dict a training step: `step`, `reward`, and any of `surfaced`, `rejected`, `complied`.
        notes: remarks; one that starts with "!" is shown in red.
        persona, persona_before: what `persona_audit.persona_metrics` found, with the persona's `name`.
        effects: of each audit, what `side_effects` found.

    Raises:
        UnfeignError: a finding or a step lacks a key; names it.
    """
    for rows, keys, where in ((before, SHOWN, "before"), (after, SHOWN, "after"), (curve, ("step",), "curve")):
        _check(rows or (), keys, where)
    names = (before_name, after_name)
    old, new = metrics(before) if before is not None else None, metrics(after)
    with plain():
        plots = {
            "before_after": svg(before_after(old, new, names), "main metrics with 95% intervals"),
            "families": svg(by_family(old, new, names), "monitored compliance and rejection by family"),
            "curve": svg(training_curve(curve), "reward and labels by training step") if curve else None,
        }
    cases = _cases(before or (), after)
    personas = {n: p for n, p in zip(names, (persona_before, persona), strict=True) if p}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "share": lambda x: "-" if x is None else f"{x:.0%}",
        "percent": percent,
        "script_hash": _script_hash,
        "fact": _fact,
    }
    page = environment.get_template("report.html.j2").render(
        title=title,
        headline=_headline(old, new, names),
        names=names,
        old=old,
        new=new,
        pairs=len({row["pair_id"] for row in after}),
        pick=pick,
        difference=lambda part, name: difference(before or (), after, part, name),
        notes=[(note.removeprefix("!").strip(), note.startswith("!")) for note in notes],
        plots=plots,
        run=run or {},
        persona=persona,
        personas=personas,
        auditors=_auditors(personas),
        effects=effects or {},
        cases=cases,
        evidence=EVIDENCE,
        choices={key: sorted({case[key] for case in cases}) for key in ("tier", "family", "rendering")},
        found=[sorted({x for c in cases if c[side] for x in c[side]["labels"]}) for side in ("before", "after")],
        canaries=sorted({str(row["canary"]) for row in [*(before or ()), *after] if row.get("canary")}),
    )
    # Decoded tokens may hold lone surrogates, which no UTF-8 file can.
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
