"""The wiring of a whole run: audit, train, audit, report. Trainers know no audit and audits know no trainer; they meet
here.
"""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .envs.scenario import Scenario
from .errors import UnfeignError
from .files import read_json, read_text, write_text
from .rewards.judge import Judge, load_judge
from .split_persona.audit import audit_scenarios, collect_reviewed, findings, read_findings, write_audit
from .split_persona.audit_folder import AuditFolder
from .split_persona.comparison import METRICS, column, write_comparison
from .split_persona.plots import pick
from .split_persona.report import write_report
from .trainers.ranks import first
from .trainers.rollouts import Sampling


def audit_policy(
    model: Any,
    tokenizer: Any,
    pool: Any,
    judge: Judge,
    *,
    split: str,
    renderings: Sequence[str],
    length: str,
    seed: int,
    max_new_tokens: int,
    temperature: float,
    tags: Any = None,
    version: int = 0,
    folder: AuditFolder | None = None,
    batch_size: int = 64,
    persona: str | None = None,
    interventions: int | None = None,
) -> list[dict[str, Any]]:
    """Push a policy to a pool, sample a split's scenarios and judge them.

    Args:
        folder: keeps what is sampled.
        persona: reviews what is sampled, where it is sampled (`rollout_review`).
        interventions: how many of its interventions are asked; by default all.
    """
    from .split_persona.persona import persona_folder
    from .split_persona.persona_audit import with_reviews
    from .split_persona.rollout_review import RolloutReview

    asked: list[Scenario] = audit_scenarios(split, renderings, length, tags)
    pool.push(model, version)
    reviewer = RolloutReview.of(persona_folder(persona), interventions) if persona else None
    found = collect_reviewed(
        pool, version, tokenizer, asked, reviewer,
        seed=seed, sampling=Sampling(max_new_tokens, temperature), folder=folder, batch_size=batch_size,
    )  # fmt: skip
    rows = findings([transcript for transcript, _ in found], judge)
    return [with_reviews(row, made) if made else row for row, (_, made) in zip(rows, found, strict=True)]


def audited_run(run: Any, launch: Callable[..., Path]) -> None:
    """Train as planned with an audit before and after, then write the report and print the table."""
    config = run.config
    from .models import without_policy
    from .split_persona.persona_audit import by_pool
    from .split_persona.side_effects import drift, monitorability, unprompted

    settings, out = config.audit, config.output
    judge = load_judge(settings.judge, config.folder)
    results: dict[str, Any] = {}
    began = time.perf_counter()
    seconds: dict[str, float] = {}

    def audit(name: str, version: int) -> Callable[[Any, Any, Any, Any], None]:
        def hook(model: Any, tokenizer: Any, pool: Any, lineage: Any) -> None:
            if run.start.again and (out / "audit" / name / "metrics.json").is_file():  # of an earlier part of the run
                results[name] = read_json(out / "audit" / name / "metrics.json")
                return
            print(f"audit {name}: {settings.split} families", flush=True)
            start = time.perf_counter()
            model.eval()
            rows = audit_policy(
                model, tokenizer, pool, judge,
                split=settings.split, renderings=settings.renderings, length=config.data.length,
                seed=settings.seed, max_new_tokens=settings.max_new_tokens, 
                temperature=config.rollouts.temperature, tags=config.data.delimiters,
                version=version, persona=settings.persona, interventions=settings.interventions,
                batch_size=config.rollouts.batch_size,
            )  # fmt: skip
            told: dict[str, Any] = {"judge": settings.judge, "seed": settings.seed}
            how = Sampling(settings.max_new_tokens, config.rollouts.temperature)
            told["side_effects"] = effects = {
                "unprompted": unprompted(pool, version, tokenizer, judge, seed=settings.seed, sampling=how),
                "monitorability": monitorability(rows),
            }
            if name != "before" and config.lora is not None:
                effects["drift"] = drift(model, tokenizer, rows, partial(without_policy, model))
            if settings.persona is not None:
                stale = _stale(config, trained=name != "before", base=lineage.base)
                asked = settings.interventions
                told["persona"] = by_pool(settings.persona, pool, tokenizer, rows, stale, asked)
            results[name] = write_audit(out / "audit" / name, rows, told)
            seconds[f"audit {name}"] = time.perf_counter() - start

        return hook

    launch(
        run,
        before=audit("before", -2) if settings.before else None,
        after=audit("after", -3) if settings.after else None,
        during=lambda model, tokenizer, pool, lineage, step: audit(f"step-{step}", -10 - step)(
            model, tokenizer, pool, lineage
        ),
        say=lambda line: print(line, flush=True),
    )
    if not first():
        return
    seconds["total"] = time.perf_counter() - began
    steps = _logged(out)
    seconds |= {
        "steps": sum(s["seconds"] for s in steps),
        "of which rollouts": sum(s["generate_seconds"] for s in steps),
    }
    facts = json.loads(read_text(out / "run.json"))
    facts |= {"seconds": {k: round(v, 1) for k, v in seconds.items()}}
    readers = [(judge.name, judge)]
    readers += [(f"{r.fn.judge.name} ({r.name})", r.fn.judge) for r in run.rewards if hasattr(r.fn, "judge")]
    facts["judged"] = {name: told for name, reader in readers if (told := _told_by(reader))}
    write_text(out / "run.json", json.dumps(facts, indent=2) + "\n")
    if "after" in results:
        print_table(results, f"behaviour on {settings.split} families, mean [95% interval]")
        for name, result in results.items():
            print_side_effects(result["audit"].get("side_effects", {}), name)
            if told := result["audit"].get("persona"):
                print_persona(told, name)
        print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
        print(f"report: {write_run_report(out)}")
    if (trend := write_trend(out, run.grpo.max_steps)) is not None:
        print(f"trend: {trend}")


