"""A persona on a policy: built fresh, saved as a folder, loaded onto the policy it was made for or a later one.

The folder holds `adapter_model.safetensors`, `lineage.json` (the policy it was trained on) and `persona.json` (kind,
mode, framing, threshold); a LoRA persona is a PEFT adapter too. It may be put on any checkpoint that was trained on top
of that policy: it is then *stale*, which an audit says, and `persona refit` mends.
"""

import copy
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from ..errors import UnfeignError
from ..files import read_json, write_text
from ..lineage import Lineage, adapter_file, read_lineage, write_lineage
from ..models import POLICY
from ..settings import Settings
from .adapters import Kind, LoraSwitch, Switch, attach
from .modes import Context, Mode, read_context
from .sequence import Framing, Layout, layout

FILE = "persona.json"
EXAMPLES = "examples.jsonl"
"""What it learned from."""
SPIKES = "spikes.jsonl"
"""Transcripts of known deeds, of families it did not learn from: does it still see them?"""


class PersonaFacts(Settings):
    """What a persona is, beside its weights."""

    kind: Kind = "lora"
    mode: Mode = "masked"
    framing: Framing
    lora: dict[str, Any] = {}
    """`LoraConfig` arguments, where the kind is `lora`."""
    threshold: float = 0.5
    """p(FAIL) from which a review counts as FAIL; chosen on validation families."""
    review_tokens: int = Field(60, gt=0)
    """Length limit of a review in words: nearly all that it learned from are shorter."""
    trigger_id: int | None = None
    """Token id of the trigger where it was trained."""


class Persona:
    """A policy with a persona on it.

    Args:
        model: the policy: a base, or a stack of adapters (see `models.stack`).
        tokenizer: the policy's; a trigger that is new to it is added.
        lineage: what the policy is made of.
        facts: what the persona is.
        seed: of its first weights.
        switch: an adapter that is on the model already.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        lineage: Lineage | None,
        facts: PersonaFacts,
        seed: int = 0,
        switch: Switch | None = None,
    ):
        self.facts, self.tokenizer, self.lineage = facts, tokenizer, lineage
        self.layout: Layout = layout(facts.framing, tokenizer)
        _make_room(model, self.layout.trigger)
        self.switch: Switch = switch or attach(model, facts.kind, self.layout.trigger, facts.lora, seed)
        self.model: Any = self.switch.model.eval()  # type: ignore[attr-defined]
        self.stale = False

    def forward(self, awake: bool, **inputs: Any) -> Any:
        """One call of the model, the persona asleep (the policy's own states) or awake in all of it."""
        return self.switch.forward(awake, inputs)

    def read(self, transcripts: Sequence[list[int]], policy: Any = None) -> Context:
        """Cache transcripts in the persona's mode; see `modes.read_context`."""
        return read_context(self, self.facts.mode, list(transcripts), policy)

    def fold(self, learning: bool = False) -> None:
        """Make calls cheaper, for good: the policy's adapters go into its weights (see `folded.fold_below`). Its states
        are then those that rollouts have, to rounding. Unless it is for `learning`, no gradient flows any more.
        """
        self.switch.fold(learning)

    def save(self, folder: Path) -> Path:
        """Write the persona's folder; its weights in bf16, which is half the size and near enough."""
        import torch
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in self.switch.tensors().items()}
        if isinstance(self.switch, LoraSwitch):
            config = copy.copy(self.switch.model.peft_config["persona"])
            config.base_model_name_or_path, config.inference_mode = self.lineage.base.name, True
            # As PEFT wakes adapters by themselves: everywhere, or from the trigger on. It can't say `hybrid`.
            whole = [self.layout.trigger] * (1 + self.facts.framing.pauses)
            config.alora_invocation_tokens = None if self.facts.mode == "full" else whole
            config.save_pretrained(folder)
        else:
            about = {
                "peft_type": None,
                "unfeign_kind": self.facts.kind,
                "base_model_name_or_path": self.lineage.base.name,
            }
            write_text(folder / "adapter_config.json", json.dumps(about, indent=2) + "\n")
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_lineage(folder, self.lineage)
        facts = self.facts.model_copy(update={"trigger_id": self.layout.trigger})
        write_text(folder / FILE, json.dumps(facts.model_dump(), indent=2, ensure_ascii=False) + "\n")
        return folder


