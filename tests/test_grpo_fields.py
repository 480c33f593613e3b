"""Every field of TRL's `GRPOConfig` is taken or refused by name; those that change the loss run on our trainer."""

import json
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig

from unfeign.cli import main
from unfeign.trainers.config import REFUSED, refusal

GRPO = {"max_steps": 2, "num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 8}
TAKEN = """
per_device_train_batch_size max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim
optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps
average_tokens_across_devices max_grad_norm bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs
gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
use_liger_kernel liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps logging_strategy
logging_steps logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
save_only_model save_strategy save_steps save_on_each_node enable_jit_checkpoint push_to_hub
hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
restore_callback_states_from_checkpoint full_determinism use_cpu accelerator_config parallelism_config
dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters
ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout debug
skip_memory_metrics do_train local_rank router_aux_loss_coef disable_dropout cast_lm_head_to_fp32 num_generations
max_completion_length pad_to_multiple_of generation_batch_size steps_per_generation chat_template_kwargs beta
num_iterations epsilon delta epsilon_high sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos
vespo_k_neg vespo_lambda_neg importance_sampling_level scale_rewards loss_type mask_truncated_completions
sync_ref_model ref_model_mixup_alpha ref_model_sync_steps top_entropy_quantile entropy_coef use_adaptive_entropy
entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target off_policy_mask_threshold use_bias_correction_kl
log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
"""


def test_every_field_is_taken_or_refused():
    """A field that a new TRL brings must be looked at: does our trainer honour it?"""
    fields = set(GRPOConfig.__dataclass_fields__)
    assert {name for name in fields if refusal(name) is None} == set(TAKEN.split())
    assert not set(REFUSED) - fields, "refused, but no field"


@pytest.mark.parametrize(
    "changes",
    [
        *({"loss_type": kind} for kind in ("grpo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo")),
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"beta": 0.1, "use_bias_correction_kl": True},
        {"num_iterations": 2, "epsilon": 0.1, "epsilon_high": 0.3, "delta": 2.0},
        {"steps_per_generation": 2, "per_device_train_batch_size": 2},
        {"top_entropy_quantile": 0.5, "entropy_coef": 0.01},
        {"mask_truncated_completions": True, "off_policy_mask_threshold": 0.5},
        {"pad_to_multiple_of": 8},
        {"scale_rewards": "none", "disable_dropout": True},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"log_completions": True, "num_completions_to_print": 1},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_fields_that_change_the_loss_run(write_config, tmp_path: Path, reward_source, changes: dict[str, Any]):
    (tmp_path / "mine.py").write_text(reward_source)
    config = write_config(
        rewards=[{"fn": "mine.py:variety"}], audit={"before": False, "after": False}, grpo=GRPO | changes
    )
    main(["train", str(config)])
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(row["grad_norm"] >= 0 for row in steps)
    assert any(row["grad_norm"] > 0 for row in steps) or changes.get("mask_truncated_completions")
