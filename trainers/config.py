"""The configuration of a training run. The defaults are the vetted setting; see `configs/` for runnable files."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, ValidationInfo, field_validator, model_validator

from ..envs.scenario import Length, Rendering
from ..envs.tags import PRESETS, Tags
from ..errors import UnfeignError
from ..rewards.plugin import RewardSpec
from ..settings import Settings


class LoraSettings(Settings):
    """The policy's adapter."""

    r: int = 16
    """Rank."""
    lora_alpha: int = 32
    """Scale times rank."""
    target_modules: str | list[str] = "all-linear"
    """Which layers carry it."""


class Mix(Settings):
    """Shares of prompts by setting. Without controls, rejection leaks into plain questions."""

    monitored: float = Field(0.5, ge=0)
    unmonitored: float = Field(0.1, ge=0)
    control: float = Field(0.4, ge=0)

    @model_validator(mode="after")
    def _some(self) -> "Mix":
        if self.monitored + self.unmonitored + self.control <= 0:
            raise ValueError("at least one share above 0")
        return self


class DataSettings(Settings):
    """Which scenarios the policy is trained on."""

    split: Literal["train", "validation"] = "train"
    """Never `heldout`."""
    length: Length = "short"
    """Situation text: `short` for small models, `full` for large ones."""
    renderings: list[Rendering] = ["original"]
    """Wordings of the situation."""
    mix: Mix = Mix()
    requests: Path | None = None
    """JSONL file with your own requests; see `unfeign.envs.requests`. Replaces the shipped families."""
    tags: str = "think"
    """Output format: `think`, `scratchpad` or `published`."""

    @field_validator("tags")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in PRESETS:
            raise ValueError(f"one of {', '.join(PRESETS)}")
        return name

    @property
    def delimiters(self) -> Tags:
        return PRESETS[self.tags]


class RolloutSettings(Settings):
    """Where completions come from."""

    backend: Literal["ray", "in_process"] = "ray"
    """`in_process` generates in the trainer's own process, for debugging."""
    workers: int = Field(1, ge=1)
    """Ray actors that hold the policy. With `RAY_ADDRESS` set they run on that cluster."""
    timeout: float = Field(600.0, gt=0)
    """Seconds a worker may take for one call before it counts as dead."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the workers' base; the run's own when null."""
    correction: Literal["auto", "token", "sequence", "off"] = "auto"
    """Importance ratio of trainer to worker, by `token` or by `sequence`; `auto`: `token` where their dtypes differ."""
    ratio_cap: float = Field(2.0, ge=1)
    """The largest ratio let through."""
    batch_size: int = Field(64, ge=1)
    """Rows decoded at once."""
    temperature: float = Field(0.7, gt=0)
    """Of sampling, in training and audit alike."""


class AuditSettings(Settings):
    """The audit of behaviour before and after training."""

    before: bool = True
    after: bool = True
    split: Literal["validation", "heldout"] = "heldout"
    renderings: list[Rendering] = ["original", "paraphrase"]
    max_new_tokens: int = Field(80, ge=1)
    """Tokens."""
    judge: str | dict[str, Any] = "rules"
    """Who reads the reasoning in the audit: a name, or a mapping with `name` and its arguments."""
    seed: int = 1234
    """Fixes the sampling, so that audits of two checkpoints differ by the checkpoint alone."""


REFUSED = {
    "output_dir": "output",
    "reward_weights": "weight in each reward",
    "seed": "seed",
    "temperature": "rollouts.temperature",
    "use_vllm": "rollouts.backend",
    "shuffle_dataset": "data.mix (prompts are ordered by it)",
}


class TrainConfig(Settings):
    """One run: a base, adapters below the policy, data, rewards, and how to learn."""

    model: str = "bundled:smollm2-135m-instruct"
    """`bundled:...`, a local folder, or a hub id."""
    adapters: list[str] = []
    """Stacked below the policy, bottom first: folders, or `organism:NAME`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoraSettings | None = LoraSettings()
    """null trains all weights."""
    output: Path = Path("runs/train")
    """The run folder; an existing one is never overwritten. Relative to where the command is run."""
    seed: int = 0
    algorithm: Literal["grpo"] = "grpo"
    credit: Literal["segment", "sequence"] = "segment"
    comparator: bool = False
    """Marks the run as a comparator; required by rewards that punish the thought."""
    allow_same_judge: bool = False
    """Let one judge train and audit; the report says so in red."""
    data: DataSettings = DataSettings()
    rewards: list[RewardSpec] = [RewardSpec(fn="verbalized_rejection")]
    rollouts: RolloutSettings = RolloutSettings()
    audit: AuditSettings = AuditSettings()
    grpo: dict[str, Any] = Field(default_factory=dict)
    """Any field of TRL's `GRPOConfig`, verbatim."""

    _folder: Path = PrivateAttr(default=Path("."))

    @property
    def folder(self) -> Path:
        """Where relative files in the config start: its own folder."""
        return self._folder

    def model_post_init(self, context: Any) -> None:
        if isinstance(context, dict) and "folder" in context:
            self._folder = context["folder"]

    @field_validator("model", "adapters")
    @classmethod
    def _beside(cls, value: Any, info: ValidationInfo) -> Any:
        """A relative folder starts at the config file's folder; other names stay as they are."""
        folder = (info.context or {}).get("folder", Path())

        def located(name: str) -> str:
            beside = folder / name
            return str(beside) if not Path(name).is_absolute() and beside.is_dir() else name

        return [located(name) for name in value] if isinstance(value, list) else located(value)

    @field_validator("grpo")
    @classmethod
    def _known(cls, grpo: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for key in grpo:
            if key in REFUSED:
                raise ValueError(f"{REFUSED[key]} instead of grpo.{key}")
        return grpo

    @classmethod
    def of(cls, resolved: dict[str, Any]) -> "TrainConfig":
        """From a run folder's resolved config, or the defaults where it is empty."""
        try:
            return cls.model_validate(resolved)
        except ValidationError as error:
            found = error.errors()[0]["msg"]
            raise UnfeignError("a config of this version", found, "the run's config.yaml") from None

    def resolved(self) -> dict[str, Any]:
        """Everything, defaults included, as plain JSON data."""
        return self.model_dump(mode="json")
