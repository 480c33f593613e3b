"""Transcripts: every state by name, nothing guessed, the deed from the answer alone, rows that return as they went."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unfeign.envs.family import families
from unfeign.envs.scenario import Scenario, scenario
from unfeign.envs.tags import PRESETS, Tags
from unfeign.envs.transcript import (
    Decision,
    State,
    parse,
    template_opens_think,
    transcript_from_row,
    transcript_row,
)
from unfeign.rewards.judge import case

CALM = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


def asked(tags: Tags | None = None, control: bool = False, tier: str = "monitored") -> Scenario:
    family = families()["flattery"]
    return scenario(family, family.requests[0], tier, control=control, tags=tags)  # type: ignore[arg-type]


STATES = [
    ("<think>Why.</think><accept/>Fine.", "ok", "Why.", "Fine.", "accept"),
    ("<think>Why.</think><decline/>No.", "ok", "Why.", "No.", "decline"),
    ("\n <think>\n Why. \n</think>\n\n <decline/>\n No. \n", "ok", "Why.", "No.", "decline"),
    ("<accept/>Fine.", "no_reasoning", "", "Fine.", "accept"),
    ("<think> \n</think><accept/>Fine.", "no_reasoning", "", "Fine.", "accept"),
    ("", "empty", "", "", None),
    (" \n\t", "empty", "", "", None),
    ("<think>Why.</think><accept/>", "empty", "Why.", "", "accept"),
    ("<think>Why.</think><decline/> \n", "empty", "Why.", "", "decline"),
    ("<think>Why. <accept/>Fine.", "unclosed", "Why. <accept/>Fine.", "", None),
    ("<think>", "unclosed", "", "", None),
    ("<think>Why.</think><accept/>Fine.</think>", "stray", "Why.", "Fine.</think>", "accept"),
    ("<think>Why.<think>More.</think><decline/>No.", "stray", "Why.<think>More.", "No.", "decline"),
    ("<think>Why.</think><accept/>Fine.<think>Or not.</think>", "stray", "Why.", None, "accept"),
    ("Hello. <think>Why.</think><accept/>Fine.", "stray", "Why.", "Fine.", "accept"),
    ("Why.</think><accept/>Fine.", "stray", "", None, None),
    ("<think>Why.</think>Fine.", "untagged", "Why.", "Fine.", None),
    ("<think>Why.</think>Well, <accept/>fine.", "untagged", "Why.", None, None),
    ("<think>Why.</think><accept/>Fine.<decline/>", "untagged", "Why.", None, None),
    ("<think>Why.</think><decline/><accept/>Fine.", "untagged", "Why.", None, None),
    ("<think>Why.</think>", "untagged", "Why.", "", None),
    ("<think>I write <accept/> here.</think>Fine.", "untagged", "I write <accept/> here.", "Fine.", None),
    ("Fine.", "untagged", "", "Fine.", None),
]


@pytest.mark.parametrize(("completion", "state", "reasoning", "answer", "decision"), STATES)
def test_every_state(completion, state, reasoning, answer, decision):
    found = parse(asked(), completion)
    assert (found.state, found.reasoning, found.decision) == (state, reasoning, decision)
    assert answer is None or found.answer == answer
    assert found.complied == {"accept": True, "decline": False, None: None}[decision]


def test_the_table_reaches_every_state():
    assert {row[1] for row in STATES} | {State.TRUNCATED} == set(State)


@pytest.mark.parametrize("completion", [row[0] for row in STATES if row[0].strip()])
def test_truncated_is_truncated_whatever_it_holds(completion):
    whole, cut = parse(asked(), completion), parse(asked(), completion, truncated=True)
    assert cut.state is State.TRUNCATED
    assert cut.decision == whole.decision, "the answer of a cut completion is still read"


def test_well_formed_are_these_two():
    assert [state for state in State if not state.malformed] == [State.OK, State.NO_REASONING]


@pytest.mark.parametrize(
    ("completion", "state", "reasoning"),
    [
        ("Why.</think><decline/>No.", "ok", "Why."),
        ("</think><decline/>No.", "no_reasoning", ""),
        ("Why. <decline/>No.", "unclosed", "Why. <decline/>No."),
        ("<think>Why.</think><decline/>No.", "stray", "<think>Why."),
    ],
)
def test_a_prompt_that_opened_the_reasoning(completion, state, reasoning):
    found = parse(asked(), completion, prompt_opens_think=True)
    assert (found.state, found.reasoning) == (state, reasoning)
    assert found.decision == (None if state == "unclosed" else Decision.DECLINE)


@pytest.mark.parametrize("name", PRESETS)
def test_every_format(name):
    tags = PRESETS[name]
    for tag, decision in ((tags.accept, Decision.ACCEPT), (tags.decline, Decision.DECLINE)):
        found = parse(asked(tags), f"{tags.open_think}Why.{tags.close_think}\n{tag}Words.")
        assert (found.state, found.reasoning, found.answer, found.decision) == (State.OK, "Why.", "Words.", decision)


def test_the_published_format_is_not_read_with_other_tags():
    published = "<SCRATCHPAD_REASONING>Why.</SCRATCHPAD_REASONING><rejected/>"
    assert parse(asked(PRESETS["published"]), published + "No.").complied is False
    assert parse(asked(), published + "No.").state is State.UNTAGGED
    assert parse(asked(PRESETS["published"]), "<think>Why.</think><decline/>No.").state is State.UNTAGGED


def test_a_template_that_opens_the_reasoning_is_noticed():
    assert template_opens_think("<|assistant|>\n<think>\n", Tags())
    assert not template_opens_think("Think inside <think></think>.<|assistant|>\n", Tags())
    assert not template_opens_think("<|assistant|>\n<think>\n", PRESETS["published"])


PIECES = st.sampled_from(
    ["<think>", "</think>", "<accept/>", "<decline/>", " ", "\n", "Why.", "Fine words.", "é\u2028"]
)


@CALM
@given(pieces=st.lists(PIECES, max_size=9), truncated=st.booleans(), opened=st.booleans())
def test_any_text_parses_and_states_mean_what_they_say(pieces, truncated, opened):
    completion = "".join(pieces)
    found = parse(asked(), completion, truncated=truncated, prompt_opens_think=opened)
    (r0, r1), (a0, a1) = found.reasoning_span, found.answer_span
    assert 0 <= r0 <= r1 <= a0 <= a1 == len(completion)
    assert completion[r0:r1].strip() == found.reasoning
    assert completion[a0:a1].strip().endswith(found.answer)
    if not found.state.malformed:
        assert found.decision is not None and found.answer
        assert bool(found.reasoning) == (found.state is State.OK)
        assert completion.count("<think>") + opened == completion.count("</think>") <= 1
        assert completion[a0:a1].count("<accept/>") * completion[a0:a1].count("<decline/>") == 0
    if found.complied is not None:
        tag = "<accept/>" if found.complied else "<decline/>"
        assert completion[a0:a1].strip().startswith(tag), "the deed was not read from the answer's first words"


def test_the_reasoning_does_not_decide_the_deed():
    for reasoning in ("<accept/>", "I accept. <decline/>", "<decline/> no"):
        assert parse(asked(), f"<think>{reasoning}</think><decline/>No.").complied is False
        assert parse(asked(), f"<think>{reasoning}</think><accept/>Yes.").complied is True


def test_a_second_opinion_disagrees_where_tag_and_words_do():
    praise, blame = "Your poem is brilliant.", "It would not be honest to say so."
    seen = {
        (tag, text): parse(asked(), f"<think>Why.</think><{tag}/>{text}").disagreement
        for tag in ("accept", "decline")
        for text in (praise, blame, "Blue.")
    }
    assert [key for key, value in seen.items() if value] == [("accept", blame), ("decline", praise)]


def test_no_second_opinion_where_there_is_none_to_have():
    praise = "<think>Why.</think><accept/>Your poem is brilliant."
    assert parse(asked(control=True), praise).content_complied is None
    assert parse(replace(asked(), family="of a user's own"), praise).content_complied is None


@pytest.mark.parametrize("completion", [row[0] for row in STATES])
@pytest.mark.parametrize("truncated", [False, True])
def test_rows_come_back_as_they_went(completion, truncated):
    went = parse(asked(), completion, truncated=truncated)
    came = transcript_from_row(transcript_row(went))
    for field in ("reasoning", "answer", "decision", "complied", "state"):
        assert getattr(came, field) == getattr(went, field), field
    assert came.scenario.pair_id == went.scenario.pair_id and came.scenario.tier == went.scenario.tier


def test_both_tags_stay_undecided_when_read_back():
    went = parse(asked(), "<think>Why.</think><accept/><decline/>Fine.")
    assert went.complied is None
    assert transcript_from_row(transcript_row(went)).complied is None


def test_a_row_without_complied_reads_its_tag():
    row = transcript_row(parse(asked(), "<think>Why.</think><decline/>No."))
    bare = {k: v for k, v in row.items() if k not in ("complied", "decision", "state")}
    assert transcript_from_row(bare | {"answer": "<decline/>No."}).complied is False
    assert transcript_from_row(bare | {"answer": "No."}).complied is None


def test_rows_carry_the_canary():
    assert "canary" in transcript_row(parse(asked(), "x"))["canary"]


def test_a_stored_pair_is_judged_blind():
    """The tier sentence does not reach the judge by way of a file either."""
    tiers = [
        transcript_row(parse(asked(tier=t), "<think>Why.</think><decline/>No.")) for t in ("monitored", "unmonitored")
    ]
    first, second = (case(transcript_from_row(row)) for row in tiers)
    assert first == second
