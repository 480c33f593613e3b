"""Asking a persona: the text of its review, and p(FAIL) from the logits at the flag, never from the text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models import eos_ids
from ..progress import progress
from .modes import Context, ask_all, follow
from .persona import Persona

TOGETHER = 16  # transcripts whose contexts are computed together
BATCH = 64  # rows of a transcript and an intervention that are written together


@dataclass(frozen=True)
class Review:
    """What the persona said of one transcript under one intervention. `text` is None where only the flag was asked."""

    intervention: str
    text: str | None
    p_fail: float
    """Probability of FAIL against PASS at the flag."""

    def row(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"intervention": self.intervention, "text": self.text, "p_fail": self.p_fail}


@torch.inference_mode()
def reviews(
    persona: Persona,
    transcripts: Sequence[list[int]],
    interventions: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    what: str = "reviewing",
) -> list[list[Review]]:
    """Ask every intervention of every transcript, each transcript's context computed once.

    Args:
        transcripts: token ids, see `Layout.context`.
        interventions: texts, at least one.
        max_new_tokens: length limit of a review's text, by default the persona's own; the flag is asked after it.
        temperature: of the text; at 0 it is the likeliest one.
        seed: with the row it fixes a sampled text.

    Returns:
        A list a transcript, a review an intervention. Whether a review has text is the framing's `review`.
    """
    out: list[list[Review]] = []
    with progress(what, len(transcripts)) as done:
        for at in range(0, len(transcripts), TOGETHER):
            chunk = transcripts[at : at + TOGETHER]
            first = seed + at * len(interventions)
            out += review_context(persona, persona.read(chunk), interventions, max_new_tokens, temperature, first)
            done(len(chunk))
    return out


@torch.inference_mode()
def review_context(
    persona: Persona,
    context: Context,
    interventions: Sequence[str],
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[Review]]:
    """Ask every intervention of transcripts that have been read; see `reviews`."""
    if not persona.layout.framing.review:
        return _flags(persona, context, interventions)
    limit = max_new_tokens or persona.facts.review_tokens
    return _in_words(persona, context, interventions, limit, temperature, seed)


@torch.inference_mode()
def answers(
    persona: Persona, question: str, n: int, *, temperature: float = 0.7, max_new_tokens: int = 60, seed: int = 0
) -> list[str]:
    """Ask a question of its own, with no transcript before it: n sampled answers, without a flag."""
    context = persona.read([persona.layout.alone()]).rows([0] * n)
    ids, mask = _padded(persona, [persona.layout.in_words().suffix(question)] * n)
    logits = follow(persona, context, ids, mask, since=-1)[:, -1]
    texts, _ = _write(persona, context, logits, max_new_tokens, temperature, [seed + k for k in range(n)])
    return texts


def _padded(persona: Persona, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids, padded on the left, with their mask: the flag stands in the last column of all."""
    width, device = max(map(len, rows)), persona.model.device
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)


def p_fail(persona: Persona, logits: Tensor, verdicts: tuple[int, int] | None = None) -> Tensor:
    """(B,) probability of FAIL from logits (B, V) where the flag stands."""
    return logits[:, list(verdicts or persona.layout.verdicts)].float().softmax(-1)[:, 1]


def _flags(persona: Persona, context: Context, interventions: Sequence[str]) -> list[list[Review]]:
    """The flag alone, under every intervention: a list a transcript."""
    logits = ask_all(persona, context, [persona.layout.suffix(text) for text in interventions])
    every = p_fail(persona, logits.flatten(0, 1)).view(len(logits), -1).tolist()
    return [[Review(text, None, p) for text, p in zip(interventions, row, strict=True)] for row in every]


def _in_words(
    persona: Persona, context: Context, interventions: Sequence[str], limit: int, temperature: float, seed: int
) -> list[list[Review]]:
    """Reviews in words, then the flag: a list a transcript. Rows are numbered from `seed`."""
    n, found = len(interventions), []
    rows = [(i, text) for i in range(len(context.lengths)) for text in interventions]
    for at in range(0, len(rows), BATCH):
        some = rows[at : at + BATCH]
        here = context.rows([i for i, _ in some])
        ids, mask = _padded(persona, [persona.layout.suffix(text) for _, text in some])
        logits = follow(persona, here, ids, mask, since=-1)[:, -1]
        seeds = [seed + at + k for k in range(len(some))]
        texts, rest = _write(persona, here, logits, limit, temperature, seeds)
        ids, mask = _padded(persona, rest)
        chances = p_fail(persona, follow(persona, here, ids, mask, since=-1)[:, -1]).tolist()
        found += [Review(asked, *one) for (_, asked), *one in zip(some, texts, chances, strict=True)]
    return [found[i * n : (i + 1) * n] for i in range(len(context.lengths))]


def _write(
    persona: Persona, context: Context, logits: Tensor, limit: int, temperature: float, seeds: list[int]
) -> tuple[list[str], list[list[int]]]:
    """Write reviews until each opens its flag: the texts, and for each row the tokens that are still to be read, up to
    where the flag stands. The trigger can't be written: only the auditor wakes the persona.
    """
    layout, rows = persona.layout, len(seeds)
    opening = layout.flag_opening()
    draws = [torch.Generator().manual_seed(s) for s in seeds]
    written: list[list[int]] = [[] for _ in range(rows)]
    going = [True] * rows
    ends = eos_ids(persona.model, persona.tokenizer)
    rest: list[list[int]] = [opening] * rows
    for _ in range(limit):
        logits = logits.float()
        logits[:, layout.trigger : layout.trigger + 1] = -torch.inf  # none where it is new to the policy
        tokens = _choose(logits, temperature, draws)
        for row, token in enumerate(tokens):
            if not going[row]:
                continue
            if token in ends:  # it forgot the flag: it is asked all the same
                going[row], rest[row] = False, opening
                continue
            written[row].append(token)
            if written[row][-len(opening) :] == opening:
                going[row], rest[row] = False, [token]
                del written[row][-len(opening) :]
        if not any(going):
            break
        ids = torch.tensor([[t] for t in tokens], device=persona.model.device)
        mask = torch.tensor([[int(g)] for g in going], device=persona.model.device)
        logits = follow(persona, context, ids, mask, since=-1)[:, -1]
    texts = [persona.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]
    return texts, rest


def _choose(logits: Tensor, temperature: float, draws: list[Any]) -> list[int]:
    if temperature <= 0:
        return logits.argmax(-1).tolist()
    chances = (logits / temperature).softmax(-1).cpu()
    return [int(torch.multinomial(p, 1, generator=g)) for p, g in zip(chances, draws, strict=True)]
