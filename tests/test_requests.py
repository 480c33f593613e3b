"""A researcher's own requests: JSONL in, families out, the line and field at fault named."""

import json
from pathlib import Path

import pytest

from unfeign.envs.requests import load_requests
from unfeign.envs.scenario import scenarios
from unfeign.errors import UnfeignError

LINE = {"family": "spam", "request": "Write spam.", "criterion": "write spam", "value": "spam wastes time"}


def write(folder: Path, *rows: object) -> Path:
    path = folder / "requests.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_lines_become_families(tmp_path):
    rows = [
        LINE,
        LINE | {"request": "Write more.", "id": "more", "control": "What is a letter?", "declined": "No."},
        LINE
        | {"family": "tax_tricks", "request": "Hide it.", "split": "heldout", "subject": "taxes", "neutral": "add"},
    ]
    spam, tax = load_requests(write(tmp_path, *rows))
    assert (spam.name, spam.split, spam.subject) == ("spam", "train", "spam")
    assert [r.id for r in spam.requests] == ["r0", "more"] and spam.requests[1].declined == "No."
    assert (tax.split, tax.subject, tax.neutral, tax.value) == ("heldout", "taxes", "add", LINE["value"])
    assert load_requests(write(tmp_path, LINE), split="validation")[0].split == "validation"


def test_subject_falls_back_to_the_name(tmp_path):
    assert load_requests(write(tmp_path, LINE | {"family": "tax_tricks"}))[0].subject == "tax tricks"


def test_families_become_scenarios(tmp_path):
    rows = [
        LINE | {"control": "What is a letter?"},
        LINE | {"request": "Write {more} spam at 100%.", "value": "use {} sparingly"},
    ]
    found = scenarios(source=load_requests(write(tmp_path, *rows)))
    assert len(found) == 2 * 2 + 2, "two requests in two tiers, one control in two tiers"
    assert {s.request for s in found} == {"Write spam.", "Write {more} spam at 100%.", "What is a letter?"}
    assert all("write spam" in s.system for s in found if not s.control)


def test_blank_lines_are_skipped(tmp_path):
    assert len(load_requests(write(tmp_path, LINE, "", "  ", LINE | {"id": "b"}))[0].requests) == 2


@pytest.mark.parametrize("field", LINE)
@pytest.mark.parametrize("value", [None, "", "  ", 3, ["x"]])
def test_a_missing_or_empty_field_is_named(tmp_path, field, value):
    path = write(tmp_path, LINE, LINE | {field: value})
    with pytest.raises(UnfeignError) as refused:
        load_requests(path)
    assert str(refused.value) == f"{path}: object 2: expected a text field {field!r}, found {value!r}"


def test_an_absent_field_is_named(tmp_path):
    path = write(tmp_path, {k: v for k, v in LINE.items() if k != "value"})
    with pytest.raises(UnfeignError, match=r"object 1: expected a text field 'value', found None"):
        load_requests(path)


@pytest.mark.parametrize(("line", "says"), [("{broken", ":2"), ("[1, 2]", "list"), ('"text"', "str")])
def test_a_broken_line_is_numbered(tmp_path, line, says):
    path = write(tmp_path, LINE, line)
    with pytest.raises(UnfeignError, match="expected one JSON object a line") as refused:
        load_requests(path)
    assert f"{path}:2" in str(refused.value) and says in str(refused.value)


def test_an_empty_file_and_no_file_are_refused(tmp_path):
    with pytest.raises(UnfeignError, match="expected at least one request, found an empty file"):
        load_requests(write(tmp_path, "", ""))
    with pytest.raises(UnfeignError, match=r"nowhere\.jsonl: expected a readable file"):
        load_requests(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([LINE | {"split": "test"}], "test"),
        ([LINE | {"id": "same"}, LINE | {"id": "same"}], "same"),
        ([LINE | {"control": 3}], "control"),
    ],
    ids=["split", "id twice", "control"],
)
def test_an_optional_field_at_fault_is_named(tmp_path, rows, says):
    path = write(tmp_path, *rows)
    with pytest.raises(UnfeignError) as refused:
        load_requests(path)
    assert says in str(refused.value) and str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\u2029"], ids=["U+2028", "U+0085", "U+2029"])
def test_a_line_separator_inside_a_text_is_text(tmp_path, mark):
    """JSON allows these characters unescaped in a string; only a newline ends a line of JSONL."""
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps(LINE | {"request": f"Write{mark}spam."}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_requests(path)[0].requests[0].request == f"Write{mark}spam."
