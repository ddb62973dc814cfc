"""Forward of the layer, first half, task routing: every row through the A of its own task.

A program takes consecutive positions of `groups.order`, so it meets few tasks, and streams x once per task it meets.
Results of different tasks never mix: a task whose A holds NaN does not disturb its neighbours in the same block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alora_kernels.records import Dropout
from alora_kernels.routing import RowGroups

from .dropout import dropout_keep, dropout_scale, seed_and_p
from .launch import launch
from .numerics import common, kernel_scaling, power_of_two, rank_block
from .tiles import tile_for


@triton.jit
def next_task(ids, previous, E):
    """The smallest id above `previous` among a block's ids [BLOCK_M], in any order, or E if there is none.

    A block of 64 or 128 rows meets one task, seldom two or three. Each step jumps to the next task that is present, so
    absent tasks cost nothing however many there are. Rows of no task have ids that no step returns: -1, or E and above.

        task = next_task(ids, -1, E)
        while task < E:
            ...                                # rows with ids == task
            task = next_task(ids, task, E)
    """
    return tl.min(tl.where((ids > previous) & (ids < E), ids, E), axis=0)


@triton.jit
def _shrink_task_kernel(
    x_ptr, a_ptr, h_ptr, ids_ptr, order_ptr, seed_ptr, p_drop, scaling,
    M, K, R, E,
    stride_xm, stride_xk, stride_ae, stride_ar, stride_ak, stride_hm,
    HAS_DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pos_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_r = pos_m < M, offs_r < R
    rows = tl.load(order_ptr + pos_m, mask=mask_m, other=0)
    ids = tl.load(ids_ptr + rows, mask=mask_m, other=-1)
    x_rows = x_ptr + rows.to(tl.int64) * stride_xm
    step = tl.full((), BLOCK_K, tl.int64)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    h = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
    task = next_task(ids, -1, E)
    while task < E:
        a_rows = a_ptr + task.to(tl.int64) * stride_ae + offs_r.to(tl.int64) * stride_ar
        x_ptrs = x_rows[:, None] + offs_k.to(tl.int64)[None, :] * stride_xk
        a_ptrs = a_rows[None, :] + offs_k.to(tl.int64)[:, None] * stride_ak
        part = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
        for k in range(0, K, BLOCK_K):
            # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_R]
            if EVEN_K:
                x = tl.load(x_ptrs)
                a = tl.load(a_ptrs, mask=mask_r[None, :], other=0.0).to(x.dtype)
            else:
                mask_k = offs_k < K - k
                x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
                a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0).to(x.dtype)
            x_ptrs += step * stride_xk
            a_ptrs += step * stride_ak
            if HAS_DROPOUT:
                x = tl.where(dropout_keep(seed, rows, k, p_drop, BLOCK_K), x, 0.0)
            part = tl.dot(x, a, part, input_precision=PRECISION, out_dtype=part.dtype)
        h = tl.where((ids == task)[:, None], part, h)
        task = next_task(ids, task, E)

    h *= tl.cast(scaling, ACC)
    if HAS_DROPOUT:
        h *= dropout_scale(p_drop, ACC)
    h_ptrs = h_ptr + rows.to(tl.int64)[:, None] * stride_hm + offs_r[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


def shrink_task(x: Tensor, a: Tensor, groups: RowGroups, *, scaling: float, dropout: Dropout | None = None) -> Tensor:
    """Each row through the matrix A of its task: h `[M, R]` in x's dtype.

    Formula: `h_m = s A_{t(m)} dropout(x_m)`, and 0 where row m has no task. s is applied in the accumulator, the
    rounding comes last.
    """
    (m, k), (e, r, _) = x.shape, a.shape
    kernel = "shrink_task_narrow" if dropout is not None or k % 16 else "shrink_task"
    h = torch.empty(m, r, dtype=x.dtype, device=x.device)
    tile, block_r = tile_for(kernel, x.device, x.dtype), rank_block(r, x.dtype)
    # a block should meet one task, not many: with few rows a task, few rows a block
    block_m = power_of_two(min(m, m // e), 16, tile.block_m)
    inside, outside = kernel_scaling(scaling, x.dtype)
    launch(
        _shrink_task_kernel, (triton.cdiv(m, block_m), triton.cdiv(r, block_r)),
        x, a, h, groups.ids, groups.order,
        *seed_and_p(dropout), inside,
        m, k, r, e, *x.stride(), *a.stride(), h.stride(0),
        HAS_DROPOUT=dropout is not None, EVEN_K=k % tile.block_k == 0,
        BLOCK_M=block_m, BLOCK_K=tile.block_k, BLOCK_R=block_r,
        **common(tile, x.dtype),
    )  # fmt: skip
    return h if outside == 1.0 else h.mul_(outside)
