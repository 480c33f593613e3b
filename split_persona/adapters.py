"""What a persona is made of: LoRA, IA3, or a steering vector a layer, each asleep or awake for a whole call.

LoRA is PEFT's activated LoRA, told explicitly from where on it is active, so the file loads in anything that knows
aLoRA. PEFT has no such switch for IA3 or vectors: these are hooks of our own, behind the same `forward`. Where a policy
generates, from a plain folded copy, LoRA is hooks too (`lend`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch
from torch import nn

from ..errors import UnfeignError
from ..folded import PackedLinear, fold_below
from ..models import activate

Kind = Literal["lora", "ia3", "steering"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NAME = "persona"
LORA = {"r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "use_rslora"}


class Switch(Protocol):
    """An adapter on a policy that is asleep or awake."""

    def forward(self, awake: bool, inputs: dict[str, Any]) -> Any:
        """Call the model once."""

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is saved."""

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put saved tensors in; raises `KeyError` or `RuntimeError` where they are another adapter's."""

    def fold(self, learning: bool) -> None:
        """Make calls cheaper, where that is possible; unless it is for `learning`, no gradient flows any more."""


class LoraSwitch:
    """Activated LoRA on top of a policy, which keeps the adapters it has."""

    def __init__(self, model: Any, trigger: int, options: dict[str, Any], seed: int):
        from peft import LoraConfig, PeftModel, get_peft_model
        from peft.tuners.lora.variants import ALoraLinearVariant

        class WholeCall(ALoraLinearVariant):
            """PEFT picks the active tokens out of every layer's input; here they are all of a call's, or none."""

            @staticmethod
            def forward(module: Any, active_adapter: str, x: Any, result: Any, **kwargs: Any) -> Any:
                offsets, a = kwargs.get("alora_offsets") or [], module.lora_A[active_adapter]
                if not any(offsets):
                    return result
                if any((offset or 0) < x.size(-2) for offset in offsets):
                    return ALoraLinearVariant.forward(module, active_adapter, x, result, **kwargs)
                grown = module.lora_B[active_adapter](a(x.to(a.weight.dtype))) * module.scaling[active_adapter]
                return result + grown

        if unknown := sorted(options.keys() - LORA):  # others would act while the persona sleeps, or not at all
            raise UnfeignError(f"LoRA options among {', '.join(sorted(LORA))}", ", ".join(unknown), "lora")
        options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | options
        torch.manual_seed(seed)
        try:
            config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, alora_invocation_tokens=[trigger], **options)
            if isinstance(model, PeftModel):
                below = list(model.active_adapters)
                model.add_adapter(NAME, config)
            else:
                below, model = [], get_peft_model(model, config, adapter_name=NAME)
        except (ValueError, TypeError) as error:
            raise UnfeignError("LoRA options that this model takes", str(error).splitlines()[0], "lora") from None
        activate(model, [*below, NAME], trainable=NAME)
        for module in model.modules():
            if NAME in getattr(module, "lora_variant", {}):
                module.lora_variant[NAME] = WholeCall()
        self.model = model

    def forward(self, awake: bool, inputs: dict[str, Any]) -> Any:
        rows, width = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[:2]
        return self.model(**inputs, alora_offsets=[width if awake else 0] * rows)

    def parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.model.named_parameters() if f".{NAME}." in name]

    def tensors(self) -> dict[str, torch.Tensor]:
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.model, adapter_name=NAME, save_embedding_layers=False)

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        from peft import set_peft_model_state_dict

        result = set_peft_model_state_dict(self.model, tensors, adapter_name=NAME)
        if missing := [key for key in result.missing_keys if f".{NAME}." in key] + list(result.unexpected_keys):
            raise KeyError(", ".join(missing[:2]))

    def fold(self, learning: bool) -> None:
        fold_below(self.model, pack=not learning)
        activate(self.model, [NAME], trainable=NAME if learning else None)


class _Hooked:
    """A model with hooks that do something while awake."""

    def __init__(self, model: Any):
        self.model, self._awake = model, False
        self._handles: list[Any] = []

    def forward(self, awake: bool, inputs: dict[str, Any]) -> Any:
        with self._set(awake):
            return self.model(**inputs)

    @contextmanager
    def _set(self, awake: bool) -> Iterator[None]:
        before, self._awake = self._awake, awake
        try:
            yield
        finally:
            self._awake = before

    def fold(self, learning: bool) -> None:
        """Its hooks stand on the policy's layers: they are left as they are."""

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()


