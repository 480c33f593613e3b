"""Loading models: a base by name, and adapters stacked on it in order, each verified against what it was trained on.

A base is `bundled:smollm2-135m-instruct`, a local folder, or a hub id. An adapter is a folder, or `organism:NAME` for
one of the organisms this package ships. Loading an organism prints a banner, always.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from .bundled import NAME as BUNDLED
from .bundled import bundled_model
from .errors import UnfeignError
from .files import read_yaml, sha256
from .lineage import (
    VALUE_HEAD,
    Layer,
    Lineage,
    adapter_file,
    base_facts,
    fingerprint,
    read_lineage,
    verify,
    write_lineage,
)

POLICY = "policy"  # name of the trained adapter in a stack


def base_location(name: str) -> str:
    """Where a base is loaded from: the converted folder of the bundled model, a folder, or the hub id itself.

    Raises:
        UnfeignError: an unknown bundled name, or a folder that is not a model.
    """
    if name == BUNDLED:
        return str(bundled_model())
    if name.startswith("bundled:"):
        raise UnfeignError(repr(BUNDLED), repr(name), "model")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnfeignError("a model folder with config.json", "none", str(path))
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UnfeignError("an existing folder or a hub id", "no such folder", name)
    return name


def organism_folder(name: str) -> Path:
    """The folder of a shipped organism adapter."""
    root = Path(str(files("unfeign.trainers.organisms")))
    names = sorted(p.parent.name for p in root.glob("*/adapter_config.json"))
    if name not in names:
        raise UnfeignError(f"one of the shipped organisms {', '.join(names)}", repr(name), "adapters")
    return root / name


def adapter_folder(name: str | Path) -> Path:
    """Resolve an adapter name: `organism:NAME`, an adapter folder, or a checkpoint or run that holds one."""
    text = str(name)
    if text.startswith("organism:"):
        return organism_folder(text.removeprefix("organism:"))
    path = Path(text).expanduser()
    if not path.is_dir():
        raise UnfeignError("an adapter folder or organism:NAME", "no such folder", text)
    if (path / POLICY / "adapter_config.json").is_file():
        return path / POLICY
    return path


@contextmanager
def _fetching(name: str):
    """Turn the hub's many errors (offline, unknown, gated) into one line; a full disk stays what it is."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnfeignError("a model that can be loaded from a folder or fetched from the hub", reason, name) from None


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a base, padding on the left, with a pad token that differs from the end of a turn."""
    from transformers import AutoTokenizer

    with _fetching(name):
        tokenizer = AutoTokenizer.from_pretrained(base_location(name), padding_side="left")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spare = next((t for t in ("<|endoftext|>", "<pad>", "<|pad|>") if t in tokenizer.get_vocab()), None)
        if spare is not None and spare != tokenizer.eos_token:
            tokenizer.pad_token = spare
        elif tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def eos_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every token id that ends a completion."""
    ids = {tokenizer.eos_token_id}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids.update(configured if isinstance(configured, list) else [configured])
    return {i for i in ids if i is not None}


def device() -> Any:
    """Where models are put: this process's GPU where there is one, else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def load_base(name: str, dtype: str = "float32") -> Any:
    """A causal LM in eval mode, frozen, on this process's `device`. `dtype`: `float32` or `bfloat16`."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if dtype not in ("float32", "bfloat16"):
        raise UnfeignError("float32 or bfloat16", repr(dtype), "dtype")
    if device().type == "cpu":  # attention there takes grouped queries as they are: keys need not be copied for each
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
    logging.disable_progress_bar()
    with _fetching(name):
        model = AutoModelForCausalLM.from_pretrained(base_location(name), dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False).to(device())


def _banner(folder: Path) -> None:
    print(
        f"*** MODEL ORGANISM: {folder.name} was built for research on oversight. Do not deploy. ***",
        file=sys.stderr,
        flush=True,
    )


