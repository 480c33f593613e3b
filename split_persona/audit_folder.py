"""An audit's folder while the audit is made: what is done is written down at once, so one that is interrupted goes on.

`audit.json` holds the settings; the same command with the same folder goes on from there, another one is refused. What
is sampled and reviewed is kept in `parts/`, by whole batches, since the rounding of a batch depends on who is in it:
continued and undisturbed audits give the same numbers. A line of a part that can't be read is named, and its batch is
made again.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UnfeignError
from ..files import CANARY, read_json, write_text

SETTINGS, PARTS, RESULT = "audit.json", "parts", "metrics.json"


class AuditFolder:
    """A folder to audit into, new or interrupted.

    Args:
        out: the folder.
        settings: all that the numbers depend on, as JSON data.
        say: told of what is taken over, and of lines that can't be read.

    Raises:
        UnfeignError: it holds a finished audit, one with other settings, or something else.
    """

    def __init__(self, out: Path, settings: dict[str, Any], say: Callable[[str], None] = print):
        self.out, self._settings, self._say = out, settings, say
        where = f"--out {out}"
        if out.exists() and not out.is_dir():
            raise UnfeignError("a folder", "a file", where)
        if out.exists() and any(out.iterdir()):
            if not (out / SETTINGS).is_file() or (out / RESULT).is_file():
                raise UnfeignError("a new folder (choose another --out)", "one that holds files", where)
            before, now = read_json(out / SETTINGS), json.loads(json.dumps(settings))
            for name in sorted(before.keys() | now.keys()):
                if before.get(name) != now.get(name):
                    found = f"{name} {before.get(name)!r}"
                    raise UnfeignError(f"an audit begun with {name} {now.get(name)!r}, to go on with", found, where)

    def _begin(self) -> None:
        """The folder is made when there is something to keep: a command that is refused leaves nothing."""
        if not (self.out / SETTINGS).is_file():
            write_text(self.out / SETTINGS, json.dumps(self._settings, indent=2) + "\n")

    def batches(self, name: str, keys: Sequence[str], size: int) -> list[list[dict[str, Any]] | None]:
        """What a part holds of `keys`, in batches of `size` of them: rows in order, or None where any is missing."""
        found = self._rows(name)
        out: list[list[dict[str, Any]] | None] = []
        for at in range(0, len(keys), size):
            some = [found.get(key) for key in keys[at : at + size]]
            out.append(None if None in some else some)  # type: ignore[arg-type]
        if kept := sum(len(batch) for batch in out if batch):
            self._say(f"{name}: {kept} of {len(keys)} are there already")
        return out

    def _rows(self, name: str) -> dict[str, dict[str, Any]]:
        path = self.out / PARTS / f"{name}.jsonl"
        rows: dict[str, dict[str, Any]] = {}
        if not path.is_file():
            return rows
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        if lines.pop():  # cut short by the crash: the next line must not be glued to it
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                rows[row["key"]] = row["row"]
            except (json.JSONDecodeError, KeyError, TypeError):
                if line.strip():
                    self._say(f"{path}:{number}: expected a row, found a broken line; it is made again")
        return rows

    def add(self, name: str, rows: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Keep rows of a part, by key; they are on the disk when this returns."""
        path = self.out / PARTS / f"{name}.jsonl"
        self._begin()
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for key, row in rows:
                file.write(json.dumps({"key": key, "row": row, "canary": CANARY}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """The audit is written: its parts are no longer needed."""
        self._begin()
        shutil.rmtree(self.out / PARTS, ignore_errors=True)
