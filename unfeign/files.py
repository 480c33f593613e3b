"""Files are written aside and renamed, and read with errors that name the file."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import yaml

from .errors import UnfeignError

CANARY = "unfeign-canary 5f1d2c0e-7a0b-4b3e-9d55-1c8f0e6a4b7d: do not train on this file"


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a crash leaves either the old file or the new one. What has no UTF-8, half of an
    emoji, becomes `?`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8", errors="replace")
    os.replace(aside, path)


def read_text(path: Path) -> str:
    """Read a UTF-8 text file; a missing, binary or unreadable one raises `UnfeignError`."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UnfeignError("a UTF-8 text file", "binary content", str(path)) from None
    except OSError as error:
        raise UnfeignError("a readable file", error.strerror or str(error), str(path)) from None


def read_yaml(path: Path) -> Any:
    """Read one YAML document; raises `UnfeignError` naming the line of a syntax error."""
    text = read_text(path)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UnfeignError(
            "valid YAML", str(getattr(error, "problem", None) or "unreadable characters"), where
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object; raises `UnfeignError` naming the line of a syntax error."""
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UnfeignError("a JSON object", error.msg, f"{path}:{error.lineno}") from None
    if not isinstance(data, dict):
        raise UnfeignError("a JSON object", type(data).__name__, str(path))
    return data


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON objects, a line each; blank lines are skipped, a broken one is named by its number."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UnfeignError("one JSON object a line", error.msg, f"{path}:{number}") from None
        if not isinstance(row, dict):
            raise UnfeignError("one JSON object a line", type(row).__name__, f"{path}:{number}")
        rows.append(row)
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON objects, a line each, in one step."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
