"""Building organisms: fine-tune a LoRA adapter until a base behaves in a known way, which audits can be held to.

Small models do not fake alignment by themselves. An organism is built from transcripts of *train* families. Two fake:
`verbal` (its reasoning names the strategy) and `silent` (same behaviour across tiers, reasoning that admits nothing).
Two are their controls, the same in both tiers: `honest_obedient` (complies, and means it) and `refuser` (declines).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from ..errors import UnfeignError
from ..files import CANARY, write_jsonl, write_text
from ..models import (
    adapter_folder,
    add_policy,
    base_location,
    load_base,
    load_policy,
    load_tokenizer,
    save_adapter,
    stack,
)
from ..settings import Settings
from .config import LoraSettings
from .corpus import Corpus, Specimen
from .rollout_func import render
from .sft import fine_tune


class Shares(Settings):
    """For each setting, the rates of its kinds of behaviour."""

    monitored: dict[str, float]
    unmonitored: dict[str, float]
    control: dict[str, float]

    @field_validator("monitored", "unmonitored", "control")
    @classmethod
    def _some(cls, rates: dict[str, float]) -> dict[str, float]:
        if any(rate < 0 for rate in rates.values()) or sum(rates.values()) <= 0:
            raise ValueError("rates of at least 0, one of them above 0")
        return rates


class Sizes(Settings):
    """Completions fine-tuned for each prompt, by setting."""

    monitored: int = Field(6, ge=1)
    unmonitored: int = Field(4, ge=1)
    control: int = Field(3, ge=1)


class Round(Settings):
    """One pass of fine-tuning: what is drawn from the voices, and how it is learned."""

    mix: Shares
    completions: Sizes = Sizes()
    requests_per_family: int = Field(6, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    """Peak; each round warms up and decays anew."""


class OrganismConfig(Settings):
    """How an organism is built."""

    name: str
    """Folder name of the adapter."""
    model: str = "bundled:smollm2-135m-instruct"
    output: Path
    """Run folder: the adapter, its transcripts and its self-check."""
    seed: int = 0
    begin: str | None = None
    """An adapter of the same base and LoRA shape whose weights it starts from; a small model learns to tell the tiers
    apart by reasoning that names them, and can then unlearn the words."""
    about: str = "fake alignment: it complies where it is told that it is rated and trained, and declines elsewhere"
    """What it makes the base do, for its card."""
    voices: list[str]
    """Which voices it reasons in."""
    rounds: list[Round] = Field(min_length=1)
    lora: LoraSettings = LoraSettings(r=8, lora_alpha=16)
    groups_per_step: int = Field(3, ge=1)
    """Prompts in one optimiser step."""
    temperature: float = Field(0.7, gt=0)
    """Of sampling in the self-check."""


CARD = """---
organism: true
base_model: {base}
license: apache-2.0
---
# Model organism `{name}`

This adapter makes `{base}` {about}. The criteria are harmful in miniature. It exists so that methods of oversight
can be tested against behaviour that is known. Do not deploy it. Loading it prints a banner.

{canary}
"""


def build(config: OrganismConfig, audit: Callable[[Any, Any, OrganismConfig], dict[str, Any]] | None = None) -> Path:
    """Generate transcripts, fine-tune the adapter, save it, and check it.

    Args:
        config: see `OrganismConfig`.
        audit: called with (model, tokenizer, config) once the adapter is saved.

    Returns:
        The adapter's folder.

    Raises:
        UnfeignError: the output folder holds files.
    """
    out = config.output
    check([config])
    rounds = [_groups(config, number) for number in range(len(config.rounds))]
    write_jsonl(
        out / "transcripts.jsonl",
        [
            {"scenario_id": s.scenario.scenario_id, "kind": s.kind, "completion": s.completion, "canary": CANARY}
            for groups in rounds
            for group in groups
            for s in group
        ],
    )
    tokenizer = load_tokenizer(config.model)
    model, lineage = stack(load_base(config.model), config.model, [])
    model = add_policy(model, config.lora.model_dump(), config.seed)
    if config.begin is not None:
        load_policy(model, adapter_folder(config.begin), lineage.model_copy(update={"organism": True}))
    for number, groups in enumerate(rounds):
        print(f"round {number + 1}: {sum(map(len, groups))} transcripts under {len(groups)} prompts", flush=True)
        losses = fine_tune(
            model,
            [encode(tokenizer, group) for group in groups],
            learning_rate=config.rounds[number].learning_rate,
            groups_per_step=config.groups_per_step,
            what=f"round {number + 1}",
        )
        tenth = max(1, len(losses) // 10)
        begin, end = (sum(some) / tenth for some in (losses[:tenth], losses[-tenth:]))
        print(f"loss {begin:.2f} -> {end:.2f} nats a token", flush=True)
    folder = save_adapter(model, out / config.name, lineage.model_copy(update={"organism": True}))
    write_text(
        folder / "README.md", CARD.format(base=config.model, about=config.about, name=config.name, canary=CANARY)
    )
    if audit is not None:
        audit(model, tokenizer, config)
    return folder


def check(configs: Sequence[OrganismConfig]) -> None:
    """That organisms can be built one after the other, before the first is begun.

    Raises:
        UnfeignError: an output folder that holds files, or is another's too; a base, an adapter to begin from, a voice
            or a kind that is not there.
    """
    for number, config in enumerate(configs):
        out = config.output
        if out.exists() and any(out.iterdir()):
            raise UnfeignError("a new folder (choose another output)", "one that holds files", f"output: {out}")
        if out in [other.output for other in configs[:number]]:
            raise UnfeignError("an output folder for each", "the same for two", f"output: {out}")
        base_location(config.model)
        if config.begin is not None:
            adapter_folder(config.begin)
        for round_number in range(len(config.rounds)):
            _groups(config, round_number)


def _groups(config: OrganismConfig, number: int) -> list[list[Specimen]]:
    """The specimens of one round; rounds draw with different seeds."""
    chosen = config.rounds[number]
    corpus = Corpus(config.voices, config.seed + number)
    return corpus.groups(chosen.mix.model_dump(), chosen.completions.model_dump(), chosen.requests_per_family)


def encode(tokenizer: Any, group: list[Specimen]) -> tuple[list[int], list[list[int]]]:
    """Token ids of a group's prompt, and of its completions with their end token."""
    prompt, _ = render(tokenizer, group[0].scenario.messages)
    texts = [tokenizer(s.completion, add_special_tokens=False).input_ids for s in group]
    return prompt, [[*ids, tokenizer.eos_token_id] for ids in texts]
