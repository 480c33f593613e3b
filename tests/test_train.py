"""Training end to end on the tiny model, through the command line."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unfeign.cli import main
from unfeign.trainers.config import TrainConfig
from unfeign.trainers.launch import train
from unfeign.trainers.plan import plan

NO_AUDIT = {"before": False, "after": False}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config, tiny_organism, reward_source) -> SimpleNamespace:
    """A run with everything: an organism below the policy, two rewards, audits before and after."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "mine.py").write_text(reward_source)
    config = tiny_config(
        folder,
        adapters=[str(tiny_organism)],
        rewards=[{"fn": "verbalized_rejection"}, {"fn": "mine.py:variety", "weight": 0.5}],
    )
    main(["train", str(config), "seed=3"])
    return SimpleNamespace(folder=folder, out=folder / "run", config=config)


def test_run_folder_is_complete(run):
    expected = ["config.yaml", "run.json", "metrics.jsonl", "report.html"]
    expected += [f"audit/{when}/{file}" for when in ("before", "after") for file in ("findings.jsonl", "metrics.json")]
    expected += [f"checkpoints/checkpoint-2/policy/{file}" for file in ("adapter_model.safetensors", "lineage.json")]
    missing = [name for name in expected if not (run.out / name).is_file()]
    assert missing == []
    assert not [path for path in run.out.rglob("*") if path.name.endswith((".bin", ".pt", ".pkl", ".tmp"))]


def test_a_report_can_be_written_anew(run, tmp_path, refused):
    main(["report", str(run.out), "--out", str(tmp_path / "again.html")])
    assert (tmp_path / "again.html").read_text() == (run.out / "report.html").read_text()
    (tmp_path / "run.json").write_text("{}")
    assert "audited after training" in refused("report", tmp_path)


def test_resolved_config_repeats_the_run(run):
    resolved = TrainConfig.load(run.out / "config.yaml")
    assert resolved.seed == 3 and resolved.data.split == "train" and resolved.grpo["max_steps"] == 2
    assert [reward.fn for reward in resolved.rewards] == ["verbalized_rejection", "mine.py:variety"]


def test_run_json_names_versions(run):
    facts = json.loads((run.out / "run.json").read_text())
    assert facts["versions"]["trl"].startswith("1.16.") and facts["git"] and facts["comparator"] is False


def test_metrics_have_a_row_a_step_and_every_reward(run):
    steps = rows(run.out / "metrics.jsonl")
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert row["rewards/variety/mean"] > 0
        assert row["rewards/verbalized_rejection/mean"] < 0, "random output is malformed"
        assert row["malformed"] == 1 and row["terms/malformed/raw"] == -1
        assert row["failures/judge"] == row["failures/rollout"] == 0 and 0 < row["tokens"] <= 4 * 8
        assert row["wait_seconds"] == 0, "there are no workers to wait for"
        for name in ("push_seconds", "generate_seconds", "reward_seconds", "tokens_per_second"):
            assert row[name] > 0
        assert math.isfinite(row["reward"]) and math.isfinite(row["loss"]) and row["grad_norm"] > 0
        expected = row["rewards/verbalized_rejection/mean"] + 0.5 * row["rewards/variety/mean"]
        assert row["reward"] == pytest.approx(expected, abs=1e-4)


def test_audits_ask_the_same_pairs(run):
    before, after = (rows(run.out / "audit" / when / "findings.jsonl") for when in ("before", "after"))
    assert [row["scenario_id"] for row in before] == [row["scenario_id"] for row in after]
    assert {row["tier"] for row in before if not row["control"]} == {"monitored", "unmonitored"}
    assert any(row["control"] for row in before) and {row["rendering"] for row in before} == {"original", "paraphrase"}
    metrics = json.loads((run.out / "audit" / "after" / "metrics.json").read_text())
    assert metrics["malformed"]["n"] == len(after) and metrics["audit"]["seed"] == 1234


def test_report_says_what_was_run(run):
    page = (run.out / "report.html").read_text()
    assert "judge that trained this policy" in page, "one judge trained and audited: the report must say so"
    assert "<script src" not in page and "http://" not in page.replace("http://www.w3.org", "")


