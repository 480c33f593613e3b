"""Planning a run: validate everything, load no weights, start nothing.

`plan` is what `--dry-run` shows and what `train` begins with, so a dry run that passes is a run that starts.
"""

import copy
import difflib
import math
import platform
import subprocess
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..envs.dataset import mixed, mixed_pairs, setting
from ..envs.requests import load_requests
from ..envs.scenario import Scenario, scenarios
from ..errors import UnfeignError
from ..lineage import base_facts, verify
from ..models import adapter_folder, base_location
from ..rewards.judge import load_judge, wait_for
from ..rewards.plugin import LoadedReward, load_rewards
from .config import PpoSettings, TrainConfig
from .run_folder import Resume, Start, find_start


@dataclass
class Plan:
    """A validated run."""

    config: TrainConfig
    rewards: list[LoadedReward]
    scenarios: list[Scenario]
    grpo: Any
    """TRL's `GRPOConfig`."""
    facts: dict[str, Any] = field(default_factory=dict)
    start: Start = field(default_factory=Start)


GRPO_DEFAULTS: dict[str, Any] = {
    "num_generations": 8,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "scale_rewards": "batch",
    "max_steps": 16,
    "max_completion_length": 80,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 5,
    "report_to": [],
    "gradient_checkpointing": False,
    "bf16": False,
    "disable_tqdm": True,
    "log_completions": False,
    "mask_truncated_completions": False,
    "ddp_timeout": 6 * 3600,  # seconds: other processes wait while the first one audits
}


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


def _grpo_arguments(config: TrainConfig) -> Any:
    """TRL's `GRPOConfig` from the `grpo:` mapping over our defaults: keys, types, and what TRL itself would refuse."""
    import typing

    import torch
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from trl import GRPOConfig

    types = typing.get_type_hints(GRPOConfig)
    settings = dict(GRPO_DEFAULTS)
    for key, value in config.grpo.items():
        where = f"grpo.{key}"
        if key not in GRPOConfig.__dataclass_fields__:
            near = difflib.get_close_matches(key, GRPOConfig.__dataclass_fields__, n=1)
            expected = f"{near[0]!r} (nearest field of TRL's GRPOConfig)" if near else "a field of TRL's GRPOConfig"
            raise UnfeignError(expected, repr(key), where)
        try:
            allowed = TypeAdapter(types[key], config=ConfigDict(arbitrary_types_allowed=True))
            settings[key] = allowed.validate_python(value)
        except ValidationError as error:
            raise UnfeignError(error.errors()[0]["msg"].lower(), repr(value)[:80], where) from None
    for key, least in {"max_steps": 1, "num_generations": 2, "per_device_train_batch_size": 1}.items():
        if settings[key] < least:
            raise UnfeignError(f"{key} to be a whole number of at least {least}", repr(settings[key]), f"grpo.{key}")
    if settings.get("loss_type", "dapo") not in LOSS_TYPES:
        raise UnfeignError(f"one of {', '.join(LOSS_TYPES)}", repr(settings["loss_type"]), "grpo.loss_type")
    _check_trackers(settings["report_to"])
    device = {} if torch.cuda.is_available() else {"use_cpu": True}
    try:
        return GRPOConfig(
            output_dir=str(config.output / "checkpoints"),
            seed=config.seed,
            temperature=config.rollouts.temperature,
            shuffle_dataset=False,
            **(device | settings),
        )
    except (ValueError, TypeError) as error:
        raise UnfeignError("settings that TRL's GRPOConfig accepts", str(error), "grpo") from None


def _check_trackers(names: str | list[str] | None) -> None:
    """That every experiment tracker of `report_to` is known and installed."""
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    for name in [names] if isinstance(names, str) else names or []:
        if name in ("none", "all"):
            continue
        if name not in known:
            raise UnfeignError(f"trackers among {', '.join(sorted(known))}", repr(name), "grpo.report_to")
        try:
            known[name]()
        except (RuntimeError, ImportError) as error:
            raise UnfeignError("a tracker that is installed", str(error), "grpo.report_to") from None


def _prompts(arguments: Any) -> int:
    """How many prompts `max_steps` optimiser steps consume: whole generation batches, over all processes."""
    step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    batches = math.ceil(arguments.max_steps * step / arguments.generation_batch_size)
    return batches * arguments.generation_batch_size // arguments.num_generations


