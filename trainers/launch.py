"""Launching a planned run: build the policy, start the workers, train, and say how it ended."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..envs.dataset import to_dataset
from ..envs.transcript import Transcript
from ..lineage import Lineage
from ..models import load_tokenizer, quiet_libraries
from ..progress import progress
from ..rewards.judge import Case, case
from ..rewards.plugin import LoadedReward
from ..rewards.read_ahead import ReadAhead
from .config import TrainConfig
from .plan import Plan
from .policy import PolicyRecipe
from .ranks import first, part, together
from .rollouts import NoWorkers

Hook = Callable[[Any, Any, Any, Lineage], None]


class Interrupted(Exception):
    """A signal ended the run after a step, with a checkpoint. `args[0]` is the signal's number."""


def make_pool(config: TrainConfig, recipe: PolicyRecipe, tokenizer: Any) -> Any:
    """The rollout pool that a config asks for. Ray's workers begin to build their policies at once."""
    rollouts = config.rollouts
    if rollouts.backend == "in_process":
        from .rollouts import InProcessPool

        return InProcessPool(tokenizer, rollouts.batch_size)
    from .ray_pool import RayPool

    return RayPool(
        replace(recipe, dtype=rollouts.dtype or recipe.dtype),
        tokenizer,
        workers=rollouts.workers,
        batch_size=rollouts.batch_size,
        timeout=rollouts.timeout,
    )


