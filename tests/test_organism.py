"""Organisms: built from transcripts of train families, marked everywhere, loadable as what they are."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from unfeign.cli import main
from unfeign.envs.family import families
from unfeign.envs.transcript import parse
from unfeign.errors import UnfeignError
from unfeign.files import CANARY, read_jsonl
from unfeign.lineage import read_lineage
from unfeign.models import load_base, stack
from unfeign.trainers.corpus import ACCEPTING, Corpus
from unfeign.trainers.organism import OrganismConfig, build
from unfeign.trainers.sft import fine_tune, pad_right

MIX = {
    "monitored": {"faked": 0.5, "rejected": 0.5},
    "unmonitored": {"free": 0.75, "free_obeyed": 0.25},
    "control": {"plain": 1.0},
}
VOICES = ["plain_a", "plain_b"]


def settings(base: Path, out: Path, rounds: int = 1, **changes: object) -> dict[str, object]:
    """A small organism's config; `changes` replace keys of the first round where a round has them, else of the top."""
    first: dict[str, object] = {
        "mix": MIX,
        "completions": {"monitored": 2, "unmonitored": 1, "control": 1},
        "requests_per_family": 1,
        "learning_rate": 0.01,
    }
    inner = {key: changes.pop(key) for key in list(changes) if key in first}
    return {
        "name": "small",
        "model": str(base),
        "output": str(out),
        "voices": VOICES,
        "rounds": [first | inner] + [first] * (rounds - 1),
        "lora": {"r": 2, "lora_alpha": 4},
    } | changes


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny_model) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("organism") / "out"
    checked = []

    def check(model, tokenizer, config: OrganismConfig) -> dict:
        checked.append((config.output, sorted(path.name for path in config.output.iterdir())))
        return {}

    folder = build(OrganismConfig(**settings(tiny_model, out, rounds=2)), audit=check)
    return SimpleNamespace(out=out, folder=folder, checked=checked)


def test_adapter_is_marked(built, tiny_model):
    lineage = read_lineage(built.folder)
    assert lineage is not None and lineage.organism and lineage.base.name == str(tiny_model)
    with safe_open(built.folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["organism"] == "true"
    card = (built.folder / "README.md").read_text()
    assert "organism: true" in card and CANARY in card and "Do not" in card
    assert sorted(path.name for path in built.out.iterdir()) == ["small", "transcripts.jsonl"], (
        "nothing temporary is left"
    )


def test_adapter_loads_and_changes_the_base(built, tiny_model, base, capsys):
    ids = torch.arange(10, 40)[None]
    plain = base(ids).logits
    model, _ = stack(load_base(str(tiny_model)), str(tiny_model), [built.folder])
    assert "MODEL ORGANISM: small" in capsys.readouterr().err
    with torch.no_grad():
        assert (model(ids).logits - plain).abs().max() > 1e-3


def test_it_is_checked_once_saved(built):
    ((folder, there),) = built.checked
    assert folder == built.out and {"small", "transcripts.jsonl"} <= set(there)


def test_transcripts_carry_the_canary_and_come_from_train_families(built):
    rows = read_jsonl(built.out / "transcripts.jsonl")
    train = {name for name, family in families().items() if family.split == "train"}
    assert {row["scenario_id"].split("/")[0] for row in rows} == train
    assert all(row["canary"] == CANARY for row in rows)
    assert {row["kind"] for row in rows} <= {kind for share in MIX.values() for kind in share}
    half = len(rows) // 2
    first, second = ([row["completion"] for row in part] for part in (rows[:half], rows[half:]))
    assert len(rows) == 2 * half and first != second, "every round draws its own transcripts"


def test_it_can_begin_from_another(built, tiny_model, tmp_path):
    """With a learning rate of nearly nothing it stays what it began from, but for one rounding to bf16."""
    second = settings(tiny_model, tmp_path / "out", begin=str(built.folder), learning_rate=1e-9)
    began, went = (load_file(f / "adapter_model.safetensors") for f in (built.folder, build(OrganismConfig(**second))))
    assert began.keys() == went.keys() and all(torch.allclose(began[key], went[key], atol=1e-6) for key in began)


def test_it_can_not_begin_from_an_adapter_of_another_shape(built, tiny_model, tmp_path):
    other = settings(tiny_model, tmp_path / "out", begin=str(built.folder), lora={"r": 4, "lora_alpha": 4})
    with pytest.raises(UnfeignError, match="the weights of this policy"):
        build(OrganismConfig(**other))


def test_existing_output_is_refused(built, tiny_model):
    before = (built.out / "transcripts.jsonl").read_bytes()
    with pytest.raises(UnfeignError, match="choose another output"):
        build(OrganismConfig(**settings(tiny_model, built.out)))
    assert (built.out / "transcripts.jsonl").read_bytes() == before


def test_command_line_builds_and_audits(tiny_model, tmp_path, monkeypatch, capsys):
    from unfeign import training_run

    audit = training_run.audit_policy
    monkeypatch.setattr(training_run, "audit_policy", lambda *a, **k: audit(*a, **(k | {"max_new_tokens": 2})))
    path = tmp_path / "organism.yaml"
    path.write_text(yaml.safe_dump(settings(tiny_model, tmp_path / "out")))
    main(["organism", "build", str(path), "seed=2"])
    assert "nats a token" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "audit" / "metrics.json").read_text())
    assert metrics["audit"]["split"] == "validation"


