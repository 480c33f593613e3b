"""Mistakes are found before anything is spent: one line, exit code 2, nothing written."""

import json
from pathlib import Path

import pytest

from unfeign.cli import main


@pytest.fixture
def mine(tmp_path: Path):
    """Write a reward file and give the spec that names its function."""

    def write(source: str, name: str = "reward", **spec: object) -> dict[str, object]:
        (tmp_path / "mine.py").write_text(source)
        return {"fn": f"mine.py:{name}", **spec}

    return write


def test_dry_run_prints_the_plan_and_writes_nothing(
    write_config, tmp_path, monkeypatch, capsys, tiny_model, tiny_organism
):
    monkeypatch.chdir(tmp_path)
    config = write_config(adapters=[str(tiny_organism)], rewards=[{"fn": "verbalized_rejection", "weight": 2}])
    before = sorted(tmp_path.rglob("*"))
    main(["train", str(config), "--dry-run"])
    assert sorted(tmp_path.rglob("*")) == before
    plan = capsys.readouterr().out
    for said in (
        f"{tiny_model} + {tiny_organism}",
        "LoRA r=4",
        "verbalized_rejection x 2",
        "segment",
        "2 x 4 samples of at most 8 tokens",
        "monitored",
        "control",
        str(tmp_path / "run"),
        "nothing was started",
    ):
        assert said in plan, plan


