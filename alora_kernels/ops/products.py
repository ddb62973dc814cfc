"""Products of factors whose dtypes differ: float32 adapters over 16-bit activations, as PEFT keeps them.

They are taken and summed in the wider dtype of the two and rounded once. The 16-bit side is the large one (x, dy, y). A
float32 copy of `[M, N]` would be larger than all that the layer saves, so its rows are widened block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from .types import wider

Function = TypeVar("Function", bound=Callable[..., Any])
BLOCK = 1 << 18  # entries widened at a time: 1 MiB in float32, which stays in a core's cache


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off: it would take the float32 products of an op in 16 bits, whose inputs are cast before the op."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def without_autocast(function: Function) -> Function:
    """The function, of a tensor and more, with autocast off; see `no_autocast`."""

    @wraps(function)
    def plain(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with no_autocast(first.device.type):
            return function(first, *args, **kwargs)

    return plain  # type: ignore[return-value]


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK // max(width, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """scaling * left right, `[M, N] [N, R]`."""
    if left.dtype == right.dtype:
        return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)
    dtype = wider(left, right)
    out, right = left.new_empty(left.shape[0], right.shape[1], dtype=dtype), right.to(dtype)
    for rows in _blocks(*left.shape):
        torch.mm(left[rows].to(dtype), right, out=out[rows])
    return out.mul_(scaling)


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, `[M, N] [M, R]`."""
    if left.dtype == right.dtype:
        return product(left.t(), right, 1.0)
    dtype = wider(left, right)
    out = left.new_zeros(left.shape[1], right.shape[1], dtype=dtype)
    for rows in _blocks(*left.shape):
        out.addmm_(left[rows].to(dtype).t(), right[rows].to(dtype))
    return out


def add_product_(out: Tensor, left: Tensor, right: Tensor, scaling: float = 1.0) -> Tensor:
    """out += scaling * left right in place, `[M, N] [M, R] [R, N]`."""
    if out.dtype == left.dtype == right.dtype:
        return out.addmm_(left, right, alpha=scaling)
    dtype = wider(left, right)
    right = right.to(dtype)
    for rows in _blocks(*out.shape):
        out[rows].add_(left[rows].to(dtype) @ right, alpha=scaling)
    return out
