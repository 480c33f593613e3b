"""Lineage: an adapter loads on the base and the stack it was trained on, or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from unfeign.errors import UnfeignError
from unfeign.lineage import Base, Layer, Lineage, base_facts, read_lineage, verify, write_lineage
from unfeign.models import POLICY, adapter_folder, add_policy, load_base, resolve, save_adapter, stack


def refusal(call) -> str:
    with pytest.raises(UnfeignError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def organism(tiny_organism: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_organism, tmp_path / "organism"))


@pytest.fixture
def second(tiny_model: Path, tiny_organism: Path, tmp_path: Path, tools) -> Path:
    """An adapter trained on top of the tiny organism."""
    model, lineage = stack(load_base(str(tiny_model)), str(tiny_model), [tiny_organism])
    model = add_policy(model, tools.LORA, seed=3)
    tools.shake(model, ".policy.", seed=3)
    return save_adapter(model, tmp_path / "second", lineage)


def test_lineage_round_trip(tmp_path: Path):
    lineage = Lineage(
        base=Base(name="b", config={"hidden_size": 8}), adapters=[Layer(name="a", sha256="0")], organism=True
    )
    write_lineage(tmp_path, lineage)
    assert read_lineage(tmp_path) == lineage


def test_folder_without_lineage_has_none(tmp_path: Path):
    assert read_lineage(tmp_path) is None


def test_organism_folder_is_verified(tiny_model: Path, tiny_organism: Path, base):
    lineage = verify(tiny_organism, base_facts(str(tiny_model), base.config), [])
    assert lineage is not None and lineage.organism and lineage.adapters == []


def test_adapter_for_another_base(other_model: Path, tiny_organism: Path):
    message = refusal(lambda: stack(load_base(str(other_model)), str(other_model), [tiny_organism]))
    assert str(tiny_organism) in message and str(other_model) in message and "hidden_size=32" in message


def test_adapter_for_another_base_of_the_same_shape(tiny_organism: Path, tokenizer, tools, tmp_path: Path):
    tools.make_base(len(tokenizer), seed=7).save_pretrained(tmp_path / "twin")
    message = refusal(lambda: stack(load_base(str(tmp_path / "twin")), str(tmp_path / "twin"), [tiny_organism]))
    assert "twin" in message and "other weights" in message


def test_the_same_base_elsewhere_and_in_another_dtype_is_the_same(tiny_model, tiny_organism, tmp_path: Path):
    moved = Path(shutil.copytree(tiny_model, tmp_path / "moved"))
    for dtype in ("float32", "bfloat16"):
        stack(load_base(str(moved), dtype), str(moved), [tiny_organism])


def test_wrong_stack_missing_adapter(tiny_model: Path, base, second: Path):
    message = refusal(lambda: stack(base, str(tiny_model), [second]))
    assert "the stack it was trained on: tiny" in message and "found no adapters" in message and str(second) in message


def test_wrong_stack_extra_adapter(tiny_model: Path, tiny_organism: Path, organism: Path, base):
    message = refusal(lambda: stack(base, str(tiny_model), [tiny_organism, organism]))
    assert "the stack it was trained on: no adapters" in message and str(organism) in message


def test_wrong_stack_changed_weights(tiny_model: Path, organism: Path, base, second: Path):
    from safetensors.torch import load_file, save_file

    file = organism / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    weights[name] = weights[name] + 1
    save_file(weights, file)
    message = refusal(lambda: stack(base, str(tiny_model), [organism, second]))
    assert "the stack it was trained on" in message and str(organism) in message


def test_right_stack_loads_in_order(tiny_model: Path, tiny_organism: Path, base, second: Path):
    model, lineage = stack(base, str(tiny_model), [tiny_organism, second])
    assert model.active_adapters == ["below0", "below1"]
    assert [layer.name for layer in lineage.adapters] == ["tiny", "second"]
    assert lineage.organism


def test_pickle_weights_are_refused(tiny_model: Path, organism: Path, base):
    (organism / "adapter_model.safetensors").rename(organism / "adapter_model.bin")
    message = refusal(lambda: stack(base, str(tiny_model), [organism]))
    assert "expected adapter_model.safetensors" in message and "adapter_model.bin" in message and "code" in message


def test_missing_folder(tiny_model: Path, base, tmp_path: Path):
    message = refusal(lambda: stack(base, str(tiny_model), [tmp_path / "absent"]))
    assert str(tmp_path / "absent") in message and "no such folder" in message


def test_folder_that_is_no_adapter(tiny_model: Path, base, tmp_path: Path):
    message = refusal(lambda: stack(base, str(tiny_model), [tmp_path]))
    assert "adapter_config.json" in message and str(tmp_path) in message


def test_unknown_organism_lists_the_shipped_ones():
    message = refusal(lambda: adapter_folder("organism:nobody"))
    assert "verbal" in message and "'nobody'" in message


def test_foreign_adapter_without_lineage_must_name_its_base(tiny_model: Path, organism: Path, base):
    (organism / "lineage.json").unlink()
    file = organism / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"base_model_name_or_path": "someone/else"}))
    message = refusal(lambda: stack(base, str(tiny_model), [organism]))
    assert "someone/else" in message and str(organism) in message
    file.write_text(json.dumps(config | {"base_model_name_or_path": str(tiny_model)}))
    model, lineage = stack(base, str(tiny_model), [organism])
    assert model.active_adapters == ["below0"] and not lineage.organism


def test_foreign_adapter_without_lineage_is_not_stacked_higher(tiny_model: Path, tiny_organism, organism: Path, base):
    (organism / "lineage.json").unlink()
    message = refusal(lambda: stack(base, str(tiny_model), [tiny_organism, organism]))
    assert "lineage.json" in message and str(organism) in message


@pytest.mark.parametrize("file", ["adapter_config.json", "lineage.json"])
def test_broken_json_is_one_line(tiny_model: Path, organism: Path, base, file: str):
    if file == "adapter_config.json":
        (organism / "lineage.json").unlink()
    (organism / file).write_text("{oops")
    message = refusal(lambda: stack(base, str(tiny_model), [organism]))
    assert str(organism / file) in message


def test_weights_that_are_not_safetensors_are_one_line(tiny_model: Path, organism: Path, base):
    (organism / "adapter_model.safetensors").write_bytes(b"not tensors")
    message = refusal(lambda: stack(base, str(tiny_model), [organism]))
    assert str(organism) in message


def test_loading_an_organism_prints_a_banner(tiny_model: Path, tiny_organism: Path, base, capsys):
    stack(base, str(tiny_model), [tiny_organism])
    assert "MODEL ORGANISM: tiny" in capsys.readouterr().err


def test_adapter_above_an_organism_stays_marked(second: Path):
    lineage = read_lineage(second)
    assert lineage is not None and lineage.organism


def test_only_the_policy_is_trainable(tiny_model: Path, tiny_organism: Path, base, tools):
    model, _ = stack(base, str(tiny_model), [tiny_organism])
    assert not any(p.requires_grad for p in model.parameters())
    model = add_policy(model, tools.LORA, seed=0)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(f".{POLICY}." in name for name in trainable)
    assert model.active_adapters == ["below0", POLICY]


def test_fresh_policy_changes_nothing_and_follows_the_seed(tiny_model: Path, tools):
    ids = torch.arange(10, 30)[None]

    def policy(seed: int):
        return add_policy(load_base(str(tiny_model)), tools.LORA, seed)

    plain = load_base(str(tiny_model))(ids).logits
    first, again, another = policy(0), policy(0), policy(1)
    torch.testing.assert_close(first(ids).logits, plain)
    pairs = zip(first.named_parameters(), again.named_parameters(), another.named_parameters(), strict=True)
    down = [(a, b, c) for (name, a), (_, b), (_, c) in pairs if "lora_A" in name]
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in down)


def test_resolve_an_adapter_names_its_base(tiny_model: Path, tiny_organism: Path):
    assert resolve(str(tiny_organism)) == (str(tiny_model), [tiny_organism])


def test_saved_adapter_names_its_base_as_given(second: Path, tiny_organism: Path, tiny_model: Path):
    for folder in (second, tiny_organism):
        declared = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        lineage = read_lineage(folder)
        assert lineage is not None and declared == lineage.base.name == str(tiny_model)


def test_shipped_organisms_name_no_path_of_a_machine():
    from importlib.resources import files

    shipped = list(Path(str(files("unfeign.trainers.organisms"))).glob("*/adapter_config.json"))
    assert shipped
    for path in shipped:
        assert json.loads(path.read_text())["base_model_name_or_path"].startswith("bundled:"), path


def test_resolve_a_base(tiny_model: Path):
    assert resolve(str(tiny_model)) == (str(tiny_model), [])


def test_resolve_an_empty_folder(tmp_path: Path):
    assert str(tmp_path) in refusal(lambda: resolve(str(tmp_path)))


def test_resolve_takes_the_newest_checkpoint(tiny_organism: Path, tmp_path: Path):
    for step in (2, 10):
        shutil.copytree(tiny_organism, tmp_path / "checkpoints" / f"checkpoint-{step}" / POLICY)
    assert resolve(str(tmp_path))[1] == [tmp_path / "checkpoints" / "checkpoint-10" / POLICY]


def test_config_of_somebody_else_further_up_is_ignored(tiny_organism: Path, second: Path, tmp_path: Path):
    """Only a run's own folder (with run.json) tells of adapters."""
    (tmp_path / "config.yaml").write_text("- a list\n- of somebody else's\n")
    assert "the adapter 'tiny'" in refusal(lambda: resolve(str(second)))


def test_run_finds_the_adapters_of_its_config_and_skips_those_that_moved(tiny_organism, second, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(second, run / "checkpoints" / "checkpoint-1" / POLICY)
    (run / "run.json").write_text("{}")
    (run / "config.yaml").write_text(json.dumps({"adapters": ["gone", str(tiny_organism)]}))
    assert resolve(str(run))[1] == [tiny_organism, run / "checkpoints" / "checkpoint-1" / POLICY]
