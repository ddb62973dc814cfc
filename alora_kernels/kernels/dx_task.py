"""Gradient of the input, task routing: the base GEMM backwards and the low-rank part of each row's task.

In:   dy [M, N], w [N, K], dh [M, R], the matrices a [E, R, K], the rows grouped by task, dropout.
Out:  dx [M, K].
Who:  the backward op with task ids; with `w=None` (4-bit bases) only the low-rank part, which the op adds.

Programs take consecutive positions of `groups.order`, gather rows of dy and scatter rows of dx. The
low-rank part comes first, because dropout masks it and must not touch dy w; the main loop then adds on top.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alora_kernels.routing import RowGroups

from .config import GROUP_M
from .dropout import Dropout, dropout_keep, dropout_scale
from .expand import gemm_tile
from .gemm import gemm_loop, rank_loop, tile_of
from .launch import launch
from .numerics import acc_dtype, dot_precision, rank_step, tl_dtype
from .segments import first_segment, task_at


@triton.jit
def _dx_task_kernel(
    dy_ptr,
    w_ptr,
    dh_ptr,
    a_ptr,
    dx_ptr,
    ids_ptr,
    order_ptr,
    offsets_ptr,
    seed_ptr,
    p_drop,
    M,
    N,
    K,
    R,
    E,
    stride_dym,
    stride_dyn,
    stride_wn,
    stride_wk,
    stride_dhm,
    stride_dhr,
    stride_ae,
    stride_ar,
    stride_ak,
    stride_dxm,
    HAS_BASE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    # BLOCK_K counts columns of dx, BLOCK_N is the step of the contraction over N
    pid_m, pid_k = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    start = pid_m * BLOCK_M
    end = tl.minimum(start + BLOCK_M, M)
    pos_m = start + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_m, mask_k = pos_m < M, offs_k < K
    row = tl.load(order_ptr + pos_m, mask=mask_m, other=0)
    rows, cols = row.to(tl.int64), offs_k.to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=ACC)
    pos, task = first_segment(start, M, E, ids_ptr, order_ptr, offsets_ptr)
    while (pos < end) & (task < E):
        stop = tl.minimum(end, tl.load(offsets_ptr + task + 1))
        # [BLOCK_M, R] [R, BLOCK_K], rows of this task only
        acc = rank_loop(
            acc, dh_ptr + rows * stride_dhm, (pos_m >= pos) & (pos_m < stop), stride_dhr,
            a_ptr + task.to(tl.int64) * stride_ae + cols * stride_ak, mask_k, stride_ar, R, BLOCK_R, DTYPE, PRECISION,
        )  # fmt: skip
        pos = stop
        task = task_at(pos, M, E, ids_ptr, order_ptr)
    if HAS_DROPOUT:
        keep = dropout_keep(tl.load(seed_ptr), row, pid_k * BLOCK_K, p_drop, BLOCK_K)
        acc = tl.where(keep, acc * dropout_scale(p_drop, ACC), 0.0)
    if HAS_BASE:
        # [BLOCK_M, N] [N, BLOCK_K]
        acc = gemm_loop(
            acc, dy_ptr + rows * stride_dym, stride_dyn, w_ptr + cols * stride_wk, mask_k, stride_wn, N,
            EVEN_K, EVEN_N, BLOCK_N, PRECISION,
        )  # fmt: skip
    dx_ptrs = dx_ptr + rows[:, None] * stride_dxm + cols[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_k[None, :])


def linear_dx_task(
    dy: Tensor | None,
    w: Tensor | None,
    dh: Tensor,
    a: Tensor,
    groups: RowGroups,
    *,
    dtype: torch.dtype,
    dropout: Dropout | None = None,
) -> Tensor:
    """Gradient of x under task routing, in one launch.

    Formula: `dx_m = dy_m w + keep_m (dh_m A_{t(m)}) / (1 - p)`; rows of no task get `dy_m w`.

    Args:
        dy: gradient of y `[M, N]`, any strides; None together with w.
        w: frozen weight `[N, K]`, any strides; None leaves the base part out.
        dh: gradient of the unscaled h `[M, R]`, accumulator dtype.
        a: the matrices A `[E, R, K]`, x's dtype or float32.
        groups: rows grouped by task.
        dtype: of x and dx.
        dropout: the same that forward used.

    Returns:
        dx `[M, K]` in `dtype`.
    """
    (m, r), (e, _, k), n = dh.shape, a.shape, 0 if w is None else w.shape[0]
    dx = torch.empty(m, k, dtype=dtype, device=dh.device)
    tile, block_m = gemm_tile(m, k, n, dh.device, dtype, dropout is not None)
    launch(
        _dx_task_kernel, (triton.cdiv(m, block_m) * triton.cdiv(k, tile.block_n),),
        dy, w, dh, a, dx, groups.ids, groups.order, groups.offsets,
        None if dropout is None else dropout.seed, 0.0 if dropout is None else float(dropout.p),
        m, n, k, r, e, *base_strides(dy, w), *dh.stride(), *a.stride(), dx.stride(0),
        HAS_BASE=w is not None, HAS_DROPOUT=dropout is not None,
        EVEN_N=n % tile.block_k == 0, EVEN_K=k % tile.block_n == 0,
        BLOCK_M=block_m, BLOCK_N=tile.block_k, BLOCK_K=tile.block_n, BLOCK_R=rank_step(r, dtype), GROUP_M=GROUP_M,
        DTYPE=tl_dtype(dtype), PRECISION=dot_precision(dtype), ACC=tl_dtype(acc_dtype(dtype)),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return dx


def base_strides(dy: Tensor | None, w: Tensor | None) -> tuple[int, ...]:
    """Strides of dy and w, or zeros where there is no base part.

    Raises:
        ValueError: only one of the two is None.
    """
    if (dy is None) != (w is None):
        raise ValueError("give both dy and w, or neither")
    return (0, 0, 0, 0) if dy is None or w is None else (*dy.stride(), *w.stride())
