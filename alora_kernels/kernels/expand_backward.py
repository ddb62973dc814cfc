"""Backward of the expand, first step of the backward: dh and db from one pass over dy.

dy is the largest tensor of the backward pass, and both results need all of it. A program keeps one block of columns of
b, walks down a chunk of rows, and writes partial sums: dh of its column block to one plane, db of its row chunk to
another. The planes are summed in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alora_kernels.records import acc_dtype

from .da import sum_partials
from .launch import launch
from .numerics import common, kernel_scaling, power_of_two, rank_block, splits_for
from .tiles import MIN_PROGRAMS, tile_for


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
    n_blocks, m_blocks, r_blocks = triton.cdiv(n, block_n), triton.cdiv(m, block_m), triton.cdiv(r, block_r)
    blocks_per_chunk = triton.cdiv(m_blocks, splits_for(n_blocks * r_blocks, m_blocks, MIN_PROGRAMS))
    chunks = triton.cdiv(m_blocks, blocks_per_chunk)
    dh_planes = torch.empty(n_blocks, m, r, dtype=acc, device=dy.device)
    db_planes = torch.empty(chunks, n, r, dtype=acc, device=dy.device)
    inside, outside = kernel_scaling(scaling, dy.dtype)
    launch(
        _expand_backward_kernel, (chunks, n_blocks, r_blocks),
        dy, b, h, dh_planes, db_planes, inside, m, n, r, blocks_per_chunk * block_m,
        *dy.stride(), *b.stride(), *h.stride(),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=block_r,
        **common(tile, dy.dtype),
    )  # fmt: skip
    dh, db = sum_partials(dh_planes, db_planes, acc, b.dtype)
    return (dh if outside == 1.0 else dh.mul_(outside)), db
