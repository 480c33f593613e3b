"""Learn the word reader (`word_reader`) from labelled reasonings."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .labelled_corpus import Truth
from .roles import PASSAGES
from .word_reader import BUCKETS, features, scale

EPOCHS, BATCH, RATE, DECAY = 6, 256, 0.02, 1e-5
ORDERS = 2  # shuffles that the weights are averaged over: one alone moves some classes of the bench by a case or two


def learn(docs: Sequence[dict[str, Any]], truths: Sequence[Truth]) -> np.ndarray:
    """(BUCKETS, roles and passages) weights: logistic, one against the rest, a little decay; each passage that a
    sentence or two neighbours make is a row of its own.
    """
    own = [[features(text) for _, text in row["s"]] for row in docs]
    passages = [
        (numbers, told)
        for some, truth in zip(own, truths, strict=True)
        for i in range(len(some))
        for numbers, told in [(some[i], truth.alone[i]), *((some[i] + some[i + 1], t) for t in truth.beside[i : i + 1])]
    ]
    parts = [_averaged([row for some in own for row in some], np.concatenate([truth.roles for truth in truths]))]
    for label in range(len(PASSAGES)):
        asked = [(numbers, told[label]) for numbers, told in passages if not np.isnan(told[label])]
        parts.append(_averaged([numbers for numbers, _ in asked], np.array([told for _, told in asked])[:, None]))
    return np.concatenate(parts, axis=1)


def _averaged(rows: list[list[int]], truth: np.ndarray) -> np.ndarray:
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
