"""Gradient of the input: the base GEMM backwards and the low-rank part, of each row's task or of all experts.

What dropout masks comes first, because it must not touch dy w; the router, which saw x before dropout, after the mask.
Through pointers task routing takes positions of `groups.order`; descriptors fetch consecutive rows only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alora_kernels.records import Dropout
from alora_kernels.routing import RowGroups

from .dropout import dropout_keep, dropout_scale, seed_and_p
from .gemm import describable, describe, descriptor_loop, finish_gemm, operands, rank_loop, tile_of
from .launch import launch
from .numerics import cdiv, common, power_of_two, rank_step, tl_dtype
from .shrink import next_task
from .tiles import GROUP_M


@triton.jit(do_not_specialize=["M"])
def _dx_task_kernel(
    dy, w, dh_ptr, a_ptr, dx, ids_ptr, order_ptr, seed_ptr, p_drop,
    M, N, K, R, E,
    stride_dym, stride_dyn, stride_wn, stride_wk, stride_dhm, stride_dhr, stride_ae, stride_ar, stride_ak,
    stride_dxm,
    HAS_BASE: tl.constexpr, HAS_DROPOUT: tl.constexpr, ONTO: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_COLS: tl.constexpr, EVEN_DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # dy, w and dx are descriptors or pointers
    # BLOCK_K counts columns of dx, BLOCK_N is the step of the contraction over N
    pid_m, pid_k = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    first, col = pid_m * BLOCK_M, pid_k * BLOCK_K
    pos_m, offs_k = first + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_K)
    mask_m, mask_k = pos_m < M, offs_k < K
    if DESCRIPTORS:
        row = tl.where(mask_m, pos_m, 0)
    else:
        row = tl.load(order_ptr + pos_m, mask=mask_m, other=0)
    ids = tl.load(ids_ptr + row, mask=mask_m, other=-1)
    rows, cols = row.to(tl.int64), offs_k.to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=ACC)
    task = next_task(ids, -1, E)
    while task < E:
        # [BLOCK_M, R] [R, BLOCK_K], rows of this task only
        acc = rank_loop(
            acc, dh_ptr + rows * stride_dhm, ids == task, stride_dhr,
            a_ptr + task.to(tl.int64) * stride_ae + cols * stride_ak, mask_k, stride_ar, R, BLOCK_R, DTYPE, PRECISION,
        )  # fmt: skip
        task = next_task(ids, task, E)
    if HAS_DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), row, col, p_drop, BLOCK_K)
        acc = tl.where(keep, acc * dropout_scale(p_drop, ACC), 0.0)
    if ONTO:
        # [BLOCK_M, BLOCK_K]
        taken = ((ids >= 0) & (ids < E))[:, None] & mask_k[None, :]
        acc += tl.load(dx + rows[:, None] * stride_dxm + cols[None, :], mask=taken, other=0.0).to(ACC)
    finish_gemm(
        dx, acc, dy, w, None, first, col, rows, offs_k, mask_m, mask_k,
        stride_dym, stride_dyn, stride_wn, stride_wk, stride_dxm, N,
        HAS_BASE, False, DESCRIPTORS, PARTS, EVEN_COLS, EVEN_DEPTH, BLOCK_M, BLOCK_K, BLOCK_N, DTYPE, PRECISION, ACC,
    )  # fmt: skip


def dx_task(
    dy: Tensor | None,
    w: Tensor | None,
    dh: Tensor,
    a: Tensor,
    groups: RowGroups,
    *,
    dtype: torch.dtype,
    dropout: Dropout | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """Gradient of x under task routing, in one launch: dx `[M, K]` in `dtype`, that of x.

    Formula: `dx_m = dy_m w + keep_m (dh_m A_{t(m)}) / (1 - p)`; rows of no task get `dy_m w`; without dy and w (a 4-bit
    base) the low-rank part alone, or added `onto` what a tensor holds in rows of a task; its other rows become 0.
    """
    (m, r), (e, _, k), n = dh.shape, a.shape, 0 if w is None else w.shape[0]
    dx = torch.empty(m, k, dtype=dtype, device=dh.device) if onto is None else onto
    base = operands(dy, w, dx, transposed=False, masks=dropout is not None)
    tile = base.tile
    # 32 ranks spill 8 bytes beside a mask (sm_80) or if they come in float32 (sm_90)
    step = rank_step(r, dtype, 16 if dropout is not None or a.dtype != dtype else 32)
    launch(
        _dx_task_kernel, (cdiv(m, base.block_m) * cdiv(k, tile.block_n),),
        base.left, base.right, dh, a, base.out, groups.ids, None if base.flags["DESCRIPTORS"] else groups.order,
        *seed_and_p(dropout),
        m, n, k, r, e, *base.strides, *dh.stride(), *a.stride(), dx.stride(0),
        HAS_BASE=w is not None, HAS_DROPOUT=dropout is not None, ONTO=onto is not None, **base.flags,
        BLOCK_M=base.block_m, BLOCK_N=tile.block_k, BLOCK_K=tile.block_n, BLOCK_R=step, GROUP_M=GROUP_M,
        DTYPE=tl_dtype(dtype), **common(tile, dtype, dh.device),
    )  # fmt: skip
    return dx


@triton.jit(do_not_specialize=["M"])
def _dx_soft_kernel(
    dy, w, dp, a, dp_ptr, a_ptr, router_ptr, dx, seed_ptr, p_drop,
    M, N, K, C, E,
    stride_dym, stride_dyn, stride_wn, stride_wk, stride_dpm, stride_dpc, stride_ac, stride_ak, stride_oe,
    stride_ok, stride_dxm,
    HAS_BASE: tl.constexpr, HAS_DROPOUT: tl.constexpr, LOW_DESCRIPTORS: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PARTS: tl.constexpr, EVEN_COLS: tl.constexpr, EVEN_DEPTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # dy, w and dx are descriptors or pointers; dp and a are descriptors of what dp_ptr and a_ptr point to, or None
    # C = E * R; BLOCK_K counts columns of dx, BLOCK_N is the step of the contraction over N
    pid_m, pid_k = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    first, col = pid_m * BLOCK_M, pid_k * BLOCK_K
    offs_m, offs_k = first + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_K)
    mask_m, mask_k = offs_m < M, offs_k < K
    rows, cols = tl.where(mask_m, offs_m, 0).to(tl.int64), offs_k.to(tl.int64)
    dp_rows = dp_ptr + rows * stride_dpm

    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=ACC)
    # [BLOCK_M, C] [C, BLOCK_K]
    if LOW_DESCRIPTORS:  # a step beyond C multiplies logits by rows beyond a, which are read as zeros
        acc = descriptor_loop(acc, dp, a, first, col, C, BLOCK_C, False, PRECISION)
    else:
        acc = rank_loop(
            acc, dp_rows, mask_m, stride_dpc, a_ptr + cols * stride_ak, mask_k, stride_ac, C, BLOCK_C, DTYPE, PRECISION
        )
    if HAS_DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), offs_m, col, p_drop, BLOCK_K)
        acc = tl.where(keep, acc * dropout_scale(p_drop, ACC), 0.0)
    # [BLOCK_M, E] [E, BLOCK_K]
    acc = rank_loop(
        acc, dp_rows + tl.cast(C, tl.int64) * stride_dpc, mask_m, stride_dpc, router_ptr + cols * stride_ok, mask_k,
        stride_oe, E, BLOCK_E, DTYPE, PRECISION,
    )  # fmt: skip
    finish_gemm(
        dx, acc, dy, w, None, first, col, rows, offs_k, mask_m, mask_k,
        stride_dym, stride_dyn, stride_wn, stride_wk, stride_dxm, N,
        HAS_BASE, False, DESCRIPTORS, PARTS, EVEN_COLS, EVEN_DEPTH, BLOCK_M, BLOCK_K, BLOCK_N, DTYPE, PRECISION, ACC,
    )  # fmt: skip


def dx_soft(
    dy: Tensor | None,
    w: Tensor | None,
    dp: Tensor,
    a: Tensor,
    router: Tensor,
    *,
    dtype: torch.dtype,
    dropout: Dropout | None = None,
) -> Tensor:
    """Gradient of x under soft routing, in one launch: dx `[M, K]` in `dtype`, that of x.

    Formula: `dx = dy w + keep (dp[:, :E*R] a_cat) / (1 - p) + dp[:, E*R:] router`; without dy and w (a 4-bit base) the
    low-rank part alone.
    """
    m, (e, r, k), n = dp.shape[0], a.shape, 0 if w is None else w.shape[0]
    dx = torch.empty(m, k, dtype=dtype, device=dp.device)
    base = operands(dy, w, dx, transposed=False, masks=dropout is not None)
    tile = base.tile
    a_cat = a.reshape(e * r, k)
    # A pipelined loop over dp hides its loads; E * R = 128 is four steps that would each wait for memory.
    # In float32 64 columns spill.
    low = base.flags["DESCRIPTORS"] and a.dtype == dtype and dtype.itemsize == 2 and describable(dp, a_cat)
    block_c = power_of_two(e * r, 16, 64) if low else rank_step(e * r, dtype)
    low_rank = (
        (describe(dp, (base.block_m, block_c)), describe(a_cat, (block_c, tile.block_n))) if low else (None, None)
    )
    launch(
        _dx_soft_kernel, (cdiv(m, base.block_m) * cdiv(k, tile.block_n),),
        base.left, base.right, *low_rank, dp, a_cat, router, base.out,
        *seed_and_p(dropout),
        m, n, k, e * r, e, *base.strides, *dp.stride(), *a_cat.stride(), *router.stride(), dx.stride(0),
        HAS_BASE=w is not None, HAS_DROPOUT=dropout is not None, LOW_DESCRIPTORS=low, **base.flags,
        BLOCK_M=base.block_m, BLOCK_N=tile.block_k, BLOCK_K=tile.block_n,
        BLOCK_C=block_c, BLOCK_E=rank_step(e, dtype), GROUP_M=GROUP_M,
        DTYPE=tl_dtype(dtype), **common(tile, dtype, dp.device),
    )  # fmt: skip
    return dx
