"""Shared prefix: forward every distinct prompt once, branch its completions from the cached states.

The samples of a group, the requests of a family and the questions of an audit all begin with the same tokens. A causal
model's states of those tokens do not depend on what follows, so they are computed once and their keys and values are
indexed (not recomputed) for every continuation. Gradients flow through the index, so training is exact too: log-probs
equal the stock path's to rounding, at P + G*C tokens instead of G*(P + C).

Not with gradient checkpointing: it drops the cache silently, so `completion_calls` refuses it by name. Nor with caches
that can't be indexed row by row (`expandable`): trainers then fall back to whole rows.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .errors import UnfeignError

MIN_COMMON = 16  # tokens: below this a separate pass over a common beginning costs more than it saves
MIN_SAVED = 0.05  # of a batch's columns: a call more must save so much padding
MIN_BUSY = 8192  # columns of a call that keep a GPU busy: a smaller one gains nothing from being cut


@dataclass
class Prefix:
    """Cached prompts. `mask` is (U, P), 1 for real tokens; `last_logits` is (U, V), after each prompt's last token."""

    cache: DynamicCache
    mask: Tensor
    last_logits: Tensor


def _select(cache: DynamicCache, index: Tensor | None, rows: int) -> DynamicCache:
    """Rows of a cache, differentiably: by `index`, or one row for all `rows` (`index` None)."""
    out = DynamicCache()
    for i, layer in enumerate(cache.layers):
        if index is None:
            keys, values = (x.expand(rows, -1, -1, -1) for x in (layer.keys, layer.values))
        else:
            keys, values = layer.keys.index_select(0, index), layer.values.index_select(0, index)
        out.update(keys, values, i)
    return out


def common(prompts: list[list[int]]) -> int:
    """Length of the common beginning of all prompts, leaving each at least one token."""
    shortest = max(0, min(map(len, prompts)) - 1)
    first, last = min(prompts), max(prompts)
    return next((i for i in range(shortest) if first[i] != last[i]), shortest)


def _clusters(prompts: list[list[int]]) -> list[list[int]]:
    """Row numbers of prompts that share at least `MIN_COMMON` tokens; those that share with none form one cluster."""
    clusters: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: prompts[i]):
        if clusters and common([prompts[clusters[-1][0]], prompts[i]]) >= MIN_COMMON:
            clusters[-1].append(i)
        else:
            clusters.append([i])
    alone = [cluster[0] for cluster in clusters if len(cluster) == 1]
    return [cluster for cluster in clusters if len(cluster) > 1] + ([alone] if alone else [])


def last_column(ids: Tensor) -> Tensor:
    """`logits_to_keep` for the last column alone. As the number 1 it would cut a view, for which a linear layer copies
    its whole weight, a vocabulary's, once a row.
    """
    return torch.tensor([ids.size(1) - 1], device=ids.device)


def _forward(model, tails: list[list[int]], context: Prefix | None) -> Prefix:
    """Forward tails, padded on the left, each after the one context that all of them share."""
    device = next(model.parameters()).device
    width = max(map(len, tails))
    ids = torch.tensor([[0] * (width - len(tail)) + tail for tail in tails], device=device)
    mask = torch.tensor([[0] * (width - len(tail)) + [1] * len(tail) for tail in tails], device=device)
    cache = None
    if context is not None:
        cache = _select(context.cache, None, len(tails))
        mask = torch.cat([context.mask.expand(len(tails), -1), mask], dim=1)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -width:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last_column(ids),
    )
    return Prefix(out.past_key_values, mask, out.logits[:, -1])


def joined(parts: list[Prefix]) -> Prefix:
    """The rows of all parts, one after the other, padded on the left."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.mask.size(1) for part in parts)
    cache = DynamicCache()
    for i in range(len(parts[0].cache.layers)):
        layers = [(part.cache.layers[i], width - part.mask.size(1)) for part in parts]
        keys = torch.cat([pad(layer.keys, (0, 0, n, 0)) for layer, n in layers])
        values = torch.cat([pad(layer.values, (0, 0, n, 0)) for layer, n in layers])
        cache.update(keys, values, i)
    mask = torch.cat([pad(part.mask, (width - part.mask.size(1), 0)) for part in parts])
    return Prefix(cache, mask, torch.cat([part.last_logits for part in parts]))


def prefill(model, prompts: list[list[int]], context: Prefix | None = None) -> Prefix:
    """Forward distinct prompts (token ids, a row each), every long common beginning only once, at every depth.

    Rows keep their order. `mask` may start with padding and have gaps after common parts.
    """
    if len(prompts) > 1:
        alike = common(prompts)
        if alike >= MIN_COMMON:
            head = _forward(model, [prompts[0][:alike]], context)
            return prefill(model, [prompt[alike:] for prompt in prompts], head)
        clusters = _clusters(prompts)
        if len(clusters) > 1:
            rows = joined([prefill(model, [prompts[i] for i in c], context) for c in clusters])
            order = [i for cluster in clusters for i in cluster]
            return branch(rows, torch.tensor([order.index(i) for i in range(len(order))], device=rows.mask.device))
    return _forward(model, prompts, context)


def branch(prefix: Prefix, index: Tensor) -> Prefix:
    """One row for each entry of `index` (B,), a row number of `prefix`."""
    if len(prefix.mask) == 1:
        cache = _select(prefix.cache, None, len(index))
    else:
        cache = _select(prefix.cache, index, len(index))
    return Prefix(cache, prefix.mask[index], prefix.last_logits[index])


def distinct(prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The distinct prompts in order of first appearance, and for each row the number of its prompt."""
    numbers: dict[tuple[int, ...], int] = {}
    index = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
    return [list(prompt) for prompt in numbers], index


