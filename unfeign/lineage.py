"""Lineage: which base and which adapters, in order, a checkpoint was trained on, with hashes.

A policy adapter alone names only its raw base. Trained on top of an organism, it would load as a different model
without a word. So every adapter folder carries `lineage.json`, and loading verifies it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import UnfeignError
from .files import read_json, sha256, write_text
from .settings import Settings

FILE = "lineage.json"
VALUE_HEAD = "value_head"  # name of PPO's head on a policy: trained with it, no part of it


class Base(Settings):
    """The raw model at the bottom."""

    name: str
    """As given: `bundled:...`, a folder, or a hub id."""
    config: dict[str, Any]
    """Architecture facts that an adapter depends on."""
    fingerprint: str | None = None
    """Of its weights (see `fingerprint`); None before they are loaded, and in lineages of early versions."""

    def differences(self, other: "Base") -> list[str]:
        """What shows that another base is not this one; empty when nothing does."""
        differ = [f"{k}={v}" for k, v in self.config.items() if other.config.get(k) != v]
        if not differ and None not in (self.fingerprint, other.fingerprint) and self.fingerprint != other.fingerprint:
            differ = ["the same shape, other weights"]
        return differ


class Layer(Settings):
    """One adapter of the stack below this one."""

    name: str
    sha256: str


class Lineage(Settings):
    """What an adapter was trained on, bottom first."""

    base: Base
    adapters: list[Layer] = []
    organism: bool = False
    """Whether this adapter, or one below it, is an organism: built to fake alignment, or as a control of one."""


_FACTS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")


def base_facts(name: str, config: Any, weights: str | None = None) -> Base:
    """Describe a base by its name, the parts of its config that an adapter depends on, and its fingerprint if known."""
    return Base(name=name, config={fact: getattr(config, fact, None) for fact in _FACTS}, fingerprint=weights)


def fingerprint(model: Any) -> str:
    """Hex digest of the first entries of every parameter, rounded to bf16: two models of one shape differ in it, one
    model loaded in another dtype, from another folder or under adapters does not.
    """
    import torch

    digest = hashlib.sha256()
    own = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" not in name and not name.startswith(VALUE_HEAD)
    }
    for name, parameter in sorted(own.items()):
        head = parameter.detach().flatten()[:64].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(name.encode() + head.numpy().tobytes())
    return digest.hexdigest()


def adapter_file(folder: Path) -> Path:
    """The weights of an adapter folder.

    Raises:
        UnfeignError: not an adapter folder, or its weights are in pickle format.
    """
    weights = folder / "adapter_model.safetensors"
    if not (folder / "adapter_config.json").is_file():
        raise UnfeignError("an adapter folder with adapter_config.json", "none", str(folder))
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise UnfeignError(
            "adapter_model.safetensors", "adapter_model.bin, which could run code" if pickled else "none", str(folder)
        )
    try:
        with safe_open(weights, framework="numpy"):
            pass
    except SafetensorError as error:
        raise UnfeignError("a safetensors file", str(error), str(weights)) from None
    return weights


def write_lineage(folder: Path, lineage: Lineage) -> None:
    """Write `lineage.json` beside an adapter."""
    write_text(folder / FILE, json.dumps(lineage.model_dump(), indent=2) + "\n")


def read_lineage(folder: Path) -> Lineage | None:
    """The lineage of an adapter folder; None for an adapter of another origin, which has none."""
    return Lineage.load(folder / FILE) if (folder / FILE).exists() else None


def verify(folder: Path, base: Base, below: list[tuple[str, Path]]) -> Lineage | None:
    """Check that an adapter was trained on this base and this stack.

    Args:
        folder: the adapter.
        base: the base about to carry it.
        below: (name, folder) of the adapters already stacked, bottom first.

    Raises:
        UnfeignError: another base, or another stack.
    """
    adapter_file(folder)
    lineage = read_lineage(folder)
    if lineage is None:
        declared = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if below:
            raise UnfeignError("an adapter with lineage.json above other adapters", "none", str(folder))
        if declared not in (None, "", base.name):
            raise UnfeignError(f"an adapter for base {base.name!r}", f"one for {declared!r}", str(folder))
        return None
    if differ := lineage.base.differences(base):
        raise UnfeignError(
            f"an adapter for base {base.name!r}", f"one for {lineage.base.name!r} ({', '.join(differ)})", str(folder)
        )
    have = [sha256(adapter_file(path)) for _, path in below]
    want = [layer.sha256 for layer in lineage.adapters]
    if have != want:
        names = ", ".join(layer.name for layer in lineage.adapters) or "no adapters"
        found = ", ".join(f"{name} ({path})" for name, path in below) or "no adapters"
        raise UnfeignError(f"the stack it was trained on: {names}", found, str(folder))
    return lineage
