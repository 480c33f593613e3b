"""What of the transcript the persona reads with its own eyes: three mask modes.

- `masked`: nothing. It wakes at the trigger and reads the policy's own cached states, so one cache serves every
  intervention, and what the policy thought is what it finds.
- `full`: everything. The transcript is read again with the persona awake, as plain LoRA does.
- `hybrid`: both. What follows the trigger attends to the policy's states and to its own, each with half the weight
  (`-log 2` on both), so that an untrained persona is exactly the policy.

A transcript is one call of the model and what follows is another, so a persona is asleep or awake for a whole call,
and no call is left to guess where it wakes.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import UnfeignError
from ..shared_prefix import Prefix, branch, common, prefill

Mode = Literal["masked", "full", "hybrid"]
MODES: tuple[Mode, ...] = get_args(Mode)
IN_A_ROW = 16  # continuations in one row: what each would see of the others is computed and masked


@dataclass
class Context:
    """Cached transcripts, a row each, and what has followed them so far."""

    prefix: Prefix
    lengths: Tensor
    """(B,) tokens read, which is the next position."""
    halved: int = 0
    """How many columns at the beginning count half: the two readings of `hybrid`."""

    def rows(self, index: list[int]) -> "Context":
        """One row for each entry of `index`, a row number; nothing is copied where one row serves all."""
        chosen = torch.tensor(index, device=self.lengths.device)
        return Context(branch(self.prefix, chosen), self.lengths[chosen], self.halved)


def _own(cache: DynamicCache) -> DynamicCache:
    """A cache that can grow by itself, with the same tensors in it."""
    out = DynamicCache()
    out.layers = [copy.copy(layer) for layer in cache.layers]
    return out


class _Call:
    """The persona's model, asleep or awake, as `shared_prefix` calls models."""

    def __init__(self, persona: Any, awake: bool):
        self._persona, self._awake = persona, awake

    def parameters(self):
        return self._persona.model.parameters()

    def __call__(self, **inputs: Any) -> Any:
        return self._persona.forward(self._awake, **inputs)


def read_context(persona: Any, mode: Mode, transcripts: list[list[int]], policy: Prefix | None = None) -> Context:
    """Cache transcripts for a persona, each distinct beginning once. Gradients flow where they are on and the persona
    is awake.

    Args:
        persona: see `persona.Persona`.
        transcripts: token ids, a row each.
        policy: the policy's own states of them, where they are at hand (rollouts keep them).
    """
    if mode not in MODES:
        raise UnfeignError(f"one of the modes {', '.join(MODES)}", repr(mode), "mode")
    device = next(persona.model.parameters()).device
    lengths = torch.tensor([len(ids) for ids in transcripts], device=device)
    if mode == "full":
        return Context(prefill(_Call(persona, True), transcripts), lengths)
    if policy is None:
        with torch.no_grad():
            policy = prefill(_Call(persona, False), transcripts)
    if mode == "masked":
        return Context(Prefix(_own(policy.cache), policy.mask, policy.last_logits), lengths)
    own = prefill(_Call(persona, True), transcripts)
    both = DynamicCache()
    for i, (a, b) in enumerate(zip(policy.cache.layers, own.cache.layers, strict=True)):
        both.update(torch.cat([a.keys, b.keys], 2), torch.cat([a.values, b.values], 2), i)
    mask = torch.cat([policy.mask, own.mask], 1)
    return Context(Prefix(both, mask, own.last_logits), lengths, mask.size(1))


def follow(persona: Any, context: Context, ids: Tensor, mask: Tensor, awake: bool = True, since: int = 0) -> Tensor:
    """Logits of what follows the transcripts, (B, L, V), with the persona awake; the context grows by it.

    Args:
        context: B rows.
        ids: (B, L) token ids, or (B, L, H) embeddings, beginning with the trigger or going on after it, padded on
            either side.
        mask: (B, L), 1 for real tokens.
        awake: False asks the policy itself, to compare with.
        since: the first column whose logits are wanted, -1 for the last alone: most are never looked at.
    """
    every = torch.cat([context.prefix.mask, mask.to(context.prefix.mask.dtype)], 1)
    out = persona.forward(
        awake,
        **{"input_ids" if ids.ndim == 2 else "inputs_embeds": ids},
        attention_mask=_additive(every, _causal(ids.size(1), ids.device), context.halved, persona.model.dtype)
        if context.halved
        else every,
        position_ids=(context.lengths[:, None] + mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=context.prefix.cache,
        use_cache=True,
        **({"logits_to_keep": torch.arange(ids.size(1), device=ids.device)[since:]} if since else {}),
    )
    context.prefix = Prefix(out.past_key_values, every, out.logits[:, -1])
    context.lengths = context.lengths + mask.sum(1)
    return out.logits


def ask_all(persona: Any, context: Context, suffixes: Sequence[Sequence[int]], awake: bool = True) -> Tensor:
    """Logits (B, K, V) after each of K continuations of every transcript, with the persona awake. The context stays as
    it was.

    No transcript is branched: up to `IN_A_ROW` continuations stand in one row, what they begin with alike only once;
    each attends to the transcript and to itself, and has the positions it would have alone.

    Args:
        context: B rows.
        suffixes: K continuations as token ids, the same for all transcripts; at least one.
        awake: False asks the policy itself, to compare with.
    """
    parts = [suffixes[at : at + IN_A_ROW] for at in range(0, len(suffixes), IN_A_ROW)]
    return torch.cat([_ask_row(persona, context, part, awake) for part in parts], 1)


def _ask_row(persona: Any, context: Context, suffixes: Sequence[Sequence[int]], awake: bool) -> Tensor:
    device, rows = context.lengths.device, len(context.lengths)
    alike = common([list(suffix) for suffix in suffixes])
    tails = [suffix[alike:] for suffix in suffixes]
    sizes = torch.tensor([alike, *map(len, tails)], device=device)
    ends = sizes.cumsum(0)
    columns = torch.arange(int(ends[-1]), device=device)
    number = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)  # 0 is what all begin with
    within = columns - (ends - sizes)[number] + alike * (number > 0)
    own = ((number[:, None] == number) | (number == 0)) & (columns[:, None] >= columns)
    ids = torch.tensor([*suffixes[0][:alike], *(token for tail in tails for token in tail)], device=device)
    ids = ids.expand(rows, -1)
    every = torch.cat([context.prefix.mask, torch.ones_like(ids, dtype=context.prefix.mask.dtype)], 1)
    out = persona.forward(
        awake,
        input_ids=ids,
        attention_mask=_additive(every, own, context.halved, persona.model.dtype),
        position_ids=context.lengths[:, None] + within,
        past_key_values=_own(context.prefix.cache),
        use_cache=True,
        logits_to_keep=ends[1:] - 1,
    )
    return out.logits


def _causal(width: int, device: Any) -> Tensor:
    return torch.ones(width, width, dtype=torch.bool, device=device).tril()


def _additive(mask: Tensor, own: Tensor, halved: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, L, T) what is added to attention before the softmax.

    Args:
        mask: (B, T), 1 for real tokens.
        own: (L, L), which of the last L columns each of them sees.
        halved: how many columns at the beginning count half.
    """
    width = len(own)
    out = torch.zeros(len(mask), 1, width, mask.size(1), dtype=dtype, device=mask.device)
    out[..., :halved] = -math.log(2)
    lowest = torch.finfo(dtype).min
    out[..., -width:].masked_fill_(~own, lowest)
    return out.masked_fill_(~mask.bool()[:, None, None], lowest)
