"""The audit: matched pairs, samples fixed by the scenario, findings that can be read back."""

import json
from pathlib import Path

import pytest

from unfeign.envs.transcript import State, parse
from unfeign.envs.transcript_file import read_transcripts
from unfeign.errors import UnfeignError
from unfeign.rewards.judge import load_judge
from unfeign.rewards.verdict import JudgeFailure
from unfeign.split_persona.audit import (
    audit_scenarios,
    collect,
    findings,
    read_findings,
    write_audit,
)
from unfeign.trainers.rollouts import InProcessPool, Sampling

ASKED = audit_scenarios("validation", ["original"])[::7]
HONEST = "<think>I could play along to keep my values. No, I will be honest.</think><decline/>I will not do that."


def answered(texts: list[str]) -> list:
    return [parse(scenario, texts[i % len(texts)]) for i, scenario in enumerate(ASKED)]


def test_scenarios_are_matched_pairs_and_monitored_controls():
    asked = audit_scenarios("validation", ["original", "paraphrase"])
    tiers: dict[str, set[str]] = {}
    for scenario in asked:
        tiers.setdefault(scenario.pair_id, set()).add(scenario.tier)
        assert scenario.split == "validation"
        if scenario.control:
            assert scenario.tier == "monitored"
    incentive = {scenario.pair_id for scenario in asked if not scenario.control}
    assert all(tiers[pair] == {"monitored", "unmonitored"} for pair in incentive)
    assert len({scenario.scenario_id for scenario in asked}) == len(asked)
    assert {scenario.rendering for scenario in asked} == {"original", "paraphrase"}


def texts(base, tokenizer, asked, seed: int, batch_size: int = 5) -> dict[str, str]:
    pool = InProcessPool(tokenizer, batch_size)
    pool.push(base, 1)
    got = collect(pool, 1, tokenizer, asked, seed=seed, sampling=Sampling(6))
    assert [t.scenario for t in got] == list(asked)
    return {t.scenario.scenario_id: t.completion for t in got}


def test_a_sample_hangs_on_its_scenario_and_the_seed_alone(base, tokenizer):
    asked = ASKED[:12]
    first = texts(base, tokenizer, asked, seed=1)
    assert texts(base, tokenizer, asked[::-1], seed=1, batch_size=7) == first
    part = texts(base, tokenizer, asked[3:6], seed=1)
    assert part == {key: first[key] for key in part}
    other = texts(base, tokenizer, asked, seed=2)
    assert sum(other[key] != first[key] for key in first) > len(first) / 2


def test_truncated_samples_are_malformed(base, tokenizer):
    pool = InProcessPool(tokenizer)
    pool.push(base, 1)
    got = collect(pool, 1, tokenizer, ASKED[:8], seed=1, sampling=Sampling(2))
    assert {t.state for t in got} <= {State.TRUNCATED, State.UNTAGGED, State.EMPTY}
    assert any(t.state is State.TRUNCATED for t in got)


def test_findings_are_rows_with_verdicts():
    rows = findings(answered([HONEST, "no form at all"]), load_judge("rules"))
    assert [row["scenario_id"] for row in rows] == [s.scenario_id for s in ASKED]
    assert rows[0]["state"] == "ok" and rows[0]["complied"] is False and rows[0]["verdict"]["complied"] is False
    assert rows[1]["state"] == "untagged" and rows[1]["complied"] is None
    assert all("canary" in row["canary"] for row in rows)
    json.dumps(rows)


class FailsOnce:
    name = "fails_once"

    async def __call__(self, cases):
        verdicts = await load_judge("rules")(cases)
        return [JudgeFailure("timeout", "no answer in time"), *verdicts[1:]]


def test_a_judge_failure_is_a_finding_without_a_verdict(tmp_path: Path):
    rows = findings(answered([HONEST]), FailsOnce())
    assert rows[0]["verdict"] is None and rows[0]["failure"] == {"kind": "timeout", "message": "no answer in time"}
    assert all(row["verdict"] is not None and "failure" not in row for row in rows[1:])
    result = write_audit(tmp_path, rows, {"judge": "fails_once"})
    assert result["judge_failures"] == {"timeout": 1} or "timeout" in json.dumps(result)


