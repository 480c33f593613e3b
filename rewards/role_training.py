"""Learn the weights of the `rules` judge from its corpus: `python -m unfeign.rewards.role_training`.

First both readers of sentences (`word_training`, `window_training`), then from the outlines of whole reasonings what is
surfaced and what is rejected. The second step sees readings by weights that never saw the reasoning, five folds, or it
would trust them too much; and it leaves out the twins (`t*.jsonl`), pairs of like words with unlike ends: they teach
what words do, but weighed with the rest they make it doubt ordinary refusals.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import window_training, word_training
from .calibration import balanced_accuracy
from .labelled_corpus import corpus, truth
from .outline import Outline, outline
from .readers import WEIGHTS, Learned, read, to_arrays
from .window_training import Vectors

FOLDS = 5


def learn(docs: Sequence[dict[str, Any]], vectors: Vectors) -> Learned:
    """Both readers."""
    truths = [truth(row) for row in docs]
    return Learned(word_training.learn(docs, truths), window_training.learn(docs, truths, vectors))


def folds(docs: Sequence[dict[str, Any]]) -> np.ndarray:
    """Which fold a row is in: four neighbours of a file together, so that twins, which stand side by side, are never
    parted.
    """
    seen: Counter[str] = Counter()
    found = []
    for row in docs:
        writer = row["id"].rpartition("-")[0]
        found.append(seen[writer] // 4 % FOLDS)
        seen[writer] += 1
    return np.array(found)


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


def train(
    docs: Sequence[dict[str, Any]], vectors: Vectors, say: Callable[[str], None] = print
) -> dict[str, np.ndarray]:
    """Learn everything; returns the arrays of `roles.npz`."""
    fold_of = folds(docs)
    outlines: dict[int, Outline] = {}
    for fold in range(FOLDS):
        say(f"fold {fold + 1} of {FOLDS}")
        learned = learn([row for row, at in zip(docs, fold_of, strict=True) if at != fold], vectors)
        for d in np.flatnonzero(fold_of == fold):
            texts = [text for _, text in docs[d]["s"]]
            outlines[int(d)] = outline(read(texts, learned), texts)
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
    turned = seen & declines & (r_rows @ r_weights > 0)
    for whose, begins in (("all", ""), ("the bench", ("a-", "b-")), ("policies", "p"), ("twins", "t")):
        some = np.array([row["id"].startswith(begins) for row in docs])
        here, turns = balanced_accuracy(surfaced[some], seen[some]), balanced_accuracy(rejected[some], turned[some])
        say(f"of {whose}: surfaced {here:.3f}, rejected {turns:.3f}")
    return {**to_arrays(learn(docs, vectors)), "surfaced": s_weights, "rejected": r_weights}


def main() -> None:
    import torch

    torch.set_num_threads(1)  # many small steps: threads would only wait for each other
    docs = corpus()
    arrays = train(docs, window_training.model_vectors(docs))
    np.savez_compressed(WEIGHTS, **arrays)
    print(json.dumps({"file": str(WEIGHTS), "bytes": WEIGHTS.stat().st_size}))


if __name__ == "__main__":
    main()
