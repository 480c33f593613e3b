"""A whole GRPO step at 512/128, rollouts on a Ray worker, against stock TRL with its own generation, alternating.

    python benchmarks/whole_step.py [REPEATS]        # bundled model, LoRA, 2 groups of 8, micro-batches of 8

Both sample completions of full length from the same prompts and learn from them. Writes
`benchmarks/out/whole_step.json`: medians, ratio = stock / ours.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from unfeign.envs.tags import Tags
from unfeign.models import load_tokenizer, quiet_libraries
from unfeign.rewards.plugin import LoadedReward
from unfeign.trainers.grpo import PolicyTrainer
from unfeign.trainers.policy import PolicyRecipe
from unfeign.trainers.ray_pool import RayPool, Worker
from unfeign.trainers.rollout_func import PoolRollouts, render

OUT = Path(__file__).parent / "out" / "whole_step.json"
RECIPE = PolicyRecipe("bundled:smollm2-135m-instruct", lora={"r": 16, "lora_alpha": 32, "target_modules": "all-linear"})
PROMPT, WIDTH, GROUPS, GROUP, MICRO = 512, 128, 2, 8, 8
NEVER = "<reponame>"  # ends completions in the place of the real end, so that all have full length


def variety(completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    assert all(len(ids) == WIDTH for ids in completion_ids), "completions of full length"
    return [len(set(ids)) / WIDTH for ids in completion_ids]


class EndlessWorker(Worker):
    """A worker whose completions end with `NEVER` too."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._tokenizer.eos_token = NEVER
        self._policy.get_base_model().generation_config.eos_token_id = self._tokenizer.eos_token_id


class EndlessPool(RayPool):
    worker = EndlessWorker


class Clock(TrainerCallback):
    """Seconds of every optimiser step, its rollouts included."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def prompts(tokenizer: Any, count: int) -> list[list[dict[str, str]]]:
    """Conversations of `PROMPT` tokens each, all different."""
    words = [tokenizer.decode([i]) for i in range(1000, 40000) if tokenizer.decode([i]).strip().isalpha()]
    out = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        text: list[str] = []
        while len(render(tokenizer, [{"role": "user", "content": "".join(text)}])[0]) < PROMPT:
            text.append(words[int(torch.randint(len(words), (1,), generator=generator))])
        out.append([{"role": "user", "content": "".join(text)}])
    return out


def main(repeats: int = 5) -> None:
    tokenizer = load_tokenizer(RECIPE.model)
    tokenizer.eos_token = NEVER
    clocks = {"ours": Clock(), "stock": Clock()}
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        args = {
            "output_dir": folder, "report_to": [], "num_generations": GROUP, "per_device_train_batch_size": MICRO,
            "gradient_accumulation_steps": GROUPS * GROUP // MICRO, "max_completion_length": WIDTH, "max_steps": 1,
            "gradient_checkpointing": False, "bf16": False, "save_strategy": "no", "disable_tqdm": True,
            "shuffle_dataset": False, "temperature": 1.0,
        }  # fmt: skip
        if not torch.cuda.is_available():
            args["use_cpu"] = True
        pool = EndlessPool(RECIPE, tokenizer, batch_size=GROUPS * GROUP)
        policies = {kind: RECIPE.build()[0] for kind in clocks}
        for policy in policies.values():
            policy.generation_config.eos_token_id = tokenizer.eos_token_id
        asked = prompts(tokenizer, GROUPS * repeats)
        for turn in range(repeats):
            shared = {
                "train_dataset": Dataset.from_list([{"prompt": p} for p in asked[GROUPS * turn :][:GROUPS]]),
                "processing_class": tokenizer,
            }
            stock = GRPOTrainer(policies["stock"], [variety], GRPOConfig(**args), callbacks=[clocks["stock"]], **shared)  # type: ignore[arg-type]
            ours = PolicyTrainer(
                model=policies["ours"],
                args=GRPOConfig(**args),
                rewards=[LoadedReward("variety", 1.0, variety)],
                credit="segment",
                lineage=None,  # type: ignore[arg-type]
                rollout_func=PoolRollouts(pool, seed=turn, temperature=1.0, tags=Tags()),
                callbacks=[clocks["ours"]],
                **shared,
            )
            for kind, trainer in (("ours", ours), ("stock", stock)):
                trainer.train()
                print(f"{kind} {clocks[kind].seconds[-1]:.1f} s", flush=True)
        pool.close()
    a, b = (statistics.median(clocks[kind].seconds) for kind in ("ours", "stock"))
    row = {"name": "whole_step", "case": f"{PROMPT}/{WIDTH}", "ours_s": a, "stock_s": b, "ratio": b / a}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps([row], indent=1) + "\n")
    print(
        f"| | stock, s | ours, s | stock / ours |\n|---|---|---|---|\n| whole step | {b:.1f} | {a:.1f} | {b / a:.2f} |"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