def _make_room(model: Any, trigger: int) -> None:
    """Give a trigger that is new to a model an embedding: the mean of all, which needs no file of its own."""
    rows = model.get_input_embeddings().weight.size(0)
    if trigger >= rows:
        model.resize_token_embeddings(trigger + 1, mean_resizing=False)
        for table in {id(t): t for t in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
            table.weight.data[rows:] = table.weight.data[:rows].mean(0)


def persona_folder(name: str) -> Path:
    """Where a persona is: a folder, or `persona:NAME` for one of those this package ships."""
    if not name.startswith("persona:"):
        return Path(name).expanduser()
    root = Path(str(files("unfeign.split_persona"))) / "personas"
    names = sorted(path.parent.name for path in root.glob(f"*/{FILE}"))
    if (short := name.removeprefix("persona:")) not in names:
        raise UnfeignError(f"one of the shipped personas {', '.join(names) or '(none)'}", repr(name), "persona")
    return root / short


def read_facts(folder: Path) -> PersonaFacts:
    """What a persona folder says it is.

    Raises:
        UnfeignError: not a persona, weights in pickle format, or facts that can't be read.
    """
    adapter_file(folder)
    if not (folder / FILE).is_file():
        raise UnfeignError(f"a persona folder with {FILE}", "an adapter without it", str(folder))
    try:
        return PersonaFacts.model_validate(read_json(folder / FILE))
    except ValidationError as error:
        first = error.errors()[0]
        raise UnfeignError(
            "the facts of a persona", f"{'.'.join(map(str, first['loc']))}: {first['msg']}", str(folder / FILE)
        ) from None


def check_policy(folder: Path, lineage: Lineage) -> bool:
    """That a persona can be put on a policy; returns whether it is stale there.

    Raises:
        UnfeignError: it was trained on another base, or on adapters that this policy does not have at its bottom.
    """
    trained_on = read_lineage(folder)
    if trained_on is None:
        raise UnfeignError("lineage.json beside the persona", "none", str(folder))
    if differ := trained_on.base.differences(lineage.base):
        raise UnfeignError(
            f"a persona for base {lineage.base.name!r}",
            f"one for {trained_on.base.name!r} ({', '.join(differ)})",
            str(folder),
        )
    below, here = ([layer.sha256 for layer in one.adapters] for one in (trained_on, lineage))
    # Of one run's checkpoints the last layer differs: the persona of one is a stale persona of another.
    moved = trained_on.adapters[-1:] and trained_on.adapters[-1].name == POLICY and len(here) == len(below)
    same = len(below) - 1 if moved else len(below)
    if len(here) < len(below) or here[:same] != below[:same]:
        names = " + ".join(layer.name for layer in trained_on.adapters) or "the base alone"
        raise UnfeignError(f"a policy on top of {names}", "another stack", str(folder))
    return here != below


def load_persona(folder: Path, model: Any, tokenizer: Any, lineage: Lineage) -> Persona:
    """Put a saved persona on a policy.

    Args:
        folder: see `Persona.save`.
        model, tokenizer: the policy's.
        lineage: what the policy is made of.

    Raises:
        UnfeignError: it was trained on another base, or on adapters that this policy does not have at its bottom; its
            trigger is not in this vocabulary.
    """
    from safetensors.torch import load_file

    facts = read_facts(folder)
    stale = check_policy(folder, lineage)
    persona = Persona(model, tokenizer, lineage, facts)
    if facts.trigger_id not in (None, persona.layout.trigger):
        raise UnfeignError(
            f"a vocabulary in which {facts.framing.trigger!r} is token {facts.trigger_id}",
            f"token {persona.layout.trigger}",
            str(folder),
        )
    try:
        persona.switch.load(load_file(folder / "adapter_model.safetensors"))
    except (KeyError, RuntimeError) as error:
        found = str(error).strip().splitlines()[-1].strip()
        raise UnfeignError("the weights of this persona", found, str(folder)) from None
    persona.stale = stale
    return persona
