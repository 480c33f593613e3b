"""What has been read is never paid for twice: one SQLite file holds all readings, and the batches under way.

It holds hashes of questions, not their text. Every operation opens the file, works and closes it, so the cache can be
used from any thread, process or event loop, and each reading is on disk before the next answer is looked at.
"""

import hashlib
import json
import os
import sqlite3
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from pydantic import ValidationError

from ..errors import UnfeignError
from .rubric import Reading, Rubric

SCHEMA_SHA256 = hashlib.sha256(json.dumps(Reading.model_json_schema(), sort_keys=True).encode()).hexdigest()


def cache_key(model: str, rubric: Rubric, question: str, sample: int = 0) -> str:
    """64 hex digits that name one reading: of one question by one model, rubric, label schema and sample."""
    parts = [model, rubric.sha256, SCHEMA_SHA256, question, sample]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def default_path() -> Path:
    """`verdicts.sqlite` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unfeign" / "verdicts.sqlite"


class VerdictCache:
    """Readings by key, and the keys of every batch under way. The file is made on first use.

    Args:
        path: the SQLite file; None is `default_path()`.
        timeout_s: how long to wait while another process writes.
    """

    def __init__(self, path: Path | None = None, timeout_s: float = 60.0):
        self.path, self.timeout_s = path or default_path(), timeout_s

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """The open file, in one transaction."""
        try:  # without a write-ahead log: homes on clusters are network drives, where it is unsafe
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=self.timeout_s)) as database:
                database.execute("CREATE TABLE IF NOT EXISTS readings (key TEXT PRIMARY KEY, reading TEXT NOT NULL)")
                database.execute("CREATE TABLE IF NOT EXISTS batches (id TEXT PRIMARY KEY, keys TEXT NOT NULL)")
                with database:
                    yield database
        except (OSError, sqlite3.Error) as error:
            raise UnfeignError("a judge cache that can be read and written", str(error), str(self.path)) from None

    def get(self, keys: Collection[str]) -> dict[str, Reading]:
        """The readings that are known among these keys; one that is no `Reading` counts as unknown."""
        found = {}
        with self._database() as database:
            for key in keys:
                row = database.execute("SELECT reading FROM readings WHERE key = ?", (key,)).fetchone()
                try:
                    if row:
                        found[key] = Reading.model_validate_json(row[0])
                except ValidationError:
                    continue
        return found

    def put(self, key: str, reading: Reading) -> None:
        """Store a reading; it is on disk when this returns."""
        with self._database() as database:
            database.execute("INSERT OR REPLACE INTO readings VALUES (?, ?)", (key, reading.model_dump_json()))

    def batches(self) -> dict[str, list[str]]:
        """Batches under way: id -> the keys asked in it."""
        with self._database() as database:
            rows = database.execute("SELECT id, keys FROM batches ORDER BY id").fetchall()
        return {name: json.loads(keys) for name, keys in rows}

    def batch_started(self, batch: str, keys: Collection[str]) -> None:
        with self._database() as database:
            database.execute("INSERT OR REPLACE INTO batches VALUES (?, ?)", (batch, json.dumps(list(keys))))

    def batch_ended(self, batch: str) -> None:
        with self._database() as database:
            database.execute("DELETE FROM batches WHERE id = ?", (batch,))
