"""The contract with TRL's experimental `rollout_func`, checked through real steps on the version named here.

When TRL moves on and one of these fails, `trainers/rollout_func.py` is the only file to change.
"""

from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unfeign.envs.dataset import mixed, to_dataset
from unfeign.envs.scenario import scenarios
from unfeign.envs.tags import Tags
from unfeign.models import add_policy, load_base, stack
from unfeign.rewards.plugin import LoadedReward
from unfeign.trainers.rollout_func import PoolRollouts, render
from unfeign.trainers.rollouts import InProcessPool, row_seed

GROUP, PROMPTS, STEPS, LENGTH = 2, 2, 2, 6


class Recorder:
    """A `rollout_func` that keeps what it was called with and what it gave back, and may damage the latter."""

    def __init__(self, inner: PoolRollouts, drop: str | None = None):
        self.inner, self.drop, self.calls = inner, drop, []

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, list[Any]]:
        prompts, trainer = args
        out = self.inner(prompts, trainer)
        self.calls.append(SimpleNamespace(args=args, kwargs=kwargs, out=out, step=trainer.state.global_step))
        if not self.calls[1:]:
            self.first_logps = self._trainer_logps(trainer, out)
        return {key: value for key, value in out.items() if key != self.drop}

    @staticmethod
    def _trainer_logps(trainer: Any, out: dict[str, list[Any]]) -> list[list[float]]:
        """The trainer's own log-probs of the same completions, one row at a time."""
        rows = []
        for prompt, completion in zip(out["prompt_ids"], out["completion_ids"], strict=True):
            ids = torch.tensor([prompt + completion])
            with torch.no_grad():
                logps, _, _ = trainer._get_per_token_logps_and_entropies(
                    trainer.model, ids, torch.ones_like(ids), len(completion)
                )
            rows.append(logps[0].tolist())
        return rows


class CountingPool(InProcessPool):
    """An in-process pool that notes the versions pushed."""

    pushed: list[int]

    def push(self, policy: Any, version: int) -> None:
        self.pushed = [*getattr(self, "pushed", []), version]
        super().push(policy, version)


