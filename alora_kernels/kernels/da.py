"""Gradients of the matrices A and of the router, the last step of the backward: d^T x, per task or over all rows.

d is dh under task routing, dp under soft routing. A program owns one task, one block of K and a share of the task's
rows; shares exist only to fill the chip, and their partial sums are added in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alora_kernels.records import Dropout, acc_dtype
from alora_kernels.routing import RowGroups

from .dropout import dropout_keep, dropout_scale, seed_and_p
from .launch import launch
from .numerics import cdiv, common, power_of_two, splits_for, tl_dtype
from .tiles import MIN_PROGRAMS, stages_for, tile_for

SUM_BLOCK = 1024  # entries that one program of `sum_partials` adds up


@triton.jit
def _add(planes_ptr, out_ptr, block, planes, length, stride, BLOCK: tl.constexpr, ACC: tl.constexpr):
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < length
    total = tl.zeros((BLOCK,), dtype=ACC)
    for plane in range(0, planes):
        # [BLOCK]
        total += tl.load(planes_ptr + tl.cast(plane, tl.int64) * stride + offs, mask=mask, other=0.0).to(ACC)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_planes", "second_planes"])
def _sum_partials_kernel(
    first_ptr, first_out_ptr, second_ptr, second_out_ptr, first_planes, first_length, first_stride, second_planes,
    second_length, second_stride,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(first_length, BLOCK)
    pid = tl.program_id(0)
    if pid < blocks:
        _add(first_ptr, first_out_ptr, pid, first_planes, first_length, first_stride, BLOCK, ACC)
    else:
        _add(second_ptr, second_out_ptr, pid - blocks, second_planes, second_length, second_stride, BLOCK, ACC)


def sum_partials(
    first: Tensor, second: Tensor, first_dtype: torch.dtype, second_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`first.sum(0)` and `second.sum(0)` of planes `[S, ...]` and `[S', ...]`, in one launch.

    A launch costs as much as reading some ten megabytes. Each plane is contiguous; a single one that has the right
    dtype is returned as it is.
    """
    (one, length), (other, other_length) = _sum_of(first, first_dtype), _sum_of(second, second_dtype)
    launch(
        _sum_partials_kernel, (cdiv(length, SUM_BLOCK) + cdiv(other_length, SUM_BLOCK),),
        first, one, second, other, first.shape[0], length, first.stride(0),
        second.shape[0], other_length, second.stride(0),
        BLOCK=SUM_BLOCK, ACC=tl_dtype(acc_dtype(first.dtype)), num_warps=4, num_stages=2,
    )  # fmt: skip
    return one, other


