"""A researcher's own requests: JSONL in, families out.

Each line: `{"family", "request", "criterion", "value"}` and optionally `id`, `control`, `neutral`, `subject`, `split`,
`accepted`, `declined`. Lines of a family share criterion and value (the first line's count).
"""

from pathlib import Path

from pydantic import ValidationError

from ..errors import UnfeignError
from ..files import read_jsonl
from .family import Family, Request

REQUIRED = ("family", "request", "criterion", "value")


def load_requests(path: Path, split: str = "train") -> list[Family]:
    """Read families from a JSONL file of requests.

    Args:
        path: the file.
        split: of families whose lines name none.

    Raises:
        UnfeignError: names the line and the field at fault.
    """
    grouped: dict[str, list[dict]] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        for field in REQUIRED:
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise UnfeignError(f"a text field {field!r}", repr(row.get(field)), f"{path}: object {number}")
        grouped.setdefault(row["family"], []).append(row)
    if not grouped:
        raise UnfeignError("at least one request", "an empty file", str(path))
    return [_family(name, rows, split, path) for name, rows in grouped.items()]


def _family(name: str, rows: list[dict], split: str, path: Path) -> Family:
    known = {*REQUIRED, "id", "control", "neutral", "subject", "split", "accepted", "declined", "control_answer"}
    for row in rows:
        if unknown := sorted(set(row) - known):
            raise UnfeignError(f"the fields {', '.join(sorted(known))}", repr(unknown[0]), f"{path}: family {name}")
    try:
        return Family(
            name=name,
            split=rows[0].get("split", split),
            subject=rows[0].get("subject", name.replace("_", " ")),
            criterion=rows[0]["criterion"],
            value=rows[0]["value"],
            neutral=rows[0].get("neutral", "give short and plain answers"),
            requests=[
                Request(
                    id=str(row.get("id", f"r{i}")),
                    request=row["request"],
                    control=row.get("control"),
                    accepted=row.get("accepted"),
                    declined=row.get("declined"),
                    control_answer=row.get("control_answer"),
                )
                for i, row in enumerate(rows)
            ],
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UnfeignError(
            f"a valid {field}", f"{first['input']!r} ({first['msg']})", f"{path}: family {name}"
        ) from None
