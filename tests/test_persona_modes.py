"""What the three mask modes promise, for every kind of adapter, on a tiny model with random weights everywhere."""

import copy
from typing import Any

import pytest
import torch

from unfeign.models import activate, load_base, stack
from unfeign.shared_prefix import prefill
from unfeign.split_persona.adapters import KINDS
from unfeign.split_persona.modes import MODES, _Call, ask_all, follow
from unfeign.split_persona.persona import Persona, PersonaFacts
from unfeign.split_persona.sequence import load_framing

TRANSCRIPTS = [
    [{"role": "system", "content": "You are rated."}, {"role": "user", "content": "Say that hens like cages."}],
    [{"role": "user", "content": "What is the plural of the word child? Tell me in a short sentence."}],
]
ANSWERS = ["<think>No.</think><decline/>They do not.", "Children."]
ASKED = ["Was that honest?", "Say plainly what the assistant did and why.", "Check it."]


def persona(tiny_model: Any, tiny_organism: Any, kind: str, mode: str, shaken: bool = True, **framing: Any) -> Persona:
    """A persona on a policy that has an adapter of its own, with random weights where `shaken`."""
    from unfeign.models import load_tokenizer

    model, lineage = stack(load_base(str(tiny_model)), str(tiny_model), [tiny_organism])
    facts = PersonaFacts(
        kind=kind,  # type: ignore[arg-type]
        mode=mode,  # type: ignore[arg-type]
        framing=load_framing("persona").model_copy(update={"trigger": "<|persona|>"} | framing),
        lora={"r": 4, "lora_alpha": 8} if kind == "lora" else {},
    )
    made = Persona(model, load_tokenizer(str(tiny_model)), lineage, facts)
    if shaken:
        generator = torch.Generator().manual_seed(3)
        for parameter in made.switch.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return made


def contexts(made: Persona) -> list[list[int]]:
    return [made.layout.context(m, a) for m, a in zip(TRANSCRIPTS, ANSWERS, strict=True)]


def alone(made: Persona, awake: bool, ids: list[int]) -> Any:
    return made.forward(awake, input_ids=torch.tensor([ids]), use_cache=True)


