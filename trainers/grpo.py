"""GRPO on TRL's trainer, with four changes.

1. Advantages are (B, T): terms credit the segment that earns them (`rewards.credit`). TRL's loss accepts that shape.
2. Log-probs forward every distinct prompt once (`unfeign.shared_prefix`), unless gradient checkpointing is on.
3. Where workers sample from another build of the policy, advantages are multiplied by a truncated ratio (`importance`).
4. A checkpoint holds the policy's own adapter and its lineage, not the whole stack; it is written aside and renamed,
   and holds no pickle (`checkpoint`).

A row whose judge or worker failed is masked whole: its reward is NaN in every column, so neither the group's mean nor
the loss sees it. A reward or a loss that is not finite stops the run before the optimiser step, with the batch saved.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from trl import GRPOTrainer
from trl.trainer.utils import is_async_callable

from ..files import CANARY, write_text
from ..lineage import Lineage
from ..models import POLICY, activate, load_policy, save_policy
from ..rewards.credit import layout, segment_credit, sequence_credit
from ..rewards.plugin import LoadedReward
from ..rewards.terms import Score
from ..rewards.verbalized_rejection import transcripts_from_columns
from ..rewards.verdict import JudgeFailure
from ..shared_prefix import completion_logits
from . import checkpoint
from .importance import truncated_ratio

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
    not_finite: list[int] = []

    def noted(values: Any) -> Any:
        """TRL turns None into NaN, so a NaN of the reward's own must be seen here."""
        not_finite[:] = [i for i, value in enumerate(values) if value is not None and not math.isfinite(value)]
        return values

    if is_async_callable(fn):

        async def named(*args: Any, **kwargs: Any) -> Any:
            return noted(await fn(*args, **kwargs))
    else:

        def named(*args: Any, **kwargs: Any) -> Any:
            return noted(fn(*args, **kwargs))

    named.__name__ = reward.name
    named.not_finite = not_finite  # type: ignore[attr-defined]
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
        self._saving_in: Path | None = None
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
        """A row of `completions.jsonl` for every sample of this process: the run's ledger."""
        if self._out is None:
            return
        begin = self.accelerator.process_index * len(inputs)
        own = (rewards * self.reward_weights.to(rewards.device))[begin : begin + len(inputs)]
        with (self._out / "completions.jsonl").open("a", encoding="utf-8") as file:
            for row, completion, values in zip(inputs, completions, own.tolist(), strict=True):
                numbers = [v for v in values if not math.isnan(v)]
                fields = {
                    "step": self.state.global_step,
                    "sample_id": row.get("sample_id"),
                    "scenario_id": row.get("scenario_id"),
                    "reward": sum(numbers) if numbers else None,
                    "failed": row.get("rollout_failed"),
                    "completion": completion if isinstance(completion, str) else completion[0]["content"],
                    "canary": CANARY,
                }
                file.write(json.dumps(fields, ensure_ascii=False) + "\n")

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
            segment_credit(total, answer, where, group, self.scale_rewards)
            if self._credit == "segment"
            else sequence_credit(total, where, group, self.scale_rewards)
        )
        out["advantages"] = credit.advantages[local].to(device)
        self._metrics[mode]["credit/floored"].append(credit.floored)
        if self._correction != "off" and "sampling_per_token_logps" in out:
            self._correct(out, mode)
        return out

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a step, not the summary at the end: also for `report_to`, so in the logs themselves
            now = self._totals() | self._spent
            logs |= {name: round(value - self._logged.get(name, 0.0), 3) for name, value in now.items()}
            self._logged = now
            if logs.get("generate_seconds"):
                logs["tokens_per_second"] = round(logs["tokens"] / logs["generate_seconds"], 1)
        super().log(logs, start_time)

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
        texts = self.processing_class.batch_decode(self._completion_ids)
        rows = [
            {"completion": text, "rewards": {n: str(v) for n, v in zip(names, values, strict=True)}}
            for text, values in zip(texts, self._raw_rewards.tolist(), strict=False)
        ]
        write_text(self._out / "bad_batch.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        return f"{what}; the batch is in {self._out / 'bad_batch.json'}"

    def save_final(self) -> Path:
        """The newest checkpoint's folder, saved now unless this step has one already."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if not (folder / "trainer_state.json").is_file():
            self._save_checkpoint(self.model, trial=None)
        return folder

    def _save_checkpoint(self, model, trial) -> None:
        if not self.args.should_save:
            super()._save_checkpoint(model, trial)
            return
        with checkpoint.aside(Path(self.args.output_dir), f"checkpoint-{self.state.global_step}") as scratch:
            self._saving_in = scratch
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_in = None

    def _get_output_dir(self, trial) -> str:
        return str(self._saving_in) if self._saving_in else super()._get_output_dir(trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # their states are sharded: their own formats
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            checkpoint.save_training_state(Path(output_dir), self.optimizer, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(folder)
        else:
            checkpoint.load_training_state(Path(folder), self.optimizer, self.lr_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.should_save:
            checkpoint.save_random_state(Path(output_dir))

    def _load_rng_state(self, folder: str | None) -> None:
        if folder is not None:
            checkpoint.load_random_state(Path(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        policy = self.accelerator.unwrap_model(model or self.model)
        if POLICY in getattr(policy, "peft_config", {}):
            load_policy(policy, Path(resume_from_checkpoint) / POLICY, self._lineage)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if POLICY not in getattr(model, "peft_config", {}):
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        save_policy(model, folder, self._lineage)
        self.processing_class.save_pretrained(folder)
