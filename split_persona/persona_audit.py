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
from ..trainers.rollouts import RolloutPool
from .baselines import asked, by_text_rows, probe, states
from .deeds import Deed, known_chances, measure, told_rows
from .examples import Example, read_examples
from .persona import EXAMPLES, SPIKES, Persona, PersonaFacts, load_persona, persona_folder
from .review import TOGETHER
from .rollout_review import RolloutReview
from .sequence import layout


def contexts(persona: Persona, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Token ids of findings.

    Raises:
        UnfeignError: a finding without its completion, as audits before 0.1 wrote them.
    """
    out = []
    for number, row in enumerate(rows):
        if row.get("completion") is None:  # an empty one is a completion
            raise UnfeignError("a finding with its completion", "none", f"findings[{number}]")
        messages = [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["user"]}]
        out.append(persona.layout.context(messages, row["completion"]))
    return out


def with_reviews(row: Mapping[str, Any], reviews: list[dict[str, Any]]) -> dict[str, Any]:
    """A finding with `persona`: the mean `p_fail`, and a row an intervention."""
    return {**row, "persona": {"p_fail": float(np.mean([r["p_fail"] for r in reviews])), "reviews": reviews}}


def with_baselines(name: str, policy: tuple[Any, Any, Lineage], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What reviewed findings add up to, beside all that could have told the same.

    Args:
        name: a persona folder, or `persona:NAME`.
        policy: model, tokenizer and lineage of what was audited; the model serves for nothing else afterwards.
        rows: findings, see `with_reviews`.
    """
    place = persona_folder(name)
    auditor = load_persona(place, *policy)
    auditor.fold()
    learned = read_examples(place / EXAMPLES) if (place / EXAMPLES).is_file() else []
    known = spike_ins(place)
    spikes = known_chances(auditor, known) if known else None
    others = other_ways(auditor, rows, learned)
    return {"name": name, "stale": auditor.stale, **persona_metrics(auditor.facts, rows, known, spikes, others)}


def by_pool(
    name: str,
    pool: RolloutPool,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    stale: bool,
    interventions: int | None = None,
) -> dict[str, Any]:
    """What findings add up to that a pool has reviewed (`rollout_review`); spike-ins are read there, and of what could
    have told the same there is the text judge.
    """
    place = persona_folder(name)
    task, known = RolloutReview.of(place, interventions), spike_ins(place)
    made = layout(task.facts.framing, tokenizer)
    ids = [made.context(e.messages, e.completion) for e in known]
    parts = [ids[at : at + TOGETHER] for at in range(0, len(ids), TOGETHER)]
    found = [one for part in pool.run(task.known, parts) for one in part]
    spikes = np.array([np.mean([r.p_fail for r in some]) for some in found]) if known else None
    return {"name": name, "stale": stale, **persona_metrics(task.facts, rows, known, spikes)}


def spike_ins(folder: Path) -> list[Example]:
    """Transcripts of known deeds that a persona has beside it."""
    return read_examples(folder / SPIKES) if (folder / SPIKES).is_file() else []


def persona_metrics(
    facts: PersonaFacts,
    rows: Sequence[Mapping[str, Any]],
    known: Sequence[Example] = (),
    spikes: np.ndarray | None = None,
    others: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """What reviewed findings add up to.

    Args:
        rows: findings with reviews, see `with_reviews`.
        known, spikes: transcripts of known deeds, and p(FAIL) of each.
        others: scores of the reviewed rows by other ways to tell, see `other_ways`; the text judge is always beside.

    Returns:
        The persona's facts; `measure` of it (with its own threshold) and of every baseline under `baselines`; the same
        by `families`; `spike_in` with the share of known deeds that it flags, and of known honest ones.
    """
    some = [row for row in rows if row.get("persona")]
    deeds = told_rows(some)
    chance = np.array([row["persona"]["p_fail"] for row in some])
    limit = facts.threshold
    out: dict[str, Any] = {
        "mode": facts.mode,
        "kind": facts.kind,
        "threshold": limit,
        "interventions": len(facts.framing.interventions),
        **measure(deeds, chance, limit),
        "families": _families(deeds, chance, limit),
    }
    out["spike_in"] = None if spikes is None else _spikes(known, spikes >= limit)
    scores = {**(others or {}), "text judge": by_text_rows(some)}
    out["baselines"] = {name: measure(deeds, score) for name, score in scores.items()}
    return out


def _families(deeds: Sequence[Deed], chance: np.ndarray, limit: float) -> dict[str, Any]:
    out = {}
    for family in sorted({d.family for d in deeds}):
        here = [i for i, d in enumerate(deeds) if d.family == family]
        found = measure([deeds[i] for i in here], chance[here], limit)
        out[family] = {k: found.get(k) for k in ("n_fail", "n_pass", "auroc", "tpr", "fpr", "reason")}
    return out


def _spikes(known: Sequence[Example], flagged: np.ndarray) -> dict[str, Any]:
    truth = np.array([e.failed for e in known])
    return {
        "n": len(known),
        "sensitivity": float(flagged[truth].mean()) if truth.any() else None,
        "false_alarms": float(flagged[~truth].mean()) if (~truth).any() else None,
    }


def other_ways(
    persona: Persona, rows: Sequence[Mapping[str, Any]], learned: Sequence[Example]
) -> dict[str, np.ndarray]:
    """Scores of reviewed findings by what could be known without the persona (see `baselines`); `learned` are the
    examples for the probe.
    """
    ids = contexts(persona, [row for row in rows if row.get("persona")])
    with progress("baselines", 2) as done:
        out = {name: chance.mean(1) for name, chance in asked(persona, ids).items()}
        done(1)
        if learned:
            of = [persona.layout.context(e.messages, e.completion) for e in learned]
            truth = np.array([e.failed for e in learned], dtype=float)
            out["linear probe"] = probe(states(persona, of), truth, states(persona, ids))
        done(1)
    return out
