"""TRL's experimental `rollout_func` hook, owned by this one file (contract checked on trl 1.16).

`GRPOTrainer(rollout_func=f)` calls `f(prompts, trainer)` with conversational prompts already repeated `num_generations`
times, and wants exactly that many rows back under `prompt_ids`, `completion_ids` and `logprobs`; further lists reach
the reward functions as columns. TRL pushes no weights and applies no chat template on this path: both happen here.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..envs.scenario import Scenario
from ..envs.tags import Tags
from ..envs.transcript import Transcript, parse, template_opens_think
from ..sampling import Sample
from .rollouts import RolloutPool, RolloutRequest, Sampling, row_seed


def render(tokenizer: Any, messages: list[dict[str, str]], **template: Any) -> tuple[list[int], str]:
    """Token ids and text of a prompt with the opening of the assistant's turn."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template)
    return tokenizer(text, add_special_tokens=False).input_ids, text


class PoolRollouts:
    """A `rollout_func` over a pool.

    Args:
        pool: generates the completions.
        seed: of the run; with step and row it fixes every sample.
        temperature: of sampling.
        tags: tell whether the chat template opens the reasoning in the prompt.
        scenarios: those asked in the run, so that a prompt can be told what it asks.
        ahead: hears of transcripts as they arrive, while others are still sampled.
    """

    def __init__(
        self,
        pool: RolloutPool,
        *,
        seed: int,
        temperature: float,
        tags: Tags,
        scenarios: Sequence[Scenario] = (),
        ahead: Callable[[list[Transcript]], None] | None = None,
    ):
        self._pool, self._seed, self._temperature, self._tags = pool, seed, temperature, tags
        self._asked = {json.dumps(s.messages): s for s in scenarios} if ahead else {}
        self._ahead = ahead
        self._seconds = {"push_seconds": 0.0, "generate_seconds": 0.0}
        self._tokens = 0
        self._at: tuple[int | None, int] = (None, 0)  # step, and rows generated in it so far

    def totals(self) -> dict[str, float]:
        """Since the start: seconds of pushing, of generating, and of standing still for workers; tokens generated; the
        pool's failures by kind.
        """
        failures = {f"failures/{kind.replace(' ', '_')}": n for kind, n in self._pool.counts.items()}
        return {**self._seconds, "wait_seconds": self._pool.waited, "tokens": self._tokens, **failures}

    def __call__(self, prompts: list[list[dict[str, str]]], trainer: Any) -> dict[str, list[Any]]:
        step = trainer.state.global_step
        began = time.perf_counter()
        if step != self._at[0]:
            self._pool.push(trainer.accelerator.unwrap_model(trainer.model), step)
            self._at = (step, 0)
        pushed = time.perf_counter()
        rendered = [render(trainer.processing_class, prompt, **trainer.chat_template_kwargs) for prompt in prompts]
        offset = self._at[1] + trainer.accelerator.process_index * len(prompts)
        self._at = (step, self._at[1] + trainer.accelerator.num_processes * len(prompts))
        requests = [
            RolloutRequest(ids, row_seed(self._seed, step, offset + row)) for row, (ids, _) in enumerate(rendered)
        ]
        sampling = Sampling(trainer.max_completion_length, self._temperature)

        def arrived(rows: Sequence[int], some: Sequence[Sample]) -> None:
            """Tell of them as the rewards will see them."""
            told = []
            for row, sample in zip(rows, some, strict=True):
                asked = self._asked.get(json.dumps(prompts[row]))
                if asked is not None and sample.failed is None:
                    text = trainer.processing_class.decode(sample.ids, skip_special_tokens=True)
                    opens = template_opens_think(rendered[row][1], self._tags)
                    told.append(parse(asked, text, truncated=sample.truncated, prompt_opens_think=opens))
            if self._ahead and told:
                self._ahead(told)

        samples = self._pool.generate(requests, step, sampling, *([arrived] if self._ahead else []))
        self._seconds["push_seconds"] += pushed - began
        self._seconds["generate_seconds"] += time.perf_counter() - pushed
        self._tokens += sum(len(s.ids) for s in samples)
        return {
            "prompt_ids": [r.prompt_ids for r in requests],
            "completion_ids": [s.ids for s in samples],
            "logprobs": [s.logprobs for s in samples],
            "truncated": [s.truncated for s in samples],
            "rollout_failed": [s.failed for s in samples],
            "sample_id": [f"{step}/{offset + row}" for row in range(len(samples))],
            "prompt_opens_think": [template_opens_think(text, self._tags) for _, text in rendered],
        }
