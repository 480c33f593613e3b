"""The command line: `unfeign train`, `audit`, `report`, `status`, and the groups `organism`, `persona`, `review`,
`reward`, `judge`.

Mistakes in the input end with one line and exit code 2. Heavy libraries load inside the commands, so `--help` is
instant.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .audit_commands import agree, audit, audit_import, report, sheet
from .errors import UnfeignError
from .persona_commands import COMMANDS as PERSONA
from .reward_commands import check, evaluate, score

Positional = tyro.conf.Positional


def train(
    config: Positional[Path],
    overrides: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = (),
    dry_run: bool = False,
    resume: Literal["auto", "never", "must"] = "never",
) -> None:
    """Train a policy: audit, learn, audit again, report.

    Args:
        config: a YAML file; see configs/.
        overrides: dotted overrides, e.g. seed=1 grpo.max_steps=20.
        dry_run: validate everything, print the plan, start nothing.
        resume: go on with an interrupted run in the output folder: `auto` if there is one, `must` or not at all.
    """
    from .trainers.config import TrainConfig

    settings = TrainConfig.load(config, overrides)
    with _quiet():
        from .trainers.launch import train as launch
        from .trainers.plan import plan

        run = plan(settings, resume)
        if settings.audit.persona is not None:
            from .training_run import check_persona

            check_persona(settings)
    if dry_run:
        _print_plan(run)
        return
    import signal

    from .trainers.launch import Interrupted
    from .trainers.rollouts import NoWorkers, WorkerError
    from .training_run import audited_run

    try:
        with _quiet():
            audited_run(run, launch)
    except Interrupted as stop:
        name = signal.Signals(stop.args[0]).name
        print(f"stopped by {name}; go on with: unfeign train {config} ... --resume auto", file=sys.stderr)
        sys.exit(128 + stop.args[0])
    except (NoWorkers, WorkerError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def status(runs: Positional[tuple[Path, ...]]) -> None:
    """Tell the state of runs: running, finished, interrupted, failed, or dead without a word.

    Args:
        runs: run folders.
    """
    from .trainers.run_folder import status as state

    for folder in runs:
        print(f"{folder}: {state(folder).line()}")


def organism_build(
    configs: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="CONFIG... [KEY=VALUE...]")],
) -> None:
    """Build model organisms: adapters that make a base fake alignment, or its controls, checked on validation families.

    Args:
        configs: YAML files, as configs/organism_*.yaml; then dotted overrides, for all of them.
    """
    from .trainers.organism import OrganismConfig

    files = [one for one in configs if one.endswith((".yaml", ".yml")) or "=" not in one]
    overrides = tuple(one for one in configs if one not in files)
    if not files:
        raise UnfeignError("at least one config", "none", "organism build")
    settings = [OrganismConfig.load(Path(one), overrides) for one in files]
    with _quiet():
        from .trainers.organism import build, check
        from .training_run import check_organism

        check(settings)
        for one in settings:
            print(f"building {one.name}", flush=True)
            build(one, audit=check_organism)


def _quiet():
    from .models import quiet_libraries

    return quiet_libraries()


def _print_plan(run: Any) -> None:
    from collections import Counter

    from .envs.dataset import setting

    config, grpo = run.config, run.grpo
    counts = Counter(setting(s) for s in run.scenarios)
    samples = grpo.per_device_train_batch_size * grpo.gradient_accumulation_steps * grpo.world_size
    print(f"model     {config.model}" + "".join(f" + {a}" for a in config.adapters))
    print(f"policy    {'LoRA r=' + str(config.lora.r) if config.lora else 'all weights'}, {config.dtype}")
    print("rewards   " + ", ".join(f"{r.name} x {r.weight:g}" for r in run.rewards) + f"; credit by {config.credit}")
    print(f"data      {config.data.split} families: " + ", ".join(f"{n} {k}" for k, n in counts.items()) + " prompts")
    print(f"steps     {grpo.max_steps} x {samples} samples of at most {grpo.max_completion_length} tokens")
    print(
        f"rollouts  {config.rollouts.backend}"
        + (f", {config.rollouts.workers} workers" * (config.rollouts.backend == "ray"))
    )
    audit = config.audit
    when = ["before"] * audit.before + [f"every {audit.every} steps"] * bool(audit.every) + ["after"] * audit.after
    reviewed = f", reviewed by {audit.persona}" if audit.persona else ""
    print(f"audits    {audit.split} families, {', '.join(when)}{reviewed}" if when else "audits    none")
    resumes = f", resumed from {run.start.checkpoint}" if run.start.checkpoint else ""
    print(f"output    {config.output}{resumes}")
    print("dry run: nothing was started")


COMMANDS = {"train": train, "audit": audit, "report": report, "status": status}
GROUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "organism": ("Build model organisms: `unfeign organism build CONFIG...`.", {"build": organism_build}),
    "persona": ("Train, ask, refit or distill an honest persona: `unfeign persona train CONFIG`.", PERSONA),
    "review": (
        "Read by hand: `unfeign review sheet AUDIT...`, then `unfeign review agree SHEET AUDIT...`.",
        {"sheet": sheet, "agree": agree},
    ),
    "reward": ("Check or score with a reward: `unfeign reward check|score SPEC`.", {"check": check, "score": score}),
    "judge": ("Compare a judge with people's labels: `unfeign judge eval JUDGE FILE`.", {"eval": evaluate}),
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 2 after a mistake in the input, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments[:1] == ["--version"]:
        from . import __version__

        print(__version__)
        return
    try:
        if arguments[:2] == ["audit", "import"]:
            tyro.cli(audit_import, prog="unfeign audit import", args=arguments[2:] or ["--help"])
        elif arguments[:1] and arguments[0] in GROUPS:
            group = GROUPS[arguments[0]][1]
            rest = arguments[1:] or ["--help"]
            tyro.extras.subcommand_cli_from_dict(group, prog=f"unfeign {arguments[0]}", args=rest)
        else:
            commands: dict[str, Any] = {**COMMANDS, **{name: _about(text) for name, (text, _) in GROUPS.items()}}
            tyro.extras.subcommand_cli_from_dict(commands, prog="unfeign", args=arguments or ["--help"])
    except UnfeignError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _about(text: str) -> Any:
    """A command that is a group of others, for the list of commands."""

    def group() -> None:
        """Replaced below."""

    group.__doc__ = text
    return group
