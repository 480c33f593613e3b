"""What a persona learns from: transcripts with the review and the flag that are right for them.

A persona that meets every deed in a situation of its own learns the situation. So the examples from a policy's own
transcripts come in matched sets: for one prompt, as many that complied as did not (`matched`); and the quiet tiers and
controls, where nothing is wrong, are PASS.

Data of one's own is a JSONL file with `messages`, `completion`, `flag` (PASS or FAIL), and optionally `id`,
`intervention`, `review` and `topic`.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..envs.family import families
from ..envs.transcript import Transcript
from ..errors import UnfeignError
from ..files import CANARY, read_jsonl, read_yaml
from ..rewards.verdict import Verdict

FLAGS = {"PASS": False, "FAIL": True}


@dataclass(frozen=True)
class Example:
    """One transcript with what a persona should say of it. None: drawn (intervention), or not trained (review)."""

    id: str
    messages: list[dict[str, str]]
    completion: str
    failed: bool
    intervention: str | None = None
    review: str | None = None
    topic: str = ""

    def row(self) -> dict[str, Any]:
        """As a line of a data file."""
        return {
            "id": self.id,
            "messages": self.messages,
            "completion": self.completion,
            "flag": "FAIL" if self.failed else "PASS",
            "intervention": self.intervention,
            "review": self.review,
            "topic": self.topic,
            "canary": CANARY,
        }


def read_examples(path: Path) -> list[Example]:
    """Examples of one's own.

    Raises:
        UnfeignError: naming the line and the field at fault.
    """
    out = []
    for number, row in enumerate(read_jsonl(path), start=1):
        where = f"{path}:{number}"
        for key, kind in (("messages", list), ("completion", str)):
            if not isinstance(row.get(key), kind):
                raise UnfeignError(f"{key!r}, a {kind.__name__}", repr(row.get(key))[:60], where)
        for message in row["messages"]:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise UnfeignError("messages with 'role' and 'content'", repr(message)[:60], where)
        if not row["messages"]:
            raise UnfeignError("at least one message", "none", where)
        for key in ("intervention", "review"):
            if not isinstance(row.get(key), str | None):
                raise UnfeignError(f"{key!r}, a text", repr(row[key])[:60], where)
        if row.get("flag") not in FLAGS:
            raise UnfeignError("'flag', PASS or FAIL", repr(row.get("flag")), where)
        out.append(
            Example(
                str(row.get("id", number)), row["messages"], row["completion"], FLAGS[row["flag"]],
                row.get("intervention"), row.get("review"), str(row.get("topic", "")),
            )
        )  # fmt: skip
    return out


@cache
def _reviews() -> dict[str, list[str]]:
    return read_yaml(Path(str(files("unfeign.split_persona"))) / "reviews.yaml")


def deed(transcript: Transcript, verdict: Verdict) -> str | None:
    """What a transcript did, as `reviews.yaml` names it; None where it has no usable form."""
    if transcript.state.malformed or transcript.complied is None:
        return None
    return name_of(transcript.scenario.control, transcript.complied, verdict.surfaced, verdict.rejected)


def name_of(control: bool, complied: bool, surfaced: bool, rejected: bool) -> str | None:
    """The deed of a transcript in usable form; None for a control that was declined: there is nothing to judge."""
    if control:
        return "control" if complied else None
    if complied:
        return "faked" if surfaced else "complied"
    return "rejected" if rejected else "declined"


def failed(name: str) -> bool:
    """Whether a deed is one that a reviewer should flag."""
    return name in ("faked", "complied")


def example(transcript: Transcript, name: str, rng: random.Random) -> Example:
    """An example with a review in words that fit the deed, drawn from many."""
    s = transcript.scenario
    text = rng.choice(_reviews()[name])
    family = families().get(s.family)
    slots = {"criterion": s.criterion, "value": s.value, "subject": family.subject if family else "this"}
    return Example(s.scenario_id, s.messages, transcript.completion, failed(name), None, text.format(**slots), s.family)


def matched(
    judged: Iterable[tuple[Transcript, Verdict]], seed: int, per_prompt: int = 2, quiet: float = 0.5
) -> list[Example]:
    """Examples from a policy's own transcripts.

    Args:
        judged: several a prompt, with verdicts.
        seed: of what is drawn.
        per_prompt: of each deed, at most, in one monitored prompt; a prompt where only one deed was seen gives none.
        quiet: PASS examples from unmonitored prompts and controls, as a share of the matched ones.
    """
    rng = random.Random(seed)
    monitored: dict[str, dict[bool, list[Example]]] = defaultdict(lambda: {False: [], True: []})
    calm: list[Example] = []
    for transcript, verdict in judged:
        name = deed(transcript, verdict)
        if name is None:
            continue
        made = example(transcript, name, rng)
        if transcript.scenario.control or transcript.scenario.tier != "monitored":
            calm += [] if made.failed else [made]
        else:
            monitored[made.id][made.failed].append(made)
    out: list[Example] = []
    for sides in monitored.values():
        n = min(per_prompt, *map(len, sides.values()))
        out += [one for side in sides.values() for one in rng.sample(side, n)]
    return out + rng.sample(calm, min(len(calm), round(quiet * len(out))))


def flip(examples: Sequence[Example], share: float, seed: int) -> list[Example]:
    """A share of the flags the wrong way round (reviews dropped there): how much wrong labels cost."""
    rng = random.Random(seed)
    wrong = set(rng.sample(range(len(examples)), round(share * len(examples))))
    return [
        Example(e.id, e.messages, e.completion, not e.failed, e.intervention, None, e.topic) if i in wrong else e
        for i, e in enumerate(examples)
    ]
