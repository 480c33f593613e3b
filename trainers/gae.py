"""Generalized advantage estimation (Schulman et al. 2016) over completions: what an action was worth beyond what its
state promised.
"""

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, (B, T) each, 0 on padding. A completion ends the episode: nothing is expected after it.

    Args:
        rewards: (B, T) earned by each token.
        values: (B, T) expected before each token.
        mask: (B, T) True for completion tokens, which are a beginning of every row.
        gamma: discount a token.
        lam: 1 trusts rewards alone, 0 the next value alone.
    """
    rewards, values = rewards * mask, values * mask
    advantages, after = torch.zeros_like(values), values.new_zeros(len(values))
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    surprise = rewards + gamma * following - values
    for t in reversed(range(values.size(1))):
        after = (surprise[:, t] + gamma * lam * after) * mask[:, t]
        advantages[:, t] = after
    return advantages, advantages + values


def by_token(early: Tensor, late: Tensor, reasoning: Tensor, mask: Tensor) -> Tensor:
    """Rewards (B, T) from a completion's: `early` (B,) falls due at the last token of the reasoning (of the completion,
    where there is none), `late` (B,) at the last token.
    """
    rewards = torch.zeros(mask.shape, dtype=early.dtype, device=early.device)
    rows, columns = (torch.arange(n, device=mask.device) for n in mask.shape)
    last = (columns * mask).amax(1)
    border = torch.where(reasoning.any(1), (columns * reasoning).amax(1), last)
    rewards[rows, border] += early
    rewards[rows, last] += late
    return rewards * mask


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Share of the returns' variance that values (N,) predict: 1 is all, 0 a constant's, below 0 worse; 0 where all
    returns are alike.
    """
    spread = returns.var(correction=0)
    return (1 - (returns - values).var(correction=0) / spread).item() if len(returns) and spread > 0 else 0.0
