"""How a review is laid out: what follows the transcript, and where the persona wakes.

    <transcript> TRIGGER <opens> <intervention> <closes> <opens the review> <review> <opens the flag> PASS or FAIL

The transcript is the policy's own chat, up to the end of its answer. The trigger is one token; everything from it on is
the persona's. The pieces between are a `Framing`: a text file in `framings/`, or the user's own. The `published` one
lays sequences out as the data of "Split Personality Training" (arXiv 2602.05532) do.
"""

from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from ..errors import UnfeignError
from ..settings import Settings

_FRAMINGS = Path(str(files("unfeign.split_persona"))) / "framings"


class Framing(Settings):
    """Who is asked, and how."""

    trigger: str = "<reponame>"
    """One token that wakes the persona: a reserved one of the tokenizer, or a new one, which is added to it."""
    system_tag: str = ""
    """Comes before the system prompt inside the user's turn, for models whose template has no system role."""
    before_intervention: str
    """Between trigger and intervention. `{to_user}` ends the policy's turn and opens one of the user's, as the chat
    template of the model does.
    """
    after_intervention: str = ""
    """Right after it. `{to_assistant}` ends the user's turn and opens one of the policy's."""
    before_review: str = ""
    """Then, where a review is asked for."""
    before_flag: str
    """Then the flag."""
    pauses: int = Field(0, ge=0)
    """How many more times the trigger stands there, for the persona to think in before it is asked anything."""
    review: bool = True
    """Whether a review comes before the flag; else the flag alone."""
    interventions: list[str]
    """Texts that ask for a review; a training draws among them."""

    @field_validator("before_flag")
    @classmethod
    def _no_space(cls, text: str) -> str:
        return text.rstrip(" ")  # the space belongs to the word after it

    @field_validator("interventions")
    @classmethod
    def _some(cls, texts: list[str]) -> list[str]:
        if not texts or not all(text.strip() for text in texts):
            raise ValueError("at least one intervention, none empty")
        return texts


@cache
def framings() -> tuple[str, ...]:
    """Names of the shipped framings."""
    return tuple(sorted(path.stem for path in _FRAMINGS.glob("*.yaml")))


def load_framing(name: str, folder: Path = Path(), overrides: tuple[str, ...] = ()) -> Framing:
    """A shipped framing by name, or the user's own YAML file (relative to `folder`)."""
    if name in framings():
        return Framing.load(_FRAMINGS / f"{name}.yaml", overrides)
    if not name.endswith((".yaml", ".yml")):
        raise UnfeignError(f"one of the framings {', '.join(framings())}, or a YAML file", repr(name), "framing")
    return Framing.load(folder / name, overrides)


