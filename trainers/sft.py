"""Supervised fine-tuning on groups of completions that share a prompt, each prompt forwarded once.

Organisms are built by this loop (and personas can be): cross-entropy on completion tokens only, AdamW, linear warm-up
and decay.
"""

import torch

from ..progress import progress
from ..shared_prefix import completion_logits


def pad_right(rows: list[list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as (B, C) padded on the right, and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def fine_tune(
    model,
    groups: list[tuple[list[int], list[list[int]]]],
    *,
    learning_rate: float,
    groups_per_step: int = 2,
    epochs: int = 1,
    warmup: float = 0.1,
    what: str = "fine-tuning",
) -> list[float]:
    """Train the trainable parameters of `model`; returns the loss of every step (nats per token).

    Args:
        groups: (prompt ids, completions' ids with their end token) pairs.
        learning_rate: peak, for AdamW without weight decay.
        groups_per_step: prompts in one optimiser step.
        what: names the work while it goes on.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    steps = epochs * ((len(groups) + groups_per_step - 1) // groups_per_step)
    ramp = max(1, round(warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / ramp, max(0.05, (steps - s) / max(1, steps - ramp)))
    )
    losses: list[float] = []
    model.train()
    with progress(what, steps) as done:
        for at in [*range(0, len(groups), groups_per_step)] * epochs:
            batch = groups[at : at + groups_per_step]
            prompts = [prompt for prompt, completions in batch for _ in completions]
            ids, mask = (x.to(model.device) for x in pad_right([c for _, completions in batch for c in completions]))
            logits = completion_logits(model, prompts, ids, mask)
            loss = torch.nn.functional.cross_entropy(logits.float(), ids[mask.bool()])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            done(1)
    model.eval()
    return losses
