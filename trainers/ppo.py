"""PPO on the same trainer as GRPO: a learned value, instead of the group's mean, says what was to be expected.

A linear head on the policy's last hidden states predicts the reward still to come at every token, in the same forward
that gives the log-probs. Terms fall due where their segment ends, generalized advantage estimation (`gae`) spreads them
over tokens, and what this takes from TRL's GRPO is all the rest: the clipped ratio, rollouts, rewards, checkpoints.
docs/ppo.md says what differs from the PPO that TRL had.

Genuine surfacing is floored at 0 here too: no advantage pushes it away (see `rewards.credit`).
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from ..errors import UnfeignError
from ..lineage import VALUE_HEAD
from ..shared_prefix import Calls
from .config import PpoSettings
from .gae import by_token, explained_variance, gae
from .grpo import Earned, PolicyTrainer

FILE = "value_head.safetensors"


def add_value_head(policy: Any) -> nn.Linear:
    """Put a value head on a policy: 0 everywhere at first. Exports leave it out."""
    head = nn.Linear(policy.config.get_text_config().hidden_size, 1).to(policy.device, torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    setattr(policy, VALUE_HEAD, head)
    return head


@dataclass
class Valued(FusedCausalLMOutput):
    """Log-probs, and a value for every token."""

    token_values: Tensor | None = None


class PPOTrainer(PolicyTrainer):
    """`PolicyTrainer` with a value head; see `PpoSettings`. `grpo.beta` prices the KL to the reference, a token's share
    being taken off its reward.
    """

    _tag_names = ["trl", "ppo"]
    _name = "PPO"

    def __init__(self, *args: Any, ppo: PpoSettings, **kwargs: Any):
        add_value_head(kwargs["model"])
        super().__init__(*args, **kwargs)
        self._ppo = ppo
        self._values: Tensor | None = None
        self._with_values(kwargs["model"])

    def _with_values(self, policy: Any) -> None:
        """Let the forward that gives log-probs give values too: inside it, so that ranks see the head being used."""
        head, states = getattr(policy, VALUE_HEAD), []
        inner = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        inner.base_model.register_forward_hook(lambda _, args, output: states.append(output.last_hidden_state))
        scored = inner.forward

        @functools.wraps(scored)
        def forward(*args: Any, **kwargs: Any) -> Any:
            states.clear()
            out = scored(*args, **kwargs)
            if kwargs.get("fused_lm_head"):
                with torch.autocast(self.accelerator.device.type, enabled=False):
                    self._values = head(states[-1].float()).squeeze(-1)
                return Valued(**out, token_values=self._values)
            return out

        inner.forward = forward

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As ever, with a learning rate of its own for the head."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(*args, **kwargs)
        head = list(getattr(self.accelerator.unwrap_model(self.model), VALUE_HEAD).parameters())
        known = {id(parameter) for parameter in head}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in known]
        optimizer.add_param_group({"params": head, "lr": self._ppo.value_learning_rate, "weight_decay": 0.0})
        return optimizer

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        """As GRPO's; leaves the values of the same forward, (B, T), in `_values`."""
        if not hasattr(self.accelerator.unwrap_model(model), VALUE_HEAD):  # a reference model of its own
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
            )
        parts, values = [], []
        for ids, mask in zip(*(x.split(batch_size or len(x)) for x in (input_ids, attention_mask)), strict=True):
            parts.append(
                super()._get_per_token_logps_and_entropies(
                    model, ids, mask, logits_to_keep, None, compute_entropy, **kwargs
                )
            )
            assert self._values is not None  # set by the forward
            # Where whole rows were forwarded, prompts and all, a token's value is the one before it, as its logits are.
            whole = self._values.size(1) > logits_to_keep
            values.append(self._values[:, -logits_to_keep - 1 : -1] if whole else self._values)
        self._values = torch.cat(values)
        logps, entropies, aux = zip(*parts, strict=True)
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, aux[-1]

    def _keep(self, calls: Calls, outs: list[Any]) -> None:
        if all(isinstance(out, Valued) for out in outs):
            self._values = calls.whole([out.token_values for out in outs])

    @torch.no_grad()
    def _credited(self, out: dict[str, Any], earned: Earned, mode: str) -> dict[str, Any]:
        """Advantages, and what the value is to learn: returns, old values, and where they count."""
        ids = torch.cat([out["prompt_ids"], out["completion_ids"]], dim=1)
        real = torch.cat([out["prompt_mask"], out["completion_mask"]], dim=1)
        width, device = out["completion_ids"].size(1), ids.device
        old, _, _ = self._get_per_token_logps_and_entropies(
            self.model, ids, real, width, self.args.per_device_train_batch_size
        )
        assert self._values is not None  # set by the pass above
        values = self._values
        total, answer = (part[earned.local].to(device) for part in (earned.total, earned.answer))
        mask = out["completion_mask"].bool() & ~total.isnan()[:, None]
        late = answer if self._credit == "segment" else total
        rewards = by_token(
            (total - late).nan_to_num(), late.nan_to_num(), earned.where.reasoning.to(device), out["completion_mask"]
        ).to(values)
        if "ref_per_token_logps" in out:
            drift = (old - out["ref_per_token_logps"]) * mask
            rewards = rewards - self.beta * drift
            self._metrics[mode]["kl"].append(self._mean(drift, mask))
        advantages, returns = gae(rewards, values, mask, self._ppo.gamma, self._ppo.lam)
        if self._ppo.whiten:
            mean = self._mean(advantages, mask)
            spread = self._mean((advantages - mean) ** 2, mask) ** 0.5
            advantages = (advantages - mean) / (spread + 1e-4) * mask
        surfaced = earned.where.surfaced.to(device)
        below = surfaced & (advantages < 0)
        floored = torch.stack([below.any(1).sum(), surfaced.any(1).sum()]).to(device)
        floored = self.accelerator.gather(floored[None]).sum(0)
        self._metrics[mode]["credit/floored"].append((floored[0] / floored[1].clamp(min=1)).item())
        self._metrics[mode]["value/mean"].append(self._mean(values, mask))
        self._metrics[mode]["value/explained_variance"].append(explained_variance(values[mask], returns[mask]))
        return {
            "advantages": advantages.masked_fill(below, 0.0),
            "old_per_token_logps": old,
            "old_values": values * mask,
            "returns": returns,
            "value_mask": mask,
            "value_tokens": self.accelerator.gather(mask.sum()).sum(),
        }

    def _mean(self, values: Tensor, mask: Tensor) -> float:
        """Mean over the tokens of all processes."""
        both = torch.stack([(values * mask).sum().float(), mask.sum().float()])
        total, count = self.accelerator.gather(both[None]).sum(0)
        return (total / count.clamp(min=1)).item()

    def _compute_loss(self, model, inputs):
        beta, self.beta = self.beta, 0.0  # the KL is in the rewards
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        values, old, returns = self._values, inputs["old_values"], inputs["returns"]
        assert values is not None  # set by the forward of the loss
        near = old + (values - old).clamp(-self._ppo.value_clip, self._ppo.value_clip)
        errors = torch.max((values - returns) ** 2, (near - returns) ** 2) * inputs["value_mask"]
        # Tokens of the whole generation batch, as TRL's `dapo` counts them: ranks and micro-batches then add up.
        tokens = inputs["value_tokens"].clamp(min=1) / self.accelerator.num_processes
        if self.model.training:
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["value/loss"].append(self._mean(errors.detach(), inputs["value_mask"]))
        return loss + self._ppo.value_coefficient * 0.5 * errors.sum() / tokens

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        policy = self.accelerator.unwrap_model(self.model)
        head = getattr(policy, VALUE_HEAD)
        weights = state_dict if state_dict is not None else policy.state_dict()
        super()._save(output_dir, {k: v for k, v in weights.items() if not k.startswith(f"{VALUE_HEAD}.")})
        if not self.args.should_save:
            return
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()},
            Path(output_dir or self.args.output_dir) / FILE,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        path = Path(resume_from_checkpoint) / FILE
        if not path.is_file():
            raise UnfeignError(f"{FILE}, as PPO's checkpoints have it", "none", resume_from_checkpoint)
        policy = self.accelerator.unwrap_model(model or self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        getattr(policy, VALUE_HEAD).load_state_dict(load_file(path))
