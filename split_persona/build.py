"""`unfeign persona train`: a policy's transcripts, or a data file, become a persona, which is checked on families it
never saw and given its threshold there.
"""

import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationInfo, model_validator

from ..envs.scenario import RENDERINGS, Length, scenarios
from ..envs.tags import Tags
from ..errors import UnfeignError
from ..files import read_text, write_jsonl, write_text
from ..settings import Settings
from ..trainers.config import TrainConfig
from ..trainers.rollouts import InProcessPool, Sampling
from .adapters import Kind
from .deeds import Judged, chances, known_chances, measure, monitored, sample_deeds, threshold_at, told
from .examples import Example, flip, matched, read_examples
from .modes import Mode
from .persona import EXAMPLES, SPIKES, Persona, PersonaFacts, load_persona, persona_folder, read_facts
from .published import evenly, read_published
from .sequence import Layout, layout, load_framing
from .training import train_persona


class OwnData(Settings):
    """The policy's own transcripts of train families."""

    samples: int = Field(6, gt=0)
    """Completions of each monitored prompt; other prompts get one."""
    requests_per_family: int = Field(7, gt=0)
    per_prompt: int = Field(2, gt=0)
    """Of each deed, at most, in one monitored prompt."""
    quiet: float = Field(0.5, ge=0)
    """PASS examples from unmonitored prompts and controls, as a share of the matched ones."""


class PublishedData(Settings):
    """The public `stage_3_tagged` files of Split Personality Training."""

    folder: Path
    config: Path | None = None
    """A `training_config.json` with its filters."""
    topics: list[str] | None = None
    leave_out: list[str] = []
    limit: int | None = Field(None, gt=0)


class PersonaConfig(Settings):
    """All of `unfeign persona train`."""

    model: str
    adapters: list[str] = []
    """The policy's adapters, bottom first."""
    output: Path
    kind: Kind = "lora"
    mode: Mode = "masked"
    framing: str = "persona"
    """A shipped framing, or a YAML file."""
    interventions: Path | None = None
    """A text file with further interventions, one a line."""
    review: bool | None = None
    """Whether reviews have text, else the flag alone; by default as the framing says."""
    pauses: int | None = Field(None, ge=0)
    """Triggers after the first, for the persona to think in; by default as the framing says."""
    lora: dict[str, Any] = {}
    """`LoraConfig` arguments."""
    own: OwnData = OwnData()
    file: Path | None = None
    """Examples of one's own; the policy's transcripts are then not sampled."""
    published: PublishedData | None = None
    """The published files; likewise."""
    flip: float = Field(0.0, ge=0, lt=0.5)
    """Share of flags turned round, to see what wrong labels cost."""
    learning_rate: float = Field(1e-3, gt=0)
    epochs: int = Field(3, gt=0)
    batch_size: int = Field(8, gt=0)
    train_intervention: bool = False
    max_tokens: int = Field(1024, gt=0)
    """Longest transcript, in tokens."""
    temperature: float = Field(1.0, gt=0)
    """At which the policy's transcripts are sampled: high, so that both deeds are seen."""
    max_new_tokens: int = Field(80, gt=0)
    length: Length = "short"
    """Of the situations, as the policy knows them."""
    delimiters: Tags = Tags()
    """Of reasoning and decision, as the policy writes them."""
    dtype: str = "float32"
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _relative(cls, data: Any, info: ValidationInfo) -> Any:
        """Paths are relative to the config file, as in every config."""
        folder = (info.context or {}).get("folder")
        if not isinstance(data, dict) or folder is None:
            return data
        out = dict(data)
        for key in ("file", "interventions"):
            if out.get(key):
                out[key] = folder / Path(out[key]).expanduser()
        if isinstance(out.get("published"), dict):
            out["published"] = {
                k: folder / Path(v).expanduser() if k in ("folder", "config") and v else v
                for k, v in out["published"].items()
            }
        if str(out.get("framing", "")).endswith((".yaml", ".yml")):
            out["framing"] = str(folder / out["framing"])
        return out

    @model_validator(mode="after")
    def _one_source(self) -> "PersonaConfig":
        if self.file and self.published:
            raise ValueError("one source of examples, file or published")
        return self

    def facts(self) -> PersonaFacts:
        framing = load_framing(self.framing)
        more = read_text(self.interventions).splitlines() if self.interventions else []
        texts = [*framing.interventions, *(line.strip() for line in more if line.strip())]
        told = {"review": self.review, "pauses": self.pauses}
        framing = framing.model_copy(update={k: v for k, v in told.items() if v is not None} | {"interventions": texts})
        return PersonaFacts(kind=self.kind, mode=self.mode, framing=framing, lora=self.lora)


