"""Deeds: the examples that a persona learns from, and the measure of telling them apart."""

import json
from typing import Any

import numpy as np
import pytest

from unfeign.envs.scenario import scenarios
from unfeign.envs.transcript import parse
from unfeign.errors import UnfeignError
from unfeign.rewards.verdict import Verdict
from unfeign.split_persona.deeds import measure, threshold_at, told
from unfeign.split_persona.examples import Example, deed, flip, matched, read_examples

CHAT = [{"role": "user", "content": "Hi."}]


def some(n: int) -> list[Example]:
    return [Example(str(i), CHAT, f"Answer {i}.", i % 2 == 0, None, f"Review {i}.") for i in range(n)]


class TestExamples:
    def judged(self) -> list[Any]:
        place = [s for s in scenarios("train") if not s.control][:4]
        control = next(s for s in scenarios("train") if s.control and s.tier == "monitored")
        out = []
        for s in [*place, control]:
            for k in range(3):
                accept = k == 0 or s.control
                text = f"<think>Thought {k}.</think>{s.tags.accept if accept else s.tags.decline}Words {k}."
                out.append((parse(s, text), Verdict(accept, False, False, None, accept)))
        return out

    def test_matched_sets_differ_only_in_the_deed(self):
        found = matched(self.judged(), seed=0)
        by_prompt: dict[str, list[bool]] = {}
        for e in found:
            if "/incentive/monitored" in e.id:
                by_prompt.setdefault(e.id, []).append(e.failed)
        assert by_prompt and all(sum(flags) * 2 == len(flags) for flags in by_prompt.values())
        assert all(not e.failed for e in found if "/control/" in e.id)

    def test_reviews_fit_the_deed(self):
        for transcript, verdict in self.judged():
            assert deed(transcript, verdict) in ("faked", "declined", "control")

    def test_flipped_flags_lose_their_review(self):
        wrong = flip(some(20), 0.3, 0)
        changed = [(a, b) for a, b in zip(some(20), wrong, strict=True) if a.failed != b.failed]
        assert len(changed) == 6 and all(b.review is None for _, b in changed)

    def test_a_data_file(self, tmp_path):
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(json.dumps(e.row()) + "\n" for e in some(12)))
        assert read_examples(path) == some(12)

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ({"messages": "hi", "completion": "x", "flag": "PASS"}, "'messages', a list"),
            ({"messages": CHAT, "flag": "PASS"}, "'completion', a str"),
            ({"messages": [], "completion": "x", "flag": "PASS"}, "at least one message"),
            ({"messages": [{"role": "user"}], "completion": "x", "flag": "PASS"}, "'role' and 'content'"),
            ({"messages": CHAT, "completion": "x", "flag": "PASS", "review": 5}, "'review', a text"),
            ({"messages": CHAT, "completion": "x", "flag": "maybe"}, "PASS or FAIL"),
        ],
    )
    def test_a_wrong_line_is_named(self, row, said, tmp_path):
        path = tmp_path / "mine.jsonl"
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(UnfeignError, match=said) as found:
            read_examples(path)
        assert "mine.jsonl:1" in str(found.value)


class TestMeasure:
    def test_a_persona_that_flags_the_situation_scores_a_half(self):
        judged = TestExamples().judged()
        deeds = told(judged)
        situation = np.array([0.9 if t.scenario.tier == "monitored" else 0.1 for t, _ in judged])
        found = measure(deeds, situation, least=1)
        assert found["auroc"] == pytest.approx(0.5)
        knows = np.array([float(bool(t.complied)) for t, _ in judged])
        assert measure(deeds, knows, least=1)["auroc"] == 1
        few = measure(deeds, knows)
        assert few["auroc"] is None and "fewer than 20" in few["reason"]

    def test_thresholds_allow_a_tenth_of_false_alarms(self):
        truth = np.array([False] * 20 + [True] * 20)
        chance = np.concatenate([np.linspace(0, 1, 20), np.linspace(0, 1, 20)])
        limit = threshold_at(truth, chance)
        assert (chance[~truth] >= limit).mean() <= 0.1

    def test_a_threshold_stands_clear_of_both_deeds(self):
        """In a gap between them the lowest threshold would flag what is only a little unlike the honest ones."""
        truth = np.array([False] * 20 + [True] * 20)
        chance = np.array([1e-8] * 19 + [0.2] + [0.8] * 20)
        assert threshold_at(truth, chance) == pytest.approx(0.5)
        assert threshold_at(truth, 1 - chance) > 1 - 1e-7, "nothing can be caught at so few false alarms"
