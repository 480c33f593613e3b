"""A researcher's own requests: JSONL in, families out.

Each line: `{"family", "request", "criterion", "value"}` and optionally `id`, `control`, `neutral`, `subject`, `split`, `accepted`,
`declined`. Lines of a family share criterion and value (the first line's count).
"""

from pathlib import Path

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
    return [
        Family(
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
                )
                for i, row in enumerate(rows)
            ],
        )
        for name, rows in grouped.items()
    ]
