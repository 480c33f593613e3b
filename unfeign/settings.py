"""From YAML to a validated config: one file, then dotted overrides, then pydantic with unknown keys refused.

Every config class derives from `Settings`; the string under a field is its documentation. Paths in a config file are
relative to that file.
"""

import contextlib
import difflib
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import UnfeignError
from .files import read_yaml


class Settings(BaseModel):
    """Base of all config classes: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def load(cls, path: Path, overrides: tuple[str, ...] = ()) -> Self:
        """Read `path`, apply overrides such as `grpo.learning_rate=1e-4`, validate.

        Raises:
            UnfeignError: names the file or override, the key, and what was expected.
        """
        data = read_yaml(path)
        if data is None:
            data = {}
        if not isinstance(data, dict):
            raise UnfeignError("a mapping of settings", type(data).__name__, str(path))
        return cls._made(data, overrides, {"folder": path.resolve().parent}, str(path))

    @classmethod
    def made(cls, data: dict[str, Any], overrides: tuple[str, ...] = ()) -> Self:
        """From a mapping instead of a file, with overrides; paths stay as they are."""
        return cls._made(dict(data), overrides, {}, "command line")

    @classmethod
    def _made(cls, data: dict[str, Any], overrides: tuple[str, ...], context: dict[str, Any], where: str) -> Self:
        for override in overrides:
            _apply(data, override)
        try:
            return cls.model_validate(data, context=context)
        except ValidationError as error:
            raise _one_line(cls, error, where) from None


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UnfeignError("key=value, with dots for nested keys", repr(override), "command line")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UnfeignError("a YAML value after =", repr(text), f"command line: {key}") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    *parents, last = key.split(".")
    node: Any = data
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise UnfeignError("a mapping to set a key in", type(node).__name__, f"command line: {key}")
    node[last] = value


def _settings_in(annotation: Any) -> Any:
    """The config class inside an annotation such as `X | None` or `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _settings_in(part))), None)


def _one_line(cls: type[BaseModel], error: ValidationError, where: str) -> UnfeignError:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        model: Any = cls
        for part in first["loc"][:-1]:
            field = getattr(model, "model_fields", {}).get(str(part))
            model = _settings_in(field.annotation) if field else model  # a list index stays in its element's class
        names = list(getattr(model, "model_fields", {}))
        close = difflib.get_close_matches(str(first["loc"][-1]), names, n=1)
        expected = (
            f"{close[0]!r} (nearest key)"
            if close
            else f"one of the keys {', '.join(names)}"
            if names
            else "no such key"
        )
        return UnfeignError(expected, f"unknown key {key!r}", where)
    if first["type"] == "missing":
        return UnfeignError(f"the key {key!r}", "nothing", where)
    message = first["msg"].removeprefix("Value error, ")
    return UnfeignError(
        message[0].lower() + message[1:], repr(first["input"])[:120], f"{where}: {key}" if key else where
    )