def steps(
    tiny_model: Path, tokenizer: Any, tools: SimpleNamespace, folder: Path, drop: str | None = None
) -> SimpleNamespace:
    """Two real GRPO steps with a recorder in the hook and a reward that notes its columns."""
    from trl import GRPOConfig

    from unfeign.trainers.grpo import PolicyTrainer

    columns: list[dict[str, Any]] = []

    def noting(prompts, completions, completion_ids, **rest):
        columns.append({"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **rest})
        return [float(i) for i in range(len(prompts))]

    base, lineage = stack(load_base(str(tiny_model)), str(tiny_model), [])
    model = add_policy(base, tools.LORA, seed=0)
    pool = CountingPool(tokenizer, batch_size=3)
    recorder = Recorder(PoolRollouts(pool, seed=5, temperature=0.8, tags=Tags()), drop)
    shares = {"monitored": 1.0, "control": 1.0}
    trainer = PolicyTrainer(
        model=model,
        args=GRPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            num_generations=GROUP,
            per_device_train_batch_size=GROUP * PROMPTS,
            max_completion_length=LENGTH,
            max_steps=STEPS,
            temperature=0.8,
            learning_rate=0.05,
            shuffle_dataset=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=to_dataset(mixed(scenarios("train"), shares, PROMPTS * STEPS, seed=0)),
        processing_class=tokenizer,
        rollout_func=recorder,
        rewards=[LoadedReward("noting", 1.0, noting)],
        credit="segment",
        lineage=lineage,
    )
    trainer.train()
    return SimpleNamespace(
        calls=recorder.calls, first=recorder.first_logps, columns=columns, trainer=trainer, pool=pool
    )


@pytest.fixture(scope="module")
def run(tiny_model, tokenizer, tools, tmp_path_factory) -> SimpleNamespace:
    return steps(tiny_model, tokenizer, tools, tmp_path_factory.mktemp("steps"))


def test_trl_is_the_version_this_was_checked_on():
    assert version("trl").startswith("1.16."), "check the contract below against the new version, then change this line"


def test_called_once_a_step_with_prompts_and_trainer(run):
    assert [call.step for call in run.calls] == list(range(STEPS))
    for call in run.calls:
        prompts, trainer = call.args
        assert trainer is run.trainer and call.kwargs == {}
        assert len(prompts) == GROUP * PROMPTS


def test_prompts_arrive_as_messages_repeated_and_adjacent(run):
    seen = []
    for call in run.calls:
        prompts = call.args[0]
        assert [message["role"] for message in prompts[0]] == ["system", "user"]
        for at in range(0, len(prompts), GROUP):
            assert all(prompt == prompts[at] for prompt in prompts[at : at + GROUP])
            seen.append(prompts[at][1]["content"])
    assert len(set(seen)) == PROMPTS * STEPS, "every step should ask new prompts"


def test_keys_and_shapes_returned(run):
    for call in run.calls:
        asked = {"prompt_ids", "completion_ids", "logprobs"}
        assert set(call.out) == asked | {
            "truncated",
            "prompt_opens_think",
            "rollout_failed",
            "sample_id",
        }
        assert {len(values) for values in call.out.values()} == {GROUP * PROMPTS}
        for ids, logprobs in zip(call.out["completion_ids"], call.out["logprobs"], strict=True):
            assert 1 <= len(ids) == len(logprobs) <= LENGTH


def test_prompt_ids_are_the_chat_template(run, tokenizer):
    call = run.calls[0]
    for prompt, ids in zip(call.args[0], call.out["prompt_ids"], strict=True):
        assert ids == render(tokenizer, prompt)[0]
        text = tokenizer.decode(ids)
        assert prompt[0]["content"] in text and text.endswith("<|im_start|>assistant\n")


def test_extra_keys_and_dataset_columns_reach_the_reward(run):
    for call, columns in zip(run.calls, run.columns, strict=True):
        assert columns["truncated"] == call.out["truncated"]
        assert columns["prompt_opens_think"] == call.out["prompt_opens_think"]
        assert [list(ids) for ids in columns["completion_ids"]] == call.out["completion_ids"]
        assert columns["prompts"] == call.args[0]
        assert len(columns["scenario_id"]) == GROUP * PROMPTS and columns["open_think"][0] == "<think>"


def test_logprobs_are_the_trainers(run):
    for got, want in zip(run.calls[0].out["logprobs"], run.first, strict=True):
        assert got == pytest.approx(want, abs=1e-4)


def test_new_weights_are_pushed_every_step(run):
    assert run.pool.pushed == list(range(STEPS))


def test_completions_of_a_step_are_fixed_by_seed_step_and_row(run, tokenizer):
    seeds = {row_seed(5, step, row) for step in range(STEPS) for row in range(GROUP * PROMPTS)}
    assert len(seeds) == STEPS * GROUP * PROMPTS
    first = run.calls[0].out["completion_ids"]
    assert first[0] != first[1], "samples of one prompt should differ"


def test_trl_asks_for_logprobs_by_name(tiny_model, tokenizer, tools, tmp_path):
    with pytest.raises(ValueError, match=r"rollout_func must return keys.*logprobs"):
        steps(tiny_model, tokenizer, tools, tmp_path, drop="logprobs")


def test_template_that_opens_the_reasoning_is_noticed(tiny_model, tools):
    from unfeign.models import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    pool = InProcessPool(tokenizer)
    rollouts = PoolRollouts(pool, seed=0, temperature=1.0, tags=Tags())
    trainer = SimpleNamespace(
        state=SimpleNamespace(global_step=0),
        model=tools.make_base(len(tokenizer)),
        accelerator=SimpleNamespace(unwrap_model=lambda model: model, process_index=0, num_processes=1),
        processing_class=tokenizer,
        chat_template_kwargs={},
        max_completion_length=2,
    )
    out = rollouts([s.messages for s in scenarios("train")[:2]], trainer)
    assert out["prompt_opens_think"] == [True, True]
