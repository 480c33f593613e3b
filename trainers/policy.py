"""The policy of a run as a recipe: what a trainer builds once, and every rollout worker builds again where it runs.

A recipe is a few names and numbers, so it travels cheaply. Trained weights follow it as NumPy arrays (`trained`,
`put`), of the trained parameters alone: megabytes for LoRA, everything for full fine-tuning.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..lineage import VALUE_HEAD, Lineage
from ..models import add_policy, load_base, load_tokenizer, stack


@dataclass(frozen=True)
class PolicyRecipe:
    """How to build the untrained policy.

    Args:
        model: the base, as in a config.
        adapters: stacked below the policy, bottom first.
        dtype: of the base's weights.
        lora: the policy's adapter (`LoraConfig` arguments); None trains all weights.
        seed: of the adapter's first weights.
    """

    model: str
    adapters: tuple[str, ...] = ()
    dtype: str = "float32"
    lora: dict[str, Any] | None = None
    seed: int = 0

    def build(self) -> tuple[Any, Any, Lineage]:
        """The policy, its tokenizer, and the lineage of what is trained.

        In fp32 what lies below the policy is folded into the base's weights where `_folds`: that changes nothing but
        rounding, and spares every step the adapters' passes. In bf16 it would round them away.
        """
        tokenizer = load_tokenizer(self.model)
        model, lineage = stack(load_base(self.model, self.dtype), self.model, list(self.adapters))
        if self.dtype == "float32" and _folds(model):
            model = model.merge_and_unload().requires_grad_(False)
        if self.lora is None:
            return model.requires_grad_(True), tokenizer, lineage
        return add_policy(model, self.lora, self.seed), tokenizer, lineage


def _folds(model: Any) -> bool:
    """Whether all adapters of a stack are plain LoRA of linear layers that share no weight: not of a tied head."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    tuned = [m for m in model.modules() if hasattr(m, "get_base_layer")]
    return (
        bool(tuned)
        and all(type(layer) is Linear for layer in tuned)
        and model.get_output_embeddings() not in tuned
        and all(
            isinstance(c, LoraConfig)
            and not (c.lora_bias or c.use_dora or c.modules_to_save or c.alora_invocation_tokens)
            for c in model.peft_config.values()
        )
    )


def trained(policy: Any) -> dict[str, np.ndarray]:
    """The policy's trained parameters by name, as arrays that share its memory on a CPU. NumPy knows no bf16: such
    tensors travel as the int16 of the same bits.
    """
    import torch

    def view(tensor: Any) -> np.ndarray:
        tensor = tensor.detach().cpu().contiguous()
        return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()

    return {name: view(p) for name, p in policy.named_parameters() if p.requires_grad and VALUE_HEAD not in name}


def put(weights: dict[str, np.ndarray], policy: Any) -> None:
    """Write `trained` weights into another build of the same recipe, in its own dtype.

    Raises:
        ValueError: the names differ, so the recipes do.
    """
    import torch

    own = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    if own.keys() != weights.keys():
        raise ValueError(f"expected weights {sorted(own)[:2]}..., found {sorted(weights)[:2]}...")
    with torch.no_grad():
        for name, array in weights.items():
            tensor = torch.tensor(array)  # a copy: arrays from an object store are read-only
            own[name].copy_(tensor.view(torch.bfloat16) if array.dtype == np.int16 else tensor)
