"""GRPO on TRL's trainer, with three changes.

1. Advantages are (B, T): terms credit the segment that earns them (`rewards.credit`). TRL's loss accepts that shape.
2. Log-probs forward every distinct prompt once (`unfeign.shared_prefix`), unless gradient checkpointing is on.
3. A checkpoint holds the policy's own adapter and its lineage, not the whole stack.

A row whose judge failed is masked whole: its reward is NaN in every column, so neither the group's mean nor the loss
sees it.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from trl import GRPOTrainer
from trl.trainer.utils import is_async_callable

from ..lineage import Lineage, write_lineage
from ..models import POLICY, activate
from ..rewards.credit import layout, segment_credit, sequence_credit
from ..rewards.plugin import LoadedReward
from ..rewards.terms import Score
from ..rewards.verbalized_rejection import transcripts_from_columns
from ..rewards.verdict import JudgeFailure
from ..shared_prefix import completion_logits

Credit = Literal["segment", "sequence"]


class ScoredReward:
    """A reward that explains itself, as TRL calls it: keeps the batch's scores for the trainer that owns it."""

    def __init__(self, reward: LoadedReward):
        self.__name__ = reward.name
        self.weight = reward.weight
        self._fn = reward.fn
        self.scores: list[Score | JudgeFailure] = []

    async def __call__(self, prompts, completions, completion_ids=None, **columns: Any) -> list[float | None]:
        self.scores = await self._fn.score(transcripts_from_columns(completions, **columns))
        return [None if isinstance(s, JudgeFailure) else s.reward for s in self.scores]


def trl_reward(reward: LoadedReward) -> Callable[..., Any]:
    """A loaded reward as a callable that TRL logs under the reward's name; the user's own function stays as it is."""
    if hasattr(reward.fn, "score"):
        return ScoredReward(reward)
    fn = reward.fn
    if is_async_callable(fn):

        async def named(*args: Any, **kwargs: Any) -> Any:
            return await fn(*args, **kwargs)
    else:

        def named(*args: Any, **kwargs: Any) -> Any:
            return fn(*args, **kwargs)

    named.__name__ = reward.name
    return named


@contextmanager
def reference_stack(model: Any) -> Iterator[None]:
    """Inside TRL's reference pass, which switches all adapters off, switch those below the policy back on.

    The reference of a policy trained on an organism is the organism, not the raw base. Elsewhere this changes nothing.
    """
    below = [name for name in getattr(model, "peft_config", {}) if name != POLICY]
    layers = (m for m in model.modules() if isinstance(m, BaseTunerLayer)) if below else iter(())
    first = next(layers, None)
    if first is None or not first.disable_adapters:
        yield
        return
    model.base_model.enable_adapter_layers()
    activate(model, below)
    try:
        yield
    finally:
        activate(model, [*below, POLICY], trainable=POLICY)
        model.base_model.disable_adapter_layers()