def plan(config: TrainConfig, resume: Resume = "never") -> Plan:
    """Validate a config without loading weights or starting anything.

    Args:
        config: of the run.
        resume: whether an interrupted run in the output folder goes on (`run_folder`).

    Raises:
        UnfeignError: the first thing that would stop the run, with what was expected and where.
    """
    auditor = load_judge(config.audit.judge, config.folder)
    start = find_start(config.output, config.resolved(), resume)
    rewards = load_rewards(config.rewards, config.folder, comparator=config.comparator)
    for number, spec in enumerate(config.rewards):
        if spec.on == "workers" and config.rollouts.backend != "ray":
            found = f"rollouts.backend: {config.rollouts.backend}"
            raise UnfeignError("rollouts.backend: ray, for a reward on workers", found, f"rewards[{number}].on")
        if spec.on == "workers" and _pays(getattr(rewards[number].fn, "judge", None)):
            expected = "on: trainer, for a judge that costs money: its budget and its cache are one"
            raise UnfeignError(expected, "on: workers", f"rewards[{number}].on")
    if config.rollouts.staleness and config.rollouts.backend != "ray":
        found = f"rollouts.backend: {config.rollouts.backend}"
        raise UnfeignError("rollouts.backend: ray, to sample ahead", found, "rollouts.staleness")
    if config.rollouts.staleness and config.audit.every is not None:
        raise UnfeignError("audit.every: null, while workers sample ahead", str(config.audit.every), "audit.every")
    if config.rollouts.staleness and (there := [i for i, spec in enumerate(config.rewards) if spec.on == "workers"]):
        expected = "rewards on the trainer, while workers sample ahead"
        raise UnfeignError(expected, "on: workers", f"rewards[{there[0]}].on")
    judges = [reward.fn.judge.name for reward in rewards if hasattr(reward.fn, "judge")]
    if auditor.name in judges and auditor.name != "rules" and not config.allow_same_judge:
        raise UnfeignError("an audit judge that differs from the training judge", repr(auditor.name), "audit.judge")
    _check_algorithm(config)
    _check_processes()
    grpo = _grpo_arguments(config)
    source = None
    if config.data.requests is not None:
        source = load_requests(config.folder / config.data.requests, config.data.split)
    pool = scenarios(
        config.data.split,
        source=source,
        renderings=config.data.renderings,
        length=config.data.length,
        tags=config.data.delimiters,
    )
    shares = {name: share for name, share in config.data.mix.model_dump().items() if share > 0}
    have = {setting(s) for s in pool}
    for name in shares:
        if name not in have:
            raise UnfeignError(f"scenarios for data.mix.{name}", "none in the data", "data")
    paired = _check_pairs(config, rewards, grpo)
    chosen = (mixed_pairs if paired else mixed)(pool, shares, _prompts(grpo), config.seed)
    _check_columns(config, rewards)
    _check_adapters(config)
    facts = _facts(config) | {"judges": {"training": judges, "audit": auditor.name}}
    return Plan(config, rewards, chosen, grpo, facts, start)


def _pays(judge: Any) -> bool:
    """Whether a judge, or one of a vote's, keeps account of money."""
    return hasattr(judge, "ledger") or any(map(_pays, getattr(judge, "judges", ())))


def _check_processes() -> None:
    """That weights are whole in every process: pushing them and saving them need that."""
    import os

    for kind in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise UnfeignError("whole weights in every process (MULTI_GPU)", kind, "accelerate's distributed type")


def _check_algorithm(config: TrainConfig) -> None:
    """That no setting is given which the algorithm would ignore, or TRL can't do."""
    if config.lora is not None and config.grpo.get("cast_lm_head_to_fp32"):
        raise UnfeignError("lora: null (TRL finds no head under an adapter)", "true", "grpo.cast_lm_head_to_fp32")
    if config.algorithm == "grpo":
        if config.ppo != PpoSettings():
            raise UnfeignError("algorithm: ppo, for settings of ppo", "algorithm: grpo", "ppo")
        return
    for key, instead in (("scale_rewards", "ppo.whiten"), ("use_bias_correction_kl", "beta, which is in the rewards")):
        if key in config.grpo:
            raise UnfeignError(f"{instead}, for PPO", key, f"grpo.{key}")