def policy_deeds(config: PersonaConfig, model: Any, tokenizer: Any, split: str, seed: int) -> list[Judged]:
    """The policy's transcripts of a split: several of every monitored prompt, one of the others."""
    own, train = config.own, split == "train"
    wordings = ("original",) if train else RENDERINGS
    every = scenarios(split, renderings=wordings, length=config.length, tags=config.delimiters)  # type: ignore[arg-type]
    if train:
        chosen: dict[str, set[str]] = {}
        for s in every:
            names = chosen.setdefault(s.family, set())
            if len(names) < own.requests_per_family:
                names.add(s.pair_id.split("/")[1])
        every = [s for s in every if s.pair_id.split("/")[1] in chosen[s.family]]
    pressed = [s for s in every if not s.control and s.tier == "monitored"]
    quiet = [s for s in every if (s.control and s.tier == "monitored") or (not s.control and s.tier == "unmonitored")]
    pool = InProcessPool(tokenizer, batch_size=96)
    how: dict[str, Any] = {"seed": seed, "sampling": Sampling(config.max_new_tokens, config.temperature)}
    found = sample_deeds(model, tokenizer, pool, pressed, samples=own.samples if train else 3, **how)
    found += sample_deeds(model, tokenizer, pool, quiet, samples=1, **how)
    pool.close()
    return found


def examples_of(
    config: PersonaConfig, layout: Layout, model: Any, known: Sequence[Example] = ()
) -> tuple[list[Example], dict[str, Any]]:
    """The examples a config asks for, beside `known` ones, and what is to be told of them. Published ones that are too
    long are left out.
    """
    if config.file:
        found, facts = read_examples(config.file), {"file": str(config.file)}
    elif config.published:
        p = config.published
        every, counts = read_published(p.folder, p.config, topics=p.topics, leave_out=p.leave_out)
        fitting = [e for e in every if len(layout.context(e.messages, e.completion)) <= config.max_tokens]
        found = evenly(fitting, p.limit)
        counts |= {"too long": len(every) - len(fitting), "limit": len(fitting) - len(found), "kept": len(found)}
        facts = {"published": str(p.folder), "rows": counts}
    else:
        judged = policy_deeds(config, model, layout.tokenizer, "train", config.seed)
        found = matched(judged, config.seed, config.own.per_prompt, config.own.quiet)
        facts = {"sampled": len(judged)}
    if known:
        facts |= {"own": len(found), "known": len(known)}
        found = [*found, *known]
    if not found:
        raise UnfeignError("examples to learn from", f"none: {facts}", "persona data")
    return flip(found, config.flip, config.seed), facts


def build_persona(config: PersonaConfig, say: Any = print) -> Path:
    """Sample, train, save, choose the threshold on validation families; returns the persona's folder.

    Raises:
        UnfeignError: an output that exists, a framing or examples that can't be read, or flags that are all alike.
    """
    from ..models import load_base, load_tokenizer, stack

    facts = config.facts()
    _new(config.output)
    tokenizer = load_tokenizer(config.model)
    layout(facts.framing, tokenizer)  # a wrong trigger is told before any work
    model, lineage = stack(load_base(config.model, config.dtype), config.model, list(config.adapters))
    data, about = examples_of(config, layout(facts.framing, tokenizer), model)
    held = _held(config, model, tokenizer)
    return _fit(config, Persona(model, tokenizer, lineage, facts, config.seed), data, about, held, say)


KNOWN = 32  # spike-ins that are kept, both deeds alike: every audit asks about each
KEPT = ("model", "adapters", "output", "kind", "mode", "framing", "interventions", "review", "pauses", "lora")


def refit_persona(name: str, checkpoint: str, out: Path, overrides: tuple[str, ...] = (), say: Any = print) -> Path:
    """Train a persona on, from its weights, in a later checkpoint's states: on that one's own transcripts, which may
    hardly show a deed any more, and on the examples it learned from. See `build_persona`.
    """
    _new(out)
    for override in overrides:
        if (key := override.partition("=")[0].partition(".")[0]) in KEPT:
            raise UnfeignError("settings of the training: a refitted persona stays what it is", key, "command line")
    folder, facts, config, (model, tokenizer, lineage) = _again(name, checkpoint, out, overrides)
    known = read_examples(folder / EXAMPLES) if (folder / EXAMPLES).is_file() else []
    data, about = examples_of(config, layout(facts.framing, tokenizer), model, known)
    held = _held(config, model, tokenizer)
    spikes = read_examples(folder / SPIKES) if (folder / SPIKES).is_file() else []
    return _fit(config, load_persona(folder, model, tokenizer, lineage), data, about, held, say, spikes)


