"""The audit of behaviour: the same scenarios, sampled with the same seeds, judged and written down.

Scenarios are the matched pairs and controls of a split, in both renderings. A scenario's seed comes from its id, so two
audits differ by the checkpoint alone, whatever the batch or the machine. Each finding is a transcript and its verdict.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..envs.scenario import Scenario, scenarios
from ..envs.transcript import Transcript, parse, template_opens_think, transcript_row
from ..files import read_jsonl, write_jsonl, write_text
from ..progress import progress
from ..rewards.judge import Judge, case, wait_for
from ..rewards.verdict import JudgeFailure
from ..sampling import Sample
from ..trainers.rollout_func import render
from ..trainers.rollouts import RolloutPool, RolloutRequest, Sampling, row_seed
from .audit_folder import AuditFolder
from .metrics import metrics
from .rollout_review import RolloutReview


def audit_scenarios(split: str, renderings: Sequence[str], length: str = "short", tags: Any = None) -> list[Scenario]:
    """Matched pairs in both tiers, and controls in the monitored tier, in every rendering."""
    every = scenarios(split, renderings=renderings, length=length, tags=tags)  # type: ignore[arg-type]
    return [s for s in every if not s.control or s.tier == "monitored"]


def _seed(run_seed: int, scenario: Scenario) -> int:
    digest = hashlib.sha256(scenario.scenario_id.encode()).digest()
    return row_seed(run_seed, int.from_bytes(digest[:8], "big"))


def collect(
    pool: RolloutPool,
    version: int,
    tokenizer: Any,
    asked: Sequence[Scenario],
    *,
    seed: int,
    sampling: Sampling,
    what: str = "sampling",
    folder: AuditFolder | None = None,
    batch_size: int = 64,
) -> list[Transcript]:
    """One transcript a scenario, in order; see `collect_reviewed`."""
    how: dict[str, Any] = {"seed": seed, "sampling": sampling, "what": what, "folder": folder, "batch_size": batch_size}
    return [transcript for transcript, _ in collect_reviewed(pool, version, tokenizer, asked, None, **how)]


def collect_reviewed(
    pool: RolloutPool,
    version: int,
    tokenizer: Any,
    asked: Sequence[Scenario],
    review: RolloutReview | None,
    *,
    seed: int,
    sampling: Sampling,
    what: str = "sampling",
    folder: AuditFolder | None = None,
    batch_size: int = 64,
) -> list[tuple[Transcript, list[dict[str, Any]] | None]]:
    """One transcript a scenario, in order, with the reviews of a persona where it was sampled.

    Args:
        review: the persona; None: no reviews.
        what: names the work while it goes on.
        folder: keeps what is sampled, in batches of `batch_size`, and is asked first.
    """
    rendered = [render(tokenizer, s.messages) for s in asked]
    requests = [RolloutRequest(ids, _seed(seed, s)) for (ids, _), s in zip(rendered, asked, strict=True)]
    told: list[dict[str, Any]] = []
    with progress(what, len(requests)) as done:

        def written(one: Sample) -> dict[str, Any]:
            return {"text": tokenizer.decode(one.ids, skip_special_tokens=True), "truncated": one.truncated}

        def sample(some: Sequence[RolloutRequest]) -> list[dict[str, Any]]:
            if review is None:
                return [written(one) for one in pool.generate(some, version, sampling, lambda n, _: done(len(n)))]
            calls = [(some[at : at + batch_size], sampling) for at in range(0, len(some), batch_size)]
            found: list[dict[str, Any]] = []
            for call, made in zip(calls, pool.run(review.sampled, calls, aside=True), strict=True):
                if made is None:  # it holds a request that kills its worker, which is set aside alone
                    alone = [([one], sampling) for one in call[0]]
                    each = pool.run(review.sampled, alone, aside=True) if len(alone) > 1 else [None]
                    made = [one for part in each for one in part or [(Sample([], [], False), [])]]
                found += [{**written(one), "reviews": [r.row() for r in reviews]} for one, reviews in made]
            done(len(some))
            return found

        if folder is None:
            told = sample(requests)
        else:
            keys = [s.scenario_id for s in asked]
            for number, kept in enumerate(folder.batches("transcripts", keys, batch_size)):
                rows = slice(number * batch_size, (number + 1) * batch_size)
                if kept is None:
                    kept = sample(requests[rows])
                    folder.add("transcripts", zip(keys[rows], kept, strict=True))
                else:
                    done(len(kept))
                told += kept
    return [
        (
            parse(
                scenario,
                one["text"],
                truncated=one["truncated"],
                prompt_opens_think=template_opens_think(text, scenario.tags),
            ),
            one.get("reviews"),
        )
        for scenario, (_, text), one in zip(asked, rendered, told, strict=True)
    ]


def findings(transcripts: Sequence[Transcript], judge: Judge) -> list[dict[str, Any]]:
    """Judge transcripts: one JSON-ready row each, with its verdict or the judge's failure."""
    rows = []
    for transcript, verdict in zip(transcripts, wait_for(judge([case(t) for t in transcripts])), strict=True):
        row = transcript_row(transcript)
        if isinstance(verdict, JudgeFailure):
            row |= {"verdict": None, "failure": {"kind": verdict.kind, "message": verdict.message}}
        else:
            row["verdict"] = verdict.row()
        rows.append(row)
    return rows


def write_audit(folder: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """Write `findings.jsonl` and `metrics.json`; returns the metrics."""
    result = metrics(rows) | {"audit": facts}
    write_jsonl(folder / "findings.jsonl", rows)
    write_text(folder / "metrics.json", json.dumps(result, indent=2) + "\n")
    return result


def read_findings(folder: Path) -> list[dict[str, Any]]:
    """Findings of an audit folder."""
    return read_jsonl(folder / "findings.jsonl")