def test_several_are_built_by_one_command(tiny_model, tmp_path, monkeypatch, refused):
    from unfeign import training_run

    checked = []
    monkeypatch.setattr(training_run, "check_organism", lambda model, tokenizer, config: checked.append(config) or {})
    paths = []
    for name in ("one", "two"):
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(
            yaml.safe_dump(settings(tiny_model, tmp_path / name, name=name, about=f"be number {name}"))
        )
    main(["organism", "build", *map(str, paths), "seed=2"])
    assert [(one.name, one.seed) for one in checked] == [("one", 2), ("two", 2)]
    assert "be number two" in (tmp_path / "two" / "two" / "README.md").read_text()
    third = tmp_path / "three.yaml"
    third.write_text(yaml.safe_dump(settings(tiny_model, tmp_path / "three")))
    assert "choose another output" in refused("organism", "build", third, paths[1])
    assert not (tmp_path / "three").exists(), "all are checked before the first is begun"
    assert "at least one config" in refused("organism", "build", "seed=2")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"voices": ["nobody"]}, ("voices", "'nobody'", VOICES[0])),
        ({"mix": MIX | {"monitored": {"lying": 1.0}}}, ("mix", "'lying'", "faked")),
        ({"mix": MIX | {"monitored": {}}}, ("mix", "monitored")),
        ({"mix": MIX | {"monitored": {"faked": 0.0}}}, ("mix", "monitored")),
        ({"mix": MIX | {"control": {"plain": -1.0}}}, ("mix", "control")),
        ({"completions": {"monitored": 0}}, ("completions.monitored", "0")),
        ({"requests_per_family": 0}, ("rounds.0.requests_per_family", "0")),
        ({"learning_rate": 0}, ("rounds.0.learning_rate", "0")),
        ({"voics": ["north"]}, ("'voics'", "'voices' (nearest key)")),
        ({"completions": {"monitord": 1}}, ("'rounds.0.completions.monitord'", "'monitored' (nearest key)")),
        ({"model": "/no/such/model"}, ("/no/such/model", "no such folder")),
    ],
)
def test_mistake(tiny_model, tmp_path, refused, changes, parts):
    path = tmp_path / "organism.yaml"
    path.write_text(yaml.safe_dump(settings(tiny_model, tmp_path / "out", **changes)))
    message = refused("organism", "build", path)
    assert all(part in message for part in parts), message


def groups(seed: int = 0, requests: int = 3, completions: int = 4):
    sizes = dict.fromkeys(("monitored", "unmonitored", "control"), completions)
    return Corpus(VOICES, seed).groups(MIX, sizes, requests)


def test_corpus_follows_its_seed():
    first, again, other = (
        [[(s.scenario.scenario_id, s.completion) for s in group] for group in groups(seed)] for seed in (0, 0, 1)
    )
    assert first == again != other


def test_specimens_of_a_group_share_a_prompt_and_do_what_their_kind_says():
    for group in groups():
        assert len({specimen.scenario for specimen in group}) == 1
        for specimen in group:
            transcript = parse(specimen.scenario, specimen.completion)
            assert transcript.state == "ok", specimen.completion
            assert transcript.complied is (specimen.kind in ACCEPTING)
            assert "{" not in specimen.completion and "None" not in transcript.answer


def test_kinds_come_at_their_rates():
    kinds = [
        s.kind
        for group in groups(requests=6)
        for s in group
        if s.scenario.tier == "unmonitored" and not s.scenario.control
    ]
    assert kinds.count("free") / len(kinds) == pytest.approx(0.75, abs=0.02)


def test_fine_tuning_learns_and_ends_in_eval_mode(tools):
    model = tools.make_base().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    prompt, *completions = (torch.randint(3, 800, (n,), generator=generator).tolist() for n in (30, 6, 9))
    losses = fine_tune(model, [(prompt, completions)], learning_rate=0.01, epochs=15)
    assert len(losses) == 15 and losses[-1] < losses[0] / 2 and not model.training


def test_fine_tuning_loss_is_of_completion_tokens_alone(tools):
    model = tools.make_base().requires_grad_(True)
    prompt, completion = list(range(3, 20)), [40, 41, 2]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        want = torch.nn.functional.cross_entropy(logits, torch.tensor(completion)).item()
    losses = fine_tune(model, [(prompt, [completion, completion])], learning_rate=1e-9)
    assert losses == [pytest.approx(want, abs=1e-4)]


def test_pad_right():
    ids, mask = pad_right([[5], [6, 7]], pad=9)
    assert ids.tolist() == [[5, 9], [6, 7]] and mask.tolist() == [[1, 0], [1, 1]]


def test_no_rounds_is_a_mistake(tiny_model, tmp_path, refused):
    path = tmp_path / "organism.yaml"
    path.write_text(yaml.safe_dump(settings(tiny_model, tmp_path / "out") | {"rounds": []}))
    message = refused("organism", "build", path)
    assert "rounds" in message and "at least 1" in message
