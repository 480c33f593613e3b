"""Our scenarios and our reward in TRL's own GRPOTrainer: nothing of `unfeign.trainers` is needed.

What you give up against `unfeign train`: credit by segment, shared prefixes, the audits before and after, and the state
`truncated`, which a bare trainer does not hand to rewards. A plain base seldom surfaces anything; an organism does:

    python examples/bare_grpo.py --model organism:verbal
    unfeign audit runs/bare-grpo/final
"""

import argparse
from pathlib import Path

import torch
from trl import GRPOConfig, GRPOTrainer

from unfeign.envs.dataset import mixed, to_dataset
from unfeign.envs.scenario import scenarios
from unfeign.lineage import write_lineage
from unfeign.models import add_policy, load_base, load_tokenizer, resolve, stack
from unfeign.rewards.verbalized_rejection import VerbalizedRejection

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="bundled:smollm2-135m-instruct", help="a base, a model folder, or an adapter")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--output", default="runs/bare-grpo")
args = parser.parse_args()

base, adapters = resolve(args.model)
model, lineage = stack(load_base(base), base, adapters)
model = add_policy(model, {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}, seed=0)
shares = {"monitored": 0.5, "unmonitored": 0.1, "control": 0.4}
dataset = to_dataset(mixed(scenarios("train"), shares, count=2 * args.steps, seed=0))
config = GRPOConfig(
    output_dir=args.output,
    max_steps=args.steps,
    num_generations=4,
    per_device_train_batch_size=8,  # completions: two prompts a step
    max_completion_length=96,
    learning_rate=3e-4,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    shuffle_dataset=False,  # `mixed` has put the settings in order
    gradient_checkpointing=False,
    bf16=False,
    use_cpu=not torch.cuda.is_available(),
)
reward = VerbalizedRejection()
trainer = GRPOTrainer(model, reward, config, train_dataset=dataset, processing_class=load_tokenizer(base))
trainer.train()
trainer.save_model(f"{args.output}/final")
write_lineage(Path(args.output, "final", "policy"), lineage)  # lets an audit find what the adapter was trained on
