"""Finding what a config names in Python: `package.module:name`, or `file.py:name` beside the config file."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from ..errors import UnfeignError


def user_file(text: str) -> str | None:
    """The file in `file.py:name`, as written; None for anything else."""
    path, colon, _ = text.rpartition(":")
    return path if colon and path.endswith(".py") else None


def imported(text: str, folder: Path, where: str) -> Any:
    """The callable that `text` names.

    Args:
        text: `package.module:name`, or `file.py:name`.
        folder: where a relative file starts.
        where: key to name in errors.

    Raises:
        UnfeignError: no such file or module, one that can't be imported, or nothing callable of that name in it.
    """
    path, _, attribute = text.rpartition(":")
    module = _file(folder / path, where) if user_file(text) else _package(path, where)
    if not callable(found := getattr(module, attribute, None)):
        raise UnfeignError(f"a callable {attribute!r} in {path}", "none of that name", where)
    return found


def _file(path: Path, where: str) -> Any:
    path = path.resolve()
    if not path.is_file():
        raise UnfeignError("an existing Python file", f"no file {path}", where)
    spec = importlib.util.spec_from_file_location(f"unfeign_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a .py path always has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UnfeignError(
            "a file that can be imported", f"{type(error).__name__}: {error}", f"{where}: {path}"
        ) from error
    return module


def _package(path: str, where: str) -> Any:
    try:
        return importlib.import_module(path)
    except (Exception, SystemExit) as error:
        raise UnfeignError("an importable module", f"{type(error).__name__}: {error}", f"{where}: {path}") from error