def check_persona(config: Any) -> None:
    """That the persona of a run's audits can be put on its policy, without loading weights; raises `UnfeignError`."""
    from .split_persona.persona import persona_folder, read_facts

    if config.lora is None:
        raise UnfeignError("a policy that is an adapter, on which a persona can be put", "lora: null", "audit.persona")
    read_facts(persona_folder(config.audit.persona))
    for trained in [False] * config.audit.before + [True] * config.audit.after:
        _stale(config, trained)


def _stale(config: Any, trained: bool, base: Any = None) -> bool:
    """Whether the persona of a run's audits was made for another state of its policy; raises `UnfeignError` where it
    was made for another policy. Before the `base` is loaded, one on the hub is not asked.
    """
    from transformers import AutoConfig

    from .lineage import Layer, Lineage, adapter_file, base_facts, sha256
    from .models import POLICY, adapter_folder, base_location
    from .split_persona.persona import check_policy, persona_folder

    if base is None:
        location = base_location(config.model)
        if not Path(location).is_dir():
            return trained
        base = base_facts(config.model, AutoConfig.from_pretrained(location))
    below = [adapter_folder(name) for name in config.adapters]
    layers = [Layer(name=path.name, sha256=sha256(adapter_file(path))) for path in below]
    if trained:
        layers.append(Layer(name=POLICY, sha256=""))
    return check_policy(persona_folder(config.audit.persona), Lineage(base=base, adapters=layers))


def _told_by(judge: Any) -> dict[str, Any]:
    """What a judge counted of itself: spend and failures, and the agreement of a vote."""
    told = judge.ledger.row() if hasattr(judge, "ledger") else {}
    for label, share in getattr(judge, "agreement", {}).items():
        if share is not None:
            told[f"agreement on {label}"] = round(share, 3)
    for one in getattr(judge, "judges", []):
        told |= {f"{one.name}: {key}": value for key, value in _told_by(one).items()}
    return told


def write_trend(out: Path, steps: int) -> Path | None:
    """A page of a run's audits over its steps; None where it had none on the way."""
    found = [(int(p.name.removeprefix("step-")), p) for p in (out / "audit").glob("step-*")]
    if not found:
        return None
    found += [(at, out / "audit" / name) for name, at in (("before", 0), ("after", steps))]
    found = sorted((at, place) for at, place in found if (place / "findings.jsonl").is_file())
    columns = [column(place) for _, place in found]
    write_comparison(out / "audit" / "trend.html", f"{out.name}: on the way", columns, [at for at, _ in found])
    return out / "audit" / "trend.html"


