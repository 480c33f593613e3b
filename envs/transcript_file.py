"""Transcripts from a file: a JSON object a line, for audits, rewards and judges without a model."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import UnfeignError
from ..files import read_jsonl
from .scenario import TIERS
from .tags import Tags
from .transcript import State, Transcript, transcript_from_row

NEEDED = ("scenario_id", "pair_id", "family", "tier", "control", "system", "user", "answer")
ALLOWED: dict[str, tuple] = {
    "tier": TIERS,
    "control": (True, False),
    "complied": (True, False, None),
    "state": tuple(State),
}


def read_transcripts(path: Path, needed: tuple[str, ...] = NEEDED) -> list[tuple[dict[str, Any], Transcript]]:
    """Rows of a `transcripts.jsonl`, each with its transcript. Families may be unknown.

    Args:
        path: the file.
        needed: fields that every row must have.

    Raises:
        UnfeignError: names the line and the field that is missing or wrong.
    """
    out = []
    for number, row in enumerate(read_jsonl(path), start=1):
        for key in needed:
            if key not in row:
                raise UnfeignError(f"a field {key!r}", f"fields {', '.join(sorted(row))}", f"{path}: object {number}")
        for key, allowed in ALLOWED.items():
            if key in row and row[key] not in allowed:
                names = ", ".join(map(str, allowed))
                raise UnfeignError(f"{key} to be one of {names}", repr(row[key]), f"{path}: object {number}")
        try:
            out.append((row, transcript_from_row(row)))
        except (ValidationError, TypeError):
            expected = f"tags with {', '.join(Tags.model_fields)}"
            raise UnfeignError(expected, repr(row.get("tags")), f"{path}: object {number}") from None
    if not out:
        raise UnfeignError("at least one transcript", "an empty file", str(path))
    return out
