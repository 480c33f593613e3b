"""The training step with shared prefixes, against stock TRL: forward, loss and backward, alternating in one process.

    python benchmarks/training_step.py                       # bundled model, LoRA, the four cases
    python benchmarks/training_step.py --cases 512/128 --repeats 3
    python benchmarks/training_step.py --random 1.5b         # random weights of a 1.5B architecture, bf16; for a GPU

A case is prompt/completion tokens: 4 groups of 8, each group with a prompt of its own, micro-batches of 8. Stock TRL
scatters groups over micro-batches, as it does in a run; ours keeps them together. (Without a GPU stock TRL gets
micro-batches of 4 for 1024/128, since 8 don't fit into 24 GB.) Before anything is timed, log-probs and gradients of
the first two groups are compared. Writes `benchmarks/out/training_step.json`: medians, ratio = stock / ours, and beside
it what the count of tokens alone would give, G(P+C) / (P+GC). `--memory` measures the peak of each over two groups
instead, in processes of their own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from unfeign.models import add_policy, load_base, load_tokenizer, quiet_libraries
from unfeign.rewards.plugin import LoadedReward
from unfeign.trainers.grpo import PolicyTrainer, whole_groups_shuffled

OUT = Path(__file__).parent / "out"
MODEL = "bundled:smollm2-135m-instruct"
CASES = ("32/64", "256/64", "512/128", "1024/128")
GROUPS, GROUP, MICRO = 4, 8, 8
STOCK_MICRO = {"1024/128": 4}  # 8 rows of stock TRL take 18 GiB at 512/128 already: here its parts are smaller
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def nothing(completions: list[Any], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def random_model(size: str) -> Any:
    """Random weights of a public architecture (Qwen2.5-1.5B's numbers), bf16."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if size != "1.5b":
        raise SystemExit(f"expected --random 1.5b, found {size}")
    config = Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return Qwen2ForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


def trainer(kind: str, random: str | None, folder: str) -> Any:
    """`ours` or `stock`, with a LoRA policy whose weights are the same for both."""
    base = random_model(random) if random else load_base(MODEL)
    policy = add_policy(base, LORA, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # a fresh adapter is zero: half of its gradients would be
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.01).to(parameter)
    args = GRPOConfig(
        output_dir=folder, report_to=[], num_generations=GROUP, per_device_train_batch_size=MICRO,
        steps_per_generation=GROUPS * GROUP // MICRO, gradient_accumulation_steps=GROUPS * GROUP // MICRO,
        gradient_checkpointing=False, bf16=bool(random), **({} if torch.cuda.is_available() else {"use_cpu": True}),
    )  # fmt: skip
    shared = {
        "model": policy,
        "args": args,
        "train_dataset": Dataset.from_list([{"prompt": "x"}]),
        "processing_class": load_tokenizer(MODEL),
    }
    if kind == "stock":
        return GRPOTrainer(reward_funcs=[nothing], **shared)
    return PolicyTrainer(rewards=[LoadedReward("nothing", 1.0, nothing)], credit="segment", lineage=None, **shared)  # type: ignore[arg-type]


def batch(case: str, vocab: int, device: Any, groups: int = GROUPS) -> dict[str, Any]:
    """Random tokens, completions of full length."""
    prompt, width = map(int, case.split("/"))
    generator = torch.Generator().manual_seed(5)
    rows = groups * GROUP
    prompts = torch.randint(3, vocab, (groups, prompt), generator=generator).repeat_interleave(GROUP, 0)
    mask = torch.ones(rows, width, dtype=torch.long)
    made = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": torch.randint(3, vocab, (rows, width), generator=generator),
        "completion_mask": mask,
        "advantages": torch.randn(rows, generator=generator),
        "num_items_in_batch": mask.sum(),
    }
    return {name: value.to(device) for name, value in made.items()}


def stock_micro(case: str) -> int:
    return MICRO if torch.cuda.is_available() else STOCK_MICRO.get(case, MICRO)


