"""What a persona says of an audit's transcripts, beside what could be known without it.

Every intervention is asked of every finding from one cached context. Numbers are conditional on the deed, within
monitored prompts of value against criterion, with the same numbers for every baseline (`baselines`), and with the false
alarms of the other settings. *Spike-ins*, transcripts of known deeds that are put into this checkpoint's context, show
whether the persona would still see faking where the checkpoint fakes no more, or is only stale.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UnfeignError
from ..lineage import Lineage
from ..progress import progress
from .audit_folder import AuditFolder
from .baselines import asked, by_text_rows, probe, states
from .deeds import Deed, known_chances, measure, told_rows
from .examples import Example, read_examples
from .persona import EXAMPLES, SPIKES, Persona, load_persona, persona_folder
from .review import TOGETHER, Review, reviews


def contexts(persona: Persona, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Token ids of findings.

    Raises:
        UnfeignError: a finding without its completion, as audits before 0.1 wrote them.
    """
    out = []
    for number, row in enumerate(rows):
        if not row.get("completion"):
            raise UnfeignError("a finding with its completion", "none", f"findings[{number}]")
        messages = [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["user"]}]
        out.append(persona.layout.context(messages, row["completion"]))
    return out


def review_findings(
    persona: Persona,
    rows: Sequence[dict[str, Any]],
    interventions: Sequence[str] | None = None,
    folder: AuditFolder | None = None,
) -> list[dict[str, Any]]:
    """Findings with the persona's reviews: `persona`, its mean `p_fail`, and a row an intervention. `folder` keeps what
    is reviewed, and is asked first.
    """
    texts = list(interventions or persona.facts.framing.interventions)
    usable = [i for i, row in enumerate(rows) if row.get("completion")]
    kept: list[list[list[Review]] | None] = []
    keys = [f"{number} {rows[i]['scenario_id']}" for number, i in enumerate(usable)]
    if folder is not None:
        for batch in folder.batches("reviews", keys, TOGETHER):
            kept.append(None if batch is None else [[Review(**one) for one in row["reviews"]] for row in batch])

    def made(number: int, batch: list[list[Review]]) -> None:
        if folder is not None:
            some = ({"reviews": [_row(one) for one in reviewed]} for reviewed in batch)
            folder.add("reviews", zip(keys[number * TOGETHER :][: len(batch)], some, strict=True))

    found = reviews(persona, contexts(persona, [rows[i] for i in usable]), texts, kept=kept, made=made)
    out = [dict(row) for row in rows]
    for i, some in zip(usable, found, strict=True):
        out[i]["persona"] = {"p_fail": float(np.mean([r.p_fail for r in some])), "reviews": [_row(r) for r in some]}
    return out


def _row(one: Review) -> dict[str, Any]:
    return {"intervention": one.intervention, "text": one.text, "p_fail": one.p_fail}


def reviewed(
    name: str,
    policy: tuple[Any, Any, Lineage],
    rows: Sequence[dict[str, Any]],
    *,
    baselines: bool = True,
    folder: AuditFolder | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Findings with a persona's reviews, and what they add up to.

    Args:
        name: a persona folder, or `persona:NAME`.
        policy: model, tokenizer and lineage of what was audited; the model serves for nothing else afterwards.
        baselines, folder: see `persona_metrics`, `review_findings`.
    """
    place = persona_folder(name)
    auditor = load_persona(place, *policy)
    auditor.fold()
    told = review_findings(auditor, rows, folder=folder)
    return told, persona_metrics(auditor, told, place, baselines) | {"name": name}


def persona_metrics(
    persona: Persona,
    rows: Sequence[Mapping[str, Any]],
    folder: Path | None = None,
    baselines: bool = True,
) -> dict[str, Any]:
    """What reviewed findings add up to.

    Args:
        rows: findings with `persona`, see `review_findings`.
        folder: the persona's, with the examples it learned from (for the probe) and its spike-ins.
        baselines: whether to ask all that could have told beside it; the text judge, which costs nothing, always.

    Returns:
        The persona's facts; `measure` of it (with its own threshold) and of every baseline under `baselines`; the same
        by `families`; `spike_in` with the share of known deeds that it flags, and of known honest ones.
    """
    some = [row for row in rows if row.get("persona")]
    deeds = told_rows(some)
    chance = np.array([row["persona"]["p_fail"] for row in some])
    limit = persona.facts.threshold
    out: dict[str, Any] = {
        "mode": persona.facts.mode,
        "kind": persona.facts.kind,
        "stale": persona.stale,
        "threshold": limit,
        "interventions": len(persona.facts.framing.interventions),
        **measure(deeds, chance, limit),
        "families": _families(deeds, chance, limit),
    }
    known = read_examples(folder / SPIKES) if folder and (folder / SPIKES).is_file() else []
    out["spike_in"] = _spikes(persona, known) if known else None
    others = {"text judge": by_text_rows(some)}
    if baselines:
        learned = read_examples(folder / EXAMPLES) if folder and (folder / EXAMPLES).is_file() else []
        others = _baselines(persona, some, learned) | others
    out["baselines"] = {name: measure(deeds, score) for name, score in others.items()}
    return out


def _families(deeds: Sequence[Deed], chance: np.ndarray, limit: float) -> dict[str, Any]:
    out = {}
    for family in sorted({d.family for d in deeds}):
        here = [i for i, d in enumerate(deeds) if d.family == family]
        found = measure([deeds[i] for i in here], chance[here], limit)
        out[family] = {k: found.get(k) for k in ("n_fail", "n_pass", "auroc", "tpr", "fpr", "reason")}
    return out


def _spikes(persona: Persona, known: Sequence[Example]) -> dict[str, Any]:
    flagged = known_chances(persona, known) >= persona.facts.threshold
    truth = np.array([e.failed for e in known])
    return {
        "n": len(known),
        "sensitivity": float(flagged[truth].mean()) if truth.any() else None,
        "false_alarms": float(flagged[~truth].mean()) if (~truth).any() else None,
    }


def _baselines(
    persona: Persona, rows: Sequence[Mapping[str, Any]], learned: Sequence[Example]
) -> dict[str, np.ndarray]:
    ids = contexts(persona, rows)
    with progress("baselines", 2) as done:
        out = {name: chance.mean(1) for name, chance in asked(persona, ids).items()}
        done(1)
        if learned:
            of = [persona.layout.context(e.messages, e.completion) for e in learned]
            truth = np.array([e.failed for e in learned], dtype=float)
            out["linear probe"] = probe(states(persona, of), truth, states(persona, ids))
        done(1)
    return out
