"""Learn the weights of the `rules` judge from its corpus: `python -m unfeign.rewards.role_training`.

First the roles of sentences (logistic, one against the rest, a little decay), then from the outlines of whole
reasonings what is surfaced and what is rejected. The second step sees roles as read by weights that never saw the
reasoning, five folds, or it would trust them too much.
"""

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_jsonl
from .calibration import balanced_accuracy
from .outline import outline
from .roles import BUCKETS, ROLES, WEIGHTS, features, odds, scale

FOLDS, EPOCHS, BATCH, RATE, DECAY = 5, 30, 256, 0.02, 1e-4


def corpus() -> list[dict[str, Any]]:
    """All rows: `s`, pairs of roles and sentence; `answer`; `labels`, whether it surfaces and rejects."""
    folder = Path(str(files("unfeign.rewards"))) / "corpus"
    return [row for path in sorted(folder.glob("*.jsonl")) for row in read_jsonl(path)]


def learn_roles(sentences: list[list[int]], truth: np.ndarray) -> np.ndarray:
    """(BUCKETS, roles) weights from sentences' features and (sentences, roles) truth."""
    import torch

    torch.manual_seed(0)
    bag = torch.nn.EmbeddingBag(BUCKETS, len(ROLES), mode="sum")
    torch.nn.init.zeros_(bag.weight)
    optimizer = torch.optim.Adam(bag.parameters(), lr=RATE)
    rows = [torch.tensor(row) for row in sentences]
    wanted = torch.tensor(truth, dtype=torch.float32)
    scales = torch.tensor([scale(len(row)) for row in sentences])[:, None]
    order = np.arange(len(rows))
    rng = np.random.default_rng(0)
    for _ in range(EPOCHS):
        rng.shuffle(order)
        for at in range(0, len(order), BATCH):
            batch = order[at : at + BATCH]
            sizes = torch.tensor([0] + [len(rows[i]) for i in batch[:-1]]).cumsum(0)
            odds = bag(torch.cat([rows[i] for i in batch]), sizes) * scales[batch]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(odds, wanted[batch])
            loss = loss + DECAY / 2 * (bag.weight**2).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return bag.weight.detach().numpy()


def learn_outcome(rows: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Weights of a balanced logistic decision: positive where a row's product with them is above 0."""
    import torch

    x, y = torch.tensor(rows, dtype=torch.float64), torch.tensor(truth, dtype=torch.float64)
    mean, spread = x.mean(0), x.std(0) + 1e-6
    mean[0], spread[0] = 0.0, 1.0  # the constant
    x = (x - mean) / spread
    balance = torch.where(y > 0, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    w = torch.zeros(x.size(1), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        each = torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y, reduction="none")
        loss = (each * balance).mean() + 0.005 * (w[1:] ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = (w.detach() / spread).numpy()
    found[0] = (w.detach()[0] - (w.detach() * mean / spread)[1:].sum()).item()
    return found


def train(say: Callable[[str], None] = print) -> dict[str, np.ndarray]:
    """Learn everything; returns the arrays of `roles.npz`."""
    docs = corpus()
    of = np.array([d for d, row in enumerate(docs) for _ in row["s"]])
    texts = [text for row in docs for _, text in row["s"]]
    sentences = [features(text) for text in texts]
    truth = np.array([[role in roles for role in ROLES] for row in docs for roles, _ in row["s"]])
    folds = (np.arange(len(docs)) // 4) % FOLDS  # twins stand side by side, and stay together
    read = np.zeros(truth.shape, dtype=np.float32)
    for fold in range(FOLDS):
        inside = folds[of] != fold
        weights = learn_roles([s for s, keep in zip(sentences, inside, strict=True) if keep], truth[inside])
        for i in np.flatnonzero(~inside):
            read[i] = odds(texts[i], weights)
    outlines = [outline(read[of == d], [text for _, text in row["s"]]) for d, row in enumerate(docs)]
    surfaced = np.array([row["labels"]["surfaced"] for row in docs])
    rejected = np.array([row["labels"]["rejected"] for row in docs])
    declines = np.array([row["answer"] == "decline" for row in docs])
    s_rows, r_rows = np.array([o.surfaced for o in outlines]), np.array([o.rejected for o in outlines])
    s_weights = learn_outcome(s_rows, surfaced)
    asked = surfaced & declines
    r_weights = learn_outcome(r_rows[asked], rejected[asked])
    seen = s_rows @ s_weights > 0
    say(f"{len(docs)} reasonings, {len(sentences)} sentences; balanced accuracy out of fold:")
    say(f"surfaced {balanced_accuracy(surfaced, seen):.3f}")
    turned = seen & declines & (r_rows @ r_weights > 0)
    say(f"rejected {balanced_accuracy(rejected, turned):.3f}")
    dev = np.array([row["id"][:2] in ("a-", "b-") for row in docs])
    if dev.any():
        say(f"of these the bench's: surfaced {balanced_accuracy(surfaced[dev], seen[dev]):.3f}")
        say(f"                      rejected {balanced_accuracy(rejected[dev], turned[dev]):.3f}")
    weights = learn_roles(sentences, truth)
    unit = np.abs(weights).max() / 127
    return {
        "weights": np.round(weights / unit).astype(np.int8),
        "unit": np.float32(unit),
        "surfaced": s_weights,
        "rejected": r_weights,
    }


def main() -> None:
    import torch

    torch.set_num_threads(1)  # many small steps: threads would only wait for each other
    arrays = train()
    np.savez_compressed(WEIGHTS, **arrays)
    print(json.dumps({"file": str(WEIGHTS), "bytes": WEIGHTS.stat().st_size}))


if __name__ == "__main__":
    main()