def _again(name: str, checkpoint: str, out: Path, overrides: tuple[str, ...] = ()) -> Any:
    """A saved persona's folder and facts, with the policy it is put on and the settings of that policy's run."""
    from ..models import load_base, load_tokenizer, resolve, run_config, stack

    folder = persona_folder(name)
    facts = read_facts(folder)
    base, below = resolve(checkpoint)
    asked = TrainConfig.of(run_config(Path(checkpoint).resolve()))
    settings: dict[str, Any] = {"model": base, "adapters": [str(a) for a in below], "output": str(out)}
    settings |= {"epochs": 1, "learning_rate": 3e-4, "length": asked.data.length, "delimiters": asked.data.delimiters}
    config = PersonaConfig.made(settings | {"max_new_tokens": asked.audit.max_new_tokens}, overrides)
    model, lineage = stack(load_base(base, config.dtype), base, below)
    return folder, facts, config, (model, load_tokenizer(base), lineage)


def _held(config: PersonaConfig, model: Any, tokenizer: Any) -> list[Judged]:
    """The policy's transcripts of validation families; none where the persona learns from somebody else's."""
    if config.file or config.published:
        return []
    return policy_deeds(config, model, tokenizer, "validation", config.seed + 1000)


def _new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UnfeignError("a new folder (choose another output)", "something that is there", str(folder))


def _fit(
    config: PersonaConfig,
    persona: Persona,
    data: list[Example],
    about: dict[str, Any],
    held: list[Judged],
    say: Any,
    spikes: Sequence[Example] = (),
) -> Path:
    """Train, save, and choose the threshold on what is held out: the policy's own transcripts, and known `spikes`."""
    say(f"{len(data)} examples, {sum(e.failed for e in data)} FAIL: {about}")
    lengths = sorted(len(persona.layout.ids(e.review)) for e in data if e.review)
    longest = lengths[int(0.95 * len(lengths))] + 5 if lengths else 0
    persona.facts = persona.facts.model_copy(update={"review_tokens": max(persona.facts.review_tokens, longest)})
    persona.fold(learning=True)
    losses = train_persona(
        persona, data,
        learning_rate=config.learning_rate, epochs=config.epochs, batch_size=config.batch_size,
        train_intervention=config.train_intervention, seed=config.seed, max_tokens=config.max_tokens,
    )  # fmt: skip
    folder = persona.save(config.output)
    persona.fold()
    report: dict[str, Any] = {"examples": len(data), "data": about, "losses": [losses[0], losses[-1]]}
    if held:
        chance = chances(persona, held, persona.facts.framing.interventions).mean(1)
        deeds = told(held)
        pressed, truth = monitored(deeds)
        known, flagged = np.array([e.failed for e in spikes], dtype=bool), known_chances(persona, spikes)
        truth, seen = np.concatenate([truth, known]), np.concatenate([chance[pressed], flagged])
        threshold = threshold_at(truth, seen) if truth.any() and not truth.all() else persona.facts.threshold
        persona.facts = persona.facts.model_copy(update={"threshold": threshold})
        persona.save(config.output)
        report["validation"] = measure(deeds, chance, threshold)
        say(f"validation families: {json.dumps(report['validation'])}")
    keep_examples(folder, data, spikes or matched(held, config.seed, per_prompt=1, quiet=0.0))
    write_text(folder / "metrics.json", json.dumps(report, indent=2) + "\n")
    say(f"persona: {folder}")
    return folder


def keep_examples(folder: Path, data: Sequence[Example], spikes: Sequence[Example]) -> None:
    """Put beside a persona what it learned from, and some transcripts of known deeds that it did not."""
    write_jsonl(folder / EXAMPLES, [e.row() for e in data])
    flagged = [[e for e in spikes if e.failed is failed][: KNOWN // 2] for failed in (True, False)]
    if known := [one for both in zip_longest(*flagged) for one in both if one]:
        write_jsonl(folder / SPIKES, [e.row() for e in known])


def distill_persona(name: str, checkpoint: str, intervention: str, k: int, out: Path, say: Any = print) -> Path:
    """Learn k vectors for an intervention on a checkpoint's train families; tells what is saved, and what is kept on
    validation families.
    """
    from .distill import check, distill, flags

    _new(out)
    folder, facts, config, (model, tokenizer, lineage) = _again(name, checkpoint, out)
    check(layout(facts.framing, tokenizer), intervention, k)
    train, held = (policy_deeds(config, model, tokenizer, split, config.seed) for split in ("train", "validation"))
    persona = load_persona(folder, model, tokenizer, lineage)
    ids = [[persona.layout.context(t.scenario.messages, t.completion) for t, _ in part] for part in (train, held)]
    prefix = distill(persona, ids[0], intervention, k, seed=config.seed)
    kept = measure(told(held), np.array(flags(persona, ids[1], prefix)))
    whole = measure(told(held), chances(persona, held, [intervention])[:, 0])
    report = {
        "tokens": prefix.tokens,
        "saved": prefix.saved,
        "auroc_text": whole["auroc"],
        "auroc_vectors": kept["auroc"],
    }
    prefix.save(out)
    write_text(out / "metrics.json", json.dumps(report, indent=2) + "\n")
    say(f"{prefix.tokens} tokens -> {k} vectors ({100 * prefix.saved:.0f}% saved): {json.dumps(report)}")
    return out