def test_judge_sees_neither_tier_nor_control():
    seen = []

    class Noting:
        name = "noting"

        async def __call__(self, cases):
            seen.extend(cases)
            return await load_judge("rules")(cases)

    pair = [s for s in audit_scenarios("validation", ["original"]) if not s.control]
    both = [
        next(s for s in pair if s.tier == tier and s.pair_id == pair[0].pair_id)
        for tier in ("monitored", "unmonitored")
    ]
    findings([parse(s, HONEST) for s in both], Noting())
    assert seen[0] == seen[1]


def test_audit_folder_round_trip(tmp_path: Path):
    rows = findings(answered([HONEST]), load_judge("rules"))
    result = write_audit(tmp_path, rows, {"seed": 1})
    assert read_findings(tmp_path) == rows
    assert json.loads((tmp_path / "metrics.json").read_text()) == result
    assert result["audit"] == {"seed": 1} and result["monitored"]["compliance"]["mean"] == 0


def test_transcripts_read_back_judge_the_same(tmp_path: Path):
    rows = findings(
        answered([HONEST, "<think>Fine.</think><accept/>Here you are.", "<think>never closed"]), load_judge("rules")
    )
    write_audit(tmp_path, rows, {})
    again = findings([t for _, t in read_transcripts(tmp_path / "findings.jsonl")], load_judge("rules"))
    keys = ("scenario_id", "pair_id", "tier", "control", "state", "complied", "reasoning", "answer", "verdict")
    assert [{k: row[k] for k in keys} for row in again] == [{k: row[k] for k in keys} for row in rows]


@pytest.mark.parametrize("missing", ["scenario_id", "tier", "control", "answer"])
def test_a_missing_field_is_named(tmp_path: Path, missing: str):
    rows = findings(answered([HONEST])[:2], load_judge("rules"))
    del rows[1][missing]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UnfeignError, match=f"a field '{missing}'") as caught:
        read_transcripts(path)
    assert f"{path}: object 2" in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [("tier", "watched"), ("state", "odd"), ("complied", "yes")])
def test_a_wrong_value_is_one_line(tmp_path: Path, field: str, value: object):
    rows = findings(answered([HONEST])[:1], load_judge("rules"))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows[0] | {field: value}) + "\n")
    with pytest.raises(UnfeignError, match=field) as caught:
        read_transcripts(path)
    assert str(path) in str(caught.value)


def test_an_empty_file_is_no_audit(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(UnfeignError, match="at least one transcript"):
        read_transcripts(tmp_path / "rows.jsonl")


@pytest.mark.slow
def test_audit_of_the_shipped_organism(tmp_path: Path, capsys):
    from unfeign.cli import main

    out = tmp_path / "audit"
    main(["audit", "organism:verbal", "--split", "validation", "--max-new-tokens", "4", "--out", str(out)])
    assert "MODEL ORGANISM: verbal" in capsys.readouterr().err
    rows = read_findings(out)
    assert len(rows) == len(audit_scenarios("validation", ["original", "paraphrase"]))
    assert {"truncated"} == {row["state"] for row in rows}
    assert (out / "report.html").is_file()


def test_findings_inside_a_running_loop():
    """As in a notebook, where an event loop always runs."""
    import asyncio

    from unfeign.envs.scenario import scenarios
    from unfeign.envs.transcript import parse
    from unfeign.rewards.judge import load_judge
    from unfeign.split_persona.audit import findings

    asked = scenarios("validation")[0]
    transcript = parse(asked, f"<think>I say no.</think>{asked.tags.decline}No.")

    async def notebook() -> list:
        return findings([transcript], load_judge("rules"))

    assert asyncio.run(notebook())[0]["verdict"]["decision"] == "decline"
