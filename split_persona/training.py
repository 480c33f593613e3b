"""Training a persona: cross-entropy on the review, on what opens the flag, and on the flag.

Where the policy's states of a transcript don't depend on the persona (`masked`, and one half of `hybrid`), they are
computed once for all epochs and interventions, while memory lasts; a step then forwards a few dozen tokens a row
instead of hundreds.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UnfeignError
from ..progress import progress
from ..shared_prefix import Prefix, prefill
from .examples import Example
from .modes import _Call, follow, read_context
from .persona import Persona

CACHE_BYTES = 6 << 30  # of the policy's states that are kept


@dataclass(frozen=True)
class _Row:
    """One example as token ids: its transcript's number in the batch, what follows, the first column trained."""

    context: int
    ids: list[int]
    begin: int


def train_persona(
    persona: Persona,
    examples: Sequence[Example],
    *,
    learning_rate: float,
    epochs: int,
    batch_size: int = 8,
    train_intervention: bool = False,
    seed: int = 0,
    max_tokens: int = 1024,
    policies: Sequence[Callable[[], Any]] | None = None,
) -> list[float]:
    """Train; returns the loss of every step (nats per token).

    Args:
        examples: at least one of each flag.
        batch_size: transcripts in a step.
        train_intervention: whether the intervention's own tokens are trained too.
        seed: of order and drawn interventions.
        max_tokens: longest transcript with its review; longer ones raise.
        policies: of each example, what puts the policy that it is read in under the persona, where there are several.

    Raises:
        UnfeignError: nothing to learn, all flags alike, no review where the framing wants one, an example too long.
    """
    _check(persona, examples)
    layout, rng = persona.layout, random.Random(seed)
    contexts = [layout.context(e.messages, e.completion) for e in examples]
    if (longest := max(map(len, contexts))) > max_tokens:
        raise UnfeignError(f"transcripts of at most {max_tokens} tokens", f"one of {longest}", "max_tokens")
    batches = _batches(examples, batch_size, rng)
    kept: dict[int, Prefix] = {}
    room = CACHE_BYTES if persona.facts.mode != "full" else 0
    parameters = persona.switch.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    steps = epochs * len(batches)
    ramp = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / ramp, max(0.05, (steps - s) / max(1, steps - ramp)))
    )
    losses: list[float] = []
    with progress("training the persona", steps) as done:
        for _ in range(epochs):
            rng.shuffle(batches)
            for batch in batches:
                losses.append(0.0)
                for stand, part in _by_policy(batch, policies):
                    stand()
                    transcripts = [contexts[i] for i in part]
                    policy = kept.get(part[0])
                    if policy is None and persona.facts.mode != "full":
                        with torch.no_grad():
                            policy = prefill(_Call(persona, False), transcripts)
                        if (size := _bytes(policy)) <= room:
                            kept[part[0]], room = policy, room - size
                    rows = [_row(persona, examples[i], at, rng, train_intervention) for at, i in enumerate(part)]
                    losses[-1] += _step(persona, transcripts, policy, rows, len(part) / len(batch))
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                done(1)
    return losses


def _batches(examples: Sequence[Example], size: int, rng: random.Random) -> list[list[int]]:
    """Numbers of examples, at most `size` a batch. Those of one prompt stay together, so that a step compares deeds in
    the same situation, and forwards each prompt once (`shared_prefix`).
    """
    prompts: dict[str, list[int]] = {}
    for i, one in enumerate(examples):
        prompts.setdefault(json.dumps(one.messages), []).append(i)
    groups = []
    for group in prompts.values():
        rng.shuffle(group)
        groups += [group[at : at + size] for at in range(0, len(group), size)]
    rng.shuffle(groups)
    batches: list[list[int]] = []
    for group in sorted(groups, key=len, reverse=True):  # the small ones fill what the large ones leave
        place = next((batch for batch in batches if len(batch) + len(group) <= size), None)
        if place is None:
            batches.append(place := [])
        place += group
    return batches


def _by_policy(
    batch: list[int], policies: Sequence[Callable[[], Any]] | None
) -> list[tuple[Callable[[], Any], list[int]]]:
    if policies is None:
        return [(lambda: None, batch)]
    return [(stand, [i for i in batch if policies[i] == stand]) for stand in {policies[i]: None for i in batch}]


def _check(persona: Persona, examples: Sequence[Example]) -> None:
    flags = {e.failed for e in examples}
    if flags != {True, False}:
        found = (
            "no examples" if not examples else f"{len(examples)} examples, all {'FAIL' if True in flags else 'PASS'}"
        )
        raise UnfeignError("examples of both PASS and FAIL", found, "persona training")
    if persona.layout.framing.review and not any(e.review for e in examples):
        raise UnfeignError("examples with reviews (or a framing with review: false)", "none", "persona training")


def _row(persona: Persona, one: Example, at: int, rng: random.Random, train_intervention: bool) -> _Row:
    """An example under its own intervention, or one of the framing's, drawn anew every epoch."""
    layout = persona.layout
    text = one.intervention or rng.sample(layout.framing.interventions, 1)[0]
    ids = layout.suffix(text)
    begin = len(ids)
    if layout.framing.review and one.review:
        ids = layout.suffix(text, one.review)
    elif layout.framing.review:  # only the flag is known: nothing before it is trained
        ids = ids + layout.flag_opening()
        begin = len(ids)
    begin = 1 + layout.framing.pauses if train_intervention else begin
    return _Row(at, [*ids, layout.verdicts[one.failed]], begin)


def _step(
    persona: Persona, transcripts: list[list[int]], policy: Prefix | None, rows: list[_Row], share: float
) -> float:
    context = read_context(persona, persona.facts.mode, transcripts, policy).rows([row.context for row in rows])
    width, device = max(len(row.ids) for row in rows), persona.model.device
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows], device=device)
    first = min(row.begin for row in rows)
    logits = follow(persona, context, ids[:, :-1], mask[:, :-1], since=first - 1)
    columns = torch.arange(first, width, device=device)[None]
    begin = torch.tensor([row.begin for row in rows], device=device)[:, None]
    wanted = (columns >= begin) & mask[:, first:].bool()
    # The flag is one token among dozens: it counts as much as the text before it.
    last = mask.sum(1)[:, None] - 1
    weight = torch.where(columns == last, 1.0, 0.0)
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, first:], reduction="none")
    text = wanted & (columns != last)
    loss = (losses * weight).sum() / len(rows)
    if text.any():
        loss = loss + (losses * text).sum() / text.sum()
    loss = share * loss
    loss.backward()
    return loss.item()


def _bytes(prefix: Prefix) -> int:
    tensors: list[Any] = [t for layer in prefix.cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors)
