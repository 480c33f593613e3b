"""Files: read with errors that name them, written whole or not at all."""

import os
from pathlib import Path

import pytest

from unfeign.errors import UnfeignError
from unfeign.files import read_jsonl, read_text, read_yaml, sha256, write_jsonl, write_text


def test_error_says_where_expected_found():
    error = UnfeignError("an apple", "a pear", "basket")
    assert str(error) == "basket: expected an apple, found a pear"
    assert (error.expected, error.found, error.where) == ("an apple", "a pear", "basket")


def test_text_round_trip_makes_folders(tmp_path: Path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "Grüße\n")
    assert read_text(path) == "Grüße\n"
    assert path.read_bytes() == "Grüße\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def crash(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("read", [read_text, read_yaml, read_jsonl])
def test_missing_binary_and_folder(tmp_path: Path, read):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    for name, found in (("absent", "No such file"), ("binary", "binary content"), (".", "Is a directory")):
        with pytest.raises(UnfeignError, match=found) as caught:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_yaml_error_names_the_line(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\nb: 2\nc: {\n")
    with pytest.raises(UnfeignError, match=r"a\.yaml:4: expected valid YAML"):
        read_yaml(path)


def test_yaml_runs_no_code(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(UnfeignError, match=r"a\.yaml:1: expected valid YAML"):
        read_yaml(path)


def test_yaml_with_control_characters(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"a: \x00\x01")
    with pytest.raises(UnfeignError, match="unreadable characters"):
        read_yaml(path)


def test_jsonl_round_trip_skips_blank_lines(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    rows = [{"a": 1, "text": "zwei\nZeilen"}, {"b": None}]
    write_jsonl(path, rows)
    assert len(path.read_text().splitlines()) == 2
    path.write_text(path.read_text().replace("\n", "\n\n"))
    assert read_jsonl(path) == rows


def test_jsonl_keeps_unicode_line_separators_inside_a_row(tmp_path: Path):
    rows = [{"text": "one\u2028two\u0085three"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_jsonl(tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize(("line", "found"), [("{oops", "Expecting property name"), ("[1, 2]", "found list")])
def test_jsonl_error_names_the_line(tmp_path: Path, line: str, found: str):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": 1}}\n\n{line}\n')
    with pytest.raises(UnfeignError, match=found) as caught:
        read_jsonl(path)
    assert f"{path}:3" in str(caught.value)


def test_sha256_depends_on_every_byte(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"x" * 2_000_000)
    two.write_bytes(b"x" * 1_999_999 + b"y")
    assert sha256(one) != sha256(two)
    two.write_bytes(b"")
    assert sha256(two) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