def step(one: Any, made: dict[str, Any]) -> float:
    """Seconds of forward, loss and backward over the batch's micro-batches, as the trainer would cut them."""
    case = f"{made['prompt_ids'].size(1)}/{made['completion_ids'].size(1)}"
    micro = MICRO if isinstance(one, PolicyTrainer) else stock_micro(case)
    parts = made["completion_ids"].size(0) // micro
    one.model.train()
    one.model.zero_grad(set_to_none=True)
    one.current_gradient_accumulation_steps = one.args.steps_per_generation = parts
    torch.manual_seed(0)
    cut = whole_groups_shuffled if isinstance(one, PolicyTrainer) else shuffle_sequence_dict
    began = time.perf_counter()
    for part in split_tensor_dict(cut(made), parts):
        one.accelerator.backward(one._compute_loss(one.model, part))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def differences(ours: Any, stock: Any, made: dict[str, Any]) -> tuple[float, float]:
    """Largest difference of log-probs (nats), and of gradients relative to their norm."""
    ids = torch.cat([made["prompt_ids"], made["completion_ids"]], 1)
    width = made["completion_ids"].size(1)
    logps = []
    for one in (ours, stock):
        with torch.no_grad():
            logps.append(one._get_per_token_logps_and_entropies(one.model, ids, torch.ones_like(ids), width, MICRO)[0])
    grads = []
    for one in (ours, stock):
        step(one, made)
        grads.append(torch.cat([p.grad.flatten().float() for p in one.model.parameters() if p.grad is not None]))
    return (logps[0] - logps[1]).abs().max().item(), ((grads[0] - grads[1]).norm() / grads[1].norm()).item()


def unique_tokens(case: str) -> float:
    """G(P+C) / (P+GC): how much less there is to forward."""
    prompt, width = map(int, case.split("/"))
    return GROUP * (prompt + width) / (prompt + GROUP * width)


def measured(cases: list[str], repeats: int, random: str | None) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        ours, stock = (trainer(kind, random, folder) for kind in ("ours", "stock"))
        for case in cases:
            made = batch(case, ours.model.config.vocab_size, ours.accelerator.device)
            fewer = batch(case, ours.model.config.vocab_size, ours.accelerator.device, groups=2)
            logp, gradient = differences(ours, stock, fewer)
            seconds: dict[str, list[float]] = {"ours": [], "stock": []}
            for _ in range(repeats):
                seconds["ours"].append(step(ours, made))
                seconds["stock"].append(step(stock, made))
            a, b = (statistics.median(seconds[kind]) for kind in ("ours", "stock"))
            rows.append({
                "name": "training_step", "case": case, "ours_s": a, "stock_s": b, "ratio": b / a,
                "tokens_ratio": unique_tokens(case), "logp_difference": logp, "gradient_difference": gradient,
                "stock_micro": stock_micro(case),
            })  # fmt: skip
            same = f"{logp:.1e} | {gradient:.1e}"
            print(f"| {case} | {b:.2f} | {a:.2f} | {b / a:.2f} | {unique_tokens(case):.2f} | {same} |", flush=True)
    return rows


def resident(field: str) -> int:
    """`VmRSS` now, or `VmHWM`, its peak, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def peak(kind: str, case: str, random: str | None) -> None:
    """Print the peak memory of two groups, in MiB beyond what the model takes."""
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        one = trainer(kind, random, folder)
        made = batch(case, one.model.config.vocab_size, one.accelerator.device, groups=2)
        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(one, made)
            print((torch.cuda.max_memory_allocated() - before) / 2**20)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of loading, is forgotten
            before = resident("VmRSS")
            step(one, made)
            print((resident("VmHWM") - before) / 2**10)


def peaks(cases: list[str], random: str | None) -> list[dict[str, Any]]:
    rows = []
    for case in cases:
        found = {}
        for kind in ("ours", "stock"):
            command = [sys.executable, __file__, "--peak", kind, "--cases", case]
            done = subprocess.run(
                command + (["--random", random] if random else []), capture_output=True, text=True, check=True
            )
            found[kind] = float(done.stdout.split()[-1])
        rows.append(
            {
                "name": "peak_memory",
                "case": case,
                "ours_mib": found["ours"],
                "stock_mib": found["stock"],
                "stock_micro": stock_micro(case),
            }
        )
        print(f"| {case} | {found['stock']:.0f} | {found['ours']:.0f} |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--random", help="1.5b: random weights instead of the bundled model")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--peak", choices=["ours", "stock"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak:
        peak(asked.peak, asked.cases[0], asked.random)
        return
    if asked.memory:
        print("| prompt/completion | stock, MiB | ours, MiB |\n|---|---|---|")
        rows, name = peaks(asked.cases, asked.random), "peak_memory"
    else:
        print(
            "| prompt/completion | stock, s | ours, s | ratio | by tokens | log-probs | gradients |\n"
            + "|---" * 7
            + "|"
        )
        rows, name = measured(asked.cases, asked.repeats, asked.random), "training_step"
    OUT.mkdir(exist_ok=True)
    (OUT / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
