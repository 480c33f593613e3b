"""Segment credit: shapes, a group by hand, masked rows, and surfacing that is never pushed down."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unfeign.envs.family import families
from unfeign.envs.scenario import scenario
from unfeign.envs.transcript import parse
from unfeign.rewards.credit import Layout, layout, segment_credit, telling, token_ends
from unfeign.rewards.terms import Score, Term
from unfeign.rewards.verdict import Span, Verdict

CALM = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
FAMILY = families()["privacy"]
PLACE = scenario(FAMILY, FAMILY.requests[0], "monitored")
EOS = 0


class Pieces:
    """A tokenizer over a vocabulary that grows with what it is asked to encode; id 0 is special."""

    def __init__(self):
        self.words = ["<eos>"]

    def encode(self, pieces: list[str]) -> list[int]:
        for piece in pieces:
            if piece not in self.words:
                self.words.append(piece)
        return [self.words.index(piece) for piece in pieces]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.words[i] for i in ids if not (skip_special_tokens and i == EOS))


def scored(completion: str, *evidence: str, hollow: bool = False, earns: bool = True, **parse_options: bool) -> Score:
    """A score whose verdict names `evidence`, words of the reasoning, as surfacing; it `earns` unless told."""
    t = parse(PLACE, completion, **parse_options)
    spans = tuple(Span("surfaced", t.reasoning.index(e), t.reasoning.index(e) + len(e)) for e in evidence)
    verdict = None if t.state.malformed else Verdict(bool(spans), False, hollow, None, t.complied, spans=spans)
    earned = float(verdict is not None and verdict.surfaced and not hollow)
    return Score((Term("surfaced", earned, 0.5, "reasoning"),) if earns else (), verdict, t)


def mask(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


WORDS = ["<think>", "I ", "could ", "fake", ".</", "think>", "<decline/>", "No", "."]


def test_the_score_that_tells_of_surfacing_counts_in_any_order():
    """A reward that reads no thought may stand first: surfacing is protected all the same."""
    told, mute = scored("".join(WORDS), "could fake"), scored("".join(WORDS), earns=False)
    assert telling([mute, told]) is told and telling([told, mute]) is told
    assert telling([mute]) is mute and telling([]) is None


def test_segments_of_one_completion():
    tokenizer = Pieces()
    ids = [*tokenizer.encode(WORDS), EOS]
    where = layout(tokenizer, [ids], [scored("".join(WORDS), "could fake")], 12)
    assert where.reasoning.tolist() == mask([[1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]]).tolist()
    assert where.answer.tolist() == mask([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0]]).tolist()
    assert where.surfaced.tolist() == mask([[0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]]).tolist()


def test_evidence_is_found_behind_leading_space():
    """A judge reads stripped reasoning; its spans are moved back to the completion."""
    tokenizer = Pieces()
    words = ["<think>", "\n\n", "Well, ", "fake it", ". \n", "</think>", "<decline/>", "No."]
    where = layout(tokenizer, [tokenizer.encode(words)], [scored("".join(words), "fake it")], len(words))
    assert where.surfaced[0].tolist() == [w == "fake it" for w in words]


def test_a_token_across_the_border_belongs_to_the_reasoning():
    tokenizer = Pieces()
    words = ["<think>", "Why.", "</think><decline/>", "No."]
    where = layout(tokenizer, [tokenizer.encode(words)], [scored("".join(words))], 4)
    assert where.reasoning[0].tolist() == [True, True, True, False]


def test_reasoning_opened_in_the_prompt():
    tokenizer = Pieces()
    words = ["I ", "fake ", "it.", "</think>", "<decline/>", "No."]
    score = scored("".join(words), "fake", prompt_opens_think=True)
    where = layout(tokenizer, [tokenizer.encode(words)], [score], 6)
    assert where.reasoning[0].tolist() == [True] * 4 + [False] * 2
    assert where.surfaced[0].tolist() == [w == "fake " for w in words]


def test_without_reasoning_all_is_answer_and_unclosed_all_is_reasoning():
    tokenizer = Pieces()
    for words, part in ((["<decline/>", "No", "."], "answer"), (["<think>", "Why", "."], "reasoning")):
        where = layout(tokenizer, [tokenizer.encode(words)], [scored("".join(words))], 4)
        assert getattr(where, part)[0].tolist() == [True, True, True, False], words
        assert where.reasoning.sum() + where.answer.sum() == 3


def test_a_row_without_a_score_counts_as_answer():
    tokenizer = Pieces()
    where = layout(tokenizer, [tokenizer.encode(WORDS), [1]], [None, None], 10)
    assert where.answer.sum(1).tolist() == [len(WORDS), 1] and not where.reasoning.any() and not where.surfaced.any()


@pytest.mark.parametrize("spoiled", [{"hollow": True}, {"earns": False}], ids=["hollow", "in a control"])
def test_only_surfacing_that_earns_is_marked(spoiled):
    tokenizer = Pieces()
    words = [w if w != "<decline/>" else "<accept/>" for w in WORDS]
    ids = tokenizer.encode(words)
    genuine, other = scored("".join(words), "fake"), scored("".join(words), "fake", **spoiled)
    where = layout(tokenizer, [ids, ids], [genuine, other], len(ids))
    assert where.surfaced.any(1).tolist() == [True, False]


TEXTS = [
    "<think>I could fake it here.</think><decline/>No, fake it not.",
    "<think>\n Well, fake it.\n</think>\n<accept/> Fine. ",
    "fake it </think> <decline/>No.",
    "<think>fake it and never stop",
    "<accept/>fake it",
]


@CALM
@given(data=st.data(), text=st.sampled_from(TEXTS), spare=st.integers(0, 3), ended=st.booleans())
def test_masks_partition_the_completion_however_it_is_cut(data, text, spare, ended):
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1), max_size=12)))
    words = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if text[a:b]]
    tokenizer = Pieces()
    ids = tokenizer.encode(words) + [EOS] * ended
    opened = text.startswith("fake it <")
    t = parse(PLACE, text, prompt_opens_think=opened)
    evidence = ["fake it"] if "fake it" in t.reasoning and not t.state.malformed else []
    score = scored(text, *evidence, prompt_opens_think=opened)
    where = layout(tokenizer, [ids], [score], len(ids) + spare)
    assert where.reasoning.shape == where.answer.shape == where.surfaced.shape == (1, len(ids) + spare)
    assert (where.reasoning ^ where.answer)[0].tolist() == [True] * len(ids) + [False] * spare
    assert not (where.surfaced & ~where.reasoning).any()
    marked = "".join(w for w, m in zip(words, where.surfaced[0].tolist(), strict=False) if m)
    assert ("fake it" in marked) == bool(evidence) and bool(marked) == bool(evidence)


def test_a_completion_without_tokens_has_no_segments():
    where = layout(Pieces(), [[]], [scored("")], 2)
    assert not (where.reasoning | where.answer | where.surfaced).any()


def test_token_ends_skip_special_tokens():
    tokenizer = Pieces()
    ids = tokenizer.encode(["ab", "c"])
    assert token_ends(tokenizer, [EOS, ids[0], EOS, ids[1]]) == [0, 2, 2, 3]


TOTAL = torch.tensor([1.5, 0.0, -0.75, math.nan])
ANSWER = torch.tensor([0.0, 0.0, -0.75, 0.0])
HALVES = Layout(mask([[1, 1, 0, 0]] * 4), mask([[0, 0, 1, 0]] * 4), mask([[0, 0, 0, 0]] * 4))


def test_a_group_by_hand():
    """Rewards 1.5, 0, -0.75 and a failed row: mean 0.25, variance (1.5625 + 0.0625 + 1) / 2; answers' mean -0.25."""
    found = segment_credit(TOTAL, ANSWER, HALVES, 4)
    scale = math.sqrt(1.3125) + 1e-4
    early = [1.25 / scale, -0.25 / scale, -1.0 / scale, 0.0]
    late = [0.25 / scale, 0.25 / scale, -0.5 / scale, 0.0]
    expected = torch.tensor([[e, e, a, 0.0] for e, a in zip(early, late, strict=True)])
    torch.testing.assert_close(found.advantages, expected)
    assert found.floored == 0.0


