"""Stock PEFT LoRA on the fused op: LoRA is ALoRA with a single matrix A.

Only the class of a layer changes, to a subclass with another `forward`: its parameters, state dict, merging and pickles
stay PEFT's. Every call decides anew whether the op may serve it, so adapters may be added, switched, merged and
disabled afterwards; whatever the op does not do runs PEFT's forward.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from ..ops import alora_linear, packed
from ..routing import constant_routing
from ..text import some
from .base_layer import hooked, only_multiplies, takes_fused_op
from .layer import ALoRALayer
from .targets import by_reason

EXAMPLES = 3  # names shown for each reason
KINDS: tuple[tuple[type, str], ...] = (
    (lora.Embedding, "adapts an embedding"),
    (lora._ConvNd, "adapts a convolution"),
    (lora.MultiheadAttention, "adapts nn.MultiheadAttention, which multiplies by its weights without calling a layer"),
    (lora.ParamWrapper, "adapts a parameter (target_parameters), not a layer"),
)
_reported: WeakSet[Any] = WeakSet()  # layers whose reason was already given


@dataclass(frozen=True)
class Accelerated:
    """What `accelerate` did, by module name."""

    layers: list[str]  # LoRA layers that run the fused op, those of earlier calls included
    skipped: dict[str, str]  # LoRA layers that keep PEFT's forward -> the reason

    def __str__(self) -> str:
        return f"{len(self.layers)} LoRA layers run the fused op{_reasons(self.skipped)}"


def _reasons(skipped: dict[str, str]) -> str:
    """One line per reason: how many layers, and the names of some."""
    lines = ""
    for reason, names in by_reason(skipped).items():
        lines += f"\n{len(names)} keep PEFT's forward: {reason} ({some(names, EXAMPLES)})"
    return lines


class FusedLoraLinear(lora.Linear):  # type: ignore[misc]
    """PEFT's LoRA layer over a plain `nn.Linear`, with the fused op in its forward where that computes the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base output plus the active adapter, or PEFT's forward; see `accelerate`."""
        # a hook may still hold this function when `restore` has taken the class away: super() would fail
        fused = isinstance(self, FusedLoraLinear) and not args and not kwargs
        arguments = _arguments(self, x) if fused else None
        if arguments is None:
            return lora.Linear.forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        added = arguments.pop("added")
        y = alora_linear(x, **arguments)
        return y if added is None else (y + added).to(y.dtype)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, which adds to `weight.data`: its version counter, by which packed copies go, stays as it is."""
        packed.forget(self.get_base_layer().weight)  # type: ignore[arg-type]
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        """Likewise."""
        packed.forget(self.get_base_layer().weight)  # type: ignore[arg-type]
        super().unmerge()


def _arguments(layer: Any, x: Tensor) -> dict[str, Any] | None:
    """The op's arguments for this call and what is added to its result, or None if PEFT's forward must run."""
    transformed = type(x) not in (Tensor, nn.Parameter) or torch._C._are_functorch_transforms_active()
    if layer.disable_adapters or layer.merged or transformed:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or active[0] in layer.lora_variant:
        return None
    (name,) = active
    base, lora_A, lora_B, dropout = layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    drops = type(dropout) in (nn.Dropout, nn.Identity) and not hooked(dropout)
    if not (takes_fused_op(base) and only_multiplies(lora_A) and only_multiplies(lora_B) and drops):
        return None
    weight, bias, a, b, scaling = base.weight, base.bias, lora_A.weight, lora_B.weight, layer.scaling[name]
    if not _dtypes_fit(x, weight, bias, a, b, layer.cast_input_dtype_enabled) or not isinstance(scaling, int | float):
        return None
    added = None
    if lora_B.bias is not None:  # lora_bias=True: s * bias_B is one more constant of the layer
        own = lora_B.bias * scaling
        if own.dtype == weight.dtype:
            bias = own if bias is None else bias + own
        else:  # as a 16-bit bias it would get a 16-bit gradient
            added = own
    return {
        "added": added,
        "weight": weight,
        "lora_A": a[None],
        "lora_B": b,
        "bias": bias,
        "task_ids": constant_routing(0, x.shape[:-1], x.device),
        "scaling": float(scaling),
        "dropout_p": getattr(dropout, "p", 0.0),
        "training": dropout.training,
    }


def _dtypes_fit(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, casts: bool) -> bool:
    """Whether the op casts as PEFT does: base and x in one dtype, adapters in it or in float32."""
    dtype = x.dtype
    frozen = {dtype, weight.dtype} if bias is None else {dtype, weight.dtype, bias.dtype}
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        frozen.discard(torch.float32)
    if frozen - {dtype} or a.dtype != b.dtype or a.dtype not in (dtype, torch.float32):
        return False
    return casts or a.dtype == x.dtype


