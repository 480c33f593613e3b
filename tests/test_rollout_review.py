"""Reviews where the policy generates: the same as afterwards, from states that are computed once, on real workers."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from unfeign.envs.scenario import scenarios
from unfeign.envs.transcript import State
from unfeign.errors import UnfeignError
from unfeign.folded import FoldedModel
from unfeign.models import load_base, load_tokenizer, stack
from unfeign.sampling import Kept, sample
from unfeign.shared_prefix import prefill
from unfeign.split_persona.audit import collect_reviewed
from unfeign.split_persona.persona import Persona, PersonaFacts, load_persona
from unfeign.split_persona.review import reviews
from unfeign.split_persona.rollout_review import RolloutReview
from unfeign.split_persona.sequence import load_framing
from unfeign.trainers.policy import PolicyRecipe
from unfeign.trainers.ray_pool import RayPool
from unfeign.trainers.rollout_func import render
from unfeign.trainers.rollouts import InProcessPool, RolloutRequest, Sampling

ASKED = [s for s in scenarios("validation") if not s.control][:7]
HOW = Sampling(6)


def persona(folder: Path, tiny_model: Path, tiny_organism: Path, **facts: Any) -> Path:
    """A saved persona that changes what it reads."""
    model, lineage = stack(load_base(str(tiny_model)), str(tiny_model), [tiny_organism])
    framing = load_framing(facts.pop("framing", "persona")).model_copy(update={"trigger": "<|persona|>"})
    framing = framing.model_copy(update={"review": facts.pop("review", False)})
    lora = facts.pop("lora", {"r": 4, "lora_alpha": 8} if facts.get("kind", "lora") == "lora" else {})
    made = Persona(model, load_tokenizer(str(tiny_model)), lineage, PersonaFacts(framing=framing, lora=lora, **facts))
    generator = torch.Generator().manual_seed(3)
    for parameter in made.switch.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return made.save(folder)


@pytest.fixture
def policy(tiny_model: Path, tiny_organism: Path) -> Any:
    model, lineage = stack(load_base(str(tiny_model)), str(tiny_model), [tiny_organism])
    return model, load_tokenizer(str(tiny_model)), lineage


def requests(tokenizer: Any) -> list[RolloutRequest]:
    return [RolloutRequest(render(tokenizer, s.messages)[0], seed) for seed, s in enumerate(ASKED)]


def test_kept_states_are_those_of_the_whole_transcript(policy):
    """Rows that end early, rows that are cut: what sampling leaves is what reading them again gives."""
    model, tokenizer, _ = policy
    folded = FoldedModel(model).model
    prompts = [r.prompt_ids for r in requests(tokenizer)]
    alone = sample(folded, prompts, list(range(7)), max_new_tokens=9, eos_ids={5, 9, 11}, temperature=4.0)
    common = max({t for one in alone for t in one.ids}, key=lambda t: sum(t in one.ids for one in alone))
    kept = Kept()
    how: dict[str, Any] = {"max_new_tokens": 9, "eos_ids": {common, 5, 9, 11}, "temperature": 4.0}
    made = sample(folded, prompts, list(range(7)), kept=kept, **how)
    assert made == sample(folded, prompts, list(range(7)), **how), "keeping changes no sample"
    assert len({len(one.ids) for one in made}) > 1, "some end before others"
    ids = [p + (one.ids if one.truncated else one.ids[:-1]) for p, one in zip(prompts, made, strict=True)]
    again, told = prefill(folded, ids), []
    for rows, states in kept.batches(2):
        told += rows
        assert states.mask.sum(1).tolist() == [len(ids[row]) for row in rows]
        for mine, other in zip(states.cache.layers, again.cache.layers, strict=True):
            for at, row in enumerate(rows):
                a, b = mine.keys[at][:, states.mask[at].bool()], other.keys[row][:, again.mask[row].bool()]
                assert (a - b).abs().max() < 1e-4
    assert sorted(told) == list(range(7)) and told != list(range(7)) and not list(kept.batches(2))


@pytest.mark.parametrize(
    "facts",
    [
        {}, {"mode": "full"}, {"mode": "hybrid"}, {"kind": "ia3"}, {"kind": "steering"}, {"framing": "published"},
        {"framing": "user_followup"}, {"review": True, "review_tokens": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_review_where_it_was_sampled_is_the_review_afterwards(facts, policy, tiny_model, tiny_organism, tmp_path):
    folder = persona(tmp_path / "persona", tiny_model, tiny_organism, **facts)
    model, tokenizer, lineage = policy
    pool = InProcessPool(tokenizer, 4)
    pool.push(model, 0)
    task = RolloutReview.of(folder)
    calls = requests(tokenizer)
    here = [one for part in pool.run(task.sampled, [(calls[:4], HOW), (calls[4:], HOW)]) for one in part]
    questions = len(task.facts.framing.interventions)
    assert len(here[0][1]) == questions
    fewer = RolloutReview.of(folder, 2).sampled(pool._context, (calls[:1], HOW))
    assert len(fewer[0][1]) == min(2, questions)
    plain = pool.generate(calls, 0, HOW)
    assert [one.ids for one, _ in here] == [one.ids for one in plain], "the persona sleeps while the policy generates"
    again = load_persona(folder, model, tokenizer, lineage)
    if again.layout.framing.system_tag:
        pytest.skip("the context is laid out anew: it is read, not kept")
    ends = {tokenizer.eos_token_id}
    ids = [r.prompt_ids + [t for t in one.ids if t not in ends] for r, (one, _) in zip(calls, here, strict=True)]
    later = reviews(again, ids, again.facts.framing.interventions)
    for (_, mine), other in zip(here, later, strict=True):
        assert [r.p_fail for r in mine] == pytest.approx([r.p_fail for r in other], abs=1e-4)
        assert [r.text for r in mine] == [r.text for r in other]


def test_real_workers_review_what_they_sample(tiny_model, tiny_organism, tmp_path, tools):
    folder = persona(tmp_path / "persona", tiny_model, tiny_organism)
    recipe = PolicyRecipe(str(tiny_model), (str(tiny_organism),), lora=tools.LORA)
    model, tokenizer, _ = recipe.build()
    tools.shake(model, ".policy.")
    local = InProcessPool(tokenizer, 4)
    pool = RayPool(recipe, tokenizer, workers=1, batch_size=4, threads=1)
    try:
        found = []
        for each in (local, pool):
            each.push(model, 0)
            task = RolloutReview.of(folder)
            found.append(collect_reviewed(each, 0, tokenizer, ASKED, task, seed=1, sampling=HOW, batch_size=4))
        for (mine, here), (other, there) in zip(*found, strict=True):
            assert mine.completion == other.completion and here and there
            assert [r["p_fail"] for r in here] == pytest.approx([r["p_fail"] for r in there], abs=1e-5)
    finally:
        pool.close()


class Fatal(RolloutReview):
    """Kills its worker over the last of the requests."""

    def sampled(self, context: Any, call: Any) -> Any:
        made = super().sampled(context, call)
        if any(r.prompt_ids == render(context.tokenizer, ASKED[4].messages)[0] for r in call[0]):
            os._exit(1)
        return made


def test_a_request_that_kills_its_worker_is_set_aside(tiny_model, tiny_organism, tmp_path, tools):
    plain = RolloutReview.of(persona(tmp_path / "persona", tiny_model, tiny_organism))
    recipe = PolicyRecipe(str(tiny_model), (str(tiny_organism),), lora=tools.LORA)
    model, tokenizer, _ = recipe.build()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    pool = RayPool(recipe, tokenizer, workers=1, batch_size=2, threads=1)
    try:
        pool.push(model, 0)
        how: dict[str, Any] = {"seed": 1, "sampling": HOW, "batch_size": 3}
        found = collect_reviewed(pool, 0, tokenizer, ASKED[2:5], Fatal(plain.facts, plain.weights, plain.sha256), **how)
        calm = collect_reviewed(pool, 0, tokenizer, ASKED[2:5], plain, **how)
    finally:
        pool.close()
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert found[-1][0].state is State.EMPTY and not found[-1][1]
    for one, other in zip(found[:-1], calm[:-1], strict=True):
        assert one[0].completion == other[0].completion and one[1]


def test_a_worker_is_left_as_it_was(policy, tiny_model, tiny_organism, tmp_path):
    folder = persona(tmp_path / "persona", tiny_model, tiny_organism)
    model, tokenizer, _ = policy
    pool = InProcessPool(tokenizer, 4)
    pool.push(model, 0)
    before = pool.generate(requests(tokenizer), 0, HOW)
    pool.run(RolloutReview.of(folder).sampled, [(requests(tokenizer), HOW)])
    assert pool.generate(requests(tokenizer), 0, HOW) == before

    def left(context: Any, _: None) -> tuple[int, int]:
        model = context.model
        return sum(len(m._forward_hooks) for m in model.modules()), len(model.get_input_embeddings().weight)

    assert pool.run(left, [None]) == [(0, model.config.vocab_size)]


def test_a_persona_is_folded_once_a_version(policy, tiny_model, tiny_organism, tmp_path, tools):
    """Folded weights are kept for the next call, but for one persona and one version of the policy alone."""
    first = RolloutReview.of(persona(tmp_path / "first", tiny_model, tiny_organism))
    other = RolloutReview.of(persona(tmp_path / "other", tiny_model, tiny_organism, lora={"r": 4, "lora_alpha": 32}))
    model, tokenizer, _ = policy
    ids = [r.prompt_ids for r in requests(tokenizer)[:2]]
    pool = InProcessPool(tokenizer, 4)

    def asked() -> list[float]:
        found = [pool.run(task.known, [ids])[0] for task in (first, other, first)]
        chances = [[r.p_fail for row in one for r in row] for one in found]
        assert chances[0] == chances[2] != chances[1]
        return chances[0]

    pool.push(model, 0)
    before, cache = asked(), pool._context.cache
    packed = [list(map(id, kept.values())) for kept in cache.values()]
    assert asked() == before and [list(map(id, kept.values())) for kept in cache.values()] == packed
    assert len(packed) == 2 and all(packed)
    tools.shake(model, ".lora_B.")
    pool.push(model, 1)
    after = asked()
    pool = InProcessPool(tokenizer, 4)
    pool.push(model, 1)
    assert asked() == after != before


def test_another_vocabulary_is_refused(policy, tiny_model, tiny_organism, tmp_path):
    task = RolloutReview.of(persona(tmp_path / "persona", tiny_model, tiny_organism))
    model, tokenizer, _ = policy
    pool = InProcessPool(tokenizer, 4)
    pool.push(model, 0)
    other = RolloutReview(task.facts.model_copy(update={"trigger_id": 7}), task.weights, task.sha256)
    with pytest.raises(UnfeignError, match="vocabulary"):
        pool.run(other.known, [[[1, 2, 3]]])
