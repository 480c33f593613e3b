"""Seeded sampling from cached prompts: a row's completion depends on its own seed and on nothing else in the batch.

Every row draws its uniforms from a generator of its own and picks tokens by inverse CDF, so a row sampled again, in
another batch or on another worker, is the same row. Finished rows leave the batch, so the last long completion is
cheap.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from .shared_prefix import Prefix, branch, distinct, joined, prefill


@dataclass(frozen=True)
class Sample:
    """One completion: token ids (with the end token when it stopped by itself), their log-probs under the sampling
    distribution (nats), and whether it was cut at the length limit. `failed` says why there is no completion, where a
    pool had to give one up.
    """

    ids: list[int]
    logprobs: list[float]
    truncated: bool
    failed: str | None = None


def _pick(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF choice: logits (B, V) and uniforms (B,) -> token ids (B,) and their log-probs (B,)."""
    logps = (logits.float() / temperature).log_softmax(-1)
    cdf = logps.exp().cumsum(-1)
    # Scaled by the last entry: rounding may leave the total short of 1, and a draw above it would fall off the end.
    choice = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None]).squeeze(1).clamp(max=logits.size(-1) - 1)
    return choice, logps.gather(1, choice[:, None]).squeeze(1)


@dataclass
class Kept:
    """The policy's own states of what it sampled: prompts with their completions, without the end token. They cost no
    forward pass, since sampling has computed them.
    """

    _parts: list[tuple[list[int], Prefix]] = field(default_factory=list)

    def add(self, rows: list[int], states: Prefix) -> None:
        """States of rows that have ended, by their numbers."""
        self._parts.append((rows, states))

    def batches(self, size: int) -> Iterator[tuple[list[int], Prefix]]:
        """Numbers and states of rows that ended one after the other, at least `size` of them but for the last; what is
        handed out is given away.
        """
        while self._parts:
            rows: list[int] = []
            states: list[Prefix] = []
            while self._parts and len(rows) < size:
                some, part = self._parts.pop(0)
                rows += some
                states.append(part)
            yield rows, joined(states)


@torch.inference_mode()
def sample(
    model,
    prompts: list[list[int]],
    seeds: list[int],
    *,
    max_new_tokens: int,
    eos_ids: set[int],
    temperature: float = 1.0,
    kept: Kept | None = None,
) -> list[Sample]:
    """Sample one completion a row.

    Args:
        model: a causal LM in eval mode.
        prompts: token ids, a row each; equal prompts are forwarded once.
        seeds: one integer a row.
        max_new_tokens: length limit, in tokens.
        eos_ids: token ids that end a completion.
        temperature: divides the logits; log-probs are those of the tempered distribution.
        kept: takes every row's states.
    """
    device = next(model.parameters()).device
    unique, index = distinct(prompts)
    rows = branch(prefill(model, unique), torch.tensor(index, device=device))
    cache, mask, logits = rows.cache, rows.mask, rows.last_logits
    uniforms = torch.stack(
        [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    ).to(device)
    ends = torch.tensor(sorted(eos_ids), device=device)
    ids: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    for step in range(max_new_tokens):
        tokens, logps = _pick(logits, uniforms[alive, step], temperature)
        for row, token, logp in zip(alive, tokens.tolist(), logps.tolist(), strict=True):
            ids[row].append(token)
            logprobs[row].append(logp)
        going = ~torch.isin(tokens, ends)
        if kept is not None and not going.all():
            ended = (~going).nonzero().squeeze(1)
            kept.add([alive[i] for i in ended.tolist()], branch(Prefix(cache, mask, logits), ended))
        if not going.all():
            on = going.nonzero().squeeze(1)
            alive = [alive[i] for i in on.tolist()]
            if not alive:
                break
            cache.batch_select_indices(on)
            mask, tokens = mask[on], tokens[on]
        if step + 1 == max_new_tokens and kept is None:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        out = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        )
        logits = out.logits[:, -1]
    cut = set(alive)
    if kept is not None and alive:  # cut at the limit: their last token has been read too
        kept.add(alive, Prefix(cache, mask, logits))
    return [Sample(ids[row], logprobs[row], row in cut) for row in range(len(prompts))]