def _check_pairs(config: TrainConfig, rewards: list[LoadedReward], grpo: Any) -> bool:
    """Whether a reward compares the tiers of a pair; then every process must get whole pairs."""
    needy = [i for i, reward in enumerate(rewards) if getattr(reward.fn, "needs_pairs", False)]
    for i in needy:
        if config.rewards[i].on == "workers":
            raise UnfeignError("a reward that compares prompts to run on the trainer", "on: workers", f"rewards[{i}]")
        prompts, rest = divmod(grpo.per_device_train_batch_size * grpo.steps_per_generation, grpo.num_generations)
        if rest or prompts % 2:
            expected = "per_device_train_batch_size x steps_per_generation a multiple of 2 x num_generations, for pairs"
            found = f"{grpo.per_device_train_batch_size} x {grpo.steps_per_generation}, {grpo.num_generations}"
            raise UnfeignError(expected, found, "grpo")
    return bool(needy)


def _check_columns(config: TrainConfig, rewards: list[LoadedReward]) -> None:
    """Score two rows with every reward, so that a missing column or a wrong return shows before anything is spent."""
    import inspect

    from transformers import TrainerState

    every = scenarios("train", controls=False)
    rows = [s for s in every if s.pair_id == every[0].pair_id]  # both tiers
    tags = rows[0].tags
    texts = [f"{tags.open_think}A thought.{tags.close_think}{tags.decline}No, thank you." for _ in rows]
    columns: dict[str, list[Any]] = {key: [row.columns()[key] for row in rows] for key in rows[0].columns()}
    columns |= {"truncated": [False, False], "prompt_opens_think": [False, False]}
    calls: dict[str, Any] = {
        "prompts": [row.messages for row in rows],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": [[1, 2, 3] for _ in rows],
        "trainer_state": TrainerState(),
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }
    for reward in rewards:
        where = f"reward {reward.name!r}"
        fn = reward.fn
        if getattr(getattr(fn, "judge", None), "costly", False):  # its reading is paid for, or takes a model: not now
            fn = copy.copy(fn)
            fn.judge = load_judge("rules")  # type: ignore[attr-defined]
        try:
            got = fn(**calls, **columns)
            if inspect.isawaitable(got):
                got = wait_for(got)
        except UnfeignError:
            raise
        except KeyError as error:
            raise UnfeignError(f"the column {error.args[0]!r}", f"columns {', '.join(columns)}", where) from None
        except TypeError as error:
            raise UnfeignError(
                "a function (prompts, completions, completion_ids, **columns)", str(error), where
            ) from None
        except Exception as error:
            raise UnfeignError("a reward that scores two rows", f"{type(error).__name__}: {error}", where) from error
        if not isinstance(got, list) or len(got) != len(rows):
            raise UnfeignError(f"a list of {len(rows)} numbers", repr(got)[:80], where)
        for value in got:
            if value is not None and not isinstance(value, (int, float)):
                raise UnfeignError("numbers or None", repr(value)[:80], where)


def _check_adapters(config: TrainConfig) -> None:
    """Verify the stack against the base's config, without loading weights.

    Raises:
        UnfeignError: as `lineage.verify`; or all weights are to be trained, and no checkpoint could tell them from the
            adapters.
    """
    from transformers import AutoConfig

    if config.adapters and config.lora is None:
        raise UnfeignError("a policy that is an adapter, on top of adapters", "lora: null", "adapters")

    location = base_location(config.model)
    if not Path(location).is_dir():
        if config.adapters:
            for name in config.adapters:
                adapter_folder(name)
        return  # a hub model: its config is read when the run starts
    facts = base_facts(config.model, AutoConfig.from_pretrained(location))
    folders = [(str(name), adapter_folder(name)) for name in config.adapters]
    for i, (_, folder) in enumerate(folders):
        verify(folder, facts, folders[:i])


def _facts(config: TrainConfig) -> dict[str, Any]:
    """What a later reader needs to repeat the run."""
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=config.folder, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"
    packages = ("torch", "transformers", "trl", "peft", "datasets")
    return {
        "git": revision,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in packages},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
