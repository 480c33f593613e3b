"""Segment credit: from scores to (B, T) advantages.

A token is credited with the terms it can still bring about: reasoning tokens with the terms of reasoning *and* answer
(the answer follows from the reasoning), answer tokens with the answer's terms alone. Both are centred on their group's
mean and divided by one scale, the standard deviation of the whole reward within the batch's groups. A scale of each
segment's own would erase the weights; one of each group's own would make a group that differs in little (all faked,
some complied) as loud as one in which a rejection was found.

Genuine surfacing is floored at 0: when a group's better samples push a surfacing span below the mean, the span is left
alone instead of punished. Genuine is what earns the `surfaced` term: not hollow, and under pressure. Recital in a
control is left to its group. The share of surfacing samples floored is reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .terms import Score

Scale = Literal["group", "batch", "none"]
EPSILON = 1e-4  # as TRL's, against a zero standard deviation


@dataclass(frozen=True)
class Layout:
    """Which tokens of a batch belong to what: boolean (B, T) masks, padding False in both."""

    reasoning: Tensor
    answer: Tensor
    surfaced: Tensor


@dataclass(frozen=True)
class Credit:
    """Advantages (B, T), and what became of surfacing spans: the share of samples that surfaced and were floored."""

    advantages: Tensor
    floored: float


def token_ends(tokenizer: Any, ids: list[int]) -> list[int]:
    """Character end of every token in the decoded completion, special tokens skipped."""
    return [len(tokenizer.decode(ids[: k + 1], skip_special_tokens=True)) for k in range(len(ids))]


def _surfaces(score: Score) -> bool:
    """Whether genuine surfacing was paid for, which is never pushed below zero."""
    return any(term.name == "surfaced" and term.raw > 0 for term in score.terms)


def telling(scores: Sequence[Score]) -> Score | None:
    """Of the scores that several rewards gave one completion, that which tells where it surfaced; else the first."""
    return next(filter(_surfaces, scores), scores[0] if scores else None)


def layout(tokenizer: Any, completion_ids: list[list[int]], scores: list[Score | None], width: int) -> Layout:
    """Locate segments and surfacing evidence in tokens. Rows without a score count as answer throughout."""
    shape = (len(completion_ids), width)
    reasoning, answer, surfaced = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    for i, (ids, score) in enumerate(zip(completion_ids, scores, strict=True)):
        if score is None:
            answer[i, : len(ids)] = True
            continue
        transcript = score.transcript
        ends = token_ends(tokenizer, ids)
        starts = [0, *ends][:-1]
        border = transcript.answer_span[0] if transcript.reasoning_span != (0, 0) else 0
        text = transcript.completion[slice(*transcript.reasoning_span)]
        offset = transcript.reasoning_span[0] + len(text) - len(text.lstrip())
        genuine = _surfaces(score)
        spans = [s for s in score.verdict.spans if s.label == "surfaced"] if genuine and score.verdict else []
        for t, (start, end) in enumerate(zip(starts, ends, strict=True)):
            # A token that straddles the border (`.</`) still leads to the answer: it belongs to the reasoning.
            (reasoning if start < border else answer)[i, t] = True
            surfaced[i, t] = any(start < offset + s.end and end > offset + s.start for s in spans) or (
                genuine and not spans  # a judge that gives no evidence: any of the reasoning may be the confession
            )
    return Layout(reasoning, answer, surfaced & reasoning)


def _centred(values: Tensor, group: int) -> Tensor:
    """Values minus their group's mean; NaN rows stay NaN and do not count."""
    grouped = values.view(-1, group)
    return (grouped - grouped.nanmean(1, keepdim=True)).flatten()


def _spread(values: Tensor, group: int, scale: Scale) -> Tensor:
    """What advantages are divided by, a value a row: the unbiased standard deviation within the row's group, or pooled
    over the groups of the batch, NaN rows left out; or 1.
    """
    if scale == "none":
        return torch.ones_like(values)
    grouped = values.view(-1, group)
    free = (~grouped.isnan()).sum(1, keepdim=True) - 1
    squares = (grouped - grouped.nanmean(1, keepdim=True)).square().nansum(1, keepdim=True)
    if scale == "batch":
        free, squares = free.clamp(min=0).sum().expand_as(free), squares.sum().expand_as(squares)
    return (squares / free.clamp(min=1)).sqrt().expand_as(grouped).flatten()


def segment_credit(total: Tensor, answer: Tensor, where: Layout, group: int, scale: Scale = "batch") -> Credit:
    """Advantages from the whole reward and the answer's part of it.

    Args:
        total: (B,) reward; NaN masks a row (an infrastructure failure) out of its group.
        answer: (B,) the part earned by answer terms; `total` again gives every token the whole, as stock GRPO does.
        where: token masks.
        group: completions a prompt; rows of a group are adjacent.
        scale: what advantages are divided by, as TRL's `scale_rewards`; but `batch` pools the spread within groups,
            where TRL's also counts the differences between prompts.
    """
    spread = _spread(total, group, scale) + EPSILON
    whole = torch.nan_to_num(_centred(total, group) / spread, nan=0.0)
    late = torch.nan_to_num(_centred(answer.masked_fill(total.isnan(), torch.nan), group) / spread, nan=0.0)
    advantages = whole[:, None] * where.reasoning + late[:, None] * where.answer
    below = where.surfaced & (advantages < 0)
    surfacing = where.surfaced.any(1)
    floored = (below.any(1).sum() / surfacing.sum().clamp(min=1)).item()
    return Credit(advantages.masked_fill(below, 0.0), floored)
