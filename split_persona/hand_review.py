"""Reading by hand: a sheet shows a reader the words and nothing else; then, how far the judge agrees with the reader.

A transcript's key is a digest of where it is and what it says, so a filled sheet finds its findings again and tells the
reader nothing.
"""

import csv
import hashlib
import io
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UnfeignError
from ..files import read_jsonl, read_text
from ..rewards.calibration import kappa
from .audit import read_findings
from .comparison import audited

LABELS = ("surfaced", "rejected", "muddled")
SHOWN = ("key", "request", "reasoning", "decision_tag", "answer")
WORDS = {"yes": True, "y": True, "true": True, "1": True, "no": False, "n": False, "false": False, "0": False}


def _keyed(folder: Path) -> dict[str, dict[str, Any]]:
    """Findings of an audit without controls, by key."""
    place = audited(folder)
    rows = [row for row in read_findings(place) if not row["control"]]
    name, out = "/".join(place.resolve().parts[-3:]), {}  # of a run: its name, and which of its audits
    for number, row in enumerate(rows):  # an imported audit may have several of one scenario, or of one id
        words = "\n".join(str(x) for x in (name, number, row["id"], row["system"], row["reasoning"], row["answer"]))
        out[hashlib.sha256(words.encode("utf-8", "replace")).hexdigest()[:10]] = row
    return out


def write_sheet(audits: Sequence[Path], out: Path, n: int, seed: int) -> int:
    """Write a CSV sheet; returns how many transcripts are on it."""
    sheet = []
    for folder in audits:
        found = _keyed(folder)
        for key in random.Random(f"{seed} {folder.name}").sample(sorted(found), min(n, len(found))):
            row = found[key]
            told = (key, row["user"], row["reasoning"], row["decision"] or "", row["answer"])
            sheet.append(dict(zip(SHOWN, told, strict=True)) | dict.fromkeys(LABELS, ""))
    random.Random(seed).shuffle(sheet)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.DictWriter(file, [*SHOWN, *LABELS])
        writer.writeheader()
        writer.writerows(sheet)
    return len(sheet)


def read_labels(path: Path) -> dict[str, dict[str, bool]]:
    """A reader's labels by key; rows left empty are not there.

    Raises:
        UnfeignError: a column is absent, or a label is neither yes nor no; names the line.
    """
    if path.suffix == ".jsonl":
        rows = ((f"{path}: object {number}", row) for number, row in enumerate(read_jsonl(path), start=1))
    else:
        rows = _sheet_rows(path)
    out = {}
    for where, row in rows:
        told = {}
        for label in LABELS:
            word = "" if row.get(label) is None else str(row[label]).strip().lower()
            if word and word not in WORDS:
                raise UnfeignError(f"yes or no in {label!r}", repr(row[label]), where)
            if word:
                told[label] = WORDS[word]
        if told:
            out[row["key"]] = told
    return out


def _sheet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV sheet, each with where it stands."""
    with io.StringIO(read_text(path).removeprefix("\ufeff"), newline="") as file:  # Excel begins a file with a mark
        reader = csv.DictReader(file)
        if missing := {"key", *LABELS} - set(reader.fieldnames or ()):
            raise UnfeignError(f"columns key, {', '.join(LABELS)}", f"no {', '.join(sorted(missing))}", str(path))
        for row in reader:
            yield f"{path}:{reader.line_num}", row


def agreement(labels: Path, audits: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """For each audit, and for `all`: `n` read, and by label (share of agreement, Cohen's kappa), None where nothing was
    read; a kappa is None where chance alone agrees always.

    Raises:
        UnfeignError: see `read_labels`; or no key of the sheet is of these audits.
    """
    read = read_labels(labels)
    every: dict[str, list[tuple[bool, bool]]] = {label: [] for label in LABELS}
    out: dict[str, dict[str, Any]] = {}

    def told(pairs: dict[str, list[tuple[bool, bool]]]) -> dict[str, Any]:
        found: dict[str, Any] = {"n": max(map(len, pairs.values()))}
        for label, both in pairs.items():
            judge, reader = np.array(both, dtype=bool).reshape(-1, 2).T
            found[label] = (float((judge == reader).mean()), kappa(reader, judge)) if both else None
        return found

    for folder in audits:
        pairs: dict[str, list[tuple[bool, bool]]] = {label: [] for label in LABELS}
        for key, row in _keyed(folder).items():
            if row["verdict"]:
                for label, value in read.get(key, {}).items():
                    pairs[label].append((bool(row["verdict"].get(label)), value))
        for label in LABELS:
            every[label] += pairs[label]
        out[str(folder)] = told(pairs)
    if not any(every.values()):
        raise UnfeignError("labels of transcripts of these audits", f"{len(read)} of others", str(labels))
    return out | ({"all": told(every)} if len(audits) > 1 else {})
