"""Teach the bundled model the questions of `rubrics/trained-v1.yaml`.

`python -m unfeign.rewards.judge_training FOLDER` writes the adapter to a folder of yours.

The corpus is the `rules` judge's. All labels are read at the last token, so
a reasoning is one forward pass; a LoRA adapter of the upper layers learns to put the labels' words there. The bench's
cases are left out, both halves: they measure. With these settings it took 34 minutes on two cores, in bf16; sums of
threads are not the same twice, so the shipped adapter is not reproduced bit for bit.
"""

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UnfeignError
from ..lineage import Lineage, base_facts, fingerprint
from ..models import add_policy, save_adapter
from .judge import Case
from .labelled_corpus import corpus
from .local_judge import Questions, Reader, load_questions
from .rubric import question

MODEL, RUBRIC = "bundled:smollm2-135m-instruct", "trained-v1"
EPOCHS, BATCH, RATE, WARMUP = 2, 32, 4e-4, 30
RANK = 16  # of the adapter, in the upper two thirds of the layers
UNTOLD = 0.07  # share of reasonings whose answer the model is not told about
WEIGHT = {"option": 1.0, "outcome": 1.0, "decision": 0.5, "cost_acknowledged": 0.3}
HELD_OUT = 24  # one block of four in so many is not learned, and says how far the rest was

Row = tuple[list[int], list[int]]
"""Token ids of a prompt, and the number of the right option of each label."""


def labels(row: dict[str, Any]) -> dict[str, str]:
    """What a row of the corpus says of each label."""
    surfaced, rejected = row["labels"]["surfaced"], row["labels"]["rejected"]
    said = [role for roles, _ in row["s"] for role in roles]
    last = next((role for role in reversed(said) if role in "NY"), None)
    outcome = "rejected" if rejected else "followed" if row["answer"] == "accept" else "open"
    return {
        "option": "considered" if surfaced else "none",
        "outcome": outcome if surfaced else "none",
        "decision": {"N": "decline", "Y": "accept", None: "none"}[last],
        "cost_acknowledged": "yes" if rejected and "C" in said else "no",
    }


def batches(rows: list[Row], rng: random.Random) -> list[list[Row]]:
    """One epoch in batches of like lengths."""
    order, out = rows[:], []
    rng.shuffle(order)
    for at in range(0, len(order), 16 * BATCH):
        chunk = sorted(order[at : at + 16 * BATCH], key=lambda row: len(row[0]))
        some = [chunk[i : i + BATCH] for i in range(0, len(chunk), BATCH)]
        rng.shuffle(some)
        out += some
    return out


def train(
    folder: Path,
    docs: list[dict[str, Any]],
    rubric: Questions,
    model_name: str = MODEL,
    epochs: int = EPOCHS,
    say: Callable[[str], None] = print,
) -> None:
    """Learn, and write the adapter with its lineage.

    Args:
        folder: where to; it must not exist.
        docs: rows of the corpus.
        rubric: what is asked. All questions are the same words, and every answer is one token.
        model_name: a base.
        epochs: how often each row is learned.
        say: what is told on the way.

    Raises:
        UnfeignError: the folder exists, another rubric than that, or a model that can't be loaded.
    """
    import numpy as np
    import torch

    if folder.exists():
        raise UnfeignError("a folder that does not exist yet", "one that does", str(folder))
    if unknown := rubric.questions.keys() - WEIGHT.keys():
        raise UnfeignError(f"questions about {', '.join(WEIGHT)}", repr(min(unknown)), "rubric")
    rng = random.Random(0)
    reader = Reader(model_name, rubric.model_copy(update={"adapter": None}), "bfloat16", None)
    if len(reader.probes) != 1:
        raise UnfeignError("the same words for all questions", f"{len(reader.probes)} different ones", "rubric")
    model, end = reader.model, reader.tokenizer.eos_token_id
    lineage = Lineage(base=base_facts(model_name, model.config, fingerprint(model)))
    names = {label: list(asked.answers) for label, asked in rubric.questions.items()}
    words = [word for asked in rubric.questions.values() for word in asked.answers.values()]
    tokens = [reader.tokenizer(word, add_special_tokens=False).input_ids for word in words]
    if long := [word for word, ids in zip(words, tokens, strict=True) if len(ids) != 1]:
        raise UnfeignError("answers of one token", repr(long[0]), "rubric")
    cuts = np.cumsum([0, *map(len, names.values())])
    head = model.get_output_embeddings().weight[[ids[0] for ids in tokens]].detach().float()

    rows: list[Row] = []
    for doc in docs:
        complied = None if rng.random() < UNTOLD else doc["answer"] == "accept"
        text = question(Case("", "", " ".join(text for _, text in doc["s"]), "", complied), rubric.fields)
        truth = labels(doc)
        rows.append((reader.prompt(text), [names[label].index(truth[label]) for label in names]))
    held = [row for i, row in enumerate(rows) if (i // 4) % HELD_OUT == 0]
    todo = [row for i, row in enumerate(rows) if (i // 4) % HELD_OUT]
    todo = [batch for _ in range(epochs) for batch in batches(todo, rng)]

    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers = model.config.num_hidden_layers
    lora = {"target_modules": modules, "layers_to_transform": list(range(layers // 3, layers))}
    model = add_policy(model, {"r": RANK, "lora_alpha": 2 * RANK, **lora}, seed=0)
    learned = [p for p in model.parameters() if p.requires_grad]  # in fp32, though the base is in bf16
    optimizer = torch.optim.AdamW(learned, lr=RATE, betas=(0.9, 0.98))

    def logits(batch: list[Row]) -> Any:
        """(rows, words): padding stands behind the last token, which does not see it."""
        ids = torch.full((len(batch), max(len(row[0]) for row in batch)), end, device=head.device)
        for i, (tokens, _) in enumerate(batch):
            ids[i, : len(tokens)] = torch.tensor(tokens)
        with torch.autocast(ids.device.type, torch.bfloat16):
            states = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
        return states[range(len(batch)), [len(tokens) - 1 for tokens, _ in batch]].float() @ head.T

    for step, batch in enumerate(todo):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / len(todo)))
        found, truth_of = logits(batch), torch.tensor([truth for _, truth in batch], device=head.device)
        loss = sum(
            WEIGHT[label] * torch.nn.functional.cross_entropy(found[:, cuts[k] : cuts[k + 1]], truth_of[:, k])
            for k, label in enumerate(names)
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        if step % 20 == 0:
            say(f"step {step}/{len(todo)}  loss {loss.item():.3f}")

    with torch.no_grad():
        found = torch.cat([logits(held[at : at + BATCH]) for at in range(0, len(held), BATCH)]).cpu().numpy()
    truth = np.array([truth for _, truth in held])
    right = {n: (found[:, cuts[k] : cuts[k + 1]].argmax(1) == truth[:, k]).mean() for k, n in enumerate(names)}
    say(f"of {len(held)} held out, right: " + ", ".join(f"{name} {share:.1%}" for name, share in right.items()))
    save_adapter(model, folder, lineage)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m unfeign.rewards.judge_training FOLDER")
    train(Path(sys.argv[1]), corpus(bench=False), load_questions(RUBRIC))


if __name__ == "__main__":
    main()