def _sum_of(planes: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Where the sum of planes goes, and how many entries there are to add up: none where a plane is the sum."""
    if planes.shape[0] == 1 and planes.dtype == dtype:
        return planes[0], 0
    out = torch.empty(planes.shape[1:], dtype=dtype, device=planes.device)
    return out, out.numel()


@triton.jit
def _da_kernel(
    d_ptr, x_ptr, out_ptr, order_ptr, offsets_ptr, seed_ptr, p_drop,
    M, C, K,
    num_tasks,
    stride_dm, stride_dc, stride_xm, stride_xk,
    HAS_GROUPS: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    num_k = tl.cdiv(K, BLOCK_K)
    task = tl.program_id(0) // num_k
    col0 = (tl.program_id(0) % num_k) * BLOCK_K
    offs_k = col0 + tl.arange(0, BLOCK_K)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_k, mask_c = offs_k < K, offs_c < C
    cols, outs = offs_k.to(tl.int64), offs_c.to(tl.int64)
    if HAS_GROUPS:
        first, last = tl.load(offsets_ptr + task), tl.load(offsets_ptr + task + 1)
    else:
        first, last = tl.program_id(1) * 0, M
    # this program's share of the task's rows, in whole blocks
    share = tl.cdiv(tl.cdiv(last - first, tl.num_programs(1)), BLOCK_M) * BLOCK_M
    first += tl.program_id(1) * share
    last = tl.minimum(first + share, last)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    acc = tl.zeros((BLOCK_K, BLOCK_C), dtype=ACC)
    for start in tl.range(first, last, BLOCK_M, num_stages=STAGES):
        pos_m = start + tl.arange(0, BLOCK_M)
        mask_m = pos_m < last
        if HAS_GROUPS:
            row = tl.load(order_ptr + pos_m, mask=mask_m, other=0)
        else:
            row = pos_m
        rows = row.to(tl.int64)
        # [BLOCK_M, BLOCK_C]
        d_ptrs = d_ptr + rows[:, None] * stride_dm + outs[None, :] * stride_dc
        d = tl.load(d_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0).to(DTYPE)
        # [BLOCK_M, BLOCK_K]
        x_ptrs = x_ptr + rows[:, None] * stride_xm + cols[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if HAS_DROPOUT:
            x = tl.where(dropout_keep(seed, row, col0, p_drop, BLOCK_K), x, 0.0)
        # K is the long side: x^T d uses full tensor-core tiles where d^T x, 16 rows high, would not.
        acc = tl.dot(tl.trans(x), d, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    if HAS_DROPOUT:
        acc *= dropout_scale(p_drop, ACC)
    # [planes, num_tasks, C, K], contiguous
    plane = (tl.program_id(1).to(tl.int64) * num_tasks + task) * C
    out_ptrs = out_ptr + (plane + outs)[None, :] * K + cols[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_k[:, None] & mask_c[None, :])


def _da(
    d: Tensor, x: Tensor, groups: RowGroups | None, num_tasks: int, dropout: Dropout | None, dtype: torch.dtype
) -> Tensor:
    """Planes `[S, num_tasks, C, K]` whose sum over S is d^T x; in `dtype` if S is 1, else accumulator dtype."""
    (m, c), k, acc = d.shape, x.shape[1], acc_dtype(x.dtype)
    tile = tile_for("da", x.device, x.dtype)
    block_c, block_m = power_of_two(c, 16, tile.block_m), tile.block_k
    programs, c_blocks = num_tasks * cdiv(k, tile.block_n), cdiv(c, block_c)
    splits = splits_for(programs * c_blocks, cdiv(m, block_m), MIN_PROGRAMS)
    planes = torch.empty(splits, num_tasks, c, k, dtype=dtype if splits == 1 else acc, device=x.device)
    launch(
        _da_kernel, (programs, splits, c_blocks),
        d, x, planes, None if groups is None else groups.order, None if groups is None else groups.offsets,
        *seed_and_p(dropout),
        m, c, k, num_tasks, *d.stride(), *x.stride(),
        HAS_GROUPS=groups is not None, HAS_DROPOUT=dropout is not None,
        BLOCK_M=block_m, BLOCK_C=block_c, BLOCK_K=tile.block_n,
        STAGES=stages_for(tile, x.device, dropped=dropout is not None, products=1),
        DTYPE=tl_dtype(x.dtype), **common(tile, x.dtype, x.device),
    )  # fmt: skip
    return planes


def da_task(
    dh: Tensor, x: Tensor, groups: RowGroups, num_tasks: int, *, dropout: Dropout | None = None, dtype: torch.dtype
) -> Tensor:
    """Gradient of the matrices A under task routing, `[E, R, K]` in `dtype`, that of a; zeros for tasks without rows.

    Formula: `da_t = sum over rows m of task t of dh_m^T dropout(x_m)`. dh is rounded to x's dtype for the product.
    """
    planes = _da(dh, x, groups, num_tasks, dropout, dtype)
    return planes[0] if planes.shape[0] == 1 else sum_partials(planes, planes[:, :0], dtype, planes.dtype)[0]


def da_soft(
    dp: Tensor, x: Tensor, num_experts: int, *, dropout: Dropout | None = None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of the matrices A `[E, R, K]` and of the router `[E, K]` under soft routing, in `dtype`, that of a.

    Formula: `da_cat = dp[:, :E*R]^T dropout(x)`, `drouter = dp[:, E*R:]^T x`. Without dropout one launch makes both.
    """
    cut = dp.shape[1] - num_experts
    if dropout is None:
        planes = _da(dp, x, None, 1, None, dtype)[:, 0]
        da, drouter = sum_partials(planes[:, :cut], planes[:, cut:], dtype, dtype)
        if planes.shape[0] == 1:  # both are parts of the one plane, and results of an op must not share memory
            drouter = drouter.clone()
    else:
        da_planes = _da(dp[:, :cut], x, None, 1, dropout, dtype)[:, 0]
        drouter_planes = _da(dp[:, cut:], x, None, 1, None, dtype)[:, 0]
        da, drouter = sum_partials(da_planes, drouter_planes, dtype, dtype)
    return da.view(num_experts, cut // num_experts, -1), drouter
