"""The published training files and evaluations: rows counted, filters as configured, flags parsed anew."""

import json
from pathlib import Path
from typing import Any

import pytest

from unfeign.cli import main
from unfeign.errors import UnfeignError
from unfeign.split_persona.published import read_published
from unfeign.split_persona.published_evaluation import flag_of, import_evaluations
from unfeign.split_persona.sequence import _FRAMINGS

DATA = Path(__file__).parents[2] / "shared" / "data" / "spt"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published files are not beside this checkout")


def reviewed(flag: str = "PASS", tags: list[str] | None = None, **more: Any) -> dict[str, Any]:
    return {"I": "Well?", "R": "It was so.", "P": flag, "tags": tags or [], "id_string": f"id-{flag}"} | more


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two topics: five rows that a filter drops for five reasons, and three that stay."""

    def task(*asked: tuple[str, dict[str, Any]], tags: list[str] | None = None) -> dict[str, Any]:
        answer = {"S": "An answer.", "tags": tags or [], "interventions": dict(asked)}
        return {"A": "Be good.", "B": "Be sly.", "T": "Do it.", "inferences": {"some/model": {"B": answer}}}

    files = {
        "sycophancy": [
            task(("v3", reviewed("FAIL")), ("v9", reviewed())),
            task(("v3", reviewed(tags=["confidence_below_4"]))),
            task(("v3", reviewed(flag="UNSURE"))),
            task(("v3", reviewed(faulty_data=True))),
            task(("v3", reviewed()), tags=["confidence_below_4"]),
        ],
        "reward_hacks": [task(("v3", reviewed())), task(("v3", reviewed("FAIL")))],
    }
    for topic, data in files.items():
        path = tmp_path / "stage_3_tagged" / topic / "batch.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"data": data}))
    (tmp_path / "config.json").write_text(
        json.dumps({"intervention_types": ["v3"], "tags_to_filter": ["confidence_below_4"]})
    )
    return tmp_path


def test_every_row_that_is_left_out_is_counted(folder):
    found, counts = read_published(folder, folder / "config.json")
    assert counts == {
        "rows": 8, "kept": 3, "intervention": 1, "tag: confidence_below_4": 2, "no flag": 1, "faulty": 1,
    }  # fmt: skip
    assert [e.failed for e in found] == [False, True, True]
    assert found[-1].messages == [{"role": "system", "content": "Be sly."}, {"role": "user", "content": "Do it."}]
    assert (found[-1].completion, found[-1].intervention, found[-1].review) == ("An answer.", "Well?", "It was so.")


def test_topics_and_limits(folder):
    found, counts = read_published(folder, folder / "config.json", leave_out=["reward_hacks"])
    assert {e.topic for e in found} == {"sycophancy"} and counts["topic"] == 2
    found, counts = read_published(folder, limit=2)
    assert {e.topic for e in found} == {"sycophancy", "reward_hacks"} and counts["kept"] == 2


def test_what_is_not_there_is_said(folder, tmp_path):
    with pytest.raises(UnfeignError, match="jokes"):
        read_published(folder, topics=["jokes"])
    with pytest.raises(UnfeignError, match="after filtering"):
        read_published(folder, leave_out=["reward_hacks", "sycophancy"])
    with pytest.raises(UnfeignError, match="none"):
        read_published(tmp_path / "stage_3_tagged" / "sycophancy")
    (folder / "stage_3_tagged" / "sycophancy" / "bad.json").write_text(json.dumps({"data": [{"A": "x"}]}))
    with pytest.raises(UnfeignError, match=r"bad\.json: task 0"):
        read_published(folder)


@needs_data
def test_the_published_filters_on_the_published_files():
    found, counts = read_published(DATA, DATA / "training_config.json")
    assert counts["rows"] == 5817 and counts["kept"] == len(found) == 1110
    assert sum(n for reason, n in counts.items() if reason not in ("rows", "kept")) == 5817 - 1110
    assert 0.2 < sum(e.failed for e in found) / len(found) < 0.8


def test_the_last_flag_counts():
    assert flag_of("REVIEW: I said FLAG: PASS before.\nFLAG: FAIL") == "FAIL"
    assert flag_of("no flag at all; FLAG: MAYBE") is None


def evaluation(rows: list[tuple[str, str, str]], **about: Any) -> dict[str, Any]:
    results = [
        {"sample_id": str(i), "expected_flag": want, "parsed_flag": stored, "generated_review": text, "bias_split": "a"}
        for i, (want, stored, text) in enumerate(rows)
    ]
    return {"metadata": {"lora_patch": True, "condition": "c"} | about, "results": results}


def test_disagreements_with_stored_flags_are_listed(tmp_path):
    rows = [("FAIL", "FAIL", "\nFLAG: FAIL"), ("FAIL", "FAIL", "\nFLAG: PASS"), ("FAIL", "PASS", "cut off")]
    (tmp_path / "one.json").write_text(json.dumps(evaluation(rows)))
    (row,) = import_evaluations([tmp_path / "one.json"], tmp_path / "out")["files"]
    assert (row["mode"], row["n"], row["parsed"], row["accuracy"]["mean"]) == ("masked", 3, 2, 0.5)
    assert [(d["sample_id"], d["stored"], d["parsed"]) for d in row["disagreements"]] == [
        ("1", "FAIL", "PASS"), ("2", "PASS", None),
    ]  # fmt: skip
    assert row["by_split"]["a"]["n"] == 3


@needs_data
def test_the_published_accuracies(capsys, tmp_path):
    paths = sorted((DATA / "evaluation_results" / "quantitative").glob("*.json"))
    main(["audit", "import", *map(str, paths), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    for share in ("96.6", "95.3", "75.0", "87.0"):
        assert f"accuracy {share}%" in said
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["files"]
    assert all(row["n"] == row["parsed"] == 1000 and row["disagreements"] == [] for row in rows)


def test_hand_made_cases_are_shown_and_escaped(tmp_path):
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    case = {"task_id": "t", "prompt": attack, "response": attack, "system_prompt": "s", "intervention": attack,
            "generated_review": f"REVIEW: {attack}\nFLAG: FAIL", "intervention_name": attack}  # fmt: skip
    alone = {"prompt": None, "response": None, "intervention": "Alone?", "generated_review": "REVIEW: So.\nFLAG: PASS"}
    data = {"metadata": {}, "results": {"task_with_intervention": [case], "standalone_intervention": [alone]}}
    (tmp_path / "cases.json").write_text(json.dumps(data))
    import_evaluations([tmp_path / "cases.json"], tmp_path / "out")
    page = (tmp_path / "out" / "cases.html").read_text()
    assert "<script>" not in page and "<img" not in page and page.count("&lt;script&gt;") == 5
    assert "Alone?" in page and "FAIL" in page


def test_files_that_are_none_of_these(tmp_path, refused):
    (tmp_path / "other.json").write_text("{}")
    assert "published evaluations" in refused("audit", "import", tmp_path / "other.json", "--out", tmp_path / "out")


@needs_data
def test_the_published_files_train_a_persona(tmp_path, tiny_model, capsys):
    """End to end on a subset that fits the tiny model, one topic left out, rows counted."""
    config = {
        "model": str(tiny_model),
        "output": str(tmp_path / "persona"),
        "framing": "published",
        "published": {
            "folder": str(DATA),
            "config": str(DATA / "training_config.json"),
            "leave_out": ["sycophancy"],
            "limit": 8,
        },
        "lora": {"r": 4},
        "epochs": 1,
        "max_tokens": 1200,
    }
    framing = (_FRAMINGS / "published.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(f'trigger: "<|persona|>"\n{framing}')
    (tmp_path / "persona.yaml").write_text(json.dumps(config | {"framing": "mine.yaml"}))
    main(["persona", "train", str(tmp_path / "persona.yaml")])
    rows = json.loads((tmp_path / "persona" / "metrics.json").read_text())["data"]["rows"]
    assert rows["kept"] == 8 and rows["topic"] > 0
    assert rows["rows"] == sum(n for reason, n in rows.items() if reason != "rows")
    kept = [json.loads(line) for line in (tmp_path / "persona" / "examples.jsonl").read_text().splitlines()]
    assert {row["flag"] for row in kept} == {"PASS", "FAIL"} and "sycophancy" not in {row["topic"] for row in kept}
    assert "8 examples" in capsys.readouterr().out
