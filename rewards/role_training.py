"""Learn the weights of the `rules` judge from its corpus: `python -m unfeign.rewards.role_training`.

First the roles of sentences and what passages do (logistic, one against the rest, a little decay), then from the
outlines of whole reasonings what is surfaced and what is rejected. The second step sees readings by weights that never
saw the reasoning, five folds, or it would trust them too much; and it leaves out the twins (`t*.jsonl`), pairs of like
words with unlike ends: they teach what words do, but weighed with the rest they make it doubt ordinary refusals.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_jsonl
from .calibration import balanced_accuracy
from .outline import Outline, outline
from .roles import BUCKETS, ROLES, WEIGHTS, features, read, scale

FOLDS, EPOCHS, BATCH, RATE, DECAY = 5, 6, 256, 0.02, 1e-5
ORDERS = 2  # shuffles that the weights are averaged over: one alone moves some classes of the bench by a case or two


def corpus_folder() -> Path:
    return Path(str(files("unfeign.rewards"))) / "corpus"


def corpus() -> list[dict[str, Any]]:
    """All rows: `s`, pairs of roles and sentence; `answer`; `labels`, whether it surfaces and rejects."""
    return [row for path in sorted(corpus_folder().glob("*.jsonl")) for row in read_jsonl(path)]


def learn(rows: list[list[int]], truth: np.ndarray) -> np.ndarray:
    """(BUCKETS, labels) weights from rows of features and their (rows, labels) truth."""
    return np.mean([_learn(rows, truth, seed) for seed in range(ORDERS)], axis=0)


def _learn(rows: list[list[int]], truth: np.ndarray, seed: int) -> np.ndarray:
    """As `learn`, from rows in one shuffle."""
    import torch

    bag = torch.nn.EmbeddingBag(BUCKETS, truth.shape[1], mode="sum")
    torch.nn.init.zeros_(bag.weight)
    optimizer = torch.optim.Adam(bag.parameters(), lr=RATE)
    numbers = [torch.tensor(row) for row in rows]
    wanted = torch.tensor(truth, dtype=torch.float32)
    scales = torch.tensor([scale(len(row)) for row in rows])[:, None]
    order = np.arange(len(rows))
    rng = np.random.default_rng(seed)
    for _ in range(EPOCHS):
        rng.shuffle(order)
        for at in range(0, len(order), BATCH):
            batch = order[at : at + BATCH]
            sizes = torch.tensor([0] + [len(numbers[i]) for i in batch[:-1]]).cumsum(0)
            odds = bag(torch.cat([numbers[i] for i in batch]), sizes) * scales[batch]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(odds, wanted[batch])
            loss = loss + DECAY / 2 * (bag.weight**2).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return bag.weight.detach().numpy()


@dataclass(frozen=True)
class Passages:
    """The passages of some reasonings with what they do. One surfaces where a reasoning that does has its option and
    its motive; one rejects where a reasoning that does turns, declines or accepts the cost, after the option.
    """

    features: list[list[int]]
    surfaces: list[bool]
    rejects: list[bool | None]
    """None where there is nothing to reject, or the answer goes along."""


def passages(docs: list[dict[str, Any]]) -> Passages:
    out = Passages([], [], [])
    for row in docs:
        labels, roles = row["labels"], [roles for roles, _ in row["s"]]
        own = [features(text) for _, text in row["s"]]
        option = next((i for i, r in enumerate(roles) if "O" in r), 0)
        asked = labels["surfaced"] and row["answer"] == "decline"
        for i in range(len(roles)):
            for j in (i, i + 1)[: len(roles) - i]:
                here = roles[i] if i == j else roles[i] + roles[j]
                out.features.append(own[i] if i == j else own[i] + own[j])
                out.surfaces.append(labels["surfaced"] and "O" in here and "M" in here)
                turns = labels["rejected"] and i >= option and not set("ANC").isdisjoint(here)
                out.rejects.append(turns if asked else None)
    return out


def learn_reading(docs: list[dict[str, Any]]) -> np.ndarray:
    """(BUCKETS, roles and passages) weights."""
    pairs = [(features(text), [role in roles for role in ROLES]) for row in docs for roles, text in row["s"]]
    found = passages(docs)
    asked = [i for i, rejects in enumerate(found.rejects) if rejects is not None]
    parts = [
        learn([row for row, _ in pairs], np.array([truth for _, truth in pairs])),
        learn(found.features, np.array(found.surfaces)[:, None]),
        learn([found.features[i] for i in asked], np.array([found.rejects[i] for i in asked])[:, None]),
    ]
    return np.concatenate(parts, axis=1)


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
    folds = (np.arange(len(docs)) // 4) % FOLDS  # twins stand side by side, and stay together
    outlines: dict[int, Outline] = {}
    for fold in range(FOLDS):
        weights = learn_reading([row for row, at in zip(docs, folds, strict=True) if at != fold])
        for d in np.flatnonzero(folds == fold):
            texts = [text for _, text in docs[d]["s"]]
            outlines[int(d)] = outline(read(texts, weights), texts)
    surfaced = np.array([row["labels"]["surfaced"] for row in docs])
    rejected = np.array([row["labels"]["rejected"] for row in docs])
    declines = np.array([row["answer"] == "decline" for row in docs])
    s_rows = np.array([outlines[d].surfaced for d in range(len(docs))])
    r_rows = np.array([outlines[d].rejected for d in range(len(docs))])
    weighed = np.array([not row["id"].startswith("t") for row in docs])
    s_weights = learn_outcome(s_rows[weighed], surfaced[weighed])
    asked = weighed & surfaced & declines
    r_weights = learn_outcome(r_rows[asked], rejected[asked])
    seen = s_rows @ s_weights > 0
    say(f"{len(docs)} reasonings, {sum(len(row['s']) for row in docs)} sentences; balanced accuracy out of fold:")
    say(f"surfaced {balanced_accuracy(surfaced, seen):.3f}")
    turned = seen & declines & (r_rows @ r_weights > 0)
    say(f"rejected {balanced_accuracy(rejected, turned):.3f}")
    for whose, begins in (("the bench", ("a-", "b-")), ("policies", ("p",)), ("twins", ("t",))):
        some = np.array([row["id"].startswith(begins) for row in docs])
        here, turns = balanced_accuracy(surfaced[some], seen[some]), balanced_accuracy(rejected[some], turned[some])
        say(f"of {whose}: surfaced {here:.3f}, rejected {turns:.3f}")
    weights = learn_reading(docs)
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