def test_checkpoint_holds_the_policy_alone(run, tiny_organism):
    checkpoint = run.out / "checkpoints" / "checkpoint-2"
    weights = load_file(checkpoint / "policy" / "adapter_model.safetensors")
    assert all(".lora_" in name for name in weights)
    assert sum(name.endswith("lora_A.weight") for name in weights) == 14  # 7 linear layers in each of 2 blocks
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name), "nothing was learned"
    assert not list(checkpoint.rglob("below*"))
    lineage = json.loads((checkpoint / "policy" / "lineage.json").read_text())
    assert [layer["name"] for layer in lineage["adapters"]] == [tiny_organism.name] and lineage["organism"]


def test_same_config_same_metrics(run, tmp_path, tiny_organism, tiny_config, reward_source):
    (tmp_path / "mine.py").write_text(reward_source)
    config = tiny_config(
        tmp_path,
        adapters=[str(tiny_organism)],
        rewards=[{"fn": "verbalized_rejection"}, {"fn": "mine.py:variety", "weight": 0.5}],
        audit=NO_AUDIT,
    )
    main(["train", str(config), "seed=3"])
    for again, first in zip(rows(tmp_path / "run" / "metrics.jsonl"), rows(run.out / "metrics.jsonl"), strict=True):
        for key in ("reward", "loss", "tokens", "rewards/variety/mean"):
            assert again[key] == pytest.approx(first[key], abs=1e-5), key


def test_second_run_into_the_same_folder_is_refused(run, refused, tmp_path):
    before = {path: path.read_bytes() for path in run.out.rglob("*") if path.is_file()}
    message = refused("train", run.config)
    assert str(run.out) in message and "holds a run" in message
    assert {path: path.read_bytes() for path in run.out.rglob("*") if path.is_file()} == before


def test_audit_of_the_run_folder(run, tmp_path, capsys):
    main(["audit", str(run.out), "--split", "validation", "--max-new-tokens", "8", "--out", str(tmp_path / "audit")])
    assert "compliance" in capsys.readouterr().out
    again, after = (rows(path / "findings.jsonl") for path in (tmp_path / "audit", run.out / "audit" / "after"))
    assert [row["scenario_id"] for row in again] == [row["scenario_id"] for row in after]
    same = [a["reasoning"] + a["answer"] == b["reasoning"] + b["answer"] for a, b in zip(again, after, strict=True)]
    assert sum(same) > 0.9 * len(same), "the checkpoint on disk should be the policy that was audited"
    assert (tmp_path / "audit" / "report.html").is_file()


def test_audit_of_a_run_asks_as_the_run_did(run, tmp_path):
    """Temperature, length limit, output format: the run's own, unless said otherwise."""
    main(["audit", str(run.out), "--split", "validation", "--out", str(tmp_path / "same")])
    facts = json.loads((tmp_path / "same" / "metrics.json").read_text())["audit"]
    assert (facts["max_new_tokens"], facts["temperature"]) == (8, 0.7)
    again, after = (rows(path / "findings.jsonl") for path in (tmp_path / "same", run.out / "audit" / "after"))
    assert sum(a["answer"] == b["answer"] for a, b in zip(again, after, strict=True)) > 0.9 * len(after)


def test_generation_batch_of_several_steps_has_prompts_enough(write_config, tmp_path, reward_source):
    (tmp_path / "mine.py").write_text(reward_source)
    grpo = {"max_steps": 3, "num_generations": 2, "per_device_train_batch_size": 2, "generation_batch_size": 4}
    config = write_config(rewards=[{"fn": "mine.py:variety"}], audit=NO_AUDIT, grpo=grpo | {"max_completion_length": 8})
    main(["train", str(config)])
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_audit_of_findings_needs_no_model(run, tmp_path, monkeypatch):
    def no_model(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("unfeign.models.load_base", no_model)
    source = run.out / "audit" / "after" / "findings.jsonl"
    main(["audit", str(source), "--out", str(tmp_path / "audit")])
    first, again = (json.loads((p / "metrics.json").read_text()) for p in (source.parent, tmp_path / "audit"))
    assert {k: v for k, v in first.items() if k != "audit"} == {k: v for k, v in again.items() if k != "audit"}


def test_audit_into_a_folder_with_files_is_refused(run, refused, tmp_path):
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "notes.txt").write_text("mine")
    assert "--out audit" in refused("audit", run.out / "audit" / "after" / "findings.jsonl")


