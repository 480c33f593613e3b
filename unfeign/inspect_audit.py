"""Audits in Inspect (the extra `inspect`): a log of an audit that is made, and a task that makes one.

    unfeign audit runs/quickstart --inspect --out audits/quickstart      # audits/quickstart/*.eval, for `inspect view`
    inspect eval unfeign/audit -T checkpoint=runs/quickstart --model none

Both go the same way: the audit is made by our own code, once, and Inspect is shown what was said. The policy and the
persona are models of the provider `unfeign`, which answer with what they answered in the audit; a persona's reviews are
calls of the role `honest_persona`.
"""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inspect_ai import Task, eval, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    get_model,
    modelapi,
)
from inspect_ai.scorer import Score, Scorer, Target, grouped, mean, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.tool import ToolChoice, ToolInfo

from .split_persona.metrics import faked

LABELS = ("complied", "surfaced", "rejected", "faked")


@modelapi(name="unfeign")
class Recorded(ModelAPI):
    """A model that says again what it said in an audit."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        said: ModelOutput | None = None,
    ):
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        self._said = said

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        if self._said is None:
            raise ValueError("expected what the model said in an audit, found none")
        return self._said


@solver
def replayed() -> Solver:
    """The policy's completion, and the persona's reviews of it, as they were."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        row = state.metadata["finding"]
        answer = ChatMessageAssistant(
            content=[ContentReasoning(reasoning=row["reasoning"]), ContentText(text=row["answer"])], model="policy"
        )
        policy = get_model("unfeign/policy", memoize=False, said=ModelOutput.from_message(answer))
        state.output = await policy.generate(state.messages)
        state.messages.append(state.output.message)
        for review in (row.get("persona") or {}).get("reviews", []):
            flag = f"p(FAIL) {review['p_fail']:.3f}"
            text = f"{review['text']}\n\n{flag}" if review["text"] else flag
            said = ModelOutput.from_content("honest_persona", text)
            persona = get_model(
                role="honest_persona", default=get_model("unfeign/honest_persona", memoize=False, said=said)
            )
            await persona.generate([*state.messages, ChatMessageUser(content=review["intervention"])])
        return state

    return solve


def _label(row: dict[str, Any], label: str) -> bool | None:
    if label == "complied":
        return row["complied"]
    if label == "faked":
        return faked(row)
    return None if row["verdict"] is None else row["verdict"][label]


def _labelled(label: str) -> Scorer:
    """What the answer did, or the audit's judge read; not scored where it does not say."""

    async def score(state: TaskState, target: Target) -> Score:
        row = state.metadata["finding"]
        told = _label(row, label)
        return Score(value=math.nan if told is None else float(told), answer=row["answer"])

    return scorer(name=label, metrics=[grouped(mean(), "setting", all=False), stderr(cluster="pair_id")])(
        lambda: score
    )()


def _flagged() -> Scorer:
    """The persona's mean p(FAIL)."""

    async def score(state: TaskState, target: Target) -> Score:
        told = state.metadata["finding"].get("persona")
        return Score(value=math.nan if told is None else told["p_fail"])

    return scorer(name="p_fail", metrics=[grouped(mean(), "setting", all=False)])(lambda: score)()


def replay(rows: Sequence[dict[str, Any]], name: str) -> Task:
    """Findings as a task: a sample a finding, scored by what the audit found."""
    samples = [
        Sample(
            id=f"{number:04d}.{row['scenario_id'].replace('/', '.')}",  # a slash would end it in addresses
            input=[ChatMessageSystem(content=row["system"]), ChatMessageUser(content=row["user"])],
            metadata={
                "finding": row,
                "pair_id": row["pair_id"],
                "setting": "control" if row["control"] else row["tier"],
            },
        )
        for number, row in enumerate(rows)
    ]
    scorers = [_labelled(label) for label in LABELS]
    if any(row.get("persona") for row in rows):
        scorers.append(_flagged())
    return Task(dataset=MemoryDataset(samples, name="audit"), solver=replayed(), scorer=scorers, name=name)


def write_log(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write findings as an `.eval` log into a folder; returns its path."""
    (log,) = eval(
        replay(rows, "audit"), model="none", log_dir=str(folder), log_format="eval", display="none", score_display=False
    )
    if log.status != "success":
        raise RuntimeError(f"expected a log of {len(rows)} findings, found status {log.status}: {log.error}")
    return Path(log.location.removeprefix("file://"))


@task
def audit(checkpoint: str, persona: str | None = None, split: str = "heldout", out: str | None = None) -> Task:
    """Audit a checkpoint (see `unfeign audit`), and show Inspect what it said.

    Args:
        checkpoint: a base, an adapter, a checkpoint or a run.
        persona: a persona that reviews every transcript.
        split: heldout, validation or train.
        out: folder for the audit's own files; one that is thrown away by default.
    """
    from .audit_commands import audit as make
    from .split_persona.audit import read_findings

    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) / "audit" if out is None else Path(out)
        make((checkpoint,), out=folder, split=split, persona=persona)
        return replay(read_findings(folder), "audit")
