"""What Ray costs: whole GRPO steps with one worker, against the in-process pool, alternating in one run.

    python benchmarks/ray_step.py            # 2 + 10 steps of the quickstart's batch, bundled model

Even steps generate in process, odd ones on a Ray worker; the first of each is left out. Writes
`benchmarks/out/ray_step.json`: seconds are medians, `ratio` = in-process / Ray (1 means that Ray costs nothing), and
`push_share` is what pushing weights to the worker takes of a step.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from unfeign.trainers import launch
from unfeign.trainers.config import TrainConfig
from unfeign.trainers.plan import plan
from unfeign.trainers.rollouts import InProcessPool

OUT = Path(__file__).parent / "out" / "ray_step.json"
CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
PAIRS = 5


class Alternating:
    """Two pools taking turns by version; the audit's negative versions never reach it here."""

    def __init__(self, pools: list[Any]):
        self.pools = pools
        self.counts = pools[1].counts

    @property
    def waited(self) -> float:
        return self.pools[1].waited

    def push(self, policy: Any, version: int) -> None:
        self.pools[version % 2].push(policy, version)

    def generate(self, requests, version, sampling):
        return self.pools[version % 2].generate(requests, version, sampling)

    def close(self) -> None:
        for pool in self.pools:
            pool.close()


def main() -> None:
    make_pool = launch.make_pool

    def both(config: TrainConfig, recipe: Any, tokenizer: Any) -> Alternating:
        return Alternating([InProcessPool(tokenizer, config.rollouts.batch_size), make_pool(config, recipe, tokenizer)])

    launch.make_pool = both
    with tempfile.TemporaryDirectory() as folder:
        overrides = (
            f"output={folder}/run",
            "rollouts.backend=ray",
            "rollouts.workers=1",
            f"grpo.max_steps={2 * PAIRS + 2}",
            "grpo.save_steps=1000",
        )
        launch.train(plan(TrainConfig.load(CONFIG, overrides)))
        text = (Path(folder) / "run" / "metrics.jsonl").read_text()
    steps = [json.loads(line) for line in text.splitlines()][2:]
    in_process, on_ray = steps[0::2], steps[1::2]
    rows = []
    for name, key in (("whole step", "seconds"), ("rollouts", "generate_seconds"), ("push", "push_seconds")):
        ours, stock = (statistics.median(row[key] for row in some) for some in (on_ray, in_process))
        rows.append({"name": name, "case": "1 worker", "ours_s": ours, "stock_s": stock, "ratio": stock / ours})
    share = statistics.median(row["push_seconds"] / row["seconds"] for row in on_ray)
    rows.append({"name": "push_share", "case": "1 worker", "share": share})
    tokens = [statistics.mean(row["tokens"] for row in some) for some in (in_process, on_ray)]
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=1) + "\n")
    print("| | in process, s | 1 Ray worker, s | in process / Ray |\n|---|---|---|---|")
    for row in rows[:3]:
        print(f"| {row['name']} | {row['stock_s']:.2f} | {row['ours_s']:.2f} | {row['ratio']:.2f} |")
    print(f"push: {share:.1%} of a step; tokens a step: {tokens[0]:.0f} in process, {tokens[1]:.0f} on Ray")


if __name__ == "__main__":
    main()
