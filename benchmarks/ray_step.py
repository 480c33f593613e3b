"""What Ray costs: whole GRPO steps with one worker, against the in-process pool, on the same samples in one run.

    python benchmarks/ray_step.py            # 1 + 5 steps of the quickstart's batch, bundled model

Every step pushes to both pools and generates with both, taking turns at going first, and stops if they don't draw the
same samples. A pool's whole step is the step without the other pool's seconds. The first step is left out. Writes
`benchmarks/out/ray_step.json`: seconds are medians, `ratio` = in-process / Ray (1 means that Ray costs nothing), and
`push_share` is what pushing weights to the worker takes of a step.
"""

import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from unfeign.trainers import launch
from unfeign.trainers.config import TrainConfig
from unfeign.trainers.plan import plan
from unfeign.trainers.rollouts import InProcessPool, unheard

OUT = Path(__file__).parent / "out" / "ray_step.json"
CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
STEPS = 5
KINDS = ("in_process", "ray")


class Both:
    """Two pools that do the same work; `seconds[kind][what][version]` is what each took."""

    def __init__(self, pools: dict[str, Any]):
        self.pools = pools
        self.counts = pools["ray"].counts
        self.seconds: dict[str, dict[str, dict[int, float]]] = {kind: defaultdict(dict) for kind in KINDS}

    @property
    def waited(self) -> float:
        return self.pools["ray"].waited

    def _each(self, what: str, version: int, call: Any) -> dict[str, Any]:
        out = {}
        for kind in KINDS if version % 2 else KINDS[::-1]:
            began = time.perf_counter()
            out[kind] = call(self.pools[kind])
            self.seconds[kind][what][version] = time.perf_counter() - began
        return out

    def push(self, policy, version):
        self._each("push", version, lambda pool: pool.push(policy, version))

    def generate(self, requests, version, sampling, arrived=unheard):
        samples = self._each("rollouts", version, lambda pool: pool.generate(requests, version, sampling))
        ours, stock = ([sample.ids for sample in samples[kind]] for kind in ("ray", "in_process"))
        assert ours == stock, f"version {version}: the two pools drew different samples"
        arrived(range(len(requests)), samples["ray"])
        return samples["ray"]

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()


def main() -> None:
    make_pool = launch.make_pool
    pools: list[Both] = []

    def both(config: TrainConfig, recipe: Any, tokenizer: Any) -> Both:
        in_process = InProcessPool(tokenizer, config.rollouts.batch_size)
        pools.append(Both({"in_process": in_process, "ray": make_pool(config, recipe, tokenizer)}))
        return pools[0]

    launch.make_pool = both
    with tempfile.TemporaryDirectory() as folder:
        overrides = (
            f"output={folder}/run",
            "rollouts.backend=ray",
            "rollouts.workers=1",
            f"grpo.max_steps={STEPS + 1}",
            "grpo.save_steps=1000",
        )
        launch.train(plan(TrainConfig.load(CONFIG, overrides)))
        text = (Path(folder) / "run" / "metrics.jsonl").read_text()
    steps = [json.loads(line)["seconds"] for line in text.splitlines()]
    took = {kind: {what: list(by.values()) for what, by in pools[0].seconds[kind].items()} for kind in KINDS}
    for kind, other in (KINDS, KINDS[::-1]):
        elsewhere = zip(took[other]["push"], took[other]["rollouts"], strict=True)
        took[kind]["whole step"] = [whole - sum(some) for whole, some in zip(steps, elsewhere, strict=True)]
    rows: list[dict[str, Any]] = []
    for name in ("whole step", "rollouts", "push"):
        ours, stock = (statistics.median(took[kind][name][1:]) for kind in ("ray", "in_process"))
        rows.append({"name": name, "case": "1 worker", "ours_s": ours, "stock_s": stock, "ratio": stock / ours})
    pairs = zip(took["ray"]["push"][1:], took["ray"]["whole step"][1:], strict=True)
    share = statistics.median(push / whole for push, whole in pairs)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps([*rows, {"name": "push_share", "case": "1 worker", "share": share}], indent=1) + "\n")
    print("| | in process, s | 1 Ray worker, s | in process / Ray |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['name']} | {row['stock_s']:.2f} | {row['ours_s']:.2f} | {row['ratio']:.2f} |")
    print(f"push: {share:.1%} of a step")


if __name__ == "__main__":
    main()
