"""The two inner loops that forward and dx share: the base GEMM, and the low-rank step next to it.

In:   pointers to the first element of each row of the left factor and each column of the right one.
Out:  the accumulator with the product added.
Who:  `linear_expand` (loops over K, then over R) and the two dx kernels (over R, then over N).

`out = in @ W + low rank` is one idea in two orientations: only strides differ. Rows are not masked (the
caller clamps their numbers), columns and the contraction are, unless the tile divides them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """Tile coordinates of a program: columns of GROUP_M row blocks, so that neighbours share weights in L2."""
    width = GROUP_M * num_n
    first_m = (pid // width) * GROUP_M
    size = tl.minimum(num_m - first_m, GROUP_M)
    return first_m + (pid % width) % size, (pid % width) // size


@triton.jit
def gemm_loop(
    acc,
    in_rows,
    stride_ik,
    w_cols,
    mask_n,
    stride_wk,
    K,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_N] += in [BLOCK_M, K] w [K, BLOCK_N]."""
    offs_k = tl.arange(0, BLOCK_K)
    in_ptrs = in_rows[:, None] + offs_k.to(tl.int64)[None, :] * stride_ik
    w_ptrs = w_cols[None, :] + offs_k.to(tl.int64)[:, None] * stride_wk
    step = tl.full((), BLOCK_K, tl.int64)
    for k in range(0, K, BLOCK_K):
        # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
        if EVEN_K:
            left = tl.load(in_ptrs)
        else:
            left = tl.load(in_ptrs, mask=(offs_k < K - k)[None, :], other=0.0)
        if EVEN_K and EVEN_N:
            right = tl.load(w_ptrs)
        else:
            right = tl.load(w_ptrs, mask=(offs_k < K - k)[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=acc.dtype)
        in_ptrs += step * stride_ik
        w_ptrs += step * stride_wk
    return acc


@triton.jit
def rank_loop(
    acc,
    in_rows,
    mask_m,
    stride_ir,
    w_cols,
    mask_n,
    stride_wr,
    R,
    BLOCK_R: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_N] += in [BLOCK_M, R] w [R, BLOCK_N], both rounded to DTYPE; masked rows add zero."""
    # One stage: the loop turns once to four times; pipelined, float32 adapters next to 128x256 spill 96 bytes.
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        # [BLOCK_M, BLOCK_R], [BLOCK_R, BLOCK_N]
        in_ptrs = in_rows[:, None] + offs_r.to(tl.int64)[None, :] * stride_ir
        w_ptrs = w_cols[None, :] + offs_r.to(tl.int64)[:, None] * stride_wr
        left = tl.load(in_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0).to(DTYPE)
        right = tl.load(w_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0).to(DTYPE)
        acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc
