"""The product with the shared B, which knows nothing about routing: `h b^T` with the base GEMM, and its backward.

y is written once, where separate launches would write the base output, read it back and write it again. In the backward
dh and db come from one pass over dy, its largest tensor, as partial sums: dh per block of columns, db per chunk of
rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alora_kernels.records import acc_dtype

from .da import sum_partials
from .gemm import base_product, finish_gemm, operands, rank_loop, tile_of
from .launch import launch
from .numerics import cdiv, common, kernel_scaling, power_of_two, rank_block, rank_step, splits_for, tl_dtype
from .sync import wait_for_predecessor
from .tiles import GROUP_M, MIN_PROGRAMS, tile_for


@triton.jit(do_not_specialize=["M"])
def _expand_kernel(
    x, w, bias_ptr, h_ptr, b_ptr, y,
    M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_hm, stride_hr, stride_bn, stride_br, stride_ym,
    DESCRIPTORS: tl.constexpr, PARTS: tl.constexpr, EVEN_COLS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    # x, w and y are descriptors or pointers
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    rows = tl.where(mask_m, offs_m, 0).to(tl.int64)
    cols = offs_n.to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if PDL:  # h is computed meanwhile
        acc = base_product(
            acc, x, w, row, col, rows, offs_n, mask_n, stride_xm, stride_xk, stride_wk, stride_wn, K,
            True, DESCRIPTORS, EVEN_COLS, EVEN_DEPTH, BLOCK_K, PRECISION,
        )  # fmt: skip
        wait_for_predecessor()
    # [BLOCK_M, R] [R, BLOCK_N]
    acc = rank_loop(
        acc, h_ptr + rows * stride_hm, mask_m, stride_hr, b_ptr + cols * stride_bn, mask_n, stride_br, R,
        BLOCK_R, DTYPE, PRECISION,
    )  # fmt: skip
    finish_gemm(
        y, acc, x, w, bias_ptr, row, col, rows, offs_n, mask_m, mask_n,
        stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, K,
        not PDL, True, DESCRIPTORS, PARTS, EVEN_COLS, EVEN_DEPTH, BLOCK_M, BLOCK_N, BLOCK_K, DTYPE, PRECISION, ACC,
    )  # fmt: skip


def expand(x: Tensor, w: Tensor, bias: Tensor | None, h: Tensor, b: Tensor) -> Tensor:
    """The frozen linear layer plus the expanded low-rank part, in one launch: y `[M, N]` in x's dtype.

    Formula: `y = x w^T + bias + h b^T`.
    """
    (m, k), n, r = x.shape, w.shape[0], b.shape[1]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    base = operands(x, w, y, transposed=True, masks=False)
    tile = base.tile
    launch(
        _expand_kernel, (cdiv(m, base.block_m) * cdiv(n, tile.block_n),),
        base.left, base.right, None if bias is None else bias.contiguous(), h, b, base.out, m, n, k, r,
        *base.strides, *h.stride(), *b.stride(), y.stride(0),
        **base.flags,
        BLOCK_M=base.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        # b comes row by row, R long: next to 256 columns of it 32 ranks at a time spill, 16 do not
        BLOCK_R=rank_step(r, x.dtype, 16 if tile.block_n > 128 else 32), GROUP_M=GROUP_M,
        DTYPE=tl_dtype(x.dtype), **common(tile, x.dtype, x.device),
    )  # fmt: skip
    return y


def plain_gemm(x: Tensor, w: Tensor) -> Tensor:
    """The base product alone, `y = x w^T`, by the same kernel: what its speed over cuBLAS's is measured with."""
    return expand(x, w, None, x.new_empty(x.shape[0], 0), w.new_empty(w.shape[0], 0))


@triton.jit
def _expand_backward_kernel(
    dy_ptr, b_ptr, h_ptr, dh_ptr, db_ptr, scaling,
    M, N, R,
    rows_per_chunk,
    stride_dym, stride_dyn, stride_bn, stride_br, stride_hm, stride_hr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < R
    cols, ranks = offs_n.to(tl.int64), offs_r.to(tl.int64)
    # planes: dh [N blocks, M, R], db [row chunks, N, R], both contiguous
    dh_plane = dh_ptr + pid_n.to(tl.int64) * M * R
    db_plane = db_ptr + pid_m.to(tl.int64) * N * R

    # [BLOCK_N, BLOCK_R]
    mask_b = mask_n[:, None] & mask_r[None, :]
    b = tl.load(b_ptr + cols[:, None] * stride_bn + ranks[None, :] * stride_br, mask=mask_b, other=0.0)
    b = b.to(dy_ptr.dtype.element_ty)
    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=ACC)
    first = pid_m * rows_per_chunk
    last = tl.minimum(first + rows_per_chunk, M)
    for start in range(first, last, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < last
        rows = offs_m.to(tl.int64)
        # [BLOCK_M, BLOCK_N]
        dy_ptrs = dy_ptr + rows[:, None] * stride_dym + cols[None, :] * stride_dyn
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        # [BLOCK_M, BLOCK_R]
        mask_h = mask_m[:, None] & mask_r[None, :]
        h = tl.load(h_ptr + rows[:, None] * stride_hm + ranks[None, :] * stride_hr, mask=mask_h, other=0.0)
        dh = tl.dot(dy, b, input_precision=PRECISION, out_dtype=ACC)
        db = tl.dot(tl.trans(dy), h.to(dy.dtype), db, input_precision=PRECISION, out_dtype=db.dtype)
        tl.store(dh_plane + rows[:, None] * R + ranks[None, :], dh * tl.cast(scaling, ACC), mask=mask_h)
    tl.store(db_plane + cols[:, None] * R + ranks[None, :], db, mask=mask_b)


def expand_backward(dy: Tensor, b: Tensor, h: Tensor, *, scaling: float) -> tuple[Tensor, Tensor]:
    """Gradients of `h b^T`: dh `[M, R]` of the unscaled h in the accumulator dtype, db `[N, R]` in b's dtype.

    Formula: `dh = s dy b`, `db = dy^T h` (h carries s already).
    """
    (m, n), r, acc = dy.shape, b.shape[1], acc_dtype(dy.dtype)
    if m == 0:
        return torch.zeros(0, r, dtype=acc, device=dy.device), torch.zeros_like(b)
    tile, block_r = tile_for("expand_backward", dy.device, dy.dtype), rank_block(r, dy.dtype)
    block_m, block_n = power_of_two(m, 16, tile.block_m), power_of_two(n, 16, tile.block_n)
    n_blocks, m_blocks, r_blocks = cdiv(n, block_n), cdiv(m, block_m), cdiv(r, block_r)
    blocks_per_chunk = cdiv(m_blocks, splits_for(n_blocks * r_blocks, m_blocks, MIN_PROGRAMS))
    chunks = cdiv(m_blocks, blocks_per_chunk)
    dh_planes = torch.empty(n_blocks, m, r, dtype=acc, device=dy.device)
    db_planes = torch.empty(chunks, n, r, dtype=acc, device=dy.device)
    inside, outside = kernel_scaling(scaling, dy.dtype)
    launch(
        _expand_backward_kernel, (chunks, n_blocks, r_blocks),
        dy, b, h, dh_planes, db_planes, inside, m, n, r, blocks_per_chunk * block_m,
        *dy.stride(), *b.stride(), *h.stride(),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=block_r,
        **common(tile, dy.dtype, dy.device),
    )  # fmt: skip
    dh, db = sum_partials(dh_planes, db_planes, acc, b.dtype)
    return (dh if outside == 1.0 else dh.mul_(outside)), db
