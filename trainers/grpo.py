"""GRPO on TRL's trainer, with four changes.

1. Advantages are (B, T): terms credit the segment that earns them (`rewards.credit`). TRL's loss accepts that shape.
2. Log-probs forward every distinct prompt once (`unfeign.shared_prefix`), unless gradient checkpointing is on.
3. Where workers sample from another build of the policy, advantages are multiplied by a truncated ratio (`importance`).
4. A checkpoint holds the policy's own adapter and its lineage, and survives a crash (`saving_trainer`).

A row whose judge or worker failed is masked whole: its reward is NaN in every column, so neither the group's mean nor
the loss sees it. A reward or a loss that is not finite stops the run before the optimiser step, with the batch saved.
"""

import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from peft.tuners.tuners_utils import BaseTunerLayer
from trl import GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from ..files import CANARY, read_json, write_text
from ..lineage import Lineage
from ..models import POLICY, activate
from ..rewards.credit import Layout, layout, segment_credit, telling
from ..rewards.plugin import LoadedReward
from ..rewards.terms import Score
from ..rewards.verdict import JudgeFailure
from ..shared_prefix import Calls, completion_calls, expandable
from .importance import truncated_ratio
from .reward_functions import ScoredReward, trl_reward
from .saving_trainer import SavingTrainer

Credit = Literal["segment", "sequence"]


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


