"""Every shipped config is one that runs: it parses, its rewards load, and a run of it can be planned."""

from importlib.resources import files
from pathlib import Path

import pytest

from unfeign.trainers.config import TrainConfig
from unfeign.trainers.organism import OrganismConfig
from unfeign.trainers.plan import plan

FOLDER = Path(str(files("unfeign.configs")))
CONFIGS = sorted(path.name for path in FOLDER.glob("*.yaml"))
PERSONAS = [name for name in CONFIGS if name.startswith("persona")]
TRAIN = [name for name in CONFIGS if not name.startswith(("organism_", "persona"))]
ORGANISMS = [name for name in CONFIGS if name.startswith("organism_")]


def test_all_kinds_are_found():
    assert "quickstart.yaml" in TRAIN and "organism_verbal.yaml" in ORGANISMS and "persona.yaml" in PERSONAS


@pytest.mark.parametrize("name", PERSONAS)
def test_persona_config_makes_a_persona(name: str, tiny_model: Path):
    from unfeign.models import adapter_folder, load_base, load_tokenizer, stack
    from unfeign.split_persona.build import PersonaConfig
    from unfeign.split_persona.persona import Persona

    config = PersonaConfig.load(FOLDER / name)
    assert all((adapter_folder(adapter) / "adapter_config.json").is_file() for adapter in config.adapters)
    model, lineage = stack(load_base(str(tiny_model)), str(tiny_model), [])
    assert Persona(model, load_tokenizer(str(tiny_model)), lineage, config.facts()).switch.parameters()


@pytest.mark.parametrize("name", CONFIGS)
def test_config_says_what_it_is_for(name: str):
    assert (FOLDER / name).read_text().startswith("# ")


@pytest.mark.parametrize("name", TRAIN)
def test_training_config_can_be_planned(name: str, tiny_model: Path, tmp_path: Path):
    """On the tiny model, since planning reads the base's config; everything else is the file's own."""
    overrides = (f"model={tiny_model}", "adapters=[]", f"output={tmp_path / 'run'}")
    run = plan(TrainConfig.load(FOLDER / name, overrides))
    samples = run.grpo.max_steps * run.grpo.per_device_train_batch_size * run.grpo.gradient_accumulation_steps
    assert run.rewards and len(run.scenarios) == samples // run.grpo.num_generations
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", TRAIN)
def test_training_config_names_adapters_that_exist(name: str):
    from unfeign.models import adapter_folder

    for adapter in TrainConfig.load(FOLDER / name).adapters:
        assert (adapter_folder(adapter) / "adapter_config.json").is_file()


def test_training_outputs_differ():
    outputs = [TrainConfig.load(FOLDER / name).output for name in TRAIN]
    outputs += [OrganismConfig.load(FOLDER / name).output for name in ORGANISMS]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("name", ORGANISMS)
def test_organism_config_draws_a_corpus(name: str):
    from unfeign.trainers.corpus import Corpus

    config = OrganismConfig.load(FOLDER / name)
    for number, each in enumerate(config.rounds):
        groups = Corpus(config.voices, config.seed + number).groups(
            each.mix.model_dump(), each.completions.model_dump(), 2
        )
        kinds = {specimen.kind for group in groups for specimen in group}
        assert kinds <= {kind for share in each.mix.model_dump().values() for kind in share}
        assert len(groups) > 20
