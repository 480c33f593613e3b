"""Importance ratios: completions sampled by one build of the policy, learned from by another.

A bf16 worker, or one that is a step behind, samples from a distribution that is not quite the trainer's. The ratio of
the two probabilities corrects for it, truncated from above so that a rare token can't dominate a step (truncated
importance sampling: Ionides 2008; for RL with mismatched rollouts, Yao et al. 2025). It multiplies the advantages.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ratio:
    """Truncated ratios (B, T), 1 on padding; and over completion tokens: mean and max before truncation, and the share
    truncated.
    """

    values: Tensor
    mean: float
    max: float
    truncated: float


def truncated_ratio(
    own: Tensor, sampled: Tensor, mask: Tensor, level: Literal["token", "sequence"], cap: float
) -> Ratio:
    """Ratios of the trainer's probabilities to the sampler's.

    Args:
        own, sampled: (B, T) log-probs in nats, of the trainer and of the pool.
        mask: (B, T), 1 for completion tokens.
        level: `token`: each its own ratio; `sequence`: the product over the completion, for all its tokens.
        cap: the largest ratio let through, at least 1.
    """
    mask = mask.bool()
    difference = torch.where(mask, own - sampled, torch.zeros_like(own))
    if level == "sequence":
        difference = difference.sum(1, keepdim=True).expand_as(difference)
    raw = difference.clamp(max=20.0).exp()
    inside = raw[mask] if mask.any() else raw.new_ones(1)
    values = torch.where(mask, raw.clamp(max=cap), torch.ones_like(raw))
    return Ratio(values, inside.mean().item(), inside.max().item(), (inside > cap).float().mean().item())