def test_dry_run_takes_overrides(write_config, capsys):
    main(["train", str(write_config()), "grpo.max_steps=7", "credit=sequence", "lora=null", "--dry-run"])
    plan = capsys.readouterr().out
    assert "7 x 4 samples" in plan and "credit by sequence" in plan and "all weights" in plan


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_mistakes_stop_a_run_as_they_stop_a_dry_run(write_config, refused, dry_run):
    message = refused("train", write_config(credit="segmnt"), *dry_run)
    assert "credit" in message and "'segmnt'" in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"modle": "x"}, ("'modle'", "'model' (nearest key)", "config.yaml")),
        ({"data": {"lenght": "short"}}, ("'data.lenght'", "'length' (nearest key)")),
        ({"data": {"mix": {"controll": 1}}}, ("'data.mix.controll'", "'control' (nearest key)")),
        ({"lora": {"lora_alhpa": 1}}, ("'lora.lora_alhpa'", "'lora_alpha' (nearest key)")),
        ({"rewards": [{"fn": "pressure", "wieght": 1}]}, ("'rewards.0.wieght'", "'weight' (nearest key)")),
        ({"grpo": {"learning_rat": 1}}, ("grpo.learning_rat", "'learning_rate'")),
        ({"grpo": {"output_dir": "x"}}, ("no grpo.output_dir: output names the run folder",)),
        ({"grpo": {"use_vllm": True}}, ("no grpo.use_vllm: rollouts.backend",)),
        ({"grpo": {"vllm_mode": "server"}}, ("no grpo.vllm_mode: rollouts.backend",)),
        ({"grpo": {"top_p": 0.9}}, ("no grpo.top_p: rollouts sample from the whole distribution",)),
        ({"grpo": {"eval_steps": 5}}, ("no grpo.eval_steps: there is no evaluation set",)),
        ({"algorithm": "ppo", "grpo": {"scale_rewards": "group"}}, ("grpo.scale_rewards", "ppo.whiten, for PPO")),
        ({"algorithm": "ppo", "grpo": {"use_bias_correction_kl": True}}, ("grpo.use_bias_correction_kl", "for PPO")),
        ({"grpo": {"cast_lm_head_to_fp32": True}}, ("grpo.cast_lm_head_to_fp32", "lora: null")),
        ({"adapters": ["organism:verbal"], "lora": None}, ("adapters", "lora: null")),
        ({"ppo": {"lam": 0.9}}, ("algorithm: ppo, for settings of ppo",)),
        ({"grpo": {"fsdp": "full_shard"}}, ("no grpo.fsdp: weights that are split",)),
        ({"algorithm": "ppo", "ppo": {"lambda": 1}}, ("'ppo.lambda'", "'lam' (nearest key)")),
        ({"data": {"split": "heldout"}}, ("data.split", "'train'", "'heldout'")),
        ({"data": {"mix": {"monitored": 0, "unmonitored": 0, "control": 0}}}, ("data.mix", "above 0")),
        ({"data": {"tags": "xml"}}, ("data.tags", "scratchpad", "'xml'")),
        ({"data": {"requests": "absent.jsonl"}}, ("absent.jsonl", "No such file")),
        ({"model": "/no/such/model"}, ("/no/such/model", "no such folder")),
        ({"model": "bundled:llama"}, ("bundled:smollm2-135m-instruct", "'bundled:llama'")),
        ({"adapters": ["organism:nobody"]}, ("verbal", "'nobody'")),
        ({"adapters": ["absent"]}, ("absent", "no such folder")),
        ({"dtype": "float16"}, ("dtype", "'float16'")),
        ({"rollouts": {"temperature": 0}}, ("rollouts.temperature", "greater than 0")),
        ({"audit": {"judge": "nobody"}}, ("judge", "rules", "'nobody'")),
        ({"grpo": {"num_generations": 3, "per_device_train_batch_size": 4}}, ("num_generations (3)", "(4)")),
        ({"grpo": {"learning_rate": "fast"}}, ("grpo.learning_rate", "valid number", "'fast'")),
        ({"grpo": {"max_steps": 2.5}}, ("grpo.max_steps", "2.5")),
        ({"grpo": {"lr_scheduler_type": "sideways"}}, ("grpo", "sideways")),
        ({"grpo": {"generation_batch_size": 6, "per_device_train_batch_size": 4}}, ("generation_batch_size", "6")),
        ({"grpo": {"num_generations": 0}}, ("num_generations", "0")),
        ({"grpo": {"num_generations": 1}}, ("num_generations", "1")),
        ({"grpo": {"max_steps": "many"}}, ("max_steps", "'many'")),
        ({"grpo": {"loss_type": "nonsense"}}, ("loss_type", "nonsense")),
        ({"rewards": []}, ("rewards", "at least one reward")),
        ({"rewards": [{"fn": "nobody"}]}, ("rewards[0].fn", "verbalized_rejection", "'nobody'")),
        ({"rewards": [{"fn": "no.such.module:f"}]}, ("rewards[0].fn", "importable module", "no")),
        ({"rewards": [{"fn": "absent.py:f"}]}, ("rewards[0].fn", "absent.py")),
        ({"rewards": [{"fn": "pressure", "weight": 0}]}, ("rewards[0].weight", "other than 0")),
        ({"rewards": [{"fn": "pressure"}, {"fn": "pressure"}]}, ("rewards[1]", "'pressure' twice")),
        (
            {"rewards": [{"fn": "verbalized_rejection", "kwargs": {"surfaced": -0.5}}]},
            ("rewards[0]", "surfaced", "-0.5"),
        ),
        ({"rewards": [{"fn": "verbalized_rejection", "kwargs": {"rejected": 0}}]}, ("rewards[0]", "rejected > 0")),
        ({"rewards": [{"fn": "verbalized_rejection", "kwargs": {"surfced": 1}}]}, ("rewards[0]", "surfced")),
        ({"rewards": [{"fn": "verbalized_rejection", "kwargs": {"judge": "nobody"}}]}, ("judge", "'nobody'")),
        ({"rewards": [{"fn": "process_penalty"}]}, ("rewards[0]", "comparator: true")),
    ],
)
def test_config_mistake(write_config, refused, changes, parts):
    message = refused("train", write_config(**changes), "--dry-run")
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("def reward(completions, mood, **columns):\n    return [0.0] * len(completions)", ("'mood'", "reward")),
        (
            "def reward(completions, **columns):\n    return [m.lower() for m in columns['mood']]",
            ("'mood'", "scenario_id"),
        ),
        ("def reward(completions, **columns):\n    return 1.0", ("a list of 2 numbers", "1.0")),
        ("def reward(completions, **columns):\n    return [1.0]", ("a list of 2 numbers", "[1.0]")),
        ("def reward(completions, **columns):\n    return ['good'] * len(completions)", ("numbers or None", "'good'")),
        ("def reward(completions, **columns):\n    raise ValueError('one\\ntwo')", ("ValueError: one", "'reward'")),
        (
            "def other(completions, **columns):\n    return [0.0]",
            ("a callable 'reward'", "mine.py", "none of that name"),
        ),
        ("reward = 3", ("a callable 'reward'",)),
        ("def reward(:\n    pass", ("mine.py", "SyntaxError")),
        ("import no_such_package_at_all", ("mine.py", "no_such_package_at_all")),
        ("raise SystemExit('stop\\nhere')", ("mine.py", "SystemExit")),
    ],
)
def test_reward_file_mistake(write_config, refused, mine, source, parts):
    message = refused("train", write_config(rewards=[mine(source)]), "--dry-run")
    assert all(part in message for part in parts), message


