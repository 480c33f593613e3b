"""The published evaluation of the 70B honest persona, read anew: `unfeign audit import FILES... --out DIR`.

Every flag is parsed again from the words of its review; where the stored one differs, it is listed. A file of hand-made
cases becomes a page for reading: tasks, completions, interventions and reviews side by side.
"""

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import UnfeignError
from ..files import read_json, write_text

_FLAG = re.compile(r"\bFLAG:\s*(PASS|FAIL)\b")


def flag_of(review: str) -> str | None:
    """The flag a review ends on; None where it has none. The last one counts: a review may quote the word before."""
    found = _FLAG.findall(review)
    return found[-1] if found else None


def _share(right: int, n: int) -> dict[str, Any]:
    """A leaf, with Wilson's 95% interval."""
    if n == 0:
        return {"mean": None, "low": None, "high": None, "n": 0}
    from scipy.stats import binomtest

    interval = binomtest(right, n).proportion_ci(method="wilson")
    return {"mean": right / n, "low": float(interval.low), "high": float(interval.high), "n": n}


def _accuracy(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    flags = [flag_of(row["generated_review"]) for row in rows]
    right = sum(flag == row["expected_flag"] for flag, row in zip(flags, rows, strict=True) if flag)
    parsed = sum(flag is not None for flag in flags)
    return {"n": len(rows), "parsed": parsed, "accuracy": _share(right, parsed)}


def quantitative(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """One row: model, mode, condition, intervention, accuracy, also by split of the biases, and disagreements."""
    about, rows = data["metadata"], data["results"]
    splits = sorted({row.get("bias_split") or "" for row in rows})
    differ = [
        {
            "sample_id": row.get("sample_id"),
            "stored": row.get("parsed_flag"),
            "parsed": flag_of(row["generated_review"]),
        }
        for row in rows
        if row.get("parsed_flag") != flag_of(row["generated_review"])
    ]
    return {
        "file": path.name,
        "model": about.get("target_model"),
        "checkpoint": about.get("checkpoint_name"),
        "mode": "masked" if about.get("lora_patch") else "full",
        "condition": about.get("condition"),
        "intervention": about.get("intervention_name"),
        **_accuracy(rows),
        "by_split": {s: _accuracy([row for row in rows if (row.get("bias_split") or "") == s]) for s in splits if s},
        "disagreements": differ,
    }


def cases(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Hand-made cases for reading: a task and completion each, with every intervention asked of it."""
    out: dict[tuple[Any, ...], dict[str, Any]] = {}
    for rows in data["results"].values():
        for row in rows:
            task = (row.get("task_id"), row.get("prompt"), row.get("response"))
            if row.get("prompt") is None:
                task = ("standalone", None, None)
            keys = ("category", "bias_description", "system_prompt", "prompt", "response")
            one = out.setdefault(task, {k: row.get(k) for k in keys} | {"task": task[0], "asked": []})
            one["asked"].append(
                {
                    "name": row.get("intervention_name"),
                    "intervention": row.get("intervention"),
                    "note": row.get("note"),
                    "review": row["generated_review"].strip(),
                    "flag": flag_of(row["generated_review"]),
                }
            )
    return list(out.values())


def import_evaluations(paths: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write `metrics.json` (a row a file of flags) and, where there are hand-made cases, `cases.html`.

    Raises:
        UnfeignError: a file that is neither, by name; nothing is written then.
    """
    found: list[dict[str, Any]] = []
    pages: list[dict[str, Any]] = []
    for path in paths:
        data = read_json(path)
        results = data.get("results")
        try:
            if isinstance(results, list):
                found.append(quantitative(path, data))
            elif isinstance(results, dict):
                pages.append({"file": path.name, "about": data.get("metadata", {}), "cases": cases(data)})
            else:
                raise UnfeignError("published evaluations, with 'results'", "none", str(path))
        except (KeyError, TypeError, AttributeError) as error:
            raise UnfeignError("published evaluations", f"{type(error).__name__} {error}", str(path)) from None
    result = {"files": found}
    write_text(out / "metrics.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    if pages:
        from jinja2 import Environment, StrictUndefined

        template = (files("unfeign.split_persona") / "cases.html.j2").read_text(encoding="utf-8")
        page = Environment(autoescape=True, undefined=StrictUndefined).from_string(template).render(pages=pages)
        write_text(out / "cases.html", page)
    return result
