"""Shared prefixes in training against stock TRL: same log-probs, entropies and gradients, however batches are cut."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from unfeign.models import add_policy
from unfeign.rewards.plugin import LoadedReward
from unfeign.shared_prefix import expandable
from unfeign.trainers.grpo import PolicyTrainer, whole_groups_shuffled

GROUP, PROMPTS = 4, 3


def arguments(folder, **changes: Any) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder), use_cpu=True, report_to=[], num_generations=GROUP, max_completion_length=9,
        per_device_train_batch_size=PROMPTS * GROUP, **({"bf16": False, "gradient_checkpointing": False} | changes),
    )  # fmt: skip


def nothing(completions: list[Any], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def trainers(model: Any, tokenizer: Any, folder, **changes: Any) -> SimpleNamespace:
    """Ours and stock TRL's, on the same model."""
    shared = {
        "model": model,
        "train_dataset": Dataset.from_list([{"prompt": "x"}]),
        "processing_class": tokenizer,
    }
    stock = GRPOTrainer(reward_funcs=[nothing], args=arguments(folder, **changes), **shared)
    ours = PolicyTrainer(
        rewards=[LoadedReward("none", 1.0, nothing)],
        credit="segment",
        lineage=None,
        args=arguments(folder, **changes),
        **shared,
    )  # type: ignore[arg-type]
    return SimpleNamespace(ours=ours, stock=stock)


def made_batch(vocab: int, prompt: int = 20, width: int = 9) -> dict[str, Any]:
    """Groups with prompts of unequal lengths, padded on the left, and completions, padded on the right."""
    generator = torch.Generator().manual_seed(3)
    rows, lengths = PROMPTS * GROUP, [prompt - 3 * i for i in range(PROMPTS)]
    prompts = torch.randint(3, vocab, (PROMPTS, prompt), generator=generator)
    real = torch.arange(prompt)[None] >= prompt - torch.tensor(lengths)[:, None]
    ids = torch.randint(3, vocab, (rows, width), generator=generator)
    ends = torch.randint(1, width + 1, (rows,), generator=generator)
    ends[0] = width
    mask = (torch.arange(width)[None] < ends[:, None]).long()
    return {
        "prompt_ids": (prompts * real).repeat_interleave(GROUP, 0),
        "prompt_mask": real.long().repeat_interleave(GROUP, 0),
        "completion_ids": ids * mask,
        "completion_mask": mask,
        "advantages": torch.randn(rows, width, generator=generator),
        "num_items_in_batch": mask.sum(),
    }


def gradients(trainer: Any, batch: dict[str, Any], parts: int) -> dict[str, torch.Tensor]:
    """Of the loss over a batch cut into micro-batches."""
    model = trainer.model.train()
    model.zero_grad(set_to_none=True)
    trainer.current_gradient_accumulation_steps = parts
    trainer.args.steps_per_generation = parts
    for part in split_tensor_dict(batch, parts):
        trainer.accelerator.backward(trainer._compute_loss(model, part))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def policy(base: Any, tools: Any, trained: str) -> Any:
    if trained == "full":
        return base.requires_grad_(True)
    model = add_policy(base, tools.LORA, seed=0)
    tools.shake(model, ".policy.")
    return model


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("parts", [1, 3, 6], ids=["one batch", "a group each", "half a group each"])
def test_gradients_equal_stock(base, tools, tokenizer, tmp_path, trained: str, parts: int):
    both = trainers(policy(base, tools, trained), tokenizer, tmp_path, temperature=0.7)
    batch = made_batch(base.config.vocab_size)
    want = gradients(both.stock, batch, parts)
    got = gradients(both.ours, whole_groups_shuffled(batch), parts)
    assert got.keys() == want.keys() and len(got) > 10
    for name, value in want.items():
        assert value.norm() > 0, name
        assert (got[name] - value).norm() < 1e-4 * value.norm(), name


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_logps_and_entropies_equal_stock(base, tools, tokenizer, tmp_path, trained: str, chunk: int | None):
    both = trainers(policy(base, tools, trained), tokenizer, tmp_path, temperature=0.7)
    batch = made_batch(base.config.vocab_size)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    real = batch["completion_mask"].bool()
    with torch.no_grad():
        found = [
            t._get_per_token_logps_and_entropies(t.model, ids, mask, 9, chunk, compute_entropy=True)
            for t in (both.ours, both.stock)
        ]
    for ours, stock in zip(found[0][:2], found[1][:2], strict=True):
        assert (ours - stock)[real].abs().max() < 1e-4


