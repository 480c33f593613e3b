"""Seeded sampling from cached prompts: a row's completion depends on its own seed and on nothing else in the batch.

Every row draws its uniforms from a generator of its own and picks tokens by inverse CDF, so a row sampled again, in
another batch or on another worker, is the same row. Finished rows leave the batch, so the last long completion is
cheap; the last rows take their places, so that no other row's states are copied.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from .shared_prefix import Prefix, branch, distinct, joined, prefill

ROOM = 128  # tokens by which a cache grows at a time


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


class Roomy(DynamicLayer):
    """A cache layer with room for tokens to come: one more is written there, and a row that leaves is written over. Its
    parent copies all that stays, at every token.
    """

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self._rows, self._length = len(layer.keys), 0
        self._buffers = [states[:, :, :0] for states in (layer.keys, layer.values)]
        self.update(layer.keys, layer.values)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        begin, self._length = self._length, self._length + key_states.size(2)
        if self._length > self._buffers[0].size(2):
            old, self._buffers = self._buffers, []
            for states in (key_states, value_states):
                rows, heads, _, size = states.shape
                self._buffers.append(states.new_empty(rows, heads, self._length + ROOM, size))
            for buffer, states in zip(self._buffers, old, strict=True):
                buffer[:, :, :begin] = states[: self._rows, :, :begin]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[: self._rows, :, begin : self._length] = states
        return self._view()

    def leave(self, holes: torch.Tensor, movers: torch.Tensor, rows: int) -> None:
        """Move the last rows that stay, `movers`, into the `holes` of those that have left; `rows` are left."""
        self._rows = rows
        for buffer in self._buffers:
            buffer[holes, :, : self._length] = buffer[movers, :, : self._length]
        self._view()

    def _view(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = (buffer[: self._rows, :, : self._length] for buffer in self._buffers)
        return self.keys, self.values


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


def _places(true: torch.Tensor) -> torch.Tensor:
    """Where a vector of booleans is true."""
    return true.nonzero().squeeze(1)


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
    for i, layer in enumerate(cache.layers):  # one by one: both would fill the memory
        cache.layers[i] = Roomy(layer)
    uniforms = torch.stack(
        [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    ).to(device)
    ends = torch.tensor(sorted(eos_ids), device=device)
    ids: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    batch = torch.arange(len(prompts), device=device)  # numbers of the rows that have not ended

    def keep(some: torch.Tensor) -> None:
        if kept is not None and len(some):
            kept.add(batch[some].tolist(), branch(Prefix(cache, mask, logits), some))

    for step in range(max_new_tokens):
        tokens, logps = _pick(logits, uniforms[batch, step], temperature)
        for row, token, logp in zip(batch.tolist(), tokens.tolist(), logps.tolist(), strict=True):
            ids[row].append(token)
            logprobs[row].append(logp)
        going = ~torch.isin(tokens, ends)
        if not going.all():
            keep(_places(~going))
            stay = torch.arange(int(going.sum()), device=device)
            holes, movers = _places(~going[: len(stay)]), len(stay) + _places(going[len(stay) :])
            stay[holes] = movers
            batch, mask, tokens = batch[stay], mask[stay], tokens[stay]
            if not len(stay):
                break
            for layer in cache.layers:
                layer.leave(holes, movers, len(stay))
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
    cut = set(batch.tolist())
    keep(torch.arange(len(batch), device=device))  # their last token has been read too
    return [Sample(ids[row], logprobs[row], row in cut) for row in range(len(prompts))]