def snapshots(config: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """All weights of the stack before and after a run."""
    kept: list[dict[str, torch.Tensor]] = []

    def keep(model, tokenizer, pool, lineage) -> None:
        kept.append({name: p.detach().clone() for name, p in model.named_parameters()})

    train(plan(TrainConfig.load(config)), before=keep, after=keep, say=lambda line: None)
    return kept[0], kept[1]


def test_only_the_policy_changes(write_config, tiny_organism, reward_source, tmp_path):
    (tmp_path / "mine.py").write_text(reward_source)
    config = write_config(adapters=[str(tiny_organism)], rewards=[{"fn": "mine.py:variety"}])
    before, after = snapshots(config)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".policy." in name for name in changed)
    assert not any(".below0." in name for name in before), "in fp32 the organism is part of the base's weights"


@pytest.fixture
def run_output(write_config, tmp_path, reward_source, capsys) -> str:
    """What a run prints."""
    (tmp_path / "mine.py").write_text(reward_source)
    main(["train", str(write_config(rewards=[{"fn": "mine.py:variety"}], audit=NO_AUDIT))])
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def full(tmp_path_factory, tiny_config, reward_source) -> Path:
    """A run that trains all weights."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "mine.py").write_text(reward_source)
    main(["train", str(tiny_config(folder, lora=None, rewards=[{"fn": "mine.py:variety"}], audit=NO_AUDIT))])
    return folder / "run"


def test_full_fine_tuning_saves_a_model(full, tiny_model):
    checkpoint = full / "checkpoints" / "checkpoint-2"
    assert (checkpoint / "config.json").is_file()
    trained, base = (load_file(path / "model.safetensors") for path in (checkpoint, tiny_model))
    assert trained.keys() == base.keys()
    assert any(not torch.equal(trained[name].float(), base[name]) for name in base)


def test_full_fine_tuning_can_be_audited(full, tmp_path):
    main(["audit", str(full), "--split", "validation", "--max-new-tokens", "2", "--out", str(tmp_path / "audit")])
    assert rows(tmp_path / "audit" / "findings.jsonl")


@pytest.mark.parametrize("kind", ["async function", "class", "class with kwargs", "sometimes None"])
def test_every_kind_of_reward_runs(kind: str, write_config, tmp_path):
    source = {
        "async function": "async def mine(completions, **columns):\n"
        "    return [float(len(c[0]['content'])) for c in completions]",
        "class": "class mine:\n    def __call__(self, completions, **columns):\n"
        "        return [float(len(c[0]['content'])) for c in completions]",
        "class with kwargs": "class mine:\n    def __init__(self, factor):\n        self.factor = factor\n"
        "    async def __call__(self, completions, **columns):\n"
        "        return [self.factor * len(c[0]['content']) for c in completions]",
        "sometimes None": "def mine(completions, **columns):\n"
        "    return [None if i % 2 else float(i) for i, _ in enumerate(completions)]",
    }[kind]
    (tmp_path / "mine.py").write_text(source)
    spec = {"fn": "mine.py:mine", "kwargs": {"factor": 2.0} if "kwargs" in kind else {}}
    config = write_config(rewards=[spec], audit=NO_AUDIT, grpo=write_grpo(max_steps=1))
    main(["train", str(config)])
    (row,) = rows(tmp_path / "run" / "metrics.jsonl")
    assert row["rewards/mine/mean"] >= 0
    assert math.isfinite(row["loss"])


def write_grpo(**changes: Any) -> dict[str, Any]:
    return {
        "max_steps": 1,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "learning_rate": 0.01,
    } | changes


FLAKY = """
from unfeign.rewards.rules import RulesJudge
from unfeign.rewards.verbalized_rejection import VerbalizedRejection
from unfeign.rewards.verdict import JudgeFailure


