"""Every shape, dtype and device error of the ops is raised here, with names and numbers.

`ops.functional` asks before anything runs; kernels and backends below it trust what they get.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..routing import Routing

PLAIN = (Tensor, torch.nn.Parameter)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def check(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    router: Tensor | None = None,
    base: Tensor | None = None,
) -> None:
    """Raise unless all tensors of a layer, or of an adapter and its base's output `[..., N]`, fit x and each other."""
    check_tensors(x, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias, router=router, base=base)
    check_adapter(x, lora_A, lora_B, router)
    if weight is not None:
        check_weight(x, weight, lora_B, bias)
    shape = (*x.shape[:-1], lora_B.shape[0])
    if base is not None and base.shape != shape:
        raise ValueError(f"base must be {shape} (x's leading shape and lora_B's rows), got {_shape(base)}")


WHOLE = (
    "adapters need whole weights: load the base without tensor parallelism (tp_plan, parallelize_module); under FSDP2"
    " adapt the model first, then call fully_shard on it, and call it from its top"
)


def check_whole(tensors: Mapping[str, Any], module: str | None = None, remedy: str = WHOLE) -> None:
    """Raise a ValueError if one of these tensors, of a module, is a DTensor, of which each process holds a part."""
    for name, t in tensors.items():
        if hasattr(t, "device_mesh"):
            name = f"{module}.{name}" if module else name
            raise ValueError(f"{name} is a DTensor, {t.placements} over {t.device_mesh}, and {remedy}")


def suits(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, *, weight: Tensor | None = None, base: Tensor | None = None
) -> bool:
    """Whether this x suits tensors that are known to fit each other; if not, the checks above say what is wrong."""
    if x.dim() == 0 or x.shape[-1] != lora_A.shape[2] or x.dtype not in FLOATS:
        return False
    if type(x) not in PLAIN or type(lora_A) not in PLAIN or type(lora_B) not in PLAIN:
        return False
    device = x.device
    if lora_A.device != device or lora_B.device != device:
        return False
    if weight is not None and (weight.dtype != x.dtype or weight.device != device or type(weight) not in PLAIN):
        return False
    return base is None or (base.device == device and base.shape == (*x.shape[:-1], lora_B.shape[0]))


def check_adapter(x: Tensor, lora_A: Tensor, lora_B: Tensor, router: Tensor | None) -> None:
    """Raise unless x `[..., K]`, lora_A `[E, R, K]`, lora_B `[N, R]` and router `[E, K]` fit together."""
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, [..., in_features]")
    if lora_A.dim() != 3:
        raise ValueError(f"lora_A must be [experts, rank, in_features], got {_shape(lora_A)}")
    if lora_B.dim() != 2:
        raise ValueError(f"lora_B must be [out_features, rank], got {_shape(lora_B)}")
    experts, rank, in_features = lora_A.shape
    if experts == 0 or rank == 0:
        raise ValueError(f"lora_A needs at least one expert and rank >= 1, got {_shape(lora_A)}")
    if in_features != x.shape[-1]:
        raise ValueError(f"lora_A has in_features={in_features} but x has {x.shape[-1]}")
    if lora_B.shape[1] != rank:
        raise ValueError(f"lora_B has rank {lora_B.shape[1]} but lora_A has rank {rank}")
    if router is not None and router.shape != (experts, in_features):
        raise ValueError(f"router must be [experts, in_features] = {(experts, in_features)}, got {_shape(router)}")


def check_weight(x: Tensor, weight: Tensor, lora_B: Tensor, bias: Tensor | None) -> None:
    """Raise unless weight `[N, K]` and bias `[N]` fit x and lora_B."""
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features], got {_shape(weight)}")
    out_features, in_features = weight.shape
    if in_features != x.shape[-1]:
        raise ValueError(f"weight has in_features={in_features} but x has {x.shape[-1]}")
    if lora_B.shape[0] != out_features:
        raise ValueError(f"lora_B has out_features={lora_B.shape[0]} but weight has {out_features}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must be [{out_features}], got {_shape(bias)}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight is {weight.dtype} but x is {x.dtype}: cast one of them, or use torch.autocast")
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"bias is {bias.dtype} but x is {x.dtype}: cast one of them, or use torch.autocast")


def check_tensors(x: Tensor, **others: Tensor | None) -> None:
    """Raise unless all tensors are whole, floating point (16 to 64 bits), and live where x lives."""
    tensors = {"x": x, **others}
    check_whole(tensors)
    for name, t in tensors.items():
        if t is None:
            continue
        if t.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device} but x is on {x.device}: move it with {name}.to(x.device)")


def check_routing(x: Tensor, router: Tensor | None, task_ids: Tensor | Routing | None) -> None:
    """Raise unless exactly one of router and task_ids is given, and raw ids fit x and live where x lives."""
    if (router is None) == (task_ids is None):
        given = "neither" if router is None else "both"
        raise ValueError(f"give exactly one of router (soft routing) and task_ids (task routing), got {given}")
    if task_ids is None or isinstance(task_ids, Routing):
        return
    if not isinstance(task_ids, Tensor):
        raise TypeError(
            f"task_ids must be an integer tensor, got {type(task_ids).__name__}: use torch.tensor(task_ids)"
        )
    if task_ids.device != x.device:
        raise ValueError(f"task_ids are on {task_ids.device} but x is on {x.device}: use task_ids.to(x.device)")
    per_row = task_ids.dim() == 1 and x.dim() >= 2 and task_ids.shape[0] == x.shape[0]
    if not per_row and task_ids.shape != x.shape[:-1]:
        raise ValueError(
            f"task_ids must have one id per batch row, {tuple(x.shape[:1])}, or one per token,"
            f" {tuple(x.shape[:-1])}, got {_shape(task_ids)}"
        )


def check_dropout(dropout_p: float) -> None:
    """Raise unless dropout_p is a probability."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")