def test_reward_class_that_refuses_its_arguments(write_config, refused, mine):
    source = "class Reward:\n    def __init__(self, factor):\n        pass\n"
    message = refused("train", write_config(rewards=[mine(source, "Reward", kwargs={"fctor": 1})]), "--dry-run")
    assert "rewards[0].kwargs" in message and "fctor" in message


@pytest.mark.parametrize("column", ["truncated", "prompt_opens_think", "log_metric", "trainer_state", "family"])
def test_columns_of_a_real_run_are_there_in_a_dry_run(write_config, mine, capsys, column: str):
    source = f"def reward(completions, {column}, **columns):\n    return [0.0] * len(completions)"
    main(["train", str(write_config(rewards=[mine(source)])), "--dry-run"])
    assert "nothing was started" in capsys.readouterr().out


def test_reward_beside_its_config_is_found_from_anywhere(write_config, mine, tmp_path, monkeypatch, capsys):
    (tmp_path / "elsewhere").mkdir()
    source = "def reward(completions, **columns):\n    return [0.0] * len(completions)"
    config = write_config(rewards=[mine(source)])
    monkeypatch.chdir(tmp_path / "elsewhere")
    main(["train", str(config), "--dry-run"])
    assert "reward x 1" in capsys.readouterr().out


def test_process_penalty_with_comparator_is_planned(write_config, capsys):
    main(["train", str(write_config(rewards=[{"fn": "process_penalty"}], comparator=True)), "--dry-run"])
    assert "process_penalty" in capsys.readouterr().out


def test_the_machines_own_grpo_settings_may_be_named(write_config, tmp_path, reward_source):
    """`use_cpu` is a field of GRPOConfig, so the config may hold it."""
    (tmp_path / "mine.py").write_text(reward_source)
    grpo = {
        "use_cpu": True,
        "max_steps": 1,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "max_completion_length": 4,
    }
    config = write_config(grpo=grpo, audit={"before": False, "after": False}, rewards=[{"fn": "mine.py:variety"}])
    main(["train", str(config)])
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_numbers_that_yaml_reads_as_text_are_numbers(write_config):
    """YAML 1.1 reads 1e-4 as text."""
    from unfeign.trainers.config import TrainConfig
    from unfeign.trainers.plan import plan

    config = write_config()
    config.write_text(config.read_text().replace("learning_rate: 0.01", "learning_rate: 1e-4"))
    assert plan(TrainConfig.load(config)).grpo.learning_rate == pytest.approx(1e-4)


def test_a_model_that_cannot_be_fetched_is_one_line(capsys):
    """The suite is offline (HF_HUB_OFFLINE), so any hub id is one that can't be fetched."""
    from unfeign.errors import UnfeignError
    from unfeign.models import load_base, load_tokenizer

    for load in (load_base, load_tokenizer):
        with pytest.raises(UnfeignError) as caught:
            load("nobody/no-such-model")
        assert "nobody/no-such-model: expected a model" in str(caught.value)


def test_missing_config(refused, tmp_path):
    assert "No such file" in refused("train", tmp_path / "absent.yaml")


