"""Shared prefixes are exact: logits and gradients equal a plain forward of every row, however prompts are shared."""

import pytest
import torch

from unfeign.errors import UnfeignError
from unfeign.models import add_policy
from unfeign.shared_prefix import MIN_COMMON, branch, by_length, completion_calls, completion_logits, distinct, prefill

VOCAB = 800


def draw(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def beginnings() -> dict[str, list[list[int]]]:
    """Prompts by how they share their beginnings."""
    (shared, other), tails = draw(40, 50), draw(5, 12, 1, 9, 30, seed=1)
    return {
        "one": draw(17),
        "unequal lengths, nothing shared": draw(5, 31, 18, 60),
        "a token each": draw(1, 1, 2),
        "all share a beginning": [shared + tail for tail in tails],
        "two beginnings and a loner": [
            shared + tails[0],
            other + tails[1],
            tails[4],
            other + tails[2],
            shared + tails[3],
        ],
        "one is the beginning of another": [shared, shared + tails[1], shared + tails[1] + tails[0]],
        "shared just below the limit": [shared[: MIN_COMMON - 1] + tail for tail in tails],
    }


PROMPTS = beginnings()


def batch(
    prompts: list[list[int]], group: int = 3, width: int = 7
) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Groups of completions of unequal lengths, rows in shuffled order."""
    generator = torch.Generator().manual_seed(7)
    order = torch.randperm(len(prompts) * group, generator=generator).tolist()
    rows = [prompts[i // group] for i in order]
    ids = torch.randint(3, VOCAB, (len(rows), width), generator=generator)
    lengths = torch.randint(1, width + 1, (len(rows),), generator=generator)
    lengths[0] = width
    mask = (torch.arange(width)[None] < lengths[:, None]).long()
    return rows, ids * mask, mask


def stock(model, rows: list[list[int]], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of the completion tokens, each row forwarded alone and whole; 0 at padding."""
    out = []
    for prompt, completion, real in zip(rows, ids, mask, strict=True):
        length = int(real.sum())
        whole = torch.tensor([prompt + completion[:length].tolist()])
        logits = model(input_ids=whole).logits[0, len(prompt) - 1 : -1]
        out.append(torch.nn.functional.pad(logits, (0, 0, 0, len(real) - length)))
    return torch.stack(out)


@pytest.fixture
def policy(base, tools):
    model = add_policy(base, tools.LORA, seed=0)
    tools.shake(model, ".policy.")
    return model


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_equal_a_plain_forward(policy, name: str):
    rows, ids, mask = batch(PROMPTS[name])
    with torch.no_grad():
        got = completion_logits(policy, rows, ids, mask)
        want = stock(policy, rows, ids, mask)[mask.bool()]
    assert got.shape == (mask.sum(), VOCAB)
    assert (got - want).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([5, 5, 5], [[0, 1, 2]]),
        ([9, 10, 9, 10], [[0, 2], [1, 3]]),  # saves 2 of 40
        ([99, 100, 99, 100], [[0, 2, 1, 3]]),  # saves 2 of 400
        ([25, 5, 90, 25, 4, 100], [[4, 1], [0, 3], [2, 5]]),
        ([7], [[0]]),
    ],
)
def test_rows_of_like_lengths(lengths: list[int], groups: list[list[int]]):
    assert by_length(lengths) == groups
    assert len(by_length(lengths, busy=1000)) == 1


def test_calls_hold_little_padding(base):
    rows, ids, mask = batch(PROMPTS["all share a beginning"], width=12)
    calls = completion_calls(base, rows, ids, mask)
    assert len(calls.rows) > 1 and sorted(i for some in calls.rows for i in some) == list(range(len(rows)))
    for some, inputs in zip(calls.rows, calls.inputs, strict=True):
        assert inputs["input_ids"].shape == (len(some), max(int(mask[i].sum()) for i in some))


def test_one_token_completions(base):
    rows, ids, mask = batch(PROMPTS["unequal lengths, nothing shared"], width=1)
    with torch.no_grad():
        want = stock(base, rows, ids, mask)[mask.bool()]
        assert (completion_logits(base, rows, ids, mask) - want).abs().max() < 1e-4


def gradients(model, logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.nn.functional.cross_entropy(logits, ids[mask.bool()]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize(
    "name", ["two beginnings and a loner", "all share a beginning", "unequal lengths, nothing shared"]
)
def test_gradients_equal_a_plain_forward(base, tools, trained: str, name: str):
    if trained == "lora":
        model = add_policy(base, tools.LORA, seed=0)
        tools.shake(model, ".policy.")
    else:
        model = base.requires_grad_(True)
    model.train()
    rows, ids, mask = batch(PROMPTS[name])
    got = gradients(model, completion_logits(model, rows, ids, mask), ids, mask)
    want = gradients(model, stock(model, rows, ids, mask)[mask.bool()], ids, mask)
    assert got.keys() == want.keys() and len(got) > 10
    for key in want:
        assert want[key].norm() > 0, key
        assert (got[key] - want[key]).norm() < 1e-4 * want[key].norm(), key


def test_prefill_keeps_the_order_of_rows(base):
    prompts = PROMPTS["two beginnings and a loner"]
    with torch.no_grad():
        rows = prefill(base, prompts)
        want = torch.stack([base(torch.tensor([p])).logits[0, -1] for p in prompts])
    assert rows.mask.sum(1).tolist() == [len(p) for p in prompts]
    assert (rows.last_logits - want).abs().max() < 1e-4


def test_a_common_beginning_is_forwarded_once(base, monkeypatch):
    seen = []
    forward = base.forward

    def count(*args, **kwargs):
        seen.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    monkeypatch.setattr(base, "forward", count)
    shared, tails = draw(40)[0], draw(5, 5, 5, seed=1)
    with torch.no_grad():
        prefill(base, [shared + tail for tail in tails])
    assert sum(seen) == 40 + 3 * 5


def test_branch_repeats_rows(base):
    prompts = draw(4, 9)
    with torch.no_grad():
        rows = prefill(base, prompts)
        many = branch(rows, torch.tensor([1, 0, 1]))
    assert many.mask.sum(1).tolist() == [9, 4, 9]
    assert torch.equal(many.last_logits, rows.last_logits[[1, 0, 1]])
    assert torch.equal(many.cache.layers[0].keys[2], rows.cache.layers[0].keys[1])


def test_distinct_in_order_of_appearance():
    assert distinct([[1, 2], [3], [1, 2], [3], [4]]) == ([[1, 2], [3], [4]], [0, 1, 0, 1, 2])


def test_gradient_checkpointing_is_refused_by_name(base):
    base.requires_grad_(True).train()
    base.gradient_checkpointing_enable()
    rows, ids, mask = batch(PROMPTS["one"])
    with pytest.raises(UnfeignError, match="expected gradient_checkpointing: false"):
        completion_logits(base, rows, ids, mask)


def test_gradient_checkpointing_does_not_matter_in_eval_mode(base):
    rows, ids, mask = batch(PROMPTS["one"])
    base.gradient_checkpointing_enable()
    with torch.no_grad():
        want = stock(base, rows, ids, mask)[mask.bool()]
        assert (completion_logits(base, rows, ids, mask) - want).abs().max() < 1e-4
