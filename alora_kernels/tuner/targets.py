"""Which modules can be adapted, and how their output is computed.

In:   a module that `target_modules` matched.
Out:  its in and out features, whether its weight can go into the fused op, or an error that names the module.
Who:  `ALoRAModel` before it touches the model; `ALoRALinear` at every call.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ROUTED_EXPERT = re.compile(r"(^|\.)experts\.(expert_)?\d+\.")


def base_of(module: nn.Module) -> nn.Module:
    """The module below any adapters."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module  # type: ignore[no-any-return]


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear module, quantised or not.

    Raises:
        ValueError: the module does not say.
    """
    if isinstance(module, Conv1D):  # its weight is stored [in, out]
        rows, columns = module.weight.shape
        return rows, columns
    in_features, out_features = _get_in_out_features(module)
    if in_features is None or out_features is None:
        raise ValueError(f"{type(module).__name__} has no in_features and out_features: it cannot be adapted")
    return in_features, out_features


def check_target(module: nn.Module, parent: nn.Module, name: str, experts: int, soft: bool) -> None:
    """Raise unless the module is a linear layer that adapters can serve.

    Args:
        module: the target.
        parent: the module that holds it.
        name: its name in the model.
        experts: E of the adapter.
        soft: whether the adapter routes by itself.

    Raises:
        ValueError: naming the module and the remedy.
    """
    base = base_of(module)
    kind, leave_out = type(base).__name__, f"leave it out of target_modules or add it to exclude_modules: {name!r}"
    if isinstance(base, nn.Embedding):
        raise ValueError(
            f"{name} is an {kind}: ALoRA adapts linear layers. To train it, put it in modules_to_save, or {leave_out}"
        )
    if isinstance(base, nn.modules.conv._ConvNd):
        raise ValueError(
            f"{name} is a {kind}: ALoRA adapts linear layers; of a convolution adapt the linear layers around it and"
            f" {leave_out}"
        )
    if isinstance(parent, nn.MultiheadAttention) or isinstance(base, nn.MultiheadAttention):
        raise ValueError(
            f"{name} belongs to nn.MultiheadAttention, which multiplies by its weights without calling a layer, so an"
            f" adapter would do nothing: {leave_out}, or use a model with separate projection layers"
        )
    if not _is_linear(base):
        raise ValueError(f"{name} is a {kind}, which is not a linear layer: {leave_out}")
    if ROUTED_EXPERT.search(name + ".") and experts > 1 and not soft:
        raise ValueError(
            f"{name} is a routed expert: it sees rows of the batch in another order, so task ids would not fit them."
            f' Use routing="soft" for it, or {leave_out}'
        )


def _is_linear(base: nn.Module) -> bool:
    if isinstance(base, nn.Linear | Conv1D):
        return True
    named = hasattr(base, "in_features") and hasattr(base, "out_features")
    return named or hasattr(base, "infeatures") or _quantised(base)


def _quantised(base: nn.Module) -> bool:
    try:
        return quantization_backend(base) is not None
    except Exception:  # a backend that is installed but broken must not decide about other modules
        return False


def hooked(base: nn.Module) -> bool:
    """Whether calling the module runs hooks besides its forward."""
    hooks: tuple[Any, ...] = (
        base._forward_hooks,
        base._forward_pre_hooks,
        base._backward_hooks,
        base._backward_pre_hooks,
    )
    return any(hooks) or "forward" in base.__dict__  # offloading libraries replace `forward` on the instance


def takes_fused_op(base: nn.Module) -> bool:
    """Whether `base(x)` is x W^T + bias with a frozen plain W and nothing else happens in the call."""
    if type(base) is not nn.Linear or hooked(base):
        return False
    weight = base.weight
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and not weight.requires_grad


def output_is_fresh(base: nn.Module) -> bool:
    """Whether nobody else can hold the tensor that `base(x)` returns, so that it may be overwritten."""
    return type(base) in (nn.Linear, Conv1D) and not hooked(base)


def undo_cpu_packing(base: nn.Module) -> None:
    """Give a bitsandbytes 4-bit weight its ordinary layout back.

    On CPUs with AVX512-BF16 the first evaluation packs the weight for a kernel that has no backward, and
    dequantising the packed bytes gives other numbers; so gradients and merges need the ordinary layout.
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
    """Let gradients pass every 4-bit layer of the model after an evaluation, adapted or not; see `undo_cpu_packing`."""
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
    """`base(x)`.

    Raises:
        TypeError: the module returns something else than one tensor.
    """
    out = base(x, *args, **kwargs)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"{type(base).__name__} returns {type(out).__name__}; ALoRA adapts layers that return a tensor")
    return out