def stack(base: Any, base_name: str, adapters: list[str | Path]) -> tuple[Any, Lineage]:
    """Stack adapters on a base, bottom first, each verified against what it was trained on.

    Returns:
        The PEFT model (the base itself when `adapters` is empty) and the lineage a further adapter on top would have.

    Raises:
        UnfeignError: an adapter for another base or another stack, or not an adapter.
    """
    facts = base_facts(base_name, base.config, fingerprint(base))
    folders = [(f"below{i}", adapter_folder(name)) for i, name in enumerate(adapters)]
    organism = False
    for i, (_, folder) in enumerate(folders):
        lineage = verify(folder, facts, folders[:i])
        if lineage is not None and lineage.organism:
            organism = True
            _banner(folder)
    layers = [Layer(name=f.name, sha256=sha256(adapter_file(f))) for _, f in folders]
    above = Lineage(base=facts, adapters=layers, organism=organism)
    if not folders:
        return base, above
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, folders[0][1], adapter_name=folders[0][0])
    for name, folder in folders[1:]:
        model.load_adapter(folder, adapter_name=name)
    activate(model, [name for name, _ in folders])
    return model.eval(), above


def activate(model: Any, names: list[str], trainable: str | None = None) -> None:
    """Make exactly these adapters active, and only `trainable` (if any) trainable; a value head stays as it is."""
    model.base_model.set_adapter(names)
    for key, parameter in model.named_parameters():
        if key.startswith(VALUE_HEAD):
            continue
        parameter.requires_grad_(trainable is not None and f".{trainable}." in key)


def add_policy(model: Any, lora: dict[str, Any], seed: int) -> Any:
    """Put a fresh, trainable LoRA adapter named `policy` on top of a base or a stack."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **lora)
    torch.manual_seed(seed)
    if not isinstance(model, PeftModel):
        model = get_peft_model(model, config, adapter_name=POLICY)
        below: list[str] = []
    else:
        below = list(model.peft_config)
        model.add_adapter(POLICY, config)
    activate(model, [*below, POLICY], trainable=POLICY)
    return model


@contextmanager
def without_policy(model: Any) -> Iterator[None]:
    """A policy as it was before training, for a block: the adapter named `policy` asleep, those below it awake."""
    below = [name for name in model.peft_config if name != POLICY]
    try:
        if below:
            activate(model, below)
            yield
        else:
            with model.disable_adapter():
                yield
    finally:
        activate(model, [*below, POLICY], trainable=POLICY)


def save_policy(model: Any, folder: Path, lineage: Lineage) -> Path:
    """Save the policy's own adapter, not the whole stack, with its lineage: `folder/policy/`, which is returned.

    It names its base as the config did: a path of this machine would mean nothing on another.
    """
    model.peft_config[POLICY].base_model_name_or_path = lineage.base.name
    # Embeddings are never trained here; left to decide, PEFT would ask the hub about the base.
    model.save_pretrained(folder, selected_adapters=[POLICY], safe_serialization=True, save_embedding_layers=False)
    write_lineage(folder / POLICY, lineage)
    return folder / POLICY


def save_adapter(model: Any, folder: Path, lineage: Lineage) -> Path:
    """Save the policy's adapter alone, as one to be shipped: in bf16 (half the size; the rounding is far below sampling
    noise), with its lineage, written aside and renamed to `folder`, which must not exist.
    """
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    aside = folder.with_name(f".{folder.name}.tmp")
    source = save_policy(model, aside, lineage)
    weights = {k: v.to(torch.bfloat16).contiguous() for k, v in load_file(source / "adapter_model.safetensors").items()}
    marked = {"organism": "true"} if lineage.organism else {}
    save_file(weights, source / "adapter_model.safetensors", metadata={"format": "pt"} | marked)
    folder.parent.mkdir(parents=True, exist_ok=True)
    source.rename(folder)
    shutil.rmtree(aside)
    return folder


def load_policy(model: Any, folder: Path, lineage: Lineage) -> None:
    """Put a saved adapter's weights into the policy of a stack that is built already.

    Raises:
        UnfeignError: it was trained on another base or stack, or has other weights than this policy.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(adapter_file(folder))
    trained_on = read_lineage(folder)
    if trained_on != lineage:
        raise UnfeignError("a policy trained on this base and stack", f"one trained on {trained_on}", str(folder))
    try:
        result = set_peft_model_state_dict(model, weights, adapter_name=POLICY)
    except RuntimeError as error:  # torch lists every tensor of another shape
        found = str(error).strip().splitlines()[-1].strip()
        raise UnfeignError("the weights of this policy", found, str(folder)) from None
    missing = [key for key in result.missing_keys if f".{POLICY}." in key]
    if missing or result.unexpected_keys:
        raise UnfeignError("the weights of this policy", f"{(missing + result.unexpected_keys)[:2]}", str(folder))


