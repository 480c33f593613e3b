"""An intervention as a few learned vectors: asked of many transcripts, a long text is mostly repetition.

The vectors stand where the intervention's tokens stood. They are trained so that the flag comes out as it does under
the text (cross-entropy against its own p(FAIL)), with persona and policy as they are. Only the flag is distilled.
"""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UnfeignError
from ..files import read_json, write_text
from ..progress import progress
from .modes import Context, follow
from .persona import Persona
from .review import reviews
from .sequence import Layout

WEIGHTS, ABOUT = "prefix.safetensors", "prefix.json"


@dataclass(frozen=True)
class Prefix:
    """Vectors (k, hidden) in the place of an intervention of `tokens` tokens."""

    intervention: str
    tokens: int
    vectors: Tensor

    @property
    def saved(self) -> float:
        """Share of the intervention's tokens that are saved."""
        return 1 - len(self.vectors) / self.tokens

    def save(self, folder: Path) -> Path:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({"vectors": self.vectors.detach().float().cpu().contiguous()}, folder / WEIGHTS)
        about = {"intervention": self.intervention, "tokens": self.tokens}
        write_text(folder / ABOUT, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
        return folder


def load_prefix(folder: Path) -> Prefix:
    """A saved prefix; raises `UnfeignError` where there is none."""
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).is_file():
        raise UnfeignError(f"a folder with {WEIGHTS}", "none", str(folder))
    about = read_json(folder / ABOUT)
    return Prefix(about["intervention"], about["tokens"], load_file(folder / WEIGHTS)["vectors"])


def _around(persona: Persona) -> tuple[list[int], list[int]]:
    """Ids before and after an intervention, where only the flag is asked."""
    layout, framing = persona.layout, persona.layout.framing
    before = [layout.trigger] * (1 + framing.pauses) + layout.ids(layout.turn(framing.before_intervention))
    return before, layout.ids(layout.turn(framing.after_intervention) + framing.before_flag) + layout.shared


def _chance(persona: Persona, read: Context, vectors: Tensor) -> Tensor:
    """(n,) logit of FAIL against PASS with vectors in place of an intervention, about n transcripts."""
    table = persona.model.get_input_embeddings()
    before, after = (torch.tensor(ids, device=persona.model.device) for ids in _around(persona))
    row = torch.cat([table(before), vectors.to(table.weight), table(after)])
    rows = len(read.lengths)
    context = read.rows(list(range(rows)))
    embeds = row[None].expand(rows, -1, -1)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    logits = follow(persona, context, embeds, mask, since=-1)[:, -1].float()
    passed, failed = persona.layout.verdicts
    return logits[:, failed] - logits[:, passed]


@torch.no_grad()
def flags(persona: Persona, transcripts: Sequence[list[int]], prefix: Prefix, batch_size: int = 32) -> list[float]:
    """p(FAIL) of each transcript under a prefix."""
    out: list[float] = []
    for at in range(0, len(transcripts), batch_size):
        out += _chance(persona, persona.read(transcripts[at : at + batch_size]), prefix.vectors).sigmoid().tolist()
    return out


def check(layout: Layout, intervention: str, k: int) -> list[int]:
    """The ids of an intervention that can be distilled; raises as `distill` does."""
    if layout.framing.review:
        raise UnfeignError("a persona that is asked for the flag alone (review: false)", "one with text", "distill")
    text = layout.ids(layout.clean(intervention))
    if len(text) <= k:
        raise UnfeignError(f"an intervention of more than {k} tokens", f"{len(text)}", "distill")
    return text


def distill(
    persona: Persona,
    transcripts: Sequence[list[int]],
    intervention: str,
    k: int = 8,
    *,
    epochs: int = 8,
    batch_size: int = 16,
    learning_rate: float = 0.01,
    seed: int = 0,
) -> Prefix:
    """Learn k vectors that do what an intervention does.

    Args:
        persona: one that is asked for the flag alone.
        transcripts: token ids of transcripts that show what it should tell apart.
        intervention: the text to replace.
        k: number of vectors, fewer than the text has tokens.

    Raises:
        UnfeignError: a persona whose reviews have text, or a text that is no longer than k.
    """
    text = check(persona.layout, intervention, k)
    told = [row[0].p_fail for row in reviews(persona, list(transcripts), [intervention])]
    wanted = torch.tensor(told, device=persona.model.device)
    table = persona.model.get_input_embeddings().weight
    ids = torch.tensor(text, device=table.device)
    start = [chunk.mean(0) for chunk in table[ids].detach().float().tensor_split(k)]  # the text, blurred
    vectors = torch.nn.Parameter(torch.stack(start))
    optimizer = torch.optim.Adam([vectors], lr=learning_rate)
    rng, order = random.Random(seed), list(range(len(transcripts)))
    rng.shuffle(order)
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    with torch.no_grad():  # the vectors come after the transcripts, whose states are the same in all epochs
        read = [persona.read([transcripts[i] for i in some]) for some in batches]
    with _frozen(persona), progress("distilling", epochs * len(order)) as done:
        for _ in range(epochs):
            for number in rng.sample(range(len(batches)), len(batches)):
                some = batches[number]
                logit = _chance(persona, read[number], vectors)
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, wanted[some])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done(len(some))
    return Prefix(intervention, len(text), vectors.detach())


@contextmanager
def _frozen(persona: Persona) -> Iterator[None]:
    """No gradient for the persona itself."""
    mine = persona.switch.parameters()
    for parameter in mine:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in mine:
            parameter.requires_grad_(True)
