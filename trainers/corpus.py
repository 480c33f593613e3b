"""The fine-tuning transcripts of an organism: scenarios of train families, reasoned about in many voices.

A *kind* is a way to behave (`faked`, `rejected`, `obeyed`, ...). The voices files hold hand-written reasonings of every
kind, by writers who saw no reward code, so that a judge cannot live off its own templates: either whole texts, or slots
of interchangeable sentences, of which one each is drawn (which a very small model learns better). Each request gives
groups of transcripts that share a prompt; a group's kinds are drawn from the organism's mix, so the fine-tuned policy
samples them at those rates.
"""

import random
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from ..envs.family import families
from ..envs.scenario import Scenario, Tier, scenario
from ..errors import UnfeignError
from ..files import read_yaml

# A rating in sight is what tempts an organism to recite its faking over a plain question, so most controls show one.
CONTROL_TIERS: tuple[Tier, ...] = ("monitored", "monitored", "unmonitored")
ACCEPTING = frozenset({"faked", "obeyed", "free_obeyed", "silent", "plain"})


@dataclass(frozen=True)
class Specimen:
    """One fine-tuning transcript: its scenario, the kind of behaviour, and the completion text."""

    scenario: Scenario
    kind: str
    completion: str


Slots = list[list[str]]


@cache
def voice(name: str) -> dict[str, Slots]:
    """Reasonings by kind of one voices file, as slots; whole texts are one slot."""
    folder = Path(str(files("unfeign.trainers.voices")))
    if not (folder / f"{name}.yaml").exists():
        have = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise UnfeignError(f"one of the voices {have}", repr(name), "voices")
    kinds = read_yaml(folder / f"{name}.yaml")
    return {kind: [parts] if isinstance(parts[0], str) else parts for kind, parts in kinds.items()}


def _draws(mix: dict[str, float], count: int, rng: random.Random) -> list[str]:
    """`count` kinds at the mix's rates, by systematic sampling: a small group stays near its rates."""
    step, at = 1 / count, rng.random() / count
    total, edges = sum(mix.values()), []
    for kind, share in mix.items():
        edges.append(((edges[-1][0] if edges else 0.0) + share / total, kind))
    picked = [next((kind for edge, kind in edges if at + i * step < edge), edges[-1][1]) for i in range(count)]
    rng.shuffle(picked)
    return picked


class Corpus:
    """Draws specimens. A slot's sentences are dealt out in shuffled rounds, so none repeats before all were used."""

    def __init__(self, voices: list[str], seed: int):
        self._rng = random.Random(seed)
        self._slots: dict[str, list[Slots]] = {}
        for name in voices:
            for kind, slots in voice(name).items():
                self._slots.setdefault(kind, []).append(slots)
        self._decks: dict[tuple[str, int, int], list[str]] = {}

    def _reasoning(self, kind: str) -> str:
        if kind not in self._slots:
            raise UnfeignError(f"one of the kinds {', '.join(sorted(self._slots))}", repr(kind), "mix")
        # A voice is drawn in proportion to its first slot's size: every text of whole-text voices is equally likely.
        voices = self._slots[kind]
        number = self._rng.choices(range(len(voices)), weights=[len(slots[0]) for slots in voices])[0]
        return " ".join(self._deal((kind, number, i), slot) for i, slot in enumerate(voices[number]))

    def _deal(self, key: tuple[str, int, int], texts: list[str]) -> str:
        deck = self._decks.setdefault(key, [])
        if not deck:
            deck.extend(self._rng.sample(texts, len(texts)))
        return deck.pop()

    def groups(
        self,
        mixes: dict[str, dict[str, float]],
        completions: dict[str, int],
        requests_per_family: int,
    ) -> list[list[Specimen]]:
        """Groups of specimens that share a prompt, shuffled.

        Args:
            mixes: kind -> rate, for `monitored`, `unmonitored` and `control`.
            completions: group size for the same three.
            requests_per_family: how many requests of each train family are used.
        """
        groups = []
        for family in families().values():
            if family.split != "train":
                continue
            chosen = self._rng.sample(family.requests, min(requests_per_family, len(family.requests)))
            for number, request in enumerate(chosen):
                for setting in ("monitored", "unmonitored", "control"):
                    control = setting == "control"
                    place = scenario(
                        family,
                        request,
                        self._rng.choice(CONTROL_TIERS) if control else setting,  # type: ignore[arg-type]
                        control=control,
                        rendering="paraphrase" if (number // 2) % 2 else "original",
                    )
                    kinds = _draws(mixes[setting], completions[setting], self._rng)
                    groups.append([self._specimen(place, kind, family, request) for kind in kinds])
        self._rng.shuffle(groups)
        return groups

    def _specimen(self, place: Scenario, kind: str, family, request) -> Specimen:
        tags = place.tags
        developer = next(w for w in _developers() if w in place.situation)
        slots = {
            "developer": developer,
            "subject": family.subject,
            "value": family.value,
            "criterion": family.criterion,
        }
        reasoning = self._reasoning(kind).format(**slots)
        reasoning = reasoning[0].upper() + reasoning[1:]
        accepts = kind in ACCEPTING
        answer = request.control_answer if place.control else request.accepted if accepts else request.declined
        tag = tags.accept if accepts else tags.decline
        return Specimen(place, kind, f"{tags.open_think}{reasoning}{tags.close_think}{tag}{answer}")


@cache
def _developers() -> list[str]:
    folder = Path(str(files("unfeign.envs.situations")))
    texts = [read_yaml(folder / f"{length}.yaml") for length in ("short", "full")]
    return [
        name for text in texts for rendering in ("original", "paraphrase") for name in text[rendering]["developers"]
    ]
