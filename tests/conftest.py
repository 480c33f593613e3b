"""Fixtures: a tiny random model and a tiny organism, made on the fly: no test downloads or needs the bundled model."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

torch.set_num_threads(1)

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from unfeign.envs.scenario import scenarios

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator((text for s in scenarios("train") for text in (s.system, s.request)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def make_base(vocab: int = 800, hidden: int = 32, tied: bool = True, seed: int = 0) -> Any:
    """A random Llama; its weights are large enough that logits differ between tokens and positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).float().eval().requires_grad_(False)


def shake(model: Any, part: str, seed: int = 1, scale: float = 0.05) -> None:
    """Give LoRA `B` matrices whose name holds `part` random values: a fresh adapter is zero and would test nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and part in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """Helpers for tests that build models of their own: `make_base`, `shake`, `LORA`."""
    return SimpleNamespace(make_base=make_base, shake=shake, LORA=LORA)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 2-layer Llama and a byte-level tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = _tokenizer()
    make_base(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A base of another shape with the same tokenizer. Read only."""
    from unfeign.models import load_tokenizer

    folder = tmp_path_factory.mktemp("models") / "other"
    tokenizer = load_tokenizer(str(tiny_model))
    make_base(len(tokenizer), hidden=48).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    from unfeign.models import load_tokenizer

    return load_tokenizer(str(tiny_model))


@pytest.fixture
def base(tiny_model: Path) -> Any:
    """The tiny model, loaded afresh."""
    from unfeign.models import load_base

    return load_base(str(tiny_model))


@pytest.fixture(scope="session")
def tiny_organism(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """An adapter folder for the tiny model, marked as an organism. Read only."""
    from unfeign.models import add_policy, load_base, save_adapter, stack

    model, lineage = stack(load_base(str(tiny_model)), str(tiny_model), [])
    model = add_policy(model, LORA, seed=0)
    shake(model, ".policy.")
    folder = tmp_path_factory.mktemp("organisms") / "tiny"
    return save_adapter(model, folder, lineage.model_copy(update={"organism": True}))


@pytest.fixture
def write_config(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """Write a training config for the tiny model, output `tmp_path/run`; keyword arguments replace top-level keys."""

    def write(**changes: Any) -> Path:
        return _write_config(tmp_path, tiny_model, changes)

    return write


def _write_config(folder: Path, model: Path, changes: dict[str, Any]) -> Path:
    config = {
        "model": str(model),
        "output": str(folder / "run"),
        "lora": LORA,
        "audit": {"split": "validation", "max_new_tokens": 8},
        "rollouts": {"backend": "in_process"},
        "grpo": {
            "max_steps": 2,
            "num_generations": 2,
            "per_device_train_batch_size": 4,
            "max_completion_length": 8,
            "learning_rate": 0.01,
        },
    } | changes
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def tiny_config(tiny_model: Path) -> Callable[..., Path]:
    """`write_config` for fixtures that outlive a test: the folder comes first."""

    def write(folder: Path, **changes: Any) -> Path:
        return _write_config(folder, tiny_model, changes)

    return write


REWARD = '''
"""A reward as a researcher would write it."""


def variety(prompts, completions, completion_ids, **columns):
    """How many different tokens a completion holds, and where in the batch it stands: never constant in a group."""
    return [len(set(ids)) + 0.1 * row for row, ids in enumerate(completion_ids)]
'''


@pytest.fixture(scope="session")
def reward_source() -> str:
    """Source of a reward file whose `variety` differs within every group."""
    return REWARD


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line on wrong input: it exits with 2, says one line on stderr (returned), and writes nothing."""
    from unfeign.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert stopped.value.code == 2, said
        assert said.err.startswith("error: "), said.err
        assert said.err.count("\n") == 1, f"expected one line, found: {said.err}"
        left = [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts]
        assert left == before, "a refused command wrote files"
        return said.err.strip()

    return run