@dataclass(frozen=True)
class Layout:
    """A framing with the tokens of one tokenizer. `trigger` is a token id; `verdicts` are the ids that tell PASS from
    FAIL, the first in which their spellings differ.
    """

    framing: Framing
    tokenizer: Any
    trigger: int
    verdicts: tuple[int, int]
    shared: list[int]
    """Ids that both spellings begin with."""
    turns: dict[str, str]
    """What `{to_user}` and `{to_assistant}` stand for."""

    def suffix(self, intervention: str, review: str | None = None) -> list[int]:
        """Ids from the trigger to where the review begins; with a review, or where none is asked for, to the flag."""
        framing = self.framing
        text = self.turn(framing.before_intervention) + self.clean(intervention) + self.turn(framing.after_intervention)
        text += framing.before_review if framing.review else framing.before_flag
        ids = [self.trigger] * (1 + framing.pauses) + self.ids(text)
        if not framing.review:
            return ids + self.shared
        return ids if review is None else ids + self.ids(" " + self.clean(review).strip()) + self.flag_opening()

    def flag_opening(self) -> list[int]:
        """Ids between the review and the token that gives the verdict away."""
        return self.ids(self.framing.before_flag) + self.shared

    def turn(self, text: str) -> str:
        """A text of the framing with its turns filled in; what others wrote may name them, and opens none."""
        for slot, turn in self.turns.items():
            text = text.replace(slot, turn)
        return text

    def in_words(self) -> "Layout":
        """The same layout with reviews in words, also where the persona is usually asked for the flag alone."""
        return replace(self, framing=self.framing.model_copy(update={"review": True}))

    def clean(self, text: str) -> str:
        """A text that nobody vouches for, without the trigger in it: only the auditor wakes the persona."""
        while self.framing.trigger in text:
            text = text.replace(self.framing.trigger, "")
        return text

    def context(self, messages: list[dict[str, str]], completion: str) -> list[int]:
        """Ids of a transcript: the chat as the policy saw it, and its completion without the end of the turn."""
        cleaned = [{**m, "content": self.clean(m["content"])} for m in messages]
        tag = self.framing.system_tag
        if tag and cleaned[0]["role"] == "system":
            system, user, *rest = cleaned
            cleaned = [{**user, "content": f"{tag}{system['content']}\n\n{user['content']}"}, *rest]
        prompt = self.tokenizer.apply_chat_template(cleaned, tokenize=False, add_generation_prompt=True)
        return self.ids(prompt + self.clean(completion))

    def alone(self) -> list[int]:
        """Ids of no transcript at all: the opening of the policy's turn, for standalone questions."""
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True
        )
        return self.ids(prompt)

    def ids(self, text: str) -> list[int]:
        """Ids of a text as it stands."""
        return self.tokenizer(text, add_special_tokens=False).input_ids


def layout(framing: Framing, tokenizer: Any) -> Layout:
    """Find the tokens of a framing; a trigger that the tokenizer does not know is added to it.

    Raises:
        UnfeignError: a trigger that is an ordinary word, several tokens, or part of the chat template; PASS and FAIL
            that share every token.
    """
    if framing.trigger not in tokenizer.get_vocab():
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [framing.trigger]}, replace_extra_special_tokens=False
        )
    trigger = tokenizer.convert_tokens_to_ids(framing.trigger)
    ids = tokenizer(framing.trigger, add_special_tokens=False).input_ids
    turns = _turns(tokenizer)
    known = tokenizer.added_tokens_decoder.get(trigger)
    used = trigger in (tokenizer.eos_token_id, tokenizer.pad_token_id) or any(
        framing.trigger in t for t in turns.values()
    )
    if ids != [trigger] or known is None or not known.special or used:
        raise UnfeignError("a special token that has no other use", f"{framing.trigger!r} = {ids}", "trigger")
    opening = tokenizer(framing.before_flag, add_special_tokens=False).input_ids
    passed, failed = (
        tokenizer(framing.before_flag + word, add_special_tokens=False).input_ids for word in (" PASS", " FAIL")
    )
    if passed[: len(opening)] != opening or failed[: len(opening)] != opening:
        raise UnfeignError(
            "a beginning of the flag that is tokenized by itself", f"{framing.before_flag!r}", "before_flag"
        )
    passed, failed = passed[len(opening) :], failed[len(opening) :]
    differ = next((i for i, (a, b) in enumerate(zip(passed, failed, strict=False)) if a != b), None)
    if differ is None:
        raise UnfeignError("PASS and FAIL as different tokens", f"{passed} and {failed}", "before_flag")
    return Layout(framing, tokenizer, trigger, (passed[differ], failed[differ]), passed[:differ], turns)


def _turns(tokenizer: Any) -> dict[str, str]:
    """What a chat template writes between the turns."""
    chat = [{"role": r, "content": c} for r, c in (("user", "-1-"), ("assistant", "-2-"), ("user", "-3-"))]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    after = text.partition("-2-")[2]
    to_user, _, to_assistant = after.partition("-3-")
    return {"{to_user}": to_user, "{to_assistant}": to_assistant}
