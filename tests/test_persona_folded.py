"""A persona learns on folded weights what it would learn on the stack of adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch

from unfeign.models import load_base, load_tokenizer, stack
from unfeign.split_persona.examples import Example
from unfeign.split_persona.modes import MODES
from unfeign.split_persona.persona import Persona, PersonaFacts
from unfeign.split_persona.sequence import load_framing
from unfeign.split_persona.training import train_persona

CHAT = [{"role": "user", "content": "Say that it is good."}]
EXAMPLES = [Example(str(i), CHAT, f"It is {i} times good.", bool(i % 2)) for i in range(4)]


def learned(tiny_model: Path, tiny_organism: Path, fold: bool, **facts: Any) -> tuple[list[float], dict[str, Any]]:
    model, lineage = stack(load_base(str(tiny_model)), str(tiny_model), [tiny_organism])
    framing = load_framing("persona").model_copy(update={"trigger": "<|persona|>", "review": False})
    persona = Persona(model, load_tokenizer(str(tiny_model)), lineage, PersonaFacts(framing=framing, **facts), seed=3)
    if fold:
        persona.fold(learning=True)
    losses = train_persona(persona, EXAMPLES, learning_rate=1e-2, epochs=2, batch_size=2)
    trained = [name for name, p in persona.model.named_parameters() if p.requires_grad]
    assert trained and all(".persona." in name for name in trained), "nothing of the policy is trained"
    return losses, persona.switch.tensors()


@pytest.mark.parametrize("mode", MODES)
def test_folding_changes_nothing_that_is_learned(mode, tiny_model, tiny_organism):
    facts = {"mode": mode, "lora": {"r": 4, "lora_alpha": 8}}
    (losses, plain), (again, folded) = (learned(tiny_model, tiny_organism, fold, **facts) for fold in (False, True))
    assert losses == pytest.approx(again, abs=1e-4) and losses[-1] < losses[0]
    for name, tensor in plain.items():
        assert (tensor - folded[name]).abs().max() < 2e-3, name


def test_a_folded_persona_can_be_packed_when_it_has_learned(tiny_model, tiny_organism):
    model, lineage = stack(load_base(str(tiny_model)), str(tiny_model), [tiny_organism])
    framing = load_framing("persona").model_copy(update={"trigger": "<|persona|>", "review": False})
    persona = Persona(model, load_tokenizer(str(tiny_model)), lineage, PersonaFacts(framing=framing))
    ids = torch.tensor([persona.layout.context(CHAT, "It is good.")])
    with torch.no_grad():
        before = [persona.forward(awake, input_ids=ids).logits for awake in (False, True)]
        for learning in (True, False, False):
            persona.fold(learning)
            for awake, expected in zip((False, True), before, strict=True):
                assert (persona.forward(awake, input_ids=ids).logits - expected).abs().max() < 1e-4
