"""`unfeign audit`, `report` and `review`: the command line around `split_persona`'s audits."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tyro

from .errors import UnfeignError

Positional = tyro.conf.Positional


def audit(
    paths: Positional[tuple[str, ...]],
    out: Path = Path("audit"),
    split: str | None = None,
    renderings: tuple[str, ...] | None = None,
    length: str | None = None,
    judge: str = "rules",
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    batch_size: int = 64,
    seed: int | None = None,
    dtype: str = "float32",
    adapters: tuple[str, ...] = (),
    persona: str | None = None,
    inspect: bool = False,
) -> None:
    """Audit what checkpoints do: matched pairs and controls, metrics, a report page. One that was interrupted goes on.

    Args:
        paths: a base, adapter, checkpoint or run; several, as RUN/checkpoints/checkpoint-*, give a trend; or a
            transcripts.jsonl, which needs no model.
        out: folder for findings.jsonl, metrics.json and report.html; a folder in it for each of several paths.
        split: heldout, validation or train; by default the run's, or heldout.
        renderings: wordings of the situation; by default the run's, or both.
        length: short or full situations; by default the run's, or short.
        judge: who reads the reasoning.
        max_new_tokens: length limit of a completion, in tokens; by default the run's, or 80.
        temperature: of sampling; by default the run's, or 0.7.
        batch_size: rows decoded at once.
        seed: fixes the sampling; by default the run's, or 1234.
        dtype: float32 or bfloat16.
        adapters: stacked on a base given by `paths`, bottom first.
        persona: a persona folder, or persona:NAME, that reviews every transcript; with baselines beside it.
        inspect: also write a log for Inspect View; needs the extra `inspect`.
    """
    if not paths:
        raise UnfeignError("a checkpoint or a transcripts.jsonl", "none", "audit")
    for name, value in (("--temperature", temperature), ("--max-new-tokens", max_new_tokens)):
        if value is not None and value <= 0:
            raise UnfeignError("a number above 0", f"{value:g}", name)
    if out.exists() and not out.is_dir():
        raise UnfeignError("a folder", "a file", f"--out {out}")
    if persona and (files := [path for path in paths if path.endswith(".jsonl")]):
        raise UnfeignError("a checkpoint, whose states a persona reads", files[0], "--persona")
    if inspect and find_spec("inspect_ai") is None:
        raise UnfeignError("the package inspect-ai (pip install 'unfeign[inspect]')", "none", "--inspect")
    asked = {
        "split": split, "renderings": renderings and list(renderings), "length": length, "judge": judge, "seed": seed,
        "dtype": dtype, "max_new_tokens": max_new_tokens, "temperature": temperature, "adapters": list(adapters),
        "persona": persona, "batch_size": batch_size,
    }  # fmt: skip
    from .models import quiet_libraries

    with quiet_libraries():
        from .training_run import print_persona, print_table

        if len(paths) == 1:
            results = {paths[0]: _audit(paths[0], out, asked)}
        else:
            names = _names(paths)
            results = {}
            for path, name in zip(paths, names, strict=True):
                print(f"auditing {path}", flush=True)
                results[name] = _audit(path, out / name, asked, again=True)
            _compare(out / "report.html", f"Audit of {len(paths)} checkpoints", [out / name for name in names])
    print_table(results)
    for name, result in results.items():
        if reviewed := result["audit"].get("persona"):
            print_persona(reviewed, name if len(results) > 1 else None)
    print(f"report: {out / 'report.html'}")
    if inspect:
        from .inspect_audit import write_log
        from .split_persona.audit import read_findings

        for folder in [out] if len(paths) == 1 else [out / name for name in names]:
            print(f"inspect log: {write_log(folder, read_findings(folder))}")


def _names(paths: tuple[str, ...]) -> list[str]:
    """A folder name for each path: its last part, or as many parts as tell all apart."""
    parts = [[part for part in re.split(r"[/:\\]+", path) if part not in ("", ".", "..")] for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UnfeignError("checkpoints that differ", "one given twice", "audit")


def _audit(path: str, out: Path, asked: dict[str, Any], again: bool = False) -> dict[str, Any]:
    """One audit, into its folder; returns its metrics.

    Args:
        again: an audit that is finished, with these settings, is taken as it is.
    """
    from .envs.transcript_file import read_transcripts
    from .files import read_json, sha256
    from .lineage import adapter_file
    from .models import adapter_folder, load_base, load_tokenizer, resolve, run_config, stack
    from .rewards.judge import judge_spec, load_judge
    from .split_persona.audit import findings, write_audit
    from .split_persona.audit_folder import RESULT, SETTINGS, AuditFolder
    from .split_persona.persona import persona_folder
    from .split_persona.report import write_report
    from .trainers.config import TrainConfig
    from .trainers.rollouts import InProcessPool
    from .training_run import audit_policy

    if path.endswith(".jsonl"):
        base, below, files = "", [], [Path(path)]
    else:
        base, below = resolve(path)
        below = [*below, *asked["adapters"]]
        files = [adapter_file(adapter_folder(name)) for name in below]
        if asked["persona"]:
            files.append(adapter_file(persona_folder(asked["persona"])))
    hashes = [sha256(file) for file in files if file.is_file()]
    settings = {"path": path, **asked, "base": base, "sha256": hashes}  # a run's newest checkpoint may be another later
    if again and (out / RESULT).is_file() and read_json(out / SETTINGS) == settings:
        return read_json(out / RESULT)
    reader = load_judge(judge_spec(asked["judge"]))
    facts: dict[str, Any] = {"path": path, "judge": asked["judge"]}
    if path.endswith(".jsonl"):
        told = [t for _, t in read_transcripts(Path(path))]
        folder = AuditFolder(out, settings)
        rows = findings(told, reader)
    else:
        of_run = TrainConfig.of(run_config(Path(path).resolve()))
        folder = AuditFolder(out, settings)
        tokenizer = load_tokenizer(base)
        model, lineage = stack(load_base(base, asked["dtype"]), base, below)
        limit, temperature = asked["max_new_tokens"], asked["temperature"]
        how: dict[str, Any] = {
            "split": asked["split"] or of_run.audit.split,
            "renderings": tuple(asked["renderings"] or of_run.audit.renderings),
            "length": asked["length"] or of_run.data.length,
            "seed": of_run.audit.seed if asked["seed"] is None else asked["seed"],
            "max_new_tokens": of_run.audit.max_new_tokens if limit is None else limit,
            "temperature": of_run.rollouts.temperature if temperature is None else temperature,
        }
        facts |= how | {"base": base, "adapters": [str(a) for a in below]}
        size = asked["batch_size"]
        pool = InProcessPool(tokenizer, size)
        rows = audit_policy(
            model, tokenizer, pool, reader,
            tags=of_run.data.delimiters, folder=folder, batch_size=size, persona=asked["persona"], **how,
        )  # fmt: skip
        pool.close()
        if name := asked["persona"]:
            from .split_persona.persona_audit import with_baselines

            facts["persona"] = with_baselines(name, (model, tokenizer, lineage), rows)
    told_of = {key: value for key, value in facts.items() if key != "persona"}
    title = f"Audit of {path}"
    write_report(out / "report.html", title=title, before=None, after=rows, run=told_of, persona=facts.get("persona"))
    result = write_audit(out, rows, facts)
    folder.finish()
    return result


def _compare(page: Path, title: str, folders: list[Path], names: list[str] | None = None) -> None:
    from .split_persona.comparison import column, with_common_start, write_comparison

    columns = [column(folder, name) for folder, name in zip(folders, names or [None] * len(folders), strict=True)]
    steps = [re.fullmatch(r".*checkpoint-(\d+)", one.name) for one in columns]
    numbers = [int(found[1]) for found in steps if found]
    if len(numbers) == len(columns) == len(set(numbers)):
        order = sorted(range(len(columns)), key=lambda i: numbers[i])
        columns, numbers = [columns[i] for i in order], sorted(numbers)
    else:
        numbers = []
    write_comparison(page, title, with_common_start(columns), numbers or None)


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


def report(paths: Positional[tuple[Path, ...]], out: Path | None = None, title: str = "Comparison") -> None:
    """Compare runs, seeds, comparators or audits on one page, with intervals; of one run alone, write its report anew.

    Args:
        paths: run folders with audit/after, or audit folders.
        out: the page: comparison.html if not given, or report.html in the one run's folder.
        title: heading of a comparison.
    """
    if out is not None and out.is_dir():
        raise UnfeignError("a file", "a folder", f"--out {out}")
    if len(paths) == 1:
        from .training_run import write_run_report

        if not (paths[0] / "run.json").is_file():
            raise UnfeignError("a run, or at least two runs or audits", "one that is no run", str(paths[0]))
        print(f"report: {write_run_report(paths[0], out)}")
        return
    out = out or Path("comparison.html")
    from .split_persona.audit import read_findings
    from .split_persona.comparison import audited
    from .split_persona.metrics import metrics
    from .training_run import print_table

    names = _names(tuple(str(path) for path in paths))
    found = {name: metrics(read_findings(audited(path))) for name, path in zip(names, paths, strict=True)}
    _compare(out, title, list(paths), names)
    print_table(found)
    print(f"report: {out}")


def sheet(audits: Positional[tuple[Path, ...]], out: Path = Path("sheet.csv"), n: int = 100, seed: int = 0) -> None:
    """Write a sheet of transcripts for a careful reader, who sees neither tier, run nor verdict.

    Args:
        audits: run folders with audit/after, or audit folders.
        out: a CSV file; the reader fills the columns surfaced, rejected and muddled with yes or no.
        n: transcripts of each audit, drawn at random; controls are left out.
        seed: of the drawing.
    """
    from .split_persona.hand_review import write_sheet

    if out.exists():
        raise UnfeignError("a new file", "one that exists", f"--out {out}")
    print(f"{write_sheet(audits, out, n, seed)} transcripts: {out}")


def agree(labels: Positional[Path], audits: Positional[tuple[Path, ...]]) -> None:
    """Tell how far the judge agrees with a reader: agreement and Cohen's kappa by label and audit.

    Args:
        labels: the sheet, filled in; or JSONL rows with key, surfaced, rejected, muddled.
        audits: those the sheet was made of.
    """
    from rich.console import Console
    from rich.table import Table

    from .split_persona.hand_review import LABELS, agreement

    table = Table()
    for column in ("audit", "n", *(f"{label}: agreement, kappa" for label in LABELS)):
        table.add_column(column)
    for name, found in agreement(labels, audits).items():
        cells = [
            "-" if (pair := found[x]) is None else f"{pair[0]:.2f}, " + ("-" if pair[1] is None else f"{pair[1]:.2f}")
            for x in LABELS
        ]
        table.add_row(name, str(found["n"]), *cells)
    Console().print(table)
