"""The layer below the adapters: its sizes, how it is called, and what a quantised or hooked one asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..ops.checks import WHOLE, check_whole


def base_of(module: nn.Module) -> nn.Module:
    """The module below any adapters."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module  # type: ignore[no-any-return]


def outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model by name, without what is inside of layers that have adapters."""
    inside = ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        inside = f"{name}." if name and isinstance(module, BaseTunerLayer) else ""
        yield name, module


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear module, quantised or not; a ValueError if it does not say."""
    if isinstance(module, Conv1D):  # its weight is stored [in, out]
        rows, columns = module.weight.shape
        return rows, columns
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    in_features, out_features = _get_in_out_features(module)
    if in_features is None or out_features is None:
        raise ValueError(f"{type(module).__name__} has no in_features and out_features: it cannot be adapted")
    return in_features, out_features


def refuse_split(module: nn.Module, name: str = "") -> None:
    """Raise a ValueError if processes share the weights of a module, or of one inside it."""
    check_whole(dict(module.named_parameters()), name)
    for key, part in module.named_modules():
        if (plan := getattr(part, "_hf_tp_plan", None)) is not None:  # transformers before 5.17: no DTensor says so
            key = f"{name}.{key}".strip(".")
            raise ValueError(f"{key} is split over processes by the tp_plan {plan!r}, and {WHOLE}")


def hooked(base: nn.Module) -> bool:
    """Whether calling the module runs hooks besides its forward."""
    hooks = base._forward_pre_hooks or base._forward_hooks or base._backward_pre_hooks or base._backward_hooks
    return bool(hooks) or "forward" in base.__dict__  # offloading libraries replace it on the instance


def only_multiplies(module: nn.Module) -> bool:
    """Whether calling the module is x W^T + bias with a plain W and nothing else."""
    return type(module) is nn.Linear and not hooked(module) and type(module.weight) in (nn.Parameter, Tensor)


def takes_fused_op(base: nn.Module) -> bool:
    """The same with a frozen W of floating-point numbers."""
    if not only_multiplies(base):
        return False
    weight: Any = base.weight  # each look at a parameter passes `nn.Module.__getattr__`
    return bool(weight.is_floating_point() and not weight.requires_grad)


def undo_cpu_packing(base: nn.Module) -> None:
    """Give a bitsandbytes 4-bit weight its ordinary layout back, which gradients and merges need.

    On CPUs with AVX512-BF16 the first evaluation packs it for a kernel that has no backward, and dequantising the
    packed bytes gives other numbers.
    """
    weight = base._parameters.get("weight")
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpacked

        weight.data, weight.quant_state = unpacked(weight.data, weight.quant_state)  # type: ignore[union-attr]


def _unpack_for_gradients(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    inputs = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        undo_cpu_packing(module)


def guard_gradients(model: nn.Module) -> None:
    """Let gradients pass every 4-bit layer of the model after an evaluation, adapted or not."""
    for module in model.modules():
        is_four_bit = hasattr(module._parameters.get("weight"), "quant_state")
        if is_four_bit and _unpack_for_gradients not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_unpack_for_gradients, with_kwargs=True)


def quantization_backend(base: nn.Module, **quantization: Any) -> QuantizationBackend | None:
    """PEFT's backend for a quantised base, None for any other.

    A torchao base made by `quantize_()` does not say how a merged weight is quantised again: it trains, and its backend
    supports no merge.
    """
    how = "get_apply_tensor_subclass"
    known = quantization.get(how) is not None
    backend = resolve_quantization_backend(base, **(quantization if known else {**quantization, how: _unknown}))
    if backend is not None and getattr(backend, how, None) is _unknown:
        backend.supports_merge = False
    return backend


def _unknown() -> None:
    """Stands for torchao's recipe where the model has none; never called, because such a base is not merged."""


def call_base(base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`base(x)`; a TypeError if the module returns anything but one tensor."""
    out = base(x, *args, **kwargs)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"{type(base).__name__} returns {type(out).__name__}; ALoRA adapts layers that return a tensor")
    return out
