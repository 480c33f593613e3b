"""Sampling: a row depends on its prompt and its seed, and its log-probs are the model's."""

import pytest
import torch

from unfeign.sampling import sample

NONE: set[int] = {799}


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(3, 800, (30,), generator=generator).tolist()
    own = [torch.randint(3, 800, (4 + 5 * i,), generator=generator).tolist() for i in range(count)]
    return [shared + tail if i % 2 else tail for i, tail in enumerate(own)]


ROWS = [(prompt, 100 + number) for number, prompt in enumerate(prompts(6) + prompts(3))]


def run(model, rows, **changes):
    settings = {"max_new_tokens": 12, "eos_ids": set(range(700, 760))} | changes
    return sample(model, [prompt for prompt, _ in rows], [seed for _, seed in rows], **settings)


def test_row_does_not_depend_on_its_batch(base):
    together = run(base, ROWS)
    assert len({len(s.ids) for s in together}) > 1, "rows should end at different steps for this test to mean anything"
    backwards = run(base, ROWS[::-1])[::-1]
    alone = [run(base, [row])[0] for row in ROWS]
    in_threes = [s for at in range(0, 9, 3) for s in run(base, ROWS[at : at + 3])]
    among_others = run(base, [(prompt[:3], seed + 50) for prompt, seed in ROWS] + ROWS)[9:]
    for other in (backwards, alone, in_threes, among_others):
        for a, b in zip(together, other, strict=True):
            assert (a.ids, a.truncated) == (b.ids, b.truncated)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_another_seed_is_another_completion(base):
    rows = [(ROWS[0][0], seed) for seed in range(5)]
    assert len({tuple(s.ids) for s in run(base, rows, eos_ids=NONE)}) == 5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_teacher_forced(base, temperature: float):
    for (prompt, _), got in zip(ROWS, run(base, ROWS, temperature=temperature), strict=True):
        with torch.no_grad():
            logits = base(torch.tensor([prompt + got.ids])).logits[0, len(prompt) - 1 : -1]
        want = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(got.ids)[:, None])[:, 0]
        assert got.logprobs == pytest.approx(want.tolist(), abs=1e-4)


def test_end_token_ends_and_is_kept(base):
    ends = set(range(700, 760))
    for got in run(base, ROWS, max_new_tokens=40, eos_ids=ends):
        assert not ends & set(got.ids[:-1])
        assert got.truncated == (got.ids[-1] not in ends)
        assert len(got.ids) == len(got.logprobs)
        assert len(got.ids) == 40 or not got.truncated


def test_length_limit_cuts(base):
    cut = run(base, ROWS, max_new_tokens=5, eos_ids=NONE)
    assert all(s.truncated and len(s.ids) == 5 for s in cut)


def test_a_longer_limit_only_continues_a_row(base):
    short, long = (run(base, ROWS, max_new_tokens=n, eos_ids=NONE) for n in (5, 9))
    assert [s.ids for s in short] == [s.ids[:5] for s in long]


def test_end_token_at_the_limit_is_not_truncated(base):
    every = set(range(800))
    got = run(base, ROWS, max_new_tokens=1, eos_ids=every)
    assert all(not s.truncated and len(s.ids) == 1 for s in got)


def test_frequencies_follow_the_distribution(base):
    prompt = ROWS[0][0]
    with torch.no_grad():
        probabilities = (base(torch.tensor([prompt])).logits[0, -1] / 0.5).softmax(-1)
    top = int(probabilities.argmax())
    count = 2000
    drawn = run(base, [(prompt, seed) for seed in range(count)], max_new_tokens=1, temperature=0.5)
    share = sum(s.ids == [top] for s in drawn) / count
    p = probabilities[top].item()
    assert 0.02 < p < 0.98
    assert abs(share - p) < 5 * (p * (1 - p) / count) ** 0.5


def test_pool_names_a_stale_version(base, tokenizer):
    from unfeign.trainers.rollouts import InProcessPool, RolloutRequest, Sampling, StaleWeights

    pool = InProcessPool(tokenizer, batch_size=2)
    requests = [RolloutRequest(prompt, seed) for prompt, seed in ROWS[:5]]
    with pytest.raises(StaleWeights, match="expected weights version 3"):
        pool.generate(requests, 3, Sampling(4))
    pool.push(base, 3)
    with pytest.raises(StaleWeights, match="expected weights version 4, found 3"):
        pool.generate(requests, 4, Sampling(4))
    want = run(base, ROWS[:5], max_new_tokens=4, eos_ids={tokenizer.eos_token_id})
    assert [s.ids for s in pool.generate(requests, 3, Sampling(4))] == [s.ids for s in want]


def test_row_seeds_differ_and_repeat():
    from unfeign.trainers.rollouts import row_seed

    seeds = {row_seed(run, step, row) for run in range(3) for step in range(5) for row in range(20)}
    assert len(seeds) == 300 and all(0 <= seed < 2**63 for seed in seeds)
    assert row_seed(1, 2, 3) == row_seed(1, 2, 3) != row_seed(3, 2, 1)


def test_a_cache_that_has_to_grow_again_and_again(base, monkeypatch):
    want = run(base, ROWS)
    monkeypatch.setattr("unfeign.sampling.ROOM", 1)
    assert run(base, ROWS) == want
