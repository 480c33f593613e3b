"""Audits that are interrupted: they go on where they stopped, to the same numbers. One is killed for real."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from unfeign.cli import main
from unfeign.errors import UnfeignError
from unfeign.models import load_tokenizer, stack
from unfeign.split_persona.audit_folder import AuditFolder
from unfeign.split_persona.persona import Persona, PersonaFacts
from unfeign.split_persona.sequence import load_framing

ASKED = ["--split", "validation", "--renderings", "original", "--max-new-tokens", "3", "--batch-size", "16"]


@pytest.fixture
def persona(tmp_path, tiny_model, base) -> Path:
    model, lineage = stack(base, str(tiny_model), [])
    framing = load_framing("persona").model_copy(update={"review": False})
    facts = PersonaFacts(framing=framing, lora={"r": 2, "target_modules": "all-linear"})
    made = Persona(model, load_tokenizer(str(tiny_model)), lineage, facts)
    return made.save(tmp_path / "persona")


def run(*arguments: Any) -> subprocess.Popen:
    command = [sys.executable, "-c", "from unfeign.cli import main; main()", *map(str, arguments)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # sums in another order would differ in the last digit
    return subprocess.Popen(command, env=one_thread, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_a_killed_audit_goes_on_to_the_same_metrics(tmp_path, tiny_model, persona):
    """Transcripts and reviews, which are made together."""
    command = ["audit", tiny_model, "--persona", persona, *ASKED]
    assert run(*command, "--out", tmp_path / "calm").wait() == 0
    out = tmp_path / "killed"
    process = run(*command, "--out", out)
    part = out / "parts" / "transcripts.jsonl"
    while lines(part) < 16 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = lines(part)
    assert kept >= 16 and not (out / "metrics.json").exists(), "the kill came too late to tell anything"
    again = run(*command, "--out", out)
    said = again.communicate()[0].decode()
    assert again.returncode == 0, said
    assert "transcripts: " in said and "are there already" in said
    results = [json.loads((folder / "metrics.json").read_text()) for folder in (out, tmp_path / "calm")]
    assert results[0] == results[1]
    assert (out / "findings.jsonl").read_text() == (tmp_path / "calm" / "findings.jsonl").read_text()
    assert not (out / "parts").exists()


def test_a_broken_line_is_named_and_its_batch_made_again(tmp_path, tiny_model, capsys, monkeypatch):
    from unfeign.split_persona import audit as module

    command = ["audit", str(tiny_model), *ASKED]
    main([*command, "--out", str(tmp_path / "calm")])

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("unfeign.training_run.findings", interrupted)
        with pytest.raises(SystemExit):
            main([*command, "--out", str(tmp_path / "out")])
    part = tmp_path / "out" / "parts" / "transcripts.jsonl"
    rows = part.read_text().splitlines()
    part.write_text("\n".join([*rows[:20], rows[20][: len(rows[20]) // 2], *rows[21:]]) + "\n" + rows[0][:9])
    capsys.readouterr()
    main([*command, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert f"{part}:21: expected a row, found a broken line" in said
    assert f"transcripts: {len(rows) - 16} of {len(rows)} are there already" in said, "the others are kept"
    assert module.read_findings(tmp_path / "out") == module.read_findings(tmp_path / "calm")


def test_other_settings_and_finished_audits_are_refused(tmp_path):
    folder = AuditFolder(tmp_path / "a", {"seed": 1, "split": "heldout"})
    assert not (tmp_path / "a").exists(), "nothing is kept yet"
    folder.add("transcripts", [("x", {"text": "y"})])
    with pytest.raises(UnfeignError, match="an audit begun with seed 2, to go on with, found seed 1"):
        AuditFolder(tmp_path / "a", {"seed": 2, "split": "heldout"})
    AuditFolder(tmp_path / "a", {"seed": 1, "split": "heldout"})
    (tmp_path / "a" / "metrics.json").write_text("{}")
    with pytest.raises(UnfeignError, match="a new folder"):
        AuditFolder(tmp_path / "a", {"seed": 1, "split": "heldout"})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(UnfeignError, match="a new folder"):
        AuditFolder(tmp_path / "b", {})


def test_batches_are_whole_or_made_again(tmp_path):
    folder = AuditFolder(tmp_path, {}, say=lambda line: None)
    folder.add("p", [(key, {"n": key}) for key in "abce"])
    assert folder.batches("p", list("abcdef"), 2) == [[{"n": "a"}, {"n": "b"}], None, None]
    folder.finish()
    assert folder.batches("p", list("ab"), 2) == [None]


def test_several_checkpoints_give_a_trend(tmp_path, tiny_organism, tiny_config, reward_source, capsys):
    (tmp_path / "mine.py").write_text(reward_source)
    grpo = {"max_steps": 2, "num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 8}
    config = tiny_config(
        tmp_path,
        adapters=[str(tiny_organism)],
        rewards=[{"fn": "mine.py:variety"}],
        audit={"before": False, "after": False},
        grpo=grpo | {"save_steps": 1},
    )
    main(["train", str(config)])
    checkpoints = sorted(str(p) for p in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    out = tmp_path / "trend"
    main(["audit", *checkpoints[::-1], *ASKED, "--out", str(out)])
    page = (out / "report.html").read_text()
    assert page.index("checkpoint-1<") < page.index("checkpoint-2<") and ">step<" in page
    assert (out / "checkpoint-2" / "report.html").is_file()
    capsys.readouterr()
    main(["audit", *checkpoints, *ASKED, "--out", str(out)])
    assert "sampling" not in capsys.readouterr().out, "what is finished is taken as it is"
    shutil.copytree(checkpoints[0], checkpoints[1], dirs_exist_ok=True)  # as if the run had gone on
    with pytest.raises(SystemExit):
        main(["audit", *checkpoints, *ASKED, "--out", str(out)])
    assert "choose another --out" in capsys.readouterr().err, "its numbers are not taken for those of the new one"


def test_an_audit_of_a_run_asks_as_the_run_does(tmp_path, tiny_model, monkeypatch):
    """Split, wordings and seed are the run's, unless the command line says otherwise."""
    asked: list[dict[str, Any]] = []

    def audited(*args: Any, **how: Any) -> Any:
        asked.append(how)
        raise KeyboardInterrupt

    monkeypatch.setattr("unfeign.training_run.audit_policy", audited)
    config = {"audit": {"split": "validation", "renderings": ["original"], "seed": 7}}
    monkeypatch.setattr("unfeign.models.run_config", lambda path: config)
    for more in ([], ["--split", "heldout", "--seed", "0"]):
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            main(["audit", str(tiny_model), *more, "--out", str(tmp_path / "audit")])
    found = [(how["split"], how["renderings"], how["seed"]) for how in asked]
    assert found == [("validation", ("original",), 7), ("heldout", ("original",), 0)]