def test_bf16_is_close_to_stock(base, tools, tokenizer, tmp_path):
    """Autocast rounds differently when fewer rows are forwarded; the gradients still point the same way."""
    both = trainers(policy(base, tools, "lora"), tokenizer, tmp_path, bf16=True)
    batch = made_batch(base.config.vocab_size)
    want, got = gradients(both.stock, batch, 1), gradients(both.ours, batch, 1)
    a, b = (torch.cat([found[name].flatten().float() for name in want]) for found in (want, got))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99


def test_groups_stay_together_when_shuffled():
    batch = made_batch(100) | {"texts": [str(row) for row in range(PROMPTS * GROUP)], "none": None}
    for seed in range(5):
        torch.manual_seed(seed)
        found = whole_groups_shuffled(batch)
        rows = [int(text) for text in found["texts"]]
        assert sorted(rows) == list(range(PROMPTS * GROUP))
        assert all(rows[at : at + GROUP] == list(range(rows[at], rows[at] + GROUP)) for at in range(0, 12, GROUP))
        assert torch.equal(found["advantages"], batch["advantages"][rows])
        assert found["num_items_in_batch"] == batch["num_items_in_batch"] and found["none"] is None


def test_caches_that_cannot_be_branched():
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MambaConfig,
        MambaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )

    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}
    heads = {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert expandable(LlamaForCausalLM(LlamaConfig(**small, **heads)))
    assert expandable(MistralForCausalLM(MistralConfig(**small, **heads, sliding_window=None)))
    assert not expandable(MistralForCausalLM(MistralConfig(**small, **heads, sliding_window=8)))
    assert not expandable(MambaForCausalLM(MambaConfig(**small, state_size=4)))


@pytest.mark.parametrize("why", ["gradient_checkpointing", "cache"])
def test_whole_rows_where_prefixes_cannot_be_shared(base, tools, tokenizer, tmp_path, why: str):
    """Said once, and learned the same."""
    changes = {"gradient_checkpointing": True} if why == "gradient_checkpointing" else {}
    if why == "cache":
        base.config.layer_types = ["sliding_attention"] * base.config.num_hidden_layers
        assert not expandable(base)
    model = policy(base, tools, "lora")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        both = trainers(model, tokenizer, tmp_path, **changes)
    mine = [str(w.message) for w in said if "forwarded anew" in str(w.message)]
    assert len(mine) == 1 and (why if why == "gradient_checkpointing" else "its cache") in mine[0]
    batch = made_batch(base.config.vocab_size)
    want, got = gradients(both.stock, batch, 1), gradients(both.ours, batch, 1)
    assert all((got[name] - value).norm() <= 1e-4 * value.norm() for name, value in want.items())


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "width"), [(64, 32)])
def test_the_bundled_model_learns_what_stock_trl_teaches(tools, tmp_path, prompt: int, width: int):
    """Real weights and a real head over the vocabulary; benchmarks/training_step.py compares longer ones."""
    from unfeign.models import load_base, load_tokenizer

    name = "bundled:smollm2-135m-instruct"
    model = policy(load_base(name), tools, "lora")
    both = trainers(model, load_tokenizer(name), tmp_path)
    batch = made_batch(model.config.vocab_size, prompt, width)
    want = gradients(both.stock, batch, PROMPTS)
    got = gradients(both.ours, whole_groups_shuffled(batch), PROMPTS)
    a, b = (torch.cat([found[key].flatten() for key in want]) for found in (want, got))
    assert (a - b).norm() < 1e-4 * a.norm()