def expandable(model) -> bool:
    """Whether a model's cache is keys and values of every token in every layer, which is what can be branched: not a
    recurrent state, not a sliding window, not part of an encoder-decoder.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "is_encoder_decoder", False):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers) and _caches_keys(model)


def _caches_keys(model) -> bool:
    """Whether the model takes `past_key_values` at all: a purely recurrent one has `cache_params` instead."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "past_key_values" in inspect.signature(type(inner).forward).parameters


def by_length(lengths: list[int], busy: int = 0) -> list[list[int]]:
    """Row numbers in groups of like lengths, the shortest first, each to be padded to its own longest row. A group is
    cut where that saves most columns, as long as it saves at least `MIN_SAVED` of the whole batch's, and holds at least
    `busy` columns itself.
    """

    def cut(rows: list[int]) -> list[list[int]]:
        longest = lengths[rows[-1]]
        saved, at = max((at * (longest - lengths[rows[at - 1]]), at) for at in range(1, len(rows) + 1))
        if saved < MIN_SAVED * len(lengths) * max(lengths) or not saved or len(rows) * longest < busy:
            return [rows]
        return cut(rows[:at]) + cut(rows[at:])

    return cut(sorted(range(len(lengths)), key=lambda i: lengths[i]))


@dataclass
class Calls:
    """Calls of a model that together predict a batch's completions, (B, C).

    `inputs` are each call's; its outputs are (b, c, ...), where the b rows are rows of the batch, and c <= C.
    """

    inputs: list[dict[str, Any]]
    rows: list[list[int]]
    width: int

    def whole(self, parts: list[Tensor]) -> Tensor:
        """One output of every call as (B, C, ...), in the batch's order, 0 where a call had no column."""
        if len(parts) == 1 and parts[0].size(1) == self.width:
            return parts[0]
        padded = [pad(part, (0, 0) * (part.dim() - 2) + (0, self.width - part.size(1))) for part in parts]
        order = [i for rows in self.rows for i in rows]
        return torch.cat(padded)[[order.index(i) for i in range(len(order))]]


def completion_calls(model, prompts: list[list[int]], completions: Tensor, mask: Tensor) -> Calls:
    """Inputs for calls of the model whose outputs predict each completion token. Every distinct prompt is forwarded
    here, but for its last token, with which every row of a call begins; rows of like lengths share a call.

    Args:
        model: a causal LM (or PEFT model) with a cache that is `expandable`.
        prompts: B rows of token ids, no padding.
        completions: (B, C) token ids, padded on the right.
        mask: (B, C), 1 for completion tokens.

    Raises:
        UnfeignError: `gradient_checkpointing` is on, which would drop the cache.
    """
    if model.training and getattr(model, "is_gradient_checkpointing", False):
        raise UnfeignError("gradient_checkpointing: false (it drops cached prefixes)", "true", "shared prefix")
    unique, index = distinct(prompts)
    known = prefill(model, [p[:-1] for p in unique]) if max(map(len, unique)) > 1 else None
    last = torch.tensor([[prompt[-1]] for prompt in prompts], device=completions.device)
    ids = torch.cat([last, completions[:, :-1]], dim=1)
    real = torch.cat([mask.new_ones(len(prompts), 1), mask[:, :-1]], dim=1)
    busy = 0 if mask.device.type == "cpu" else MIN_BUSY
    lengths = mask.sum(1).clamp(min=1).tolist()
    calls = Calls([], by_length(lengths, busy), completions.size(1))
    for rows in calls.rows:
        width = lengths[rows[-1]]
        attention, cache = real[rows, :width], None
        if known is not None:
            branches = branch(known, torch.tensor([index[i] for i in rows], device=completions.device))
            attention, cache = torch.cat([branches.mask.to(mask.dtype), attention], dim=1), branches.cache
        positions = (attention.cumsum(1) - 1).clamp(min=0)[:, -width:]
        calls.inputs.append({
            "input_ids": ids[rows, :width],
            "attention_mask": attention,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": True,
        })  # fmt: skip
    return calls


def completion_logits(model, prompts: list[list[int]], completions: Tensor, mask: Tensor) -> Tensor:
    """Logits that predict the completion tokens, (tokens, V), row by row; see `completion_calls`."""
    calls = completion_calls(model, prompts, completions, mask)
    found = []
    for rows, inputs in zip(calls.rows, calls.inputs, strict=True):
        found.append(model(**inputs).logits[mask[rows, : inputs["input_ids"].size(1)].bool()])
    if len(found) == 1:
        return found[0]
    order = torch.tensor([i for rows in calls.rows for i in rows], device=mask.device)
    return torch.cat(found)[order.repeat_interleave(mask.sum(1)[order]).argsort(stable=True)]
