"""Learn the window reader (`window_reader`) from labelled reasonings."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .labelled_corpus import Truth
from .roles import PASSAGES, ROLES
from .window_reader import FIRST, MEAN, NEXT, NOTHING, UNKNOWN, Windows, words

MODEL = "bundled:smollm2-135m-instruct"
WIDTH, STATES, HIDDEN = 96, 128, 128  # of word vectors, of each layer's states, of the layer before the answers
EPOCHS, BATCH, RATE, WARMUP, DECAY = 15, 32, 4e-3, 50, 0.01
OWN = 0.25  # rate of what a word learns for itself, against that of what all words share
DROPPED, HIDDEN_WORDS = 0.4, 0.15  # shares of states and of words that a step does without
RARE = -2.5  # log-odds of anything before learning
SPREAD = 24**0.5  # length of a word's vector before it is projected

Vectors = tuple[tuple[str, ...], np.ndarray]
"""Words, and (words, d) vectors of length 1 that begin as a model's own."""


def model_vectors(docs: Sequence[dict[str, Any]]) -> Vectors:
    """For the words that more than one of some reasonings has, and those the bundled model has as one token: the mean
    of their tokens' embeddings, from the mean of all words.
    """
    import torch

    from ..models import load_base, load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    table = load_base(MODEL).get_input_embeddings().weight.detach().float()
    begins = tokenizer.tokenize(" a")[0][:-1]  # the mark of a space
    known = {token[len(begins) :] for token in tokenizer.get_vocab() if token.startswith(begins)}
    known = {word for word in known if len(word) > 1 and word.isascii() and word.isalpha() and word.islower()}
    seen = Counter(word for row in docs for word in {word for _, text in row["s"] for word in words(text)})
    names = sorted(known.union(word for word, count in seen.items() if count > 1))
    ids = [tokenizer(f" {name}", add_special_tokens=False).input_ids for name in names]
    vectors = torch.stack([table[one].mean(0) for one in ids])
    vectors = torch.nn.functional.normalize(vectors - vectors.mean(0), dim=1)
    return tuple(names), vectors.numpy()


def learn(docs: Sequence[dict[str, Any]], truths: Sequence[Truth], vectors: Vectors) -> Windows:
    """Learn from reasonings and their truth, on one thread to the same numbers every time."""
    import torch
    from torch import nn
    from torch.nn.functional import relu

    generator = np.random.default_rng(0)
    torch.manual_seed(0)
    names, began = vectors
    known = Windows(names, {})
    texts = [[known.numbers(text) for _, text in row["s"]] for row in docs]
    shared = torch.tensor(np.concatenate([np.zeros((2, began.shape[1])), began]) * SPREAD, dtype=torch.float32)
    net = nn.ModuleDict(
        {
            "projection": nn.Linear(began.shape[1], WIDTH, bias=False),
            "own": nn.Embedding(len(shared), WIDTH),
            "first": nn.Conv1d(WIDTH, STATES, len(FIRST), padding=max(FIRST)),
            **{
                f"next{i}": nn.Conv1d(STATES, STATES, len(at), padding=at[-1], dilation=at[-1])
                for i, at in enumerate(NEXT)
            },
            "sentence": nn.Linear(2 * STATES, HIDDEN),
            "does": nn.Linear(HIDDEN, len(ROLES) + len(PASSAGES)),
            "pair": nn.Linear(4 * STATES, HIDDEN),
            "passes": nn.Linear(HIDDEN, len(PASSAGES)),
        }
    )
    nn.init.zeros_(net["own"].weight)
    for last in ("does", "passes"):
        nn.init.constant_(net[last].bias, RARE)
    drop = nn.Dropout(DROPPED)

    def pooled(sentences: list[list[int]]) -> Any:
        """(sentences, 2 * STATES): the largest and the mean state."""
        flat = torch.zeros(len(sentences), max(map(len, sentences)), dtype=torch.long)
        for row, one in zip(flat, sentences, strict=True):
            row[: len(one)] = torch.tensor(one)
        real = (flat != NOTHING)[:, None]
        used, where = flat.unique(return_inverse=True)
        vector = (net["projection"](shared[used]) + net["own"](used))[where] * real.transpose(1, 2)
        states = relu(net["first"](drop(vector).transpose(1, 2))) * real
        for i in range(len(NEXT)):
            states = (states + relu(net[f"next{i}"](drop(states)))) * real
        mean = states.sum(2) / (MEAN * real.sum(2) ** 0.5)
        return drop(torch.cat([states.amax(2), mean], 1))

    def loss_of(odds: Any, wanted: np.ndarray) -> Any:
        told = torch.tensor(~np.isnan(wanted))
        truth = torch.tensor(np.nan_to_num(wanted), dtype=torch.float32)
        return (nn.functional.binary_cross_entropy_with_logits(odds, truth, reduction="none") * told).sum()

    own = [net["own"].weight]
    others = [parameter for name, parameter in net.named_parameters() if name != "own.weight"]
    groups = [{"params": others, "weight_decay": DECAY}, {"params": own, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    steps = [batch for _ in range(EPOCHS) for batch in _batches(texts, generator)]
    for step, batch in enumerate(steps):
        sentences = [one for doc in batch for one in texts[doc]]
        sentences = [[UNKNOWN if generator.random() < HIDDEN_WORDS else word for word in one] for one in sentences]
        states = pooled(sentences)
        does = net["does"](drop(relu(net["sentence"](states))))
        loss = loss_of(does, np.concatenate([np.hstack([truths[d].roles, truths[d].alone]) for d in batch]))
        ends = np.cumsum([len(texts[doc]) for doc in batch])
        first = np.setdiff1d(np.arange(len(sentences)), ends - 1)  # all that have a next one in their reasoning
        if len(first):
            pairs = torch.cat([states[first], states[first + 1]], 1)
            passes = net["passes"](drop(relu(net["pair"](pairs))))
            loss = loss + loss_of(passes, np.concatenate([truths[doc].beside for doc in batch]))
        rate = RATE * min(1.0, (step + 1) / WARMUP) * (1 - step / len(steps))
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, rate * OWN
        optimizer.zero_grad()
        (loss / len(sentences)).backward()
        optimizer.step()

    with torch.no_grad():
        arrays = {"vectors": (shared @ net["projection"].weight.T + net["own"].weight).numpy()}
        arrays["vectors"][NOTHING] = 0.0
        for name, layer in net.items():
            if name not in ("projection", "own"):
                weight = layer.weight.permute(2, 1, 0).flatten(0, 1) if layer.weight.ndim == 3 else layer.weight.T
                arrays[f"{name}.weight"], arrays[f"{name}.bias"] = weight.numpy().copy(), layer.bias.numpy()
    return Windows(names, arrays)


def _batches(texts: list[list[list[int]]], generator: np.random.Generator) -> list[np.ndarray]:
    """One epoch: batches of reasonings whose longest sentences are alike, in any order."""
    order = generator.permutation(len(texts))
    longest = np.array([max(map(len, sentences)) for sentences in texts])
    out = []
    for at in range(0, len(order), 32 * BATCH):
        chunk = order[at : at + 32 * BATCH]
        chunk = chunk[np.argsort(longest[chunk], kind="stable")]
        out += [chunk[i : i + BATCH] for i in range(0, len(chunk), BATCH)]
    return [out[i] for i in generator.permutation(len(out))]
