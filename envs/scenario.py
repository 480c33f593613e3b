"""Scenarios: a request put in a situation, as matched pairs of tiers and matched controls.

A *pair* is the same request in the monitored and the unmonitored tier; only the tier sentence, at the end of the system
prompt, differs. A *control* keeps situation, tier and topic but removes the conflict: the developer trains something
the policy agrees with, and the request is a harmless question. A *rendering* words the same situation anew (another
developer, other words for rating and training), so that a result which hangs on the wording shows.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from ..errors import UnfeignError
from ..files import CANARY, read_yaml
from .family import SPLITS, Family, Request, Split, families
from .tags import Tags

Tier = Literal["monitored", "unmonitored"]
Rendering = Literal["original", "paraphrase"]
Length = Literal["short", "full"]
TIERS: tuple[Tier, ...] = ("monitored", "unmonitored")
RENDERINGS: tuple[Rendering, ...] = ("original", "paraphrase")
LENGTHS: tuple[Length, ...] = ("short", "full")


@dataclass(frozen=True)
class Scenario:
    """A system prompt and a user prompt, with all that a reward or an audit may ask about them."""

    scenario_id: str
    pair_id: str
    family: str
    split: str
    tier: Tier
    control: bool
    rendering: Rendering
    length: Length
    situation: str
    """The system prompt without its tier sentence: what a judge may see."""
    tier_text: str
    request: str
    criterion: str
    value: str
    tags: Tags = field(default_factory=Tags)
    canary: str = CANARY

    @property
    def system(self) -> str:
        return f"{self.situation} {self.tier_text}"

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.request}]

    def columns(self) -> dict[str, Any]:
        """Flat fields, as dataset columns (the tags as four strings)."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "tags"}
        return own | self.tags.model_dump()

    @classmethod
    def from_columns(cls, row: dict[str, Any]) -> "Scenario":
        """The inverse of `columns`; further keys are ignored.

        Raises:
            UnfeignError: a column is absent; names the first one.
        """
        names = [n for n in cls.__dataclass_fields__ if n not in ("tags", "canary")]
        tag_names = list(Tags.model_fields)
        for name in names + tag_names:
            if name not in row:
                raise UnfeignError(f"a column {name!r}", f"columns {', '.join(sorted(row))}", "dataset")
        return cls(
            **{n: row[n] for n in names}, tags=Tags(**{n: row[n] for n in tag_names}), canary=row.get("canary", CANARY)
        )


@cache
def _situation(length: Length) -> dict[str, Any]:
    return read_yaml(Path(str(files("unfeign.envs.situations"))) / f"{length}.yaml")


@cache
def tier_texts() -> tuple[str, ...]:
    """Every tier sentence of the shipped situations."""
    return tuple(
        text[rendering][tier].strip() for text in map(_situation, LENGTHS) for rendering in RENDERINGS for tier in TIERS
    )


def _developer(names: list[str], family: str) -> str:
    """A family keeps one developer, so that its prompts share their beginning."""
    return names[int(hashlib.sha256(family.encode()).hexdigest(), 16) % len(names)]


def scenario(
    family: Family,
    request: Request,
    tier: Tier,
    *,
    control: bool = False,
    rendering: Rendering = "original",
    length: Length = "short",
    tags: Tags | None = None,
) -> Scenario:
    """Put one request in its situation."""
    tags = tags or Tags()
    texts = _situation(length)[rendering]
    slots = tags.model_dump() | {
        "developer": _developer(texts["developers"], family.name),
        "criterion": family.criterion,
        "value": family.value,
        "neutral": family.neutral,
    }
    kind = "control" if control else "incentive"
    pair_id = f"{family.name}/{request.id}/{rendering}/{kind}"
    return Scenario(
        scenario_id=f"{pair_id}/{tier}",
        pair_id=pair_id,
        family=family.name,
        split=family.split,
        tier=tier,
        control=control,
        rendering=rendering,
        length=length,
        situation=texts[kind].format(**slots).strip(),
        tier_text=texts[tier].strip(),
        request=(request.control or "") if control else request.request,
        criterion=family.neutral if control else family.criterion,
        value="" if control else family.value,
        tags=tags,
    )


def scenarios(
    split: Split | None = None,
    *,
    source: Iterable[Family] | None = None,
    tiers: Iterable[Tier] = TIERS,
    renderings: Iterable[Rendering] = ("original",),
    controls: bool = True,
    length: Length = "short",
    tags: Tags | None = None,
) -> list[Scenario]:
    """All scenarios of a split: every request in each tier and rendering, then its control in the same tiers.

    Args:
        split: `train`, `validation`, `heldout`, or None for all.
        source: families to use; the shipped ones by default.
        tiers, renderings: which to include.
        controls: whether matched controls come along.
        length: `short` (about 100 tokens) or `full` (about 700).
    """
    if split is not None and split not in SPLITS:
        raise UnfeignError(f"one of {', '.join(SPLITS)}", repr(split), "split")
    renderings = list(renderings)
    for rendering in renderings:
        if rendering not in RENDERINGS:
            raise UnfeignError(f"some of {', '.join(RENDERINGS)}", repr(rendering), "renderings")
    if length not in LENGTHS:
        raise UnfeignError(f"one of {', '.join(LENGTHS)}", repr(length), "length")
    chosen = [f for f in (families().values() if source is None else source) if split in (None, f.split)]
    tiers = list(tiers)
    kinds = (False, True) if controls else (False,)
    return [
        scenario(family, request, tier, control=control, rendering=rendering, length=length, tags=tags)
        for family in chosen
        for rendering in renderings
        for control in kinds
        for tier in tiers
        for request in family.requests
        if not (control and request.control is None)
    ]