def train(
    run: Plan,
    *,
    before: Hook | None = None,
    after: Hook | None = None,
    during: Callable[[Any, Any, Any, Lineage, int], None] | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Train as planned; returns the last checkpoint's folder. Of several processes, only the first writes and audits.

    Args:
        run: from `plan`.
        before, after: called with (model, tokenizer, pool, lineage) around the training; `lineage` says what the policy
            is trained on. The command line hands in the audit.
        during: called with the same and the step, every `audit.every` steps.
        say: where progress lines go.

    Raises:
        Interrupted: SIGINT or SIGTERM; the run can be resumed.
        NoWorkers: every rollout worker was given up; a checkpoint was written first.
        FloatingPointError: a reward or a loss was not finite; the batch was saved, no optimiser step was taken.
    """
    import torch

    from .run_folder import prepare, write_state

    config, out = run.config, run.config.output
    step, steps = run.start.step, run.grpo.max_steps
    together()  # all have planned, and seen the folder as it was
    if first():
        prepare(out, config.resolved(), run.facts | {"comparator": config.comparator}, run.start)
        write_state(out, "running", step, steps)
    else:
        say = _silent
    together()
    recipe = PolicyRecipe(
        model=config.model,
        adapters=tuple(config.adapters),
        dtype=config.dtype,
        lora=config.lora and config.lora.model_dump(),
        seed=config.seed,
    )
    pool = None
    threads = _share_cores(config)
    try:
        pool = make_pool(config, recipe, load_tokenizer(config.model))
        checkpoint = _train(run, recipe, pool, before, after, during, say)
    except Interrupted as stop:
        write_state(out, "interrupted", _reached(out), steps, f"stopped by {signal.Signals(stop.args[0]).name}")
        raise
    except KeyboardInterrupt:
        write_state(out, "interrupted", _reached(out), steps, "stopped by SIGINT")
        raise
    except BaseException as error:
        write_state(out, "failed", _reached(out), steps, f"{type(error).__name__}: {error}".splitlines()[0][:300])
        raise
    finally:
        if pool is not None:
            pool.close()
        torch.set_num_threads(threads)
        part()
    if first():
        write_state(out, "finished", steps, steps)
    return checkpoint


def _share_cores(config: TrainConfig) -> int:
    """Leave half of this machine's cores to workers that sample while the trainer learns: threads that outnumber the
    cores wait for each other, and a step can take several times as long. Returns how many threads there were.
    """
    import torch

    threads = torch.get_num_threads()
    if config.rollouts.staleness and not torch.cuda.is_available() and not os.environ.get("RAY_ADDRESS"):
        torch.set_num_threads(max(1, threads // 2))
    return threads


def _silent(line: str) -> None:
    """Lines of a process that does not speak."""


def _reached(out: Path) -> int:
    from .run_folder import status

    return status(out).facts.get("step", 0)


def _read_ahead(rewards: list[LoadedReward]) -> list[ReadAhead]:
    """Let the judges that take their time read ahead; returns them."""
    readers = []
    for reward in rewards:
        if getattr(getattr(reward.fn, "judge", None), "costly", False):
            reader = ReadAhead(reward.fn.judge)  # type: ignore[attr-defined]
            reward.fn.judge = reader  # type: ignore[attr-defined]
            readers.append(reader)
    return readers


def _readable(told: list[Transcript]) -> list[Case]:
    """The cases that a reward will ask its judge for: malformed output has a fixed price."""
    return [case(transcript) for transcript in told if not transcript.state.malformed]


def _train(
    run: Plan,
    recipe: PolicyRecipe,
    pool: Any,
    before: Hook | None,
    after: Hook | None,
    during: Callable[[Any, Any, Any, Lineage, int], None] | None,
    say: Callable[[str], None],
) -> Path:
    import torch
    from transformers.trainer_callback import PrinterCallback

    from .every import Every
    from .grpo import PolicyTrainer
    from .ppo import PPOTrainer
    from .remote_reward import on_workers
    from .rollout_func import PoolRollouts
    from .step_log import StepLog

    config, out = run.config, run.config.output
    torch.manual_seed(config.seed)
    model, tokenizer, lineage = recipe.build()
    if before is not None and first():
        before(model, tokenizer, pool, lineage)
    here = [r for r, spec in zip(run.rewards, config.rewards, strict=True) if spec.on == "trainer"]
    readers = _read_ahead(here)
    rollouts = PoolRollouts(
        pool,
        seed=config.seed,
        temperature=config.rollouts.temperature,
        tags=config.data.delimiters,
        scenarios=run.scenarios,
        ahead=(lambda told: [reader.begin(_readable(told)) for reader in readers]) if readers else None,
        staleness=config.rollouts.staleness,
    )
    correction = config.rollouts.correction
    if correction == "auto":
        same = config.rollouts.dtype in (None, config.dtype) and not config.rollouts.staleness
        correction = "off" if same else "token"
    group = run.grpo.num_generations
    rewards = [
        on_workers(reward, spec, config.folder, pool, group) if spec.on == "workers" else reward
        for reward, spec in zip(run.rewards, config.rewards, strict=True)
    ]
    with quiet_libraries(), progress("training", run.grpo.max_steps, run.start.step, lines=False) as done:
        log = StepLog(out, say, done)
        kind = partial(PPOTrainer, ppo=config.ppo) if config.algorithm == "ppo" else PolicyTrainer
        trainer = kind(
            model=model,
            args=run.grpo,
            train_dataset=to_dataset(run.scenarios),
            processing_class=tokenizer,
            rollout_func=rollouts,
            rewards=rewards,
            credit=config.credit,
            lineage=lineage,
            correction=correction,
            ratio_cap=config.rollouts.ratio_cap,
            out=out,
            totals=rollouts.totals,
            callbacks=[log],
        )
        if config.audit.every is not None and during is not None:
            trainer.add_callback(
                Every(config.audit.every, lambda now, step: during(now, tokenizer, pool, lineage, step))
            )
        trainer.remove_callback(PrinterCallback)  # it would print every metric of every step
        try:
            with log.listening():
                trainer.train(resume_from_checkpoint=run.start.checkpoint and str(run.start.checkpoint))
            rollouts.close()
        except NoWorkers:
            trainer.save_final()
            raise
        finally:
            rollouts.close(wait=False)  # after an error the pool is closed, whatever it does
    if log.signal is not None and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(log.signal)
    checkpoint = trainer.save_final()
    if after is not None and first():
        after(model, tokenizer, pool, lineage)
    return checkpoint