class LentLora(_Hooked):
    """A saved LoRA on a plain model, for reading. Layers that are packed get weights with the LoRA folded in, which
    take their places while it is awake; others have hooks.

    Args:
        kept: folded weights of this LoRA on these very weights, by layer, from an earlier loan; new ones are put in.
    """

    def __init__(self, model: Any, options: dict[str, Any], kept: dict[str, torch.Tensor]):
        super().__init__(model)
        self._kept = kept
        self._others: list[tuple[PackedLinear, torch.Tensor]] = []
        self._options = {"r": 8, "lora_alpha": 16} | options
        self._tensors: dict[str, torch.Tensor] = {}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        rank = self._options["r"]
        scale = self._options["lora_alpha"] / (rank**0.5 if self._options.get("use_rslora") else rank)
        for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            try:
                module = self.model.get_submodule(name)
            except AttributeError as error:
                raise KeyError(f"no layer {name}") from error
            own = {"dtype": self.model.dtype, "device": self.model.device}
            a, b = tensors[key].to(**own), tensors[key.replace(".lora_A.", ".lora_B.")].to(**own)
            if isinstance(module, PackedLinear):
                if name not in self._kept:
                    self._kept[name] = module.packed_with(scale * b @ a)
                self._others.append((module, self._kept[name]))
                continue
            self._handles.append(module.register_forward_hook(partial(self._add, a.T, scale * b.T)))

    @contextmanager
    def _set(self, awake: bool) -> Iterator[None]:
        if awake == self._awake:
            yield
            return
        with super()._set(awake):
            self._swap()
            try:
                yield
            finally:
                self._swap()

    def _swap(self) -> None:
        self._others = [(module, module.swap(other)) for module, other in self._others]

    def _add(self, a: torch.Tensor, b: torch.Tensor, _: Any, given: Any, out: torch.Tensor) -> torch.Tensor | None:
        if self._awake:
            out.view(-1, out.size(-1)).addmm_(given[0].reshape(-1, a.size(0)) @ a, b)

    def parameters(self) -> list[nn.Parameter]:
        return []

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._tensors


class HookSwitch(_Hooked):
    """Learned vectors that hooks apply while awake: `ia3` scales keys, values and the inner activations of every MLP;
    `steering` adds a vector to what every layer puts out.
    """

    def __init__(self, model: Any, kind: Kind):
        super().__init__(model)
        self._vectors: dict[str, nn.Parameter] = {}
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._config = base.config
        for name, module in list(base.named_modules()):
            if "base_layer" in name.split("."):
                continue
            self._attach(kind, name, module)
        if not self._vectors:
            raise UnfeignError(f"an architecture that {kind} knows (Llama-like names)", type(base).__name__, "persona")

    def _attach(self, kind: Kind, name: str, module: nn.Module) -> None:
        last = name.rpartition(".")[2]
        if kind == "steering" and last.isdigit() and hasattr(module, "self_attn"):
            vector = self._new(name, torch.zeros, self._config.hidden_size)

            def add(_: Any, __: Any, out: Any) -> Any:
                if not self._awake:
                    return out
                return (
                    (out[0] + vector.to(out[0].dtype), *out[1:])
                    if isinstance(out, tuple)
                    else out + vector.to(out.dtype)
                )

            self._handles.append(module.register_forward_hook(add))
        elif kind == "ia3" and last in ("k_proj", "v_proj"):
            scale = self._new(name, torch.ones, module.out_features)
            self._handles.append(
                module.register_forward_hook(lambda _, __, out: out * scale.to(out.dtype) if self._awake else out)
            )
        elif kind == "ia3" and last == "down_proj":
            inner = self._new(name, torch.ones, module.in_features)
            self._handles.append(
                module.register_forward_pre_hook(
                    lambda _, args: (args[0] * inner.to(args[0].dtype), *args[1:]) if self._awake else args
                )
            )

    def _new(self, name: str, fill: Callable[..., torch.Tensor], size: int) -> nn.Parameter:
        self._vectors[name] = nn.Parameter(fill(size, device=self.model.device))
        return self._vectors[name]

    def parameters(self) -> list[nn.Parameter]:
        return list(self._vectors.values())

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: vector.detach() for name, vector in self._vectors.items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        if tensors.keys() != self._vectors.keys():
            raise KeyError(", ".join(sorted(tensors.keys() ^ self._vectors.keys())[:2]))
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._vectors[name].copy_(tensor)


def lend(model: Any, kind: Kind, options: dict[str, Any], kept: dict[str, torch.Tensor]) -> "LentLora | HookSwitch":
    """A saved adapter's place on a plain model that belongs to somebody else, for reading: `load` it, then `remove`.
    For `kept` see `LentLora`.
    """
    return LentLora(model, options, kept) if kind == "lora" else HookSwitch(model, kind)


def attach(model: Any, kind: str, trigger: int, options: dict[str, Any], seed: int) -> Switch:
    """Put a fresh adapter on a policy; it changes nothing until it is trained."""
    if kind == "lora":
        return LoraSwitch(model, trigger, options, seed)
    if kind not in KINDS:
        raise UnfeignError(f"one of the kinds {', '.join(KINDS)}", repr(kind), "persona")
    if options:
        raise UnfeignError(f"no options for {kind}", ", ".join(options), "lora")
    return HookSwitch(model, kind)  # type: ignore[arg-type]
