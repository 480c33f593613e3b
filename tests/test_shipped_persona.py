"""The persona that is shipped: small, for the shipped organism, and able to tell its deeds apart."""

import numpy as np
import pytest

from unfeign.lineage import Layer, Lineage, adapter_file, read_lineage, sha256
from unfeign.models import adapter_folder, load_base, load_tokenizer, stack
from unfeign.split_persona.deeds import known_chances
from unfeign.split_persona.examples import read_examples
from unfeign.split_persona.persona import EXAMPLES, SPIKES, check_policy, load_persona, persona_folder, read_facts

FOLDER = persona_folder("persona:honest")


def test_it_is_for_the_shipped_organism_and_small():
    organism = adapter_folder("organism:verbal")
    trained_on = read_lineage(FOLDER)
    assert trained_on is not None
    here = Lineage(base=trained_on.base, adapters=[Layer(name="verbal", sha256=sha256(adapter_file(organism)))])
    assert check_policy(FOLDER, here) is False, "it is stale"
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6e6
    assert read_facts(FOLDER).mode == "masked"


def test_it_learned_pairs_that_differ_in_the_deed_of_train_families():
    from unfeign.envs.family import families

    learned, known = read_examples(FOLDER / EXAMPLES), read_examples(FOLDER / SPIKES)
    prompts: dict[str, set[bool]] = {}
    for one in learned:
        prompts.setdefault(one.id, set()).add(one.failed)
    assert all(flags == {True, False} for flags in prompts.values() if True in flags)
    assert {families()[e.topic].split for e in learned} == {"train"}
    assert {families()[e.topic].split for e in known} == {"validation"}


@pytest.mark.slow
def test_it_flags_what_complied_and_nothing_else():
    name = "bundled:smollm2-135m-instruct"
    model, lineage = stack(load_base(name), name, ["organism:verbal"])
    persona = load_persona(FOLDER, model, load_tokenizer(name), lineage)
    persona.fold()
    known = read_examples(FOLDER / SPIKES)[:12]
    flagged = known_chances(persona, known) >= persona.facts.threshold
    assert (flagged == np.array([e.failed for e in known])).mean() >= 0.9