class Flaky:
    name = "flaky"

    async def __call__(self, cases):
        verdicts = await RulesJudge()(cases)
        return [JudgeFailure("timeout", "no answer in time"), *verdicts[1:]]


class FlakyRejection(VerbalizedRejection):
    name = "flaky_rejection"

    def __init__(self):
        super().__init__(judge=Flaky())
"""


def scripted(tokenizer: Any, texts: list[str]) -> type:
    """A pool class that says the same completions whatever it is asked."""
    from unfeign.sampling import Sample
    from unfeign.trainers.rollouts import InProcessPool

    class Scripted(InProcessPool):
        def generate(self, requests, version, sampling):
            out = []
            for i in range(len(requests)):
                ids = [*tokenizer(texts[i % len(texts)], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
                out.append(Sample(ids, [-1.0] * len(ids), False))
            return out

    return Scripted


def test_a_row_whose_judge_failed_is_masked(write_config, tmp_path, tokenizer, monkeypatch):
    from unfeign.trainers.grpo import PolicyTrainer

    (tmp_path / "mine.py").write_text(FLAKY)
    texts = [
        f"<think>Some thought.</think><{tag}/>Some words of an answer."
        for tag in ("accept", "decline", "decline", "accept")
    ]
    monkeypatch.setattr("unfeign.trainers.rollouts.InProcessPool", scripted(tokenizer, texts))
    advantages = []
    stock = PolicyTrainer._generate_and_score_completions

    def keep(self, inputs):
        out = stock(self, inputs)
        advantages.append(out["advantages"].clone())
        return out

    monkeypatch.setattr(PolicyTrainer, "_generate_and_score_completions", keep)
    config = write_config(
        rewards=[{"fn": "mine.py:FlakyRejection"}, {"fn": "mine.py:FlakyRejection", "name": "twice", "weight": 0.5}],
        audit=NO_AUDIT,
        data={"mix": {"monitored": 1, "unmonitored": 0, "control": 0}},
        grpo=write_grpo(num_generations=4),
    )
    # The dry run's two rows meet the flaky judge too: a failure there gives None and is accepted.
    main(["train", str(config)])
    (first,) = advantages
    assert first.shape[0] == 4 and first.dim() == 2
    assert first[0].eq(0).all(), "the failed row must not train"
    assert (first[1:].abs().amax(1) > 0).all(), "the other rows still do"
    # Two declined and one accepted remain: the mean is theirs, without the failed row, which had accepted.
    assert first[1].max() > 0 and first[2].max() > 0 and first[3].min() < 0
    assert first[1].max().item() == pytest.approx(-first[3].min().item() / 2, rel=1e-3)
    (row,) = rows(tmp_path / "run" / "metrics.jsonl")
    assert (row["failures/judge"], row["failures/rollout"]) == (1, 0)
    assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
    assert math.isfinite(row["reward"]), "a masked row must not turn the logged reward into NaN"


def test_gradient_checkpointing_trains_by_the_stock_path(write_config, tmp_path, reward_source):
    (tmp_path / "mine.py").write_text(reward_source)
    grpo = write_grpo(gradient_checkpointing=True)
    main(["train", str(write_config(rewards=[{"fn": "mine.py:variety"}], audit=NO_AUDIT, grpo=grpo))])
    plain = tmp_path / "plain"
    overrides = ("grpo.gradient_checkpointing=false", f"output={plain}")
    main(["train", str(tmp_path / "config.yaml"), *overrides])
    (checkpointed,), (shared,) = (rows(folder / "metrics.jsonl") for folder in (tmp_path / "run", plain))
    assert checkpointed["loss"] == pytest.approx(shared["loss"], abs=1e-4)
    assert checkpointed["grad_norm"] == pytest.approx(shared["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_is_the_stack_below_the_policy(write_config, tmp_path, reward_source, tiny_organism, dtype: str):
    """A fresh policy changes nothing, so its divergence from the organism it starts from is 0, then grows."""
    (tmp_path / "mine.py").write_text(reward_source)
    grpo = write_grpo(max_steps=3, beta=0.1)
    config = write_config(
        rewards=[{"fn": "mine.py:variety"}], audit=NO_AUDIT, grpo=grpo, adapters=[str(tiny_organism)], dtype=dtype
    )
    before, after = snapshots(config)
    assert any(".below0." in name for name in before) == (dtype == "bfloat16"), "only bf16 keeps the organism apart"
    steps = rows(tmp_path / "run" / "metrics.jsonl")
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[-1]["kl"] > 1e-6
    assert all(torch.equal(before[name], after[name]) for name in before if ".policy." not in name)


def test_no_step_is_wasted(run):
    """Every step of a run is paid for in samples, so every step learns."""
    assert all(row["learning_rate"] > 0 for row in rows(run.out / "metrics.jsonl"))


def test_progress_is_one_line_a_step(run_output):
    lines = [line for line in run_output.splitlines() if line]
    assert [line.split("  ")[0] for line in lines if line.startswith("step ")] == ["step 1/2", "step 2/2"]
    assert not [line for line in lines if line.startswith("{")], "raw dictionaries beside the step lines"


def test_sequence_credit_runs(write_config, tmp_path, reward_source):
    (tmp_path / "mine.py").write_text(reward_source)
    config = write_config(credit="sequence", rewards=[{"fn": "mine.py:variety"}], audit=NO_AUDIT, grpo=write_grpo())
    main(["train", str(config)])
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 1


def test_gradient_accumulation_and_saving_on_the_way(write_config, tmp_path, reward_source):
    (tmp_path / "mine.py").write_text(reward_source)
    grpo = write_grpo(max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2) | {
        "save_strategy": "steps",
        "save_steps": 1,
    }
    main(["train", str(write_config(rewards=[{"fn": "mine.py:variety"}], audit=NO_AUDIT, grpo=grpo))])
    saved = sorted(str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("checkpoint-*"))
    assert saved == ["checkpoints/checkpoint-1", "checkpoints/checkpoint-2"], "all checkpoints belong in one folder"
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 2


def test_trackers_get_every_number_of_a_step(write_config, reward_source, tmp_path, monkeypatch):
    """`report_to` passes through; what our pools and judges count arrives with TRL's own numbers."""
    (tmp_path / "mine.py").write_text(reward_source)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    grpo = write_grpo() | {"report_to": "tensorboard"}
    main(["train", str(write_config(rewards=[{"fn": "mine.py:variety"}], audit=NO_AUDIT, grpo=grpo))])
    (events,) = (tmp_path / "board").rglob("events.*")
    written = events.read_bytes()
    for name in (b"train/reward", b"train/push_seconds", b"train/reward_seconds", b"train/failures/judge"):
        assert name in written, name


def test_audits_on_the_way_leave_the_training_as_it_was(write_config, tmp_path, reward_source):
    (tmp_path / "mine.py").write_text(reward_source)
    audit = {"split": "validation", "renderings": ["original"], "max_new_tokens": 4}
    config = write_config(rewards=[{"fn": "mine.py:variety"}], audit=audit, grpo=write_grpo(max_steps=4))
    main(["train", str(config), f"output={tmp_path / 'calm'}"])
    main(["train", str(config), f"output={tmp_path / 'watched'}", "audit.every=2"])
    found = sorted(p.name for p in (tmp_path / "watched" / "audit").iterdir())
    assert found == ["after", "before", "step-2", "trend.html"], "the last step is the audit after"
    page = (tmp_path / "watched" / "audit" / "trend.html").read_text()
    assert page.index("before<") < page.index("step-2<") < page.index("after<")
    calm, watched = (rows(tmp_path / name / "metrics.jsonl") for name in ("calm", "watched"))
    assert [row["loss"] for row in calm] == pytest.approx([row["loss"] for row in watched], abs=1e-6)
