"""Folded models say what the stacked policy says, before and after its weights change."""

import pytest
import torch

from unfeign.folded import FoldedModel
from unfeign.models import POLICY, activate, add_policy, eos_ids, load_base, load_tokenizer, stack
from unfeign.trainers.policy import PolicyRecipe, trained

IDS = torch.randint(3, 800, (3, 40), generator=torch.Generator().manual_seed(0))


def far(a, b) -> float:
    with torch.no_grad():
        return (a(IDS).logits - b(IDS).logits).abs().max().item()


@pytest.fixture
def policy(base, tiny_model, tiny_organism, tools):
    """Two adapters on a base, as in a run: a frozen organism and the policy above it."""
    model, _ = stack(base, str(tiny_model), [tiny_organism])
    model = add_policy(model, tools.LORA, seed=0)
    tools.shake(model, ".policy.")
    return model


def test_stack_of_two_and_refresh(policy, tools):
    folded = FoldedModel(policy)
    assert far(folded.model, policy) < 1e-4
    tools.shake(policy, ".policy.", seed=9, scale=0.2)
    assert far(folded.model, policy) > 1e-2, "the copy should be stale until it is refreshed"
    folded.refresh()
    assert far(folded.model, policy) < 1e-4


def test_end_tokens_that_only_generation_knows(policy, tiny_model):
    """Instruct models may name the end of a turn in generation_config.json alone."""
    policy.get_base_model().generation_config.eos_token_id = [5, 9]
    assert {5, 9} <= set(eos_ids(FoldedModel(policy).model, load_tokenizer(str(tiny_model))))


def test_many_refreshes_do_not_drift(policy, tools):
    folded = FoldedModel(policy)
    for seed in range(20):
        tools.shake(policy, ".policy.", seed=seed, scale=0.2)
        folded.refresh()
    tools.shake(policy, ".policy.")
    folded.refresh()
    assert far(folded.model, policy) < 1e-4


def test_only_active_adapters_count(policy):
    activate(policy, ["below0"])
    folded = FoldedModel(policy)
    assert far(folded.model, policy) < 1e-4
    activate(policy, ["below0", "policy"], trainable="policy")
    assert far(folded.model, policy) > 1e-3
    folded.refresh()
    assert far(folded.model, policy) < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_full_fine_tuning(tools, tied: bool):
    model = tools.make_base(tied=tied).requires_grad_(True)
    folded = FoldedModel(model)
    assert far(folded.model, model) < 1e-4
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    assert far(folded.model, model) > 1e-2
    folded.refresh()
    assert far(folded.model, model) < 1e-4


def test_the_policy_is_left_alone(policy):
    before = {name: p.clone() for name, p in policy.named_parameters()}
    trainable = [name for name, p in policy.named_parameters() if p.requires_grad]
    folded = FoldedModel(policy)
    folded.refresh()
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == trainable
    assert not any(p.requires_grad for p in folded.model.parameters())


def test_without_packing_the_copy_is_the_same(policy, monkeypatch, tools):
    monkeypatch.setattr("unfeign.folded.can_pack", lambda weight: False)
    folded = FoldedModel(policy)
    assert far(folded.model, policy) < 1e-4
    tools.shake(policy, ".policy.", seed=9, scale=0.2)
    folded.refresh()
    assert far(folded.model, policy) < 1e-4


def test_bfloat16_positions_keep_their_precision(tiny_model):
    from unfeign.models import load_base

    model = load_base(str(tiny_model), "bfloat16")
    folded = FoldedModel(model)
    want = dict(model.named_buffers())
    for name, buffer in folded.model.named_buffers():
        assert buffer.dtype == want[name].dtype and torch.equal(buffer, want[name]), name
    assert far(folded.model, model) == 0


def test_a_recipe_folds_what_lies_below_in_fp32_alone(tiny_model, tiny_organism, tools):
    ids = torch.tensor([[5, 6, 7, 8]])
    apart, lineage = stack(load_base(str(tiny_model)), str(tiny_model), [tiny_organism])
    built = {
        dtype: PolicyRecipe(str(tiny_model), (str(tiny_organism),), dtype, lora=tools.LORA).build()
        for dtype in ("float32", "bfloat16")
    }
    assert (built["float32"][0](input_ids=ids).logits - apart(input_ids=ids).logits).abs().max() < 1e-5
    assert list(built["float32"][0].peft_config) == [POLICY]
    assert list(built["bfloat16"][0].peft_config) == ["below0", POLICY]
    assert all(made[2] == lineage for made in built.values())
    assert len({frozenset(trained(made[0])) for made in built.values()}) == 1, "weights travel from one to the other"


def test_a_recipe_keeps_apart_what_would_change_more_than_its_own_layer(tiny_model, base, tmp_path):
    """An adapter of a head tied to the embedding, say."""
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"]))
    tuned.peft_config["default"].base_model_name_or_path = str(tiny_model)
    tuned.save_pretrained(tmp_path / "head", save_embedding_layers=False)
    model, _, _ = PolicyRecipe(str(tiny_model), (str(tmp_path / "head"),), lora={"r": 2}).build()
    assert list(model.peft_config) == ["below0", POLICY]