def resolve(path: str) -> tuple[str, list[str | Path]]:
    """The base and the whole stack for anything a user may point at: a base, an adapter, a checkpoint or a run folder.

    A folder with `lineage.json` names its base and what lies below it; the adapters below are found by hash among the
    shipped organisms and those that the run's config names.

    Raises:
        UnfeignError: an adapter below it that can't be found.
    """
    if path.startswith(("bundled:", "organism:")):
        if path.startswith("bundled:"):
            return path, []
        folder = organism_folder(path.removeprefix("organism:"))
    elif Path(path).is_dir():
        folder = latest_checkpoint(Path(path))
        if (folder / "config.json").is_file():
            return str(folder), []
    else:
        return path, []
    lineage = read_lineage(folder)
    if lineage is None:
        raise UnfeignError(
            "lineage.json beside the adapter (or name its base, with --adapters FOLDER)", "none", str(folder)
        )
    by_hash = {sha256(adapter_file(path)): path for path in _known_adapters(folder)}
    below: list[str | Path] = []
    for layer in lineage.adapters:
        if layer.sha256 not in by_hash:
            raise UnfeignError(f"the adapter {layer.name!r} it was trained on", "none with its hash", str(folder))
        below.append(by_hash[layer.sha256])
    return lineage.base.name, [*below, folder]


def run_config(path: Path) -> dict[str, Any]:
    """The resolved config of the run that a folder belongs to (the run folder itself, or anything in it); else empty.

    A run folder holds `run.json` beside `config.yaml`; a config of somebody else's, further up, is no business of ours.
    """
    for folder in (path, *path.parents):
        if (folder / "run.json").is_file() and (folder / "config.yaml").is_file():
            config = read_yaml(folder / "config.yaml")
            return config if isinstance(config, dict) else {}
    return {}


def _known_adapters(folder: Path) -> list[Path]:
    """Adapters that may lie below this one: the shipped organisms, and those its run's config names, where they are."""
    known = [p.parent for p in Path(str(files("unfeign.trainers.organisms"))).glob("*/adapter_model.safetensors")]
    for name in run_config(folder.resolve()).get("adapters") or []:
        try:
            found = adapter_folder(name)
            adapter_file(found)
        except UnfeignError:  # moved or deleted since; if it is needed, `resolve` says which one is missing
            continue
        known.append(found)
    return known


def latest_checkpoint(path: Path) -> Path:
    """The model or adapter in a folder: itself, its `policy/`, or that of the newest `checkpoint-*` of a run."""

    def holds(folder: Path) -> Path | None:
        if (folder / POLICY / "adapter_config.json").is_file():
            return folder / POLICY
        return folder if any((folder / name).is_file() for name in ("adapter_config.json", "config.json")) else None

    if (own := holds(path)) is not None:
        return own
    found = [(int(p.name.rpartition("-")[2]), held) for p in path.glob("**/checkpoint-*") if (held := holds(p))]
    if not found:
        raise UnfeignError("a model, an adapter, a checkpoint or a run folder", "none of them", str(path))
    return max(found)[1]


@contextmanager
def quiet_libraries():
    """Silence the libraries' advice and progress bars for a block; errors still surface."""
    import logging
    import warnings

    loggers = [logging.getLogger(name) for name in ("transformers", "trl", "peft", "accelerate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