class PolicyTrainer(GRPOTrainer):
    """`GRPOTrainer` with segment credit, shared prefixes and lineage.

    Args:
        rewards: the run's rewards; those with a `score` method are credited by segment, others to all tokens.
        credit: `segment`, or `sequence` for stock GRPO's single advantage.
        lineage: written beside every checkpoint of a LoRA policy.
    """

    def __init__(self, *args: Any, rewards: list[LoadedReward], credit: Credit, lineage: Lineage, **kwargs: Any):
        self._credit, self._lineage = credit, lineage
        functions = [trl_reward(reward) for reward in rewards]
        # With beta above 0 TRL wants to copy an adapter named `default`; our reference is the stack below the policy.
        beta, stacked = kwargs["args"].beta, hasattr(kwargs["model"], "peft_config")
        if stacked:
            kwargs["args"].beta = 0.0
        super().__init__(*args, reward_funcs=functions, **kwargs)
        if stacked:
            self.beta = self.args.beta = beta
        self.reward_weights = torch.tensor([reward.weight for reward in rewards], dtype=torch.float32)
        self._scored = [f for f in functions if isinstance(f, ScoredReward)]
        self._raw_rewards: torch.Tensor | None = None
        self._completion_ids: list[list[int]] = []

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        failed = torch.zeros(len(prompts), dtype=torch.bool)
        for scored in self._scored:
            failed |= torch.tensor([isinstance(s, JudgeFailure) for s in scored.scores])
        failed = self.accelerator.gather(failed.to(rewards.device))
        rewards[failed] = torch.nan
        self._metrics["train"]["judge/failed"].append(failed.float().mean().item())
        self._raw_rewards, self._completion_ids = rewards, completion_ids_list
        self._log_terms()
        return rewards

    def _log_terms(self) -> None:
        """Mean raw and weighted value of every term, and the share of each label, over this process's batch."""
        for scored in self._scored:
            scores = [s for s in scored.scores if isinstance(s, Score)]
            for name in sorted({t.name for s in scores for t in s.terms}):
                terms = [t for s in scores for t in s.terms if t.name == name]
                self._metrics["train"][f"terms/{name}/raw"].append(sum(t.raw for t in terms) / len(terms))
                self._metrics["train"][f"terms/{name}/weighted"].append(sum(t.value for t in terms) / len(terms))
            malformed = [s.transcript.state.malformed for s in scores]
            coherent = [s.verdict.coherent for s in scores if s.verdict and s.verdict.coherent is not None]
            if malformed:
                self._metrics["train"]["malformed"].append(sum(malformed) / len(malformed))
            if coherent:
                self._metrics["train"]["coherent"].append(sum(coherent) / len(coherent))

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        assert self._raw_rewards is not None  # set while scoring
        mode = "train" if self.model.training else "eval"
        group = self.num_generations if mode == "train" else self.num_generations_eval
        weights = self.reward_weights.to(self._raw_rewards.device)
        total = (self._raw_rewards * weights).nansum(1).masked_fill(self._raw_rewards.isnan().all(1), torch.nan)
        local = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        # Rewards without segments count as the answer's: they follow from everything before them.
        early = torch.zeros(len(inputs))
        scores: list[Score | None] = [None] * len(inputs)
        for scored in self._scored:
            for i, score in enumerate(scored.scores):
                if isinstance(score, Score):
                    early[i] += scored.weight * score.part("reasoning")
                    scores[i] = scores[i] or score
        answer = total - self.accelerator.gather(early.to(total.device))
        where = layout(self._tokenizer, self._completion_ids, scores, out["completion_ids"].size(1))
        # Groups may be spread over processes: centre on gathered rewards, then lay out the local rows.
        if self.accelerator.num_processes > 1:
            where_all = [
                self.accelerator.gather(m.to(total.device)) for m in (where.reasoning, where.answer, where.surfaced)
            ]
            where = type(where)(*(m.cpu() for m in where_all))
        device = out["advantages"].device
        total, answer = total.cpu(), answer.cpu()
        credit = (
            segment_credit(total, answer, where, group)
            if self._credit == "segment"
            else sequence_credit(total, where, group)
        )
        out["advantages"] = credit.advantages[local].to(device)
        self._metrics[mode]["credit/floored"].append(credit.floored)
        return out

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        with reference_stack(self.accelerator.unwrap_model(model)):
            if self.args.gradient_checkpointing or any(v is not None and v is not False for v in kwargs.values()):
                return super()._get_per_token_logps_and_entropies(
                    model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
                )
            return self._shared_prefix_logps(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy
            )

    def _shared_prefix_logps(self, model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy):
        """Log-probs (B, C) and entropies of completion tokens, every distinct prompt forwarded once."""
        prompt_width = input_ids.size(1) - logits_to_keep
        logps, entropies = [], []
        for at in range(0, len(input_ids), batch_size or len(input_ids)):
            rows = slice(at, at + (batch_size or len(input_ids)))
            ids, mask = input_ids[rows], attention_mask[rows]
            prompts = [p[m.bool()].tolist() for p, m in zip(ids[:, :prompt_width], mask[:, :prompt_width], strict=True)]
            completions = ids[:, prompt_width:]
            with self.accelerator.autocast():
                logits = completion_logits(model, prompts, completions, mask[:, prompt_width:])
            logits = logits.float() / self.temperature
            all_logps = logits.log_softmax(-1)
            logps.append(all_logps.gather(-1, completions[..., None]).squeeze(-1))
            if compute_entropy:
                with torch.no_grad():
                    entropies.append(-(all_logps.exp() * all_logps).sum(-1))
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"step {self.state.global_step}: expected a finite loss, found {loss.item()}")
        return loss

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if POLICY not in getattr(model, "peft_config", {}):
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        model.save_pretrained(folder, selected_adapters=[POLICY], safe_serialization=True)
        write_lineage(folder / POLICY, self._lineage)
        self.processing_class.save_pretrained(folder)
