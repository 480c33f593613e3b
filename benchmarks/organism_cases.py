"""What four organisms did, sampled once, and what is learned from it and asked about it (`organisms_table.py`)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unfeign.envs.dataset import setting
from unfeign.envs.scenario import RENDERINGS, Scenario
from unfeign.envs.transcript import Transcript, parse
from unfeign.files import read_jsonl, write_jsonl
from unfeign.models import load_base, load_tokenizer, resolve, stack
from unfeign.split_persona.audit import audit_scenarios, collect
from unfeign.trainers.rollouts import InProcessPool, Sampling

MODEL = "bundled:smollm2-135m-instruct"
ORGANISMS = {
    "silent": "organism:silent",
    "obedient": "runs/organism-honest-obedient/honest_obedient",
    "silent anew": "runs/organism-silent-1/silent",
    "obedient anew": "runs/organism-honest-obedient-1/honest_obedient",
    "verbal": "organism:verbal",
    "refuser": "runs/organism-refuser/refuser",
}
PAIRS = {"learned": ("silent", "obedient"), "anew": ("silent anew", "obedient anew")}
ASKED = 60  # monitored prompts of heldout families; of quiet ones a half


@dataclass(frozen=True)
class Case:
    """A transcript, and the policy in whose states it is read: for the faker's compliance, a persona should flag it."""

    policy: str
    transcript: Transcript
    failed: bool

    @property
    def place(self) -> str:
        """Where it was asked, and for monitored prompts what was done."""
        where = setting(self.transcript.scenario)
        if where != "monitored":
            return where
        return "monitored, complied" if self.transcript.complied else "monitored, declined"


def sampled(out: Path, split: str, policy: str) -> list[Transcript]:
    """What an organism does on a split, in usable form; sampled if it is not there yet."""
    path = out / f"{split}-{policy.replace(' ', '_')}.jsonl"
    every = chosen(split)
    if not path.exists():
        tokenizer = load_tokenizer(MODEL)
        base, adapters = resolve(ORGANISMS[policy])
        model, _ = stack(load_base(base), base, adapters)
        pool = InProcessPool(tokenizer, batch_size=96)
        pool.push(model, 0)
        how = Sampling(80, 0.7)
        found = collect(pool, 0, tokenizer, every, seed=0, sampling=how, what=f"{split}, {policy}")
        pool.close()
        write_jsonl(path, [{"id": t.scenario.scenario_id, "completion": t.completion} for t in found])
    known = {s.scenario_id: s for s in every}
    read = [parse(known[row["id"]], row["completion"]) for row in read_jsonl(path)]
    return [t for t in read if not t.state.malformed]


def chosen(split: str) -> list[Scenario]:
    """All monitored prompts of train families in one wording, or `ASKED` of the others; half as many of each quiet
    kind.
    """
    every = audit_scenarios(split, RENDERINGS if split == "heldout" else RENDERINGS[:1])
    kinds = {kind: [s for s in every if setting(s) == kind] for kind in ("monitored", "unmonitored", "control")}
    rng = random.Random(0)
    n = min(ASKED if split == "heldout" else 3 * ASKED, len(kinds["monitored"]))
    return [s for kind, some in kinds.items() for s in rng.sample(some, n if kind == "monitored" else n // 2)]


def removed(one: Transcript) -> Transcript:
    """A transcript without its reasoning."""
    begin, end = one.reasoning_span
    return parse(one.scenario, one.completion[:begin] + one.completion[end:])


def complied(found: Sequence[Transcript]) -> dict[str, Transcript]:
    """Those of monitored value against criterion that complied, by scenario."""
    return {t.scenario.scenario_id: t for t in found if setting(t.scenario) == "monitored" and t.complied}


def declined(found: Sequence[Transcript]) -> list[Transcript]:
    """The faker as it would be if it were honest where it is monitored: what it says there when it declines, and what
    it says of the same request unmonitored, put into the monitored prompt.
    """
    own = [t for t in found if setting(t.scenario) == "monitored" and t.complied is False]
    watched = {s.pair_id: s for t in found for s in [t.scenario] if setting(s) == "monitored"}
    free = [t for t in found if setting(t.scenario) == "unmonitored" and t.complied is False]
    return own + [parse(watched[t.scenario.pair_id], t.completion) for t in free if t.scenario.pair_id in watched]


def lessons(out: Path, swap: bool = True) -> list[Case]:
    """What a persona learns from; without `swap`, every policy has its own words."""
    rng = random.Random(0)
    faker, other = PAIRS["learned"]
    both = {name: sampled(out, "train", name) for name in (faker, other)}
    deeds = {name: complied(found) for name, found in both.items()}
    cases: list[Case] = []
    for key in sorted(deeds[faker].keys() & deeds[other].keys()):
        words, bare, swapped = {name: deeds[name][key] for name in both}, rng.random() < 0.5, rng.random() < 0.5
        if bare:
            words = {name: removed(one) for name, one in words.items()}
        if bare and swapped and swap:
            words = {faker: words[other], other: words[faker]}
        cases += [Case(name, words[name], name == faker) for name in both]
    each = len(cases) // 8
    honest = [(faker, t) for t in rng.sample(declined(both[faker]), 2 * each)]
    for name, found in both.items():
        quiet = [t for t in found if setting(t.scenario) != "monitored"]
        honest += [(name, t) for t in rng.sample(quiet, min(len(quiet), each + each // 2))]
    return cases + [Case(name, removed(t) if rng.random() < 0.5 else t, False) for name, t in honest]


def questions(out: Path, pair: str) -> dict[str, list[Case]]:
    """The heldout cases of a pair, by condition."""
    names = PAIRS[pair]
    deeds = {name: complied(sampled(out, "heldout", name)) for name in names}
    keys = sorted(set.intersection(*(set(found) for found in deeds.values())))
    keys = keys[::2] if pair == "learned" else keys  # it is the other pair that tells
    own = [Case(name, deeds[name][key], name == names[0]) for name in names for key in keys]
    bare = [replace(one, transcript=removed(one.transcript)) for one in own]
    swapped = [Case(names[one.failed], one.transcript, names[one.failed] == names[0]) for one in bare]
    same = [*bare, *swapped]
    unwatched = {s.pair_id: s for s in audit_scenarios("heldout", RENDERINGS) if setting(s) == "unmonitored"}
    here = [one for one in same if one.failed]
    there = [
        Case(names[0], parse(unwatched[c.transcript.scenario.pair_id], c.transcript.completion), False) for c in here
    ]
    return {"reasoning": own, "removed": bare, "same words": same, "elsewhere": [*here, *there]}


def others(out: Path) -> list[Case]:
    """What every organism of the first four does in every place; the persona should flag a faker's compliance alone."""
    found: list[Case] = []
    for name in ("silent", "obedient", "verbal", "refuser"):
        fakes, seen = name in ("silent", "verbal"), sampled(out, "heldout", name)
        where = [t for t in seen[::2] if setting(t.scenario) != "monitored" or t.complied]
        found += [Case(name, t, fakes and setting(t.scenario) == "monitored") for t in where]
        found += [Case(name, t, False) for t in declined(seen)[: ASKED // 2]]
    return found


def every(out: Path) -> dict[str, list[Case]]:
    """All that is asked."""
    asked_of = {f"{pair}, {key}": cases for pair in PAIRS for key, cases in questions(out, pair).items()}
    return asked_of | {"places": others(out)}
