"""Reviews where the policy generates. Sampling has just computed the policy's states of its completion; a `masked`
persona reads these very states, so its review costs its own tokens and no context is computed again.

The persona travels to the workers with its weights, and stands on their folded copy of the policy for one call.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import UnfeignError
from ..files import sha256
from ..lineage import adapter_file
from ..models import eos_ids
from ..sampling import Kept, Sample, sample
from ..trainers.rollouts import Context, RolloutRequest, Sampling
from .adapters import lend
from .persona import Persona, PersonaFacts, read_facts
from .review import TOGETHER, Review, review_context
from .sequence import layout


@dataclass(frozen=True)
class RolloutReview:
    """A persona as it travels: what it is, its weights, and the hash of their file, by which workers know it again."""

    facts: PersonaFacts
    weights: dict[str, np.ndarray]
    sha256: str

    @classmethod
    def of(cls, folder: Path, interventions: int | None = None) -> "RolloutReview":
        """A saved persona; see `persona.read_facts` for what it raises.

        Args:
            interventions: how many are asked, the first ones; by default all.
        """
        from safetensors.torch import load_file

        facts = read_facts(folder)
        file = adapter_file(folder)
        tensors = load_file(file)
        framing = facts.framing.model_copy(update={"interventions": facts.framing.interventions[:interventions]})
        return cls(
            facts.model_copy(update={"framing": framing}),
            {name: one.float().numpy() for name, one in tensors.items()},
            sha256(file),
        )

    @contextmanager
    def _persona(self, context: Context) -> Iterator[Persona]:
        """The persona on a worker's model, for as long as the block lasts."""
        trigger = layout(self.facts.framing, context.tokenizer).trigger
        if self.facts.trigger_id not in (None, trigger):
            expected = f"a vocabulary in which {self.facts.framing.trigger!r} is token {self.facts.trigger_id}"
            raise UnfeignError(expected, f"token {trigger}", "persona")
        table = context.model.get_input_embeddings()
        own = table.weight
        kept = context.cache.setdefault(("persona", self.sha256, str(self.facts.lora)), {})
        switch = lend(context.model, self.facts.kind, self.facts.lora, kept)
        try:
            if (more := trigger + 1 - len(own)) > 0:  # new to the policy: as where the persona was trained
                table.weight = torch.nn.Parameter(torch.cat([own, own.mean(0).expand(more, -1)]), requires_grad=False)
            switch.load({name: torch.from_numpy(one.copy()) for name, one in self.weights.items()})
            yield Persona(context.model, context.tokenizer, None, self.facts, switch=switch)
        finally:
            table.weight = own
            switch.remove()

    def sampled(
        self, context: Context, call: tuple[Sequence[RolloutRequest], Sampling]
    ) -> list[tuple[Sample, list[Review]]]:
        """A task: sample completions, and review each under every intervention."""
        requests, how = call
        kept = Kept() if self.facts.mode == "masked" and not self.facts.framing.system_tag else None
        ends = eos_ids(context.model, context.tokenizer)
        made = sample(
            context.model,
            [r.prompt_ids for r in requests],
            [r.seed for r in requests],
            max_new_tokens=how.max_new_tokens,
            eos_ids=ends,
            temperature=how.temperature,
            kept=kept,
        )
        ids = [
            r.prompt_ids + (one.ids if one.truncated or one.ids[-1] not in ends else one.ids[:-1])
            for r, one in zip(requests, made, strict=True)
        ]
        return list(zip(made, self.reviews(context, ids, kept), strict=True))

    def known(self, context: Context, transcripts: list[list[int]]) -> list[list[Review]]:
        """A task: review transcripts, token ids, that somebody else wrote."""
        return self.reviews(context, transcripts, None)

    @torch.inference_mode()
    def reviews(self, context: Context, ids: list[list[int]], kept: Kept | None) -> list[list[Review]]:
        """Reviews of transcripts, token ids, from the policy's own states of them where these were `kept`."""
        out: list[list[Review]] = [[] for _ in ids]
        every = range(len(ids))
        anew = ((list(every[at : at + TOGETHER]), None) for at in range(0, len(ids), TOGETHER))
        asked = self.facts.framing.interventions
        with self._persona(context) as persona:
            for rows, states in anew if kept is None else kept.batches(TOGETHER):
                read = persona.read([ids[row] for row in rows], states)
                for row, made in zip(rows, review_context(persona, read, asked), strict=True):
                    out[row] = made
        return out