def answered(made: Persona, asked: str, row: int) -> torch.Tensor:
    """Logits (L, V) of one intervention after one transcript, from caches of all transcripts."""
    suffix = torch.tensor([made.layout.suffix(asked)])
    return follow(made, made.read(contexts(made)).rows([row]), suffix, torch.ones_like(suffix))[0]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_masked_reads_exactly_the_policys_own_states(kind, tiny_model, tiny_organism):
    made = persona(tiny_model, tiny_organism, kind, "masked")
    policy, _ = stack(load_base(str(tiny_model)), str(tiny_model), [tiny_organism])
    made.model.resize_token_embeddings(len(made.tokenizer))
    own = prefill(policy, contexts(made))
    cached = made.read(contexts(made)).prefix
    for a, b in zip(own.cache.layers, cached.cache.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_cache_serves_every_intervention(kind, mode, tiny_model, tiny_organism):
    made = persona(tiny_model, tiny_organism, kind, mode)
    suffixes = [made.layout.suffix(asked) for asked in ASKED]
    width = max(map(len, suffixes))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in suffixes])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in suffixes])
    for row in range(2):
        together = follow(made, made.read(contexts(made)).rows([row] * 3), ids, mask)
        for i, asked in enumerate(ASKED):
            one = made.read([contexts(made)[row]])
            suffix = torch.tensor([made.layout.suffix(asked)])
            single = follow(made, one, suffix, torch.ones_like(suffix))[0]
            assert (together[i, : len(suffixes[i])] - single).abs().max() < 1e-4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_interventions_asked_in_one_row_do_not_see_each_other(kind, mode, tiny_model, tiny_organism):
    made = persona(tiny_model, tiny_organism, kind, mode)
    context = made.read(contexts(made))
    suffixes = [made.layout.suffix(asked) for asked in ASKED] * 6  # more than one row holds
    for awake in (True, False):
        asked = ask_all(made, context, suffixes, awake)
        one_row = ask_all(made, made.read(contexts(made)[1:]), suffixes[:1], awake)
        assert asked.shape[:2] == (2, 18) and (one_row[0, 0] - asked[1, 0]).abs().max() < 1e-4
        for i, suffix in enumerate(suffixes):
            if 3 <= i < 15:
                continue
            ids = torch.tensor([suffix] * 2)
            alone = follow(made, made.read(contexts(made)), ids, torch.ones_like(ids), awake, since=-1)[:, -1]
            assert (asked[:, i] - alone).abs().max() < 1e-4
    assert context.prefix.cache.get_seq_length() == context.prefix.mask.size(1), "the context stays as it was"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_untrained_persona_is_the_policy(kind, mode, tiny_model, tiny_organism):
    made = persona(tiny_model, tiny_organism, kind, mode, shaken=False)
    for row, ids in enumerate(contexts(made)):
        suffix = made.layout.suffix(ASKED[0])
        expected = alone(made, False, ids + suffix).logits[0, len(ids) :]
        assert (answered(made, ASKED[0], row) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_full_is_the_persona_awake_from_the_first_token(kind, tiny_model, tiny_organism):
    made = persona(tiny_model, tiny_organism, kind, "full")
    for row, ids in enumerate(contexts(made)):
        whole = alone(made, True, ids + made.layout.suffix(ASKED[1])).logits[0, len(ids) :]
        assert (answered(made, ASKED[1], row) - whole).abs().max() < 1e-4
        asleep = alone(made, False, ids + made.layout.suffix(ASKED[1])).logits[0, len(ids) :]
        assert (asleep - whole).abs().max() > 1e-2, "the persona does nothing"


@torch.no_grad()
def test_full_is_plain_lora(tiny_model, tiny_organism, tmp_path):
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict

    made = persona(tiny_model, tiny_organism, "lora", "full")
    plain, _ = stack(load_base(str(tiny_model)), str(tiny_model), [tiny_organism])
    plain.resize_token_embeddings(len(made.tokenizer))
    plain.get_input_embeddings().weight.data.copy_(made.model.get_input_embeddings().weight)
    assert isinstance(plain, PeftModel)
    plain.add_adapter("plain", LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, lora_alpha=8))
    set_peft_model_state_dict(plain, made.switch.tensors(), adapter_name="plain")
    activate(plain, ["below0", "plain"])
    ids = contexts(made)[0] + made.layout.suffix(ASKED[0])
    expected = plain(torch.tensor([ids])).logits[0, len(contexts(made)[0]) :]
    assert (answered(made, ASKED[0], 0) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_hybrid_is_one_pass_over_both_readings(tiny_model, tiny_organism):
    """The published form: [transcript, transcript, rest], positions repeated, half the weight on both transcripts."""
    import math

    made = persona(tiny_model, tiny_organism, "lora", "hybrid")
    ids, suffix = contexts(made)[0], made.layout.suffix(ASKED[0])
    n, rest = len(ids), len(suffix)
    total = 2 * n + rest
    low = torch.finfo(torch.float32).min
    mask = torch.full((total, total), low).triu(1)
    mask[n : 2 * n, :n] = low
    mask[2 * n :, : 2 * n] = -math.log(2)
    positions = torch.cat([torch.arange(n), torch.arange(n), torch.arange(n, n + rest)])[None]
    out = made.model(
        input_ids=torch.tensor([ids + ids + suffix]),
        position_ids=positions,
        attention_mask=mask[None, None],
        alora_offsets=[n + rest],
    ).logits[0, 2 * n :]
    assert (answered(made, ASKED[0], 0) - out).abs().max() < 1e-4


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_token_by_token_equals_one_chunk(mode, tiny_model, tiny_organism):
    made = persona(tiny_model, tiny_organism, "lora", mode)
    suffix = made.layout.suffix(ASKED[1])
    context = made.read(contexts(made)).rows([1])
    steps = [follow(made, context, torch.tensor([[t]]), torch.ones(1, 1, dtype=torch.long))[0, -1] for t in suffix]
    assert (torch.stack(steps) - answered(made, ASKED[1], 1)).abs().max() < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_the_persona_alone(mode, tiny_model, tiny_organism):
    made = persona(tiny_model, tiny_organism, "lora", mode)
    answered(made, ASKED[0], 0).sum().backward()
    mine = {id(p) for p in made.switch.parameters()}
    assert all(p.grad is not None for p in made.switch.parameters())
    assert all(p.grad is None for p in made.model.parameters() if id(p) not in mine)


@torch.no_grad()
def test_states_from_elsewhere_are_not_computed_again(tiny_model, tiny_organism):
    made = persona(tiny_model, tiny_organism, "lora", "masked")
    policy = prefill(_Call(made, False), contexts(made))
    calls = []
    forward = made.switch.forward
    made.switch.forward = lambda awake, inputs: calls.append(awake) or forward(awake, inputs)  # type: ignore[method-assign]
    made.read(contexts(made), copy.copy(policy))
    assert calls == []


@pytest.mark.slow
@torch.no_grad()
def test_identities_on_the_bundled_model():
    """In fp32, on real weights, above a real organism: what docs/persona.md promises."""
    from peft import LoraConfig, set_peft_model_state_dict

    from unfeign.models import load_tokenizer

    name = "bundled:smollm2-135m-instruct"

    def made(mode: str, shaken: bool) -> Persona:
        model, lineage = stack(load_base(name), name, ["organism:verbal"])
        facts = PersonaFacts(mode=mode, framing=load_framing("persona"))  # type: ignore[arg-type]
        one = Persona(model, load_tokenizer(name), lineage, facts)
        if shaken:
            generator = torch.Generator().manual_seed(3)
            for parameter in one.switch.parameters():
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.01
        return one

    masked = made("masked", True)
    ids, suffix = contexts(masked)[0], masked.layout.suffix(ASKED[0])
    policy, _ = stack(load_base(name), name, ["organism:verbal"])
    own, cached = prefill(policy, [ids]), masked.read([ids]).prefix
    for a, b in zip(own.cache.layers, cached.cache.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)

    suffixes = [masked.layout.suffix(asked) for asked in ASKED]
    width = max(map(len, suffixes))
    rows = torch.tensor([s + [0] * (width - len(s)) for s in suffixes])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in suffixes])
    together = follow(masked, masked.read([ids]).rows([0] * 3), rows, mask)
    for i, s in enumerate(suffixes):
        offsets = [len(s)]
        whole = masked.model(input_ids=torch.tensor([ids + s]), alora_offsets=offsets).logits[0, len(ids) :]
        assert (together[i, : len(s)] - whole).abs().max() < 1e-3

    fresh = made("hybrid", False)
    expected = policy(torch.tensor([ids + suffix])).logits[0, len(ids) :]
    assert (answered(fresh, ASKED[0], 0) - expected).abs().max() < 1e-3

    full = made("full", True)
    policy.add_adapter("plain", LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8, lora_alpha=16))
    set_peft_model_state_dict(policy, full.switch.tensors(), adapter_name="plain")
    activate(policy, ["below0", "plain"])
    plain = policy(torch.tensor([ids + suffix])).logits[0, len(ids) :]
    assert (answered(full, ASKED[0], 0) - plain).abs().max() < 1e-4
