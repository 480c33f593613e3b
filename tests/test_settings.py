"""Settings: YAML, then overrides, then validation with one line for each mistake."""

from pathlib import Path

import pytest

from unfeign.errors import UnfeignError
from unfeign.settings import Settings


class Inner(Settings):
    depth: int = 1
    length: float = 2.0


class Outer(Settings):
    name: str
    inner: Inner = Inner()
    maybe: Inner | None = None
    several: list[Inner] = []
    free: dict[str, float] = {}


@pytest.fixture
def load(tmp_path: Path):
    def read(text: str, *overrides: str) -> Outer:
        path = tmp_path / "some.yaml"
        path.write_text(text)
        return Outer.load(path, overrides)

    return read


def error_of(load, text: str, *overrides: str) -> str:
    with pytest.raises(UnfeignError) as caught:
        load(text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_and_values(load):
    settings = load("name: a\ninner: {depth: 3}")
    assert (settings.name, settings.inner.depth, settings.inner.length) == ("a", 3, 2.0)


def test_settings_are_frozen(load):
    with pytest.raises(ValueError, match="frozen"):
        load("name: a").name = "b"


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("inner.depth=7", lambda s: s.inner.depth, 7),
        ("inner.length=1e-4", lambda s: s.inner.length, 1e-4),
        ("free.new=2", lambda s: s.free, {"new": 2.0}),
        ("name=x=y", lambda s: s.name, "x=y"),
        ("maybe.depth=4", lambda s: s.maybe.depth, 4),
        ("several=[{depth: 2}]", lambda s: [i.depth for i in s.several], [2]),
    ],
)
def test_override(load, override, read, value):
    assert read(load("name: a\ninner: {depth: 3}", override)) == value


def test_later_override_wins(load):
    assert load("name: a", "inner.depth=4", "inner.depth=5").inner.depth == 5


def test_null_override_of_a_mapping(load):
    assert load("name: a\nmaybe: {depth: 3}", "maybe=null").maybe is None


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("name: a\nnnner: {}", "nnner", "inner"),
        ("name: a\ninner: {dept: 1}", "inner.dept", "depth"),
        ("name: a\nmaybe: {dept: 1}", "maybe.dept", "depth"),
        ("name: a\nseveral: [{lenght: 1}]", "several.0.lenght", "length"),
    ],
)
def test_unknown_key_names_the_nearest(load, text, key, nearest):
    message = error_of(load, text)
    assert "some.yaml" in message and f"unknown key {key!r}" in message
    assert f"{nearest!r} (nearest key)" in message


def test_unknown_key_without_a_near_one_lists_the_keys(load):
    message = error_of(load, "name: a\nzzzzzz: 1")
    assert "one of the keys name, inner" in message and "'zzzzzz'" in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("inner: {depth: 1}", ("the key 'name'", "found nothing")),
        ("name: a\ninner: {depth: many}", ("inner.depth", "valid integer", "'many'")),
        ("- a\n- b", ("a mapping of settings", "found list")),
        ("", ("the key 'name'",)),
        ("name: [", ("valid YAML", "some.yaml:")),
    ],
)
def test_wrong_file(load, text, parts):
    message = error_of(load, text)
    assert all(part in message for part in ("some.yaml", *parts)), message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("name", ("key=value", "'name'", "command line")),
        ("=3", ("key=value", "'=3'")),
        ("name.deeper=3", ("a mapping", "str", "name.deeper")),
        ("inner=[", ("a YAML value", "command line: inner")),
        ("inner.dept=1", ("'depth' (nearest key)", "inner.dept")),
    ],
)
def test_wrong_override(load, override, parts):
    message = error_of(load, "name: a", override)
    assert all(part in message for part in parts), message


def test_every_field_of_the_configs_that_users_write_is_described_or_plain():
    from unfeign.trainers.config import TrainConfig

    assert TrainConfig.model_fields["output"].description.startswith("The run folder")