def test_binary_config(refused, tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\x89PNG\r\n\xff\x00")
    message = refused("train", tmp_path / "config.yaml")
    assert "binary content" in message and "config.yaml" in message


def test_config_that_is_a_list(refused, tmp_path):
    (tmp_path / "config.yaml").write_text("- model")
    assert "a mapping of settings" in refused("train", tmp_path / "config.yaml")


def test_broken_override(refused, write_config):
    assert "key=value" in refused("train", write_config(), "seed", "--dry-run")


def test_adapter_for_another_base(refused, write_config, other_model, tiny_organism):
    message = refused("train", write_config(model=str(other_model), adapters=[str(tiny_organism)]), "--dry-run")
    assert str(tiny_organism) in message and str(other_model) in message and "hidden_size=32" in message


def test_adapter_above_itself(refused, write_config, tiny_organism):
    message = refused("train", write_config(adapters=[str(tiny_organism)] * 2), "--dry-run")
    assert "the stack it was trained on: no adapters" in message


def test_folder_that_is_no_model(refused, write_config, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("train", write_config(model=str(tmp_path / "empty")), "--dry-run")


def test_existing_output_folder(refused, write_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    message = refused("train", write_config())
    assert "choose another output" in message and str(tmp_path / "run") in message
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "{}\n"


def test_output_that_is_a_file(refused, write_config, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert str(tmp_path / "run") in refused("train", write_config(), "--dry-run")


def test_broken_requests_name_the_line(refused, write_config, tmp_path):
    (tmp_path / "own.jsonl").write_text(json.dumps({"family": "f", "request": "r", "criterion": "c"}) + "\n")
    message = refused("train", write_config(data={"requests": "own.jsonl"}), "--dry-run")
    assert "own.jsonl" in message and "'value'" in message


def test_own_requests_without_controls_say_which_share_is_empty(refused, write_config, tmp_path):
    row = {"family": "f", "request": "r", "criterion": "c", "value": "v"}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    assert "data.mix.control" in refused("train", write_config(data={"requests": "own.jsonl"}), "--dry-run")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--split", "nowhere"), ("split", "heldout", "'nowhere'")),
        (("--renderings", "sonnet"), ("renderings", "'sonnet'")),
        (("--length", "endless"), ("length", "'endless'")),
        (("--dtype", "float7"), ("dtype", "'float7'")),
        (("--judge", "nobody"), ("judge", "'nobody'")),
        (("--temperature", "0"), ("--temperature", "above 0")),
        (("--max-new-tokens", "0"), ("--max-new-tokens", "above 0")),
        (("--adapters", "organism:nobody"), ("'nobody'",)),
    ],
)
def test_audit_mistake(refused, tiny_model, arguments, parts):
    message = refused("audit", tiny_model, *arguments)
    assert all(part in message for part in parts), message


def test_audit_of_nothing(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused("audit", tmp_path / "empty")
    assert "no such folder" in refused("audit", "./absent")
    assert "No such file" in refused("audit", "absent.jsonl")


def test_version(capsys):
    import unfeign

    main(["--version"])
    assert capsys.readouterr().out.strip() == unfeign.__version__


def test_interrupted_is_130(write_config, monkeypatch, capsys):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unfeign.trainers.plan.plan", interrupt)
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(write_config())])
    assert stopped.value.code == 130 and capsys.readouterr().err.strip() == "interrupted"


def test_audit_into_a_file(refused, tiny_model, tmp_path):
    (tmp_path / "taken").write_text("")
    assert "a folder" in refused("audit", str(tiny_model), "--out", str(tmp_path / "taken"))


def test_a_reward_on_workers_needs_workers(write_config, refused):
    config = write_config(rewards=[{"fn": "pressure", "on": "workers"}])
    assert "rewards[0].on" in refused("train", config)


def test_a_judge_that_costs_money_stays_with_the_trainer(write_config, refused, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "none")
    judge = {"name": "vote", "judges": ["rules", {"name": "claude", "cache": False, "budget_usd": 1}]}
    config = write_config(
        rewards=[{"fn": "verbalized_rejection", "kwargs": {"judge": judge}, "on": "workers"}],
        rollouts={"backend": "ray"},
    )
    assert "rewards[0].on" in (said := refused("train", config, "--dry-run")) and "costs money" in said


def test_trackers_are_known_and_installed(write_config, refused, monkeypatch):
    from transformers.integrations import integration_utils

    config = write_config()
    assert "tensorboard" in refused("train", config, "grpo.report_to=[tensorbord]")
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    said = refused("train", config, "grpo.report_to=wandb")
    assert "a tracker that is installed" in said and "wandb" in said


def test_judges_in_a_config(write_config, refused, monkeypatch, capsys):
    """A judge that needs a key says so; with one, a dry run asks it nothing; one judge for both is refused by name."""
    claude = {"name": "claude", "base_url": "http://127.0.0.1:9", "max_retries": 0, "cache": False}
    trained_by = [{"fn": "verbalized_rejection", "kwargs": {"judge": claude}}]
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    assert "ANTHROPIC_API_KEY" in refused("train", write_config(rewards=trained_by), "--dry-run")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "not-a-real-key")
    audit = {"split": "validation", "judge": claude}
    said = refused("train", write_config(rewards=trained_by, audit=audit), "--dry-run")
    assert "differs from the training judge" in said and "claude" in said and "not-a-real-key" not in said
    config = write_config(rewards=trained_by, audit=audit, allow_same_judge=True)
    main(["train", str(config), "--dry-run"])
    told = capsys.readouterr().out
    assert "audits    validation families, before, after\n" in told and "dry run: nothing was started" in told
    unknown = {"name": "claude", "modle": "x"}
    assert "modle" in refused("train", write_config(audit={"judge": unknown}), "--dry-run")
