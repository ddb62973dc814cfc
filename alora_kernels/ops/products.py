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

from . import packed
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


def _widened(t: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows in another dtype, all in one buffer, which the next block overwrites."""
    step = max(1, BLOCK // max(t.shape[1], 1))
    buffer = t.new_empty(min(step, t.shape[0]), t.shape[1], dtype=dtype)
    for start in range(0, t.shape[0], step):
        part = t[start : start + step]
        yield slice(start, start + len(part)), buffer[: len(part)].copy_(part)


def product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """scaling * left right, `[M, N] [N, R]`; MKL takes half the time where each column of right is in one piece."""
    right = right.t().contiguous().t()
    if left.dtype == right.dtype:
        return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)
    dtype = wider(left, right)
    out, right = left.new_empty(left.shape[0], right.shape[1], dtype=dtype), right.to(dtype)
    for rows, part in _widened(left, dtype):
        torch.mm(part, right, out=out[rows])
    return out.mul_(scaling)


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, `[M, N] [M, R]`; where N is the larger as (right^T left)^T, in a third of the time."""
    if left.shape[1] > right.shape[1]:
        return transposed_product(right, left).t().contiguous()
    if left.dtype == right.dtype:
        return torch.mm(left.t(), right)
    dtype = wider(left, right)
    out, left = right.new_zeros(left.shape[1], right.shape[1], dtype=dtype), left.to(dtype)
    for rows, part in _widened(right, dtype):
        out.addmm_(left[rows].t(), part)
    return out


def add_product_(out: Tensor, left: Tensor, right: Tensor, scaling: float = 1.0) -> Tensor:
    """out += scaling * left right in place, `[M, N] [M, R] [R, N]`."""
    if out.dtype == left.dtype == right.dtype:
        return out.addmm_(left, right, alpha=scaling)
    large = out.device.type == "cpu" and out.numel() > BLOCK
    if large and out.dtype == torch.bfloat16 and not packed.widens():
        return _add_split_(out, left, right, scaling)
    dtype = wider(left, right)
    left, right = left.to(dtype), right.to(dtype)
    for rows, part in _widened(out, dtype):
        out[rows] = part.addmm_(left[rows], right, alpha=scaling)
    return out


def _add_split_(out: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """The same for large out of bf16 on a CPU, which multiplies bf16, sums in float32 and rounds the sum once.

    Each factor is two of bf16, which hold its first 16 bits; out keeps 8. That takes half the time where bf16 is fast.
    """
    high, above = left.to(torch.bfloat16), right.to(torch.bfloat16)
    low, below = (left - high).to(torch.bfloat16), (right - above).to(torch.bfloat16)
    return out.addmm_(torch.cat((high, low, high), 1), torch.cat((above, above, below)), alpha=scaling)
