"""Reading a saved adapter: shapes are compared by name before a single weight is written.

In:   the tensors of an adapter file and the model they are meant for.
Out:  nothing, or an error that names the module and both shapes; the model stays usable.
Who:  `ALoRAModel`, on PEFT's way from the file to `load_state_dict`.

An adapter that was created only to be loaded (its B are still zero) is taken out again, so that a failed
`PeftModel.from_pretrained(base, folder)` gives the base back as it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .layer import ALoRALayer

DIMENSIONS = {
    "asymlora_A": "(experts, r, in_features)",
    "asymlora_B": "(out_features, r)",
    "asymlora_router": "(experts, in_features)",
}


_BARE = re.compile(r"\.asymlora_(A|B|router)$")


def with_weight(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter file by their names of today: the first files said `asymlora_A`, without `.weight`.

    Args:
        tensors: by their names in the file.
    """
    return {f"{key}.weight" if _BARE.search(key) else key: tensor for key, tensor in tensors.items()}


def check_shapes(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless every tensor has the shape of the parameter it is for.

    Args:
        model: the PEFT model, or a base model with injected layers.
        adapter_name: the adapter that is loaded.
        tensors: by their names in the model.

    Raises:
        ValueError: naming the module and both shapes, or saying that the model has no such adapter.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, ALoRALayer)}
    if not any(adapter_name in layer.asymlora_spec for layer in layers.values()):
        raise ValueError(
            f"the model has no ALoRA layers for adapter {adapter_name!r}: add the adapter before loading it"
        )
    for name, layer in layers.items():
        for part, meaning in DIMENSIONS.items():
            weights = getattr(layer, part)
            key = f"{name}.{part}.{adapter_name}.weight"
            found = next((tensors[k] for k in (key, f"base_model.model.{key}") if k in tensors), None)
            if found is None or adapter_name not in weights or found.shape == weights[adapter_name].weight.shape:
                continue
            wanted = tuple(weights[adapter_name].weight.shape)
            module = name.removeprefix("base_model.model.")
            base = layer.get_base_layer()
            _take_out_if_new(model, adapter_name, list(layers.values()))
            raise ValueError(
                f"the adapter does not fit this base: {module}.{part} {meaning} is {tuple(found.shape)} in the file but"
                f" {wanted} here, where {module} is a {type(base).__name__} with in_features={layer.in_features},"
                f" out_features={layer.out_features}; load it on the base it was trained on"
            )


def _is_new(layers: list[ALoRALayer], adapter_name: str) -> bool:
    b = [layer.asymlora_B[adapter_name].weight for layer in layers if adapter_name in layer.asymlora_B]
    return all(t.is_meta or not torch.any(t != 0) for t in b)


def _take_out_if_new(model: Any, adapter_name: str, layers: list[ALoRALayer]) -> None:
    if not _is_new(layers, adapter_name):
        return
    if len(model.peft_config) > 1 and hasattr(model, "delete_adapter"):
        model.delete_adapter(adapter_name)
        return
    tuner: Any = getattr(model, "base_model", None)
    if hasattr(tuner, "unload"):
        tuner.unload()
