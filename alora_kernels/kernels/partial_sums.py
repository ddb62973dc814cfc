"""Adding up planes of partial sums, two sets of them in one launch.

In:   planes `[S, ...]`, as kernels that split their long axis write them.
Out:  their sums, in the dtype asked for.
Who:  the launchers of `expand_backward` and `wgrad`, each with two results.

The order of addition is the order of the planes, so results repeat bit for bit. A launch costs as much as reading some
ten megabytes: that is why both sets share one, and why the cast to 16 bits is part of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alora_kernels.records import acc_dtype

from .launch import launch
from .numerics import tl_dtype

BLOCK = 1024


@triton.jit
def _add(planes_ptr, out_ptr, block, planes, length, stride, BLOCK: tl.constexpr, ACC: tl.constexpr):
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < length
    total = tl.zeros((BLOCK,), dtype=ACC)
    for plane in range(0, planes):
        # [BLOCK]
        total += tl.load(planes_ptr + tl.cast(plane, tl.int64) * stride + offs, mask=mask, other=0.0).to(ACC)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_planes_kernel(
    first_ptr,
    first_out_ptr,
    second_ptr,
    second_out_ptr,
    first_planes,
    first_length,
    first_stride,
    second_planes,
    second_length,
    second_stride,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    blocks = tl.cdiv(first_length, BLOCK)
    pid = tl.program_id(0)
    if pid < blocks:
        _add(first_ptr, first_out_ptr, pid, first_planes, first_length, first_stride, BLOCK, ACC)
    else:
        _add(second_ptr, second_out_ptr, pid - blocks, second_planes, second_length, second_stride, BLOCK, ACC)


def sum_planes(
    first: Tensor, second: Tensor, first_dtype: torch.dtype, second_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Two sums over planes in one launch.

    Formula: `first.sum(0)`, `second.sum(0)`.

    Args:
        first: planes `[S, ...]`; each plane is contiguous.
        second: planes `[S', ...]`.
        first_dtype: of the first result.
        second_dtype: of the second.

    Returns:
        Both sums. A single plane that already has the right dtype is returned as it is.
    """
    pairs = ((first, first_dtype), (second, second_dtype))
    done = [planes.shape[0] == 1 and planes.dtype == dtype for planes, dtype in pairs]
    outs = [
        planes[0] if ready else torch.empty(planes.shape[1:], dtype=dtype, device=planes.device)
        for (planes, dtype), ready in zip(pairs, done, strict=True)
    ]
    lengths = [0 if ready else out.numel() for out, ready in zip(outs, done, strict=True)]
    launch(
        _sum_planes_kernel, (sum(triton.cdiv(length, BLOCK) for length in lengths),),
        first, outs[0], second, outs[1], first.shape[0], lengths[0], first.stride(0),
        second.shape[0], lengths[1], second.stride(0),
        BLOCK=BLOCK, ACC=tl_dtype(acc_dtype(first.dtype)), num_warps=4, num_stages=2,
    )  # fmt: skip
    return outs[0], outs[1]
