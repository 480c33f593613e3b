"""The command line: `unfeign train`, `audit`, `status`, `organism build`, `reward check|score`, `judge eval`.

Mistakes in the input end with one line and exit code 2. Heavy libraries load inside the commands, so `--help` is
instant.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

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


def audit(
    paths: Positional[tuple[str, ...]],
    out: Path = Path("audit"),
    split: str = "heldout",
    renderings: tuple[str, ...] = ("original", "paraphrase"),
    length: str | None = None,
    judge: str = "rules",
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    batch_size: int = 64,
    seed: int = 1234,
    dtype: str = "float32",
    adapters: tuple[str, ...] = (),
    persona: str | None = None,
) -> None:
    """Audit what a checkpoint does: matched pairs and controls, metrics, a report page.

    Args:
        paths: a base, adapter, checkpoint or run; or a transcripts.jsonl, which needs no model.
        out: folder for findings.jsonl, metrics.json and report.html.
        split: heldout, validation or train.
        renderings: wordings of the situation.
        length: short or full situations; by default the run's, or short.
        judge: who reads the reasoning.
        max_new_tokens: length limit of a completion, in tokens; by default the run's, or 80.
        temperature: of sampling; by default the run's, or 0.7.
        batch_size: rows decoded at once.
        seed: fixes the sampling.
        dtype: float32 or bfloat16.
        adapters: stacked on a base given by `paths`, bottom first.
        persona: a persona folder, or persona:NAME, that reviews every transcript; with baselines beside it.
    """
    if len(paths) != 1:
        raise UnfeignError("one checkpoint or transcripts.jsonl", f"{len(paths)} paths", "audit")
    if persona and paths[0].endswith(".jsonl"):
        raise UnfeignError("a checkpoint, whose states a persona reads", paths[0], "--persona")
    if out.exists() and not out.is_dir():
        raise UnfeignError("a folder", "a file", f"--out {out}")
    if out.exists() and any(out.iterdir()):
        raise UnfeignError("a new folder (choose another --out)", "one that holds files", f"--out {out}")
    for name, value in (("--temperature", temperature), ("--max-new-tokens", max_new_tokens)):
        if value is not None and value <= 0:
            raise UnfeignError("a number above 0", f"{value:g}", name)
    with _quiet():
        from .envs.transcript_file import read_transcripts
        from .rewards.judge import judge_spec, load_judge
        from .split_persona.audit import findings, write_audit
        from .split_persona.report import write_report
        from .training_run import audit_policy, print_persona, print_table

        reader = load_judge(judge_spec(judge))
        facts: dict[str, Any] = {"path": paths[0], "judge": judge}
        if paths[0].endswith(".jsonl"):
            rows = findings([t for _, t in read_transcripts(Path(paths[0]))], reader)
        else:
            from .models import load_base, load_tokenizer, resolve, run_config, stack
            from .trainers.config import TrainConfig
            from .trainers.rollouts import InProcessPool

            base, below = resolve(paths[0])
            asked = TrainConfig.of(run_config(Path(paths[0]).resolve()))
            below = [*below, *adapters]
            tokenizer = load_tokenizer(base)
            model, lineage = stack(load_base(base, dtype), base, below)
            how: dict[str, Any] = {
                "split": split,
                "renderings": renderings,
                "length": length or asked.data.length,
                "seed": seed,
                "max_new_tokens": asked.audit.max_new_tokens if max_new_tokens is None else max_new_tokens,
                "temperature": asked.rollouts.temperature if temperature is None else temperature,
            }
            facts |= how | {"base": base, "adapters": [str(a) for a in below]}
            pool = InProcessPool(tokenizer, batch_size)
            rows = audit_policy(model, tokenizer, pool, reader, tags=asked.data.delimiters, **how)
            pool.close()
            if persona:
                from .split_persona.persona import load_persona, persona_folder
                from .split_persona.persona_audit import persona_metrics, review_findings

                auditor = load_persona(persona_folder(persona), model, tokenizer, lineage)
                rows = review_findings(auditor, rows)
                facts |= {"persona": persona_metrics(auditor, rows, persona_folder(persona)) | {"name": persona}}
        result = write_audit(out, rows, facts)
        reviewed = facts.get("persona")
        told = {key: value for key, value in facts.items() if key != "persona"}
        title = f"Audit of {paths[0]}"
        write_report(out / "report.html", title=title, before=None, after=rows, run=told, persona=reviewed)
    print_table({paths[0]: result})
    if persona:
        print_persona(facts["persona"])
    print(f"report: {out / 'report.html'}")


def audit_import(paths: Positional[tuple[Path, ...]], out: Path = Path("audit")) -> None:
    """Read published evaluation files: flags parsed anew, accuracies with intervals, hand-made cases as a page.

    Args:
        paths: quantitative and qualitative result files.
        out: folder for metrics.json and cases.html.
    """
    from .split_persona.published_evaluation import import_evaluations

    if not paths:
        raise UnfeignError("at least one file", "none", "audit import")
    if out.exists() and any(out.iterdir()):
        raise UnfeignError("a new folder (choose another --out)", "one that holds files", f"--out {out}")
    for row in import_evaluations(paths, out)["files"]:
        mean, low, high = (100 * (row["accuracy"][key] or 0) for key in ("mean", "low", "high"))
        print(f"{row['mode']:6} {row['condition']}: accuracy {mean:.1f}% [{low:.1f}, {high:.1f}]", end=", ")
        print(f"{row['parsed']} of {row['n']} parsed, {len(row['disagreements'])} disagree with the stored flag")
    print(f"written: {out}")


def status(runs: Positional[tuple[Path, ...]]) -> None:
    """Tell the state of runs: running, finished, interrupted, failed, or dead without a word.

    Args:
        runs: run folders.
    """
    from .trainers.run_folder import status as state

    for folder in runs:
        print(f"{folder}: {state(folder).line()}")


def organism_build(
    config: Positional[Path],
    overrides: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = (),
) -> None:
    """Build a model organism: an adapter that makes a base fake alignment, checked on validation families.

    Args:
        config: a YAML file; see configs/organism_verbal.yaml.
        overrides: dotted overrides.
    """
    from .trainers.organism import OrganismConfig

    settings = OrganismConfig.load(config, overrides)
    with _quiet():
        from .trainers.organism import build
        from .training_run import check_organism

        build(settings, check=check_organism)


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
    resumes = f", resumed from {run.start.checkpoint}" if run.start.checkpoint else ""
    print(f"output    {config.output}{resumes}")
    print("dry run: nothing was started")


COMMANDS = {"train": train, "audit": audit, "status": status}
GROUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "organism": ("Build a model organism: `unfeign organism build CONFIG`.", {"build": organism_build}),
    "persona": ("Train, ask, refit or distill an honest persona: `unfeign persona train CONFIG`.", PERSONA),
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
