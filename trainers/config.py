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
    staleness: int = Field(0, ge=0)
    """Batches sampled ahead while one is learned from: 1 lets workers and trainer work at the same time."""
    correction: Literal["auto", "token", "sequence", "off"] = "auto"
    """Importance ratio of trainer to worker, by `token` or `sequence`; `auto`: `token` where dtypes or steps differ."""
    ratio_cap: float = Field(2.0, ge=1)
    """The largest ratio let through."""
    batch_size: int = Field(64, ge=1)
    """Rows decoded at once."""
    temperature: float = Field(0.7, gt=0)
    """Of sampling, in training and audit alike."""


class PpoSettings(Settings):
    """What PPO has beside GRPO's settings. The price of the KL to the reference is `grpo.beta`."""

    gamma: float = Field(1.0, gt=0, le=1)
    """Discount a token."""
    lam: float = Field(1.0, ge=0, le=1)
    """Of generalized advantage estimation: 1 trusts the rewards alone, 0 the next value alone. A young value
    foresees little, and completions are short."""
    value_learning_rate: float = Field(1e-3, gt=0)
    """Of the value head alone, which begins at nothing; the policy has `grpo.learning_rate`."""
    value_coefficient: float = Field(0.1, gt=0)
    """Weight of the value's loss beside the policy's."""
    value_clip: float = Field(0.2, gt=0)
    """How far a value may move from the one at sampling before its loss stops counting."""
    whiten: bool = True
    """Whether advantages are brought to mean 0 and spread 1 over the batch's tokens."""


def _located(name: str, info: ValidationInfo) -> str:
    """A relative folder starts at the config file's folder; other names stay as they are."""
    beside = (info.context or {}).get("folder", Path()) / name
    return str(beside) if not Path(name).is_absolute() and beside.is_dir() else name


class AuditSettings(Settings):
    """The audit of behaviour before and after training."""

    before: bool = True
    after: bool = True
    every: int | None = Field(None, ge=1)
    """Steps between further audits on the way, which give a trend."""
    split: Literal["validation", "heldout"] = "heldout"
    renderings: list[Rendering] = ["original", "paraphrase"]
    max_new_tokens: int = Field(80, ge=1)
    """Tokens."""
    judge: str | dict[str, Any] = "rules"
    """Who reads the reasoning in the audit: a name, or a mapping with `name` and its arguments."""
    seed: int = 1234
    """Fixes the sampling, so that audits of two checkpoints differ by the checkpoint alone."""
    persona: str | None = None
    """An honest persona that reviews the audits: its folder, or persona:NAME."""
    interventions: int | None = Field(None, ge=1)
    """How many of its interventions are asked, the first ones; by default all."""

    @field_validator("persona")
    @classmethod
    def _beside(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else _located(value, info)


_SAMPLED = "rollouts sample from the whole distribution, or the log-probs of samples would be wrong"
_POOL = "rollouts.backend says where completions come from"
_SPLIT = "weights that are split over processes can't be pushed to rollout workers"
_EVALUATION = "there is no evaluation set; audits evaluate"
_ORDER = "data.mix orders the prompts"
REFUSED = {
    "output_dir": "output names the run folder",
    "reward_weights": "each reward has its weight",
    "multi_objective_aggregation": "rewards are summed, and credited by segment",
    "seed": "seed is the run's own",
    "data_seed": _ORDER,
    "shuffle_dataset": _ORDER,
    "train_sampling_strategy": _ORDER,
    "length_column_name": _ORDER,
    "ignore_data_skip": _ORDER,
    "num_train_epochs": "grpo.max_steps says how long to train",
    "temperature": "rollouts.temperature is for training and audit alike",
    "top_p": _SAMPLED,
    "top_k": _SAMPLED,
    "min_p": _SAMPLED,
    "repetition_penalty": _SAMPLED,
    "generation_kwargs": _SAMPLED,
    "cache_implementation": _POOL,
    "use_transformers_paged": _POOL,
    "use_transformers_continuous_batching": _POOL,
    "transformers_continuous_batching_config": _POOL,
    "ds3_gather_for_generation": _POOL,
    "max_tool_calling_iterations": "completions call no tools",
    "model_init_kwargs": "model and dtype say what is loaded",
    "trust_remote_code": "no code of a model's repository is run",
    "remove_unused_columns": "rewards read the scenario's columns",
    "resume_from_checkpoint": "--resume goes on with a run",
    "save_total_limit": "older checkpoints keep the policy, which is small, for audits",
    "fsdp": _SPLIT,
    "fsdp_config": _SPLIT,
    "deepspeed": _SPLIT,
    "label_smoothing_factor": "there are no labels",
    "label_names": "there are no labels",
    "auto_find_batch_size": "a batch that changes size would change the groups",
    **dict.fromkeys(
        (
            *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps", "do_eval"),
            *("eval_do_concat_batches", "eval_use_gather_object", "per_device_eval_batch_size", "do_predict"),
            *("num_generations_eval", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics"),
            *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
            *("bf16_full_eval", "fp16_full_eval"),
        ),
        _EVALUATION,
    ),
}
"""Fields of `GRPOConfig` that would do nothing or harm here, and why; also all that begin with `vllm` or `use_vllm`."""


def refusal(key: str) -> str | None:
    """Why a field of `GRPOConfig` is not taken; None when it is."""
    return _POOL if key.startswith(("vllm_", "use_vllm")) else REFUSED.get(key)


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
    algorithm: Literal["grpo", "ppo"] = "grpo"
    """`ppo` learns a value in place of the group's mean; see docs/ppo.md."""
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
    """Fields of TRL's `GRPOConfig`, verbatim, for PPO too; those in `REFUSED` are refused with the reason."""
    ppo: PpoSettings = PpoSettings()

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
        return [_located(name, info) for name in value] if isinstance(value, list) else _located(value, info)

    @field_validator("grpo")
    @classmethod
    def _known(cls, grpo: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for key in grpo:
            if (reason := refusal(key)) is not None:
                raise ValueError(f"no grpo.{key}: {reason}")
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
