"""TRL's experimental `rollout_func` hook, owned by this one file (contract checked on trl 1.16).

`GRPOTrainer(rollout_func=f)` calls `f(prompts, trainer)` with conversational prompts already repeated `num_generations`
times, and wants exactly that many rows back under `prompt_ids`, `completion_ids` and `logprobs`; further lists reach
the reward functions as columns. TRL pushes no weights and applies no chat template on this path: both happen here.
"""

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..envs.scenario import Scenario
from ..envs.tags import Tags
from ..envs.transcript import Transcript, parse, template_opens_think
from ..sampling import Sample
from .lookahead import Lookahead, generation_number, prompts_of, step_of
from .rollouts import RolloutPool, RolloutRequest, Sampling, row_seed


def render(tokenizer: Any, messages: list[dict[str, str]], **template: Any) -> tuple[list[int], str]:
    """Token ids and text of a prompt with the opening of the assistant's turn."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template)
    return tokenizer(text, add_special_tokens=False).input_ids, text


@dataclass(frozen=True)
class Batch:
    """One call's prompts, ready to be asked: at which step their completions are learned from, the number of the first
    row in it, the prompts as TRL has them, and as text and requests.
    """

    step: int
    first: int
    prompts: list[Any]
    texts: list[str]
    requests: list[RolloutRequest]


class PoolRollouts:
    """A `rollout_func` over a pool.

    Args:
        pool: generates the completions.
        seed: of the run; with step and row it fixes every sample.
        temperature: of sampling.
        tags: tell whether the chat template opens the reasoning in the prompt.
        scenarios: those asked in the run, so that a prompt can be told what it asks.
        ahead: hears of transcripts as they arrive, while others are still sampled.
        staleness: how many batches ahead of learning completions are sampled (see `lookahead`).
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
        staleness: int = 0,
    ):
        self._pool, self._seed, self._temperature, self._tags = pool, seed, temperature, tags
        self._asked = {json.dumps(s.messages): s for s in scenarios} if ahead else {}
        self._ahead = ahead
        self._seconds = {"push_seconds": 0.0, "generate_seconds": 0.0}
        self._tokens = 0
        self._at: tuple[int | None, int] = (None, 0)  # step, and rows generated in it so far
        self._reader: Any = None
        self._lookahead = Lookahead(pool, staleness) if staleness else None

    def totals(self) -> dict[str, float]:
        """Since the start: seconds of pushing, of generating, and of standing still for workers; tokens generated; the
        pool's failures by kind. Ahead of time also the seconds of generating that nobody waited for.
        """
        failures = {f"failures/{kind.replace(' ', '_')}": n for kind, n in dict(self._pool.counts).items()}
        seconds = self._seconds | {"wait_seconds": self._pool.waited}
        if self._lookahead is not None:
            seconds |= self._lookahead.seconds
        return {**seconds, "tokens": self._tokens, **failures}

    def __call__(self, prompts: list[list[dict[str, str]]], trainer: Any) -> dict[str, list[Any]]:
        step = trainer.state.global_step
        first = self._at[1] if step == self._at[0] else 0
        batch = self._batch(prompts, step, first, trainer)
        if self._ahead is not None and self._reader is None:
            self._reader = copy.deepcopy(trainer.processing_class)  # two threads can't share one
        if self._lookahead is None:
            samples = self._now(batch, trainer, pushed=step == self._at[0])
        else:
            samples = self._lookahead.samples(
                batch,
                trainer.accelerator.unwrap_model(trainer.model),
                lambda behind: self._upcoming(behind, trainer),
                lambda one, version: self._generate(one, version, trainer),
            )
        self._at = (step, first + trainer.accelerator.num_processes * len(prompts))
        self._tokens += sum(len(s.ids) for s in samples)
        return {
            "prompt_ids": [r.prompt_ids for r in batch.requests],
            "completion_ids": [s.ids for s in samples],
            "logprobs": [s.logprobs for s in samples],
            "truncated": [s.truncated for s in samples],
            "rollout_failed": [s.failed for s in samples],
            "sample_id": [f"{step}/{batch.first + row}" for row in range(len(samples))],
            "prompt_opens_think": [template_opens_think(text, self._tags) for text in batch.texts],
        }

    def _batch(self, prompts: list[Any], step: int, first: int, trainer: Any) -> Batch:
        """This process's prompts of a batch whose earlier rows in the same step number `first`."""
        rendered = [render(trainer.processing_class, prompt, **trainer.chat_template_kwargs) for prompt in prompts]
        first += trainer.accelerator.process_index * len(prompts)
        requests = [
            RolloutRequest(ids, row_seed(self._seed, step, first + row)) for row, (ids, _) in enumerate(rendered)
        ]
        return Batch(step, first, prompts, [text for _, text in rendered], requests)

    def _upcoming(self, behind: int, trainer: Any) -> Batch | None:
        """The batch that will be asked for `behind` batches after the present one; None past the end."""
        number = generation_number(trainer) + behind
        rows = prompts_of(trainer, number)
        if not rows:
            return None
        step, within = step_of(trainer, number)
        return self._batch(rows, step, within * len(rows) * trainer.accelerator.num_processes, trainer)

    def _now(self, batch: Batch, trainer: Any, pushed: bool) -> list[Sample]:
        """Samples of the policy as it is."""
        began = time.perf_counter()
        if not pushed:
            self._pool.push(trainer.accelerator.unwrap_model(trainer.model), batch.step)
        pushing = time.perf_counter()
        samples = self._generate(batch, batch.step, trainer)
        self._seconds["push_seconds"] += pushing - began
        self._seconds["generate_seconds"] += time.perf_counter() - pushing
        return samples

    def _generate(self, batch: Batch, version: int, trainer: Any) -> list[Sample]:
        sampling = Sampling(trainer.max_completion_length, self._temperature)
        if self._ahead is None:
            return self._pool.generate(batch.requests, version, sampling)
        return self._pool.generate(batch.requests, version, sampling, lambda rows, some: self._tell(batch, rows, some))

    def _tell(self, batch: Batch, rows: Sequence[int], some: Sequence[Sample]) -> None:
        """Tell of samples as the rewards will see them."""
        told = []
        for row, sample in zip(rows, some, strict=True):
            asked = self._asked.get(json.dumps(batch.prompts[row]))
            if asked is not None and sample.failed is None:
                text = self._reader.decode(sample.ids, skip_special_tokens=True)
                opens = template_opens_think(batch.texts[row], self._tags)
                told.append(parse(asked, text, truncated=sample.truncated, prompt_opens_think=opens))
        if self._ahead and told:
            self._ahead(told)

    def close(self, wait: bool = True) -> None:
        """Give up what is sampled ahead; see `Lookahead.close`."""
        if self._lookahead is not None:
            self._lookahead.close(wait)