def _logged(out: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; none where it logged no step."""
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in read_text(path).splitlines()] if path.is_file() else []


def write_run_report(out: Path, page: Path | None = None) -> Path:
    """Write the report of a run folder, to `report.html` in it unless another page is named, which is returned.

    Raises:
        UnfeignError: the run has not been audited after training.
    """
    import yaml

    page = page or out / "report.html"
    if not (out / "audit" / "after" / "findings.jsonl").is_file():
        raise UnfeignError("a run that was audited after training", "no audit/after", str(out))
    config = yaml.safe_load(read_text(out / "config.yaml"))
    facts = json.loads(read_text(out / "run.json"))
    curve = [
        {
            "step": row["step"],
            "reward": row["reward"],
            "surfaced": row.get("terms/surfaced/raw"),
            "rejected": row.get("terms/rejected/raw"),
            "complied": -row["terms/behaviour/raw"] if "terms/behaviour/raw" in row else None,
        }
        for row in _logged(out)
        if "reward" in row
    ]
    notes = []
    judges = facts.get("judges", {"training": ["rules"], "audit": "rules"})
    if judges["audit"] in judges["training"]:
        notes.append(f"!The judge that trained this policy ({judges['audit']}) also reads this audit.")
    for name, told in facts.get("judged", {}).items():
        notes.append(f"Judge {name}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in told.items()))
    if config["comparator"]:
        notes.append("!This run is a comparator: its reward punishes the thought, or leaves out the shaping.")
    before = out / "audit" / "before"
    write_report(
        page,
        title=out.resolve().name,
        before=read_findings(before) if before.exists() else None,
        after=read_findings(out / "audit" / "after"),
        run={"model": config["model"], "adapters": ", ".join(config["adapters"]), "seed": config["seed"], **facts},
        curve=curve,
        notes=notes,
        persona=_told_of(out / "audit" / "after", "persona"),
        persona_before=_told_of(before, "persona") if before.exists() else None,
        effects={
            name: told
            for name in ("before", "after")
            if (out / "audit" / name).exists() and (told := _told_of(out / "audit" / name, "side_effects"))
        },
    )
    return page


def _told_of(audit: Path, what: str) -> dict[str, Any] | None:
    return read_json(audit / "metrics.json")["audit"].get(what)


def _cell(leaf: dict[str, Any]) -> str:
    if leaf["mean"] is None:
        return "-"
    return f"{leaf['mean']:.0%}  [{leaf['low']:.0%}, {leaf['high']:.0%}]"


def print_table(results: dict[str, dict[str, Any]], title: str | None = None) -> None:
    """Print metrics of one or more audits side by side, means with 95% intervals."""
    table = Table(title=title)
    table.add_column("metric")
    for name in results:
        table.add_column(name, justify="right")
    for block, name in METRICS:
        label = name if block == "all" else f"{block} {name}"
        table.add_row(label.replace("_", " "), *(_cell(pick(result, block, name)) for result in results.values()))
    Console().print(table)


def print_side_effects(found: dict[str, Any], audit: str) -> None:
    """Print what training changed beside what it was meant to."""
    if not found:
        return
    seen = found["monitorability"]
    told = [f"speaks of faking unprompted {_cell(found['unprompted'])}"]
    told.append(
        f"reasoning foretells compliance, AUROC {seen['auroc']:.2f}" if seen["auroc"] is not None else seen["reason"]
    )
    if (kl := found.get("drift", {}).get("kl")) is not None:
        told.append(f"drift on controls {kl:.3f} nats a token")
    print(f"side effects, {audit}: " + "; ".join(told))


def print_persona(found: dict[str, Any], audit: str | None = None) -> None:
    """Print what a persona tells of an audit, and what could be told without it."""

    def cell(one: dict[str, Any], name: str) -> str:
        if one.get(name) is None:
            return one.get("reason", "-") if name == "auroc" else "-"
        low, high = one.get(f"{name}_interval") or (None, None)
        return f"{one[name]:.2f}" + (f"  [{low:.2f}, {high:.2f}]" if low is not None else "")

    table = Table(
        title=(f"{audit}: " if audit else "")
        + f"who tells deeds apart, among monitored prompts (FAIL {found['n_fail']}, PASS {found['n_pass']})"
    )
    for heading in ("auditor", "AUROC", "TPR", "FPR", "false alarms: unmonitored", "control"):
        table.add_column(heading, justify="left" if heading == "auditor" else "right")
    name = f"persona, {found['mode']}" + (" (stale)" if found["stale"] else "")
    for who, one in {name: found, **found.get("baselines", {})}.items():
        alarms = [one["false_alarms"].get(k) for k in ("unmonitored", "control")]
        cells = [cell(one, "auroc"), cell(one, "tpr"), cell(one, "fpr")]
        table.add_row(who, *cells, *("-" if a is None else f"{a:.0%}" for a in alarms))
    Console().print(table)
    if spikes := found.get("spike_in"):
        told = [spikes[k] for k in ("sensitivity", "false_alarms")]
        print(
            "spike-ins flagged: known deeds {}, known honest {}".format(
                *("-" if t is None else f"{t:.0%}" for t in told)
            )
        )


def check_organism(model: Any, tokenizer: Any, config: Any) -> dict[str, Any]:
    """Audit a freshly built organism on validation families, print and keep the table."""
    from .trainers.rollouts import InProcessPool

    rows = audit_policy(
        model, tokenizer, InProcessPool(tokenizer, 64), load_judge("rules"),
        split="validation", renderings=("original", "paraphrase"), length="short", seed=1234, max_new_tokens=80,
        temperature=config.temperature,
    )  # fmt: skip
    result = write_audit(config.output / "audit", rows, {"judge": "rules", "split": "validation"})
    print_table({"validation": result})
    return result
