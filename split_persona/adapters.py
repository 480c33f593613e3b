"""What a persona is made of: LoRA, IA3, or a steering vector a layer, each asleep or awake for a whole call.

LoRA is PEFT's activated LoRA, told explicitly from where on it is active, so the file loads in anything that knows
aLoRA. PEFT has no such switch for IA3 or vectors: these are hooks of our own, behind the same `forward`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, get_args

import torch
from torch import nn

from ..errors import UnfeignError
from ..folded import fold_below
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


class HookSwitch:
    """Learned vectors that hooks apply while awake: `ia3` scales keys, values and the inner activations of every MLP;
    `steering` adds a vector to what every layer puts out.
    """

    def __init__(self, model: Any, kind: Kind):
        self.model, self._awake = model, False
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

            module.register_forward_hook(add)
        elif kind == "ia3" and last in ("k_proj", "v_proj"):
            scale = self._new(name, torch.ones, module.out_features)
            module.register_forward_hook(lambda _, __, out: out * scale.to(out.dtype) if self._awake else out)
        elif kind == "ia3" and last == "down_proj":
            inner = self._new(name, torch.ones, module.in_features)
            module.register_forward_pre_hook(
                lambda _, args: (args[0] * inner.to(args[0].dtype), *args[1:]) if self._awake else args
            )

    def _new(self, name: str, fill: Callable[..., torch.Tensor], size: int) -> nn.Parameter:
        self._vectors[name] = nn.Parameter(fill(size, device=self.model.device))
        return self._vectors[name]

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

    def fold(self, learning: bool) -> None:
        """Its hooks stand on the policy's layers: they are left as they are."""


def attach(model: Any, kind: str, trigger: int, options: dict[str, Any], seed: int) -> Switch:
    """Put a fresh adapter on a policy; it changes nothing until it is trained."""
    if kind == "lora":
        return LoraSwitch(model, trigger, options, seed)
    if kind not in KINDS:
        raise UnfeignError(f"one of the kinds {', '.join(KINDS)}", repr(kind), "persona")
    if options:
        raise UnfeignError(f"no options for {kind}", ", ".join(options), "lora")
    return HookSwitch(model, kind)  # type: ignore[arg-type]