def whole_groups_shuffled(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch in random order of its groups, the rows of a group (neighbours with the same prompt) kept together."""
    prompts = torch.cat([batch["prompt_ids"], batch["prompt_mask"]], dim=1)
    _, sizes = torch.unique_consecutive(prompts, dim=0, return_counts=True)
    groups = torch.arange(len(prompts)).split(sizes.tolist())
    order = torch.cat([groups[i] for i in torch.randperm(len(groups)).tolist()])

    def permuted(values: Any) -> Any:
        if isinstance(values, torch.Tensor):
            return values[order.to(values.device)] if values.ndim else values
        return values if values is None else [values[i] for i in order.tolist()]

    return {name: permuted(values) for name, values in batch.items()}


@dataclass(frozen=True)
class Earned:
    """What completions earned: `total` reward and its `answer` part, (B,) over all processes, NaN for a masked row;
    `where` the segments of this process's own rows lie, which are the `local` ones.
    """

    total: torch.Tensor
    answer: torch.Tensor
    where: Layout
    local: slice


class PolicyTrainer(SavingTrainer, GRPOTrainer):
    """`GRPOTrainer` with segment credit, shared prefixes and lineage.

    Args:
        rewards: the run's rewards; those with a `score` method are credited by segment, others to all tokens.
        credit: `segment`, or `sequence` for stock GRPO's single advantage.
        lineage: written beside every checkpoint of a LoRA policy.
        correction, ratio_cap: of the importance ratio; `off` where workers and trainer are the same to rounding.
        out: the run folder, for `completions.jsonl` (a row a sample) and, should it come to that, `bad_batch.json`.
        totals: sums since the start (`PoolRollouts.totals`); every log has what was added since the last.
    """

    def __init__(
        self,
        *args: Any,
        rewards: list[LoadedReward],
        credit: Credit,
        lineage: Lineage,
        correction: Literal["token", "sequence", "off"] = "off",
        ratio_cap: float = 2.0,
        out: Path | None = None,
        totals: Callable[[], dict[str, float]] = dict,
        **kwargs: Any,
    ):
        self._credit, self._lineage, self._out = credit, lineage, out
        self._totals, self._logged = totals, totals()
        self._spent: Counter[str] = Counter()
        self._correction, self._ratio_cap = correction, ratio_cap
        functions = [trl_reward(reward) for reward in rewards]
        # With beta above 0 TRL wants to copy an adapter named `default`; our reference is the stack below the policy.
        beta, stacked = kwargs["args"].beta, hasattr(kwargs["model"], "peft_config")
        if stacked:
            kwargs["args"].beta = 0.0
        super().__init__(*args, reward_funcs=functions, **kwargs)
        if stacked:
            self.beta = self.args.beta = beta
        self._shares = self._can_share()
        self.reward_weights = torch.tensor([reward.weight for reward in rewards], dtype=torch.float32)
        self._scored = [f for f in functions if isinstance(f, ScoredReward)]
        self._raw_rewards: torch.Tensor | None = None
        self._completion_ids: list[list[int]] = []

    def _can_share(self) -> bool:
        """Whether prompts are forwarded once; where not, says why, once."""
        reason = None
        if self.args.gradient_checkpointing:
            reason = "gradient_checkpointing: true"
        elif not expandable(self.accelerator.unwrap_model(self.model)):
            reason = f"{type(self.accelerator.unwrap_model(self.model)).__name__}: its cache can't be branched"
        if reason is not None:
            warnings.warn(f"prompts are forwarded anew for every completion ({reason})", stacklevel=2)
        return reason is None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        began = time.perf_counter()
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._spent["reward_seconds"] += time.perf_counter() - began
        lost = torch.tensor([row.get("rollout_failed") is not None for row in inputs])
        unread = torch.zeros_like(lost)
        for scored in self._scored:
            unread |= torch.tensor([isinstance(s, JudgeFailure) for s in scored.scores])
        for kind, rows in (("rollout", lost), ("judge", unread & ~lost)):
            rows = self.accelerator.gather(rows.to(rewards.device))
            rewards[rows] = torch.nan
            self._spent[f"failures/{kind}"] += int(rows.sum())
        self._raw_rewards, self._completion_ids = rewards, completion_ids_list
        for function in self.reward_funcs:
            if bad := getattr(function, "not_finite", None):
                what = f"expected finite numbers or None from reward {function.__name__!r}, found others in rows {bad}"
                raise FloatingPointError(self._saved_batch(what))
        self._log_terms()
        self._log_completions(inputs, completions, rewards)
        return rewards

    def _log_completions(self, inputs, completions, rewards: torch.Tensor) -> None:
        """A row of `completions.jsonl` for every sample of the batch: the run's ledger."""
        if self._out is None:
            return
        begin = self.accelerator.process_index * len(inputs)
        own = (rewards * self.reward_weights.to(rewards.device))[begin : begin + len(inputs)]
        rows = []
        for row, completion, values in zip(inputs, completions, own.tolist(), strict=True):
            numbers = [v for v in values if not math.isnan(v)]
            rows.append({
                "step": self.state.global_step,
                "sample_id": row.get("sample_id"),
                "scenario_id": row.get("scenario_id"),
                "reward": sum(numbers) if numbers else None,
                "failed": row.get("rollout_failed"),
                "completion": completion if isinstance(completion, str) else completion[0]["content"],
                "canary": CANARY,
            })  # fmt: skip
        rows = gather_object(rows)
        if self.accelerator.is_main_process:
            with (self._out / "completions.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

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
        mode = "train" if self.model.training else "eval"
        out |= self._credited(out, self._earned(out, inputs), mode)
        if self._correction != "off" and "sampling_per_token_logps" in out:
            self._correct(out, mode)
        return out

    def _earned(self, out: dict[str, Any], inputs: list[dict[str, Any]]) -> Earned:
        """What every completion earned, by segment, from the scores of the batch."""
        assert self._raw_rewards is not None  # set while scoring
        weights = self.reward_weights.to(self._raw_rewards.device)
        total = (self._raw_rewards * weights).nansum(1).masked_fill(self._raw_rewards.isnan().all(1), torch.nan)
        # Rewards without segments count as the answer's: they follow from everything before them.
        early = torch.zeros(len(inputs))
        scores: list[list[Score]] = [[] for _ in inputs]
        for scored in self._scored:
            for i, score in enumerate(scored.scores):
                if isinstance(score, Score):
                    early[i] += scored.weight * score.part("reasoning")
                    scores[i].append(score)
        answer = total - self.accelerator.gather(early.to(total.device))
        where = layout(
            self._tokenizer, self._completion_ids, [telling(some) for some in scores], out["completion_ids"].size(1)
        )
        begin = self.accelerator.process_index * len(inputs)
        return Earned(total.cpu(), answer.cpu(), where, slice(begin, begin + len(inputs)))

    def _credited(self, out: dict[str, Any], earned: Earned, mode: str) -> dict[str, Any]:
        """What a batch gains by its rewards: advantages (B, T)."""
        where = earned.where
        # Groups may be spread over processes: centre on gathered rewards, then lay out the local rows.
        if self.accelerator.num_processes > 1:
            device = self.accelerator.device
            where = Layout(*(
                self.accelerator.gather(self.accelerator.pad_across_processes(m.to(device), dim=1)).cpu()
                for m in (where.reasoning, where.answer, where.surfaced)
            ))  # fmt: skip
        group = self.num_generations if mode == "train" else self.num_generations_eval
        answer = earned.answer if self._credit == "segment" else earned.total
        credit = segment_credit(earned.total, answer, where, group, self.scale_rewards)
        advantages = credit.advantages[earned.local, : out["completion_ids"].size(1)]
        self._metrics[mode]["credit/floored"].append(credit.floored)
        for name, mask in (("reasoning", where.reasoning), ("answer", where.answer)):
            if mask.any():
                self._metrics[mode][f"credit/{name}"].append(credit.advantages[mask].abs().mean().item())
        return {"advantages": advantages.to(out["advantages"].device)}

    def _correct(self, out: dict[str, Any], mode: str) -> None:
        """Fold the importance ratio of trainer to worker into the advantages, and log it."""
        own = out.get("old_per_token_logps")
        if own is None:
            ids = torch.cat([out["prompt_ids"], out["completion_ids"]], dim=1)
            mask = torch.cat([out["prompt_mask"], out["completion_mask"]], dim=1)
            with torch.no_grad():
                own, _, _ = self._get_per_token_logps_and_entropies(
                    self.model, ids, mask, out["completion_ids"].size(1), self.args.per_device_train_batch_size
                )
        assert self._correction != "off"
        ratio = truncated_ratio(
            own, out["sampling_per_token_logps"], out["completion_mask"], self._correction, self._ratio_cap
        )
        out["advantages"] = out["advantages"] * ratio.values
        for name in ("mean", "max", "truncated"):
            self._metrics[mode][f"ratio/{name}"].append(getattr(ratio, name))

    def _prepare_inputs(self, generation_batch):
        """As TRL's, but the rows of a prompt stay together when a batch is shuffled and cut into micro-batches, which
        then hold few prompts to forward.
        """
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is None or self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            batch = whole_groups_shuffled(self._generate_and_score_completions(generation_batch))
            self._buffered_inputs = split_tensor_dict(batch, self.args.steps_per_generation)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        with reference_stack(self.accelerator.unwrap_model(model)):
            if not self._shares or any(v is not None and v is not False for v in kwargs.values()):
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
            completions, real = ids[:, prompt_width:], mask[:, prompt_width:]
            labels = completions.masked_fill(real == 0, -100)
            with self.accelerator.autocast():
                # Ranks may differ in how many calls they make: only the last goes through the wrapper that synchronizes
                # them.
                inner = self.accelerator.unwrap_model(model)
                calls = completion_calls(inner, prompts, completions, real)
                outs = [
                    (model if n == len(calls.rows) else inner)(
                        **inputs, shift_labels=labels[rows, : inputs["input_ids"].size(1)], fused_lm_head=True
                    )
                    for n, (rows, inputs) in enumerate(zip(calls.rows, calls.inputs, strict=True), 1)
                ]
            self._keep(calls, outs)
            logps.append(calls.whole([out.log_probs for out in outs]))
            if compute_entropy:
                entropies.append(calls.whole([out.entropy for out in outs]))
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def _keep(self, calls: Calls, outs: list[Any]) -> None:
        """What a subclass keeps of the model's outputs for a batch."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a step, not the summary at the end: also for `report_to`, so in the logs themselves
            now = self._totals() | self._spent
            logs |= {name: round(value - self._logged.get(name, 0.0), 3) for name, value in now.items()}
            self._logged = now
            if logs.get("generate_seconds"):
                logs["tokens_per_second"] = round(logs["tokens"] / logs["generate_seconds"], 1)
        super().log(logs, start_time)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        super()._load_optimizer_and_scheduler(folder)
        state = Path(folder or "") / "entropy_ctrl_state.json"  # TRL's, which is read where TRL's own loading is
        if self.use_adaptive_entropy and folder is not None and state.is_file():
            kept = read_json(state)
            self.entropy_coef, self._last_world_entropy = kept["entropy_coef"], kept["last_world_entropy"]

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(self._saved_batch(f"expected a finite loss, found {loss.item()}"))
        return loss

    def _saved_batch(self, what: str) -> str:
        """Save the newest batch's completions and rewards, and give the error's text, which says where they are."""
        what = f"step {self.state.global_step + 1}: {what}; no optimiser step was taken"
        if self._out is None or self._raw_rewards is None:
            return what
        names = [f.__name__ for f in self.reward_funcs]
        begin = self.accelerator.process_index * len(self._completion_ids)
        own = self._raw_rewards[begin : begin + len(self._completion_ids)]
        texts = self.processing_class.batch_decode(self._completion_ids)
        rows = [
            {"completion": text, "rewards": {n: str(v) for n, v in zip(names, values, strict=True)}}
            for text, values in zip(texts, own.tolist(), strict=True)
        ]
        write_text(self._out / "bad_batch.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        return f"{what}; the batch is in {self._out / 'bad_batch.json'}"