def _reason(layer: Any) -> str | None:
    """Why a LoRA layer keeps PEFT's forward, or None if it can run the fused op."""
    for kind, reason in KINDS:
        if isinstance(layer, kind):
            return reason
    if type(layer) is not lora.Linear:
        return f"{type(layer).__name__} has a forward of its own (quantised, parallel or custom)"
    if "forward" in layer.__dict__ or hasattr(layer, "_hf_hook"):
        return "something else replaced its forward (offloading, hooks of accelerate): call accelerate before that"
    base = layer.base_layer
    if layer.fan_in_fan_out or type(base) is not nn.Linear:
        return f"its base is a {type(base).__name__}, not a plain nn.Linear"
    if base.weight.requires_grad:
        return "its base weight trains: freeze it, then call accelerate again"
    if not takes_fused_op(base):
        return f"its base has hooks, another forward or a {base.weight.dtype} {type(base.weight).__name__} as weight"
    if layer.lora_A and all(name in layer.lora_variant for name in layer.lora_A):
        return f"{'/'.join(sorted({type(v).__name__ for v in layer.lora_variant.values()}))} is more than plain LoRA"
    return None


def accelerate(model: nn.Module) -> Accelerated:
    """Let PEFT's LoRA layers run the fused op; `restore` undoes it. Called again, it serves layers added since.

    Formula: `y = x W0^T + bias + s (A dropout(x)) B^T`, the same as PEFT's, in one op with its own backward.

    Served are `peft.tuners.lora.layer.Linear` over a plain frozen `nn.Linear`, with one active adapter: dropout, rsLoRA
    and `lora_bias` included. All others are listed. PEFT's forward also runs, silently, whenever a call finds the layer
    merged or disabled, several or no adapters active, `adapter_names`, hooks on the base or on lora_A, lora_B,
    lora_dropout, a tensor subclass, or a transform of `torch.func`.

    What differs from PEFT: (1) Dropout masks come from a seed that torch's generator draws: the same seed gives other
    masks. (2) Float32 adapters over a 16-bit base, PEFT's default, on the Triton backend: kernels multiply 16-bit
    operands and sum in float32, as accurate as PEFT with `autocast_adapter_dtype=False`. Outputs and the gradient of x
    stay as good as PEFT's; gradients of A and B carry the rounding of their 16-bit factors. (3) Second derivatives are
    refused: call `restore` first. (4) A pickle of the whole model needs this package to load.
    `torch.compile` takes accelerated layers without a graph break; `torch.export` records PEFT's operations by default.
    On CPUs expect less memory for the backward rather than less time: `examples/accelerate_lora.py` measures both.

    Args:
        model: a `PeftModel`, or a base with injected adapters. Changed in place; parameters stay the same objects.

    Returns:
        The names of the layers that run the op, and of those that do not with the reason; `print` it. Reasons are also
        given in one warning, once per layer.

    Raises:
        ValueError: the model has no LoRA layer.

    Source: Hu et al. 2021, LoRA; the op is `alora_kernels.alora_linear` with E = 1.
    """
    layers: list[str] = []
    skipped: dict[str, str] = {}
    unreported: dict[str, str] = {}
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in modules:
        if not isinstance(module, lora.LoraLayer):
            continue
        reason = None if type(module) is FusedLoraLinear else _reason(module)
        if reason is None:
            module.__class__ = FusedLoraLinear  # pickles by name, keeps isinstance and the state dict
            layers.append(name)
            continue
        skipped[name] = reason
        if module not in _reported:
            unreported[name] = reason
            _reported.add(module)
    if not layers and not skipped and not any(isinstance(module, ALoRALayer) for _, module in modules):
        raise ValueError(
            f"{type(model).__name__} has no LoRA layer to accelerate: first add one with"
            " peft.get_peft_model(model, LoraConfig(...)) or load one with PeftModel.from_pretrained"
        )
    if unreported:
        warnings.warn(f"accelerate left some LoRA layers alone{_reasons(unreported)}", stacklevel=2)
    return Accelerated(layers, skipped)


def restore(model: nn.Module) -> int:
    """Give the layers that `accelerate` changed PEFT's own forward back, and their number to the caller."""
    fused: list[Any] = [module for module in model.modules() if type(module) is FusedLoraLinear]
    for module in fused:
        module.__class__ = lora.Linear
        packed.forget(module.get_base_layer().weight)  # PEFT may write to it from now on
    return len(fused)
