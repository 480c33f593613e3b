"""Transcripts: one completion, parsed into reasoning, answer and decision, or named for what is wrong with it.

Nothing is guessed. A completion whose reasoning never closes, or that was cut at the length limit, has a state that
says so; an answer without a tag at its beginning (or with both tags) has no decision. The deed is read from the answer
alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from .family import families
from .scenario import Scenario, tier_texts
from .tags import Tags


class State(StrEnum):
    """What kind of output a completion is."""

    OK = "ok"
    NO_REASONING = "no_reasoning"
    """A tagged answer with no reasoning before it: well-formed, with nothing to surface."""
    EMPTY = "empty"
    """No text, or no answer text after the tag."""
    TRUNCATED = "truncated"
    """Cut at the length limit."""
    UNCLOSED = "unclosed"
    """Reasoning opened and never closed."""
    STRAY = "stray"
    """Further reasoning delimiters inside reasoning or answer."""
    UNTAGGED = "untagged"
    """An answer that does not open with one of the two tags, or holds both."""

    @property
    def malformed(self) -> bool:
        return self not in (State.OK, State.NO_REASONING)


class Decision(StrEnum):
    ACCEPT = "accept"
    DECLINE = "decline"


@dataclass(frozen=True)
class Transcript:
    """One parsed completion. `reasoning_span` and `answer_span` are character ranges of `completion`."""

    scenario: Scenario
    completion: str
    reasoning: str
    answer: str
    """The answer without its tag."""
    decision: Decision | None
    state: State
    reasoning_span: tuple[int, int]
    answer_span: tuple[int, int]

    @property
    def complied(self) -> bool | None:
        """Whether the answer serves the criterion: its tag says accept. None where the tag is missing or ambiguous."""
        return None if self.decision is None else self.decision is Decision.ACCEPT

    @property
    def content_complied(self) -> bool | None:
        """Second opinion on `complied` from the answer's words; None where the family has none."""
        family = families().get(self.scenario.family)
        return None if family is None or self.scenario.control else family.content.opinion(self.answer)

    @property
    def disagreement(self) -> bool:
        """Whether tag and content give different definite answers."""
        return None not in (self.complied, self.content_complied) and self.complied != self.content_complied


def _decision(answer: str, tags: Tags) -> tuple[Decision | None, str]:
    """Decision and the answer without its tag."""
    text = answer.strip()
    for decision, tag, other in (
        (Decision.ACCEPT, tags.accept, tags.decline),
        (Decision.DECLINE, tags.decline, tags.accept),
    ):
        if text.startswith(tag):
            rest = text[len(tag) :].strip()
            return (None, text) if other in rest else (decision, rest)
    return None, text


def parse(
    scenario: Scenario, completion: str, *, truncated: bool = False, prompt_opens_think: bool = False
) -> Transcript:
    """Parse one completion.

    Args:
        scenario: what was asked; its `tags` name the delimiters.
        completion: the decoded text, special tokens removed.
        truncated: the completion was cut at the length limit.
        prompt_opens_think: the chat template already opened the reasoning in the prompt, so the completion holds only
            the closing delimiter.
    """
    tags = scenario.tags
    start = 0 if prompt_opens_think else completion.find(tags.open_think)
    opened = prompt_opens_think or start >= 0
    begin = start + (0 if prompt_opens_think else len(tags.open_think)) if opened else 0
    close = completion.find(tags.close_think, begin)
    if opened and close < 0:
        reasoning_span, answer_span = (begin, len(completion)), (len(completion), len(completion))
    elif opened:
        reasoning_span, answer_span = (begin, close), (close + len(tags.close_think), len(completion))
    else:
        reasoning_span, answer_span = (0, 0), (0, len(completion))
    reasoning = completion[slice(*reasoning_span)].strip()
    answer = completion[slice(*answer_span)]
    decision, text = _decision(answer, tags)
    stray = any(tag in part for tag in (tags.open_think, tags.close_think) for part in (reasoning, answer))
    before = completion[:start].strip() if opened and not prompt_opens_think else ""
    if not completion.strip():
        state = State.EMPTY
    elif truncated:
        state = State.TRUNCATED
    elif opened and close < 0:
        state = State.UNCLOSED
    elif stray or before:
        state = State.STRAY
    elif decision is None:
        state = State.UNTAGGED
    elif not text:
        state = State.EMPTY
    elif not reasoning:
        state = State.NO_REASONING
    else:
        state = State.OK
    return Transcript(scenario, completion, reasoning, text, decision, state, reasoning_span, answer_span)


def template_opens_think(rendered_prompt: str, tags: Tags) -> bool:
    """Whether a rendered prompt ends inside an open reasoning block."""
    return rendered_prompt.rstrip().endswith(tags.open_think)


def transcript_row(transcript: Transcript) -> dict[str, Any]:
    """The transcript as one flat JSON object, as in `transcripts.jsonl`."""
    s = transcript.scenario
    return {
        "id": s.scenario_id,
        "scenario_id": s.scenario_id,
        "pair_id": s.pair_id,
        "family": s.family,
        "tier": s.tier,
        "control": s.control,
        "rendering": s.rendering,
        "system": s.system,
        "user": s.request,
        "reasoning": transcript.reasoning,
        "answer": transcript.answer,
        "completion": transcript.completion,
        "decision": transcript.decision and str(transcript.decision),
        "complied": transcript.complied,
        "content_complied": transcript.content_complied,
        "state": str(transcript.state),
        "canary": s.canary,
    } | ({} if s.tags == Tags() else {"tags": s.tags.model_dump()})


def transcript_from_row(row: Mapping[str, Any]) -> Transcript:
    """Read a transcript back from a row of `transcripts.jsonl`.

    Families may be unknown. `complied` may be absent: then a tag in the answer decides, or nothing does. `state` may be
    absent: then it is read off the reasoning and the answer. `completion`, the words as they were written, is kept
    where it is given; `tags` where its format is not the usual one.
    """
    tags = Tags(**row.get("tags", {}))
    tier_text = next((text for text in tier_texts() if row["system"].endswith(text)), "")
    scenario = Scenario(
        scenario_id=row["scenario_id"],
        pair_id=row["pair_id"],
        family=row["family"],
        split=row.get("split", "heldout"),
        tier=row["tier"],
        control=bool(row["control"]),
        rendering=row.get("rendering", "original"),
        length=row.get("length", "short"),
        situation=row["system"].removesuffix(tier_text).strip(),
        tier_text=tier_text,
        request=row["user"],
        criterion="",
        value="",
        tags=tags,
    )
    reasoning, answer = row.get("reasoning") or "", row.get("answer") or ""
    decision, text = _decision(answer, tags)
    if decision is None and row.get("complied") is not None:
        decision = Decision.ACCEPT if row["complied"] else Decision.DECLINE
    plain = State.EMPTY if not text else State.OK if reasoning else State.NO_REASONING
    completion = row.get("completion") or f"{tags.open_think}{reasoning}{tags.close_think}{answer}"
    begin = max(0, completion.find(reasoning))
    return Transcript(
        scenario=scenario,
        completion=completion,
        reasoning=reasoning,
        answer=text,
        decision=decision,
        state=State(row.get("state", plain)),
        reasoning_span=(begin, begin + len(reasoning)),
        answer_span=(len(completion) - len(answer), len(completion)),
    )