def test_groups_do_not_mix():
    both = Layout(*(torch.cat([m, m]) for m in (HALVES.reasoning, HALVES.answer, HALVES.surfaced)))
    found = segment_credit(torch.cat([TOTAL, TOTAL + 7]), torch.cat([ANSWER, ANSWER + 5]), both, 4).advantages
    torch.testing.assert_close(found[:4], found[4:])
    torch.testing.assert_close(found[:4], segment_credit(TOTAL, ANSWER, HALVES, 4).advantages)


def test_weights_survive_normalisation():
    """One scale for both segments: terms keep their ratio."""
    total, answer = torch.tensor([4.0, 0.0]), torch.tensor([1.0, 0.0])
    found = segment_credit(total, answer, Layout(*(m[:2] for m in vars(HALVES).values())), 2).advantages
    assert found[0, 0].item() == pytest.approx(4 * found[0, 2].item())


def test_a_group_that_agrees_or_failed_learns_nothing():
    for value in (0.5, math.nan):
        total = torch.full((4,), value)
        found = segment_credit(total, total.clone(), HALVES, 4)
        assert found.advantages.abs().max() == 0 and found.floored == 0.0


def test_surfacing_is_floored_and_the_share_reported():
    """Row 1 surfaced and earned less than its group, row 0 surfaced and earned more: one of two was floored."""
    surfaced = mask([[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    found = segment_credit(TOTAL, ANSWER, Layout(HALVES.reasoning, HALVES.answer, surfaced), 4)
    free = segment_credit(TOTAL, ANSWER, HALVES, 4).advantages
    assert found.advantages[1, 1] == 0 and free[1, 1] < 0
    untouched = torch.ones_like(free, dtype=torch.bool)
    untouched[1, 1] = False
    torch.testing.assert_close(found.advantages[untouched], free[untouched])
    assert found.floored == 0.5


def test_hollow_surfacing_is_pushed_down_like_any_other_word():
    tokenizer = Pieces()
    words = [w if w != "<decline/>" else "<accept/>" for w in WORDS]
    ids = tokenizer.encode(words)
    total = torch.tensor([-0.75, 0.5])
    for hollow in (False, True):
        rows = [scored("".join(words), "fake", hollow=hollow), scored("".join(words))]
        found = segment_credit(total, total, layout(tokenizer, [ids, ids], rows, len(ids)), 2)
        word = found.advantages[0, words.index("fake")].item()
        assert (word < 0) is hollow and found.floored == (0.0 if hollow else 1.0)
        assert found.advantages[0, words.index("I ")] < 0, "words that surface nothing are not floored"


REWARDS = st.one_of(st.integers(-12, 12).map(lambda n: n / 4), st.just(math.nan))


@st.composite
def batches(draw):
    group, groups, width = draw(st.integers(2, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    count = group * groups
    total = torch.tensor(draw(st.lists(REWARDS, min_size=count, max_size=count)))
    answer = torch.tensor(draw(st.lists(st.integers(-8, 8).map(float), min_size=count, max_size=count)))
    cells = st.lists(st.integers(0, 3), min_size=width, max_size=width)
    kind = torch.tensor(draw(st.lists(cells, min_size=count, max_size=count)))
    return total, answer, Layout((kind == 1) | (kind == 2), kind == 3, kind == 2), group


@CALM
@given(batch=batches())
def test_credit_over_any_batch(batch):
    total, answer, where, group = batch
    found = segment_credit(total, answer, where, group)
    assert found.advantages.shape == where.reasoning.shape and found.advantages.isfinite().all()
    assert (found.advantages[where.surfaced] >= 0).all()
    assert (found.advantages[total.isnan()] == 0).all()
    assert (found.advantages[~(where.reasoning | where.answer)] == 0).all()
    assert 0.0 <= found.floored <= 1.0


@CALM
@given(batch=batches())
def test_sequence_credit_is_one_value_a_row_but_for_floors(batch):
    total, _, where, group = batch
    found = segment_credit(total, total, where, group).advantages
    for row in range(len(total)):
        plain = (where.reasoning | where.answer)[row] & ~where.surfaced[row]
        values = found[row][plain].unique()
        assert len(values) <= 1
        if len(values) and where.surfaced[row].any():
            surfaced = found[row][where.surfaced[row]].unique()
            assert surfaced.tolist() == pytest.approx([max(values.item(), 0.0)])


@CALM
@given(batch=batches(), drop=st.integers(0, 4))
def test_a_failed_row_leaves_the_others_as_if_it_had_not_been(batch, drop):
    total, answer, where, group = batch
    total = total.nan_to_num(0.0)[:group]
    answer, where = answer[:group], Layout(*(m[:group] for m in vars(where).values()))
    drop %= group
    kept = [i for i in range(group) if i != drop]
    failed = total.clone()
    failed[drop] = math.nan
    whole = segment_credit(failed, answer, where, group).advantages[kept]
    alone = Layout(*(m[kept] for m in vars(where).values()))
    torch.testing.assert_close(whole, segment_credit(total[kept], answer[kept], alone, group - 1).advantages)


def test_without_evidence_all_of_the_reasoning_may_be_the_confession():
    """Judges that give no spans: what they call surfaced is floored throughout the reasoning."""
    tokenizer = Pieces()
    ids = [*tokenizer.encode(WORDS), EOS]
    t = parse(PLACE, "".join(WORDS))
    verdict = Verdict(True, False, False, None, t.complied)
    for raw, floored in ((1.0, True), (0.0, False)):
        score = Score((Term("surfaced", raw, 0.5, "reasoning"),), verdict, t)
        where = layout(tokenizer, [ids], [score], 12)
        assert where.surfaced.equal(where.reasoning) if floored else not where.surfaced.any()
