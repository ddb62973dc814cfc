"""Forward of the layer, second half: the base GEMM with the low-rank product as its last K-step.

In:   x [M, K], w [N, K], bias [N], the scaled and already routed h [M, R], the shared b [N, R].
Out:  y [M, N] in x's dtype.
Who:  the forward op, after a shrink; with 4-bit bases the op adds h b^T to the base's own output instead.

B is shared by all experts, so nothing here knows about routing. y is written once, where separate
launches would write the base output, read it back and write it again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import GROUP_M, Tile, tile_for
from .gemm import gemm_loop, rank_loop, tile_of
from .launch import launch
from .numerics import acc_dtype, dot_precision, power_of_two, rank_step, tl_dtype


@triton.jit
def _expand_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    h_ptr,
    b_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_hm,
    stride_hr,
    stride_bn,
    stride_br,
    stride_ym,
    HAS_BIAS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    rows = tl.where(mask_m, offs_m, 0).to(tl.int64)
    cols = offs_n.to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    # [BLOCK_M, R] [R, BLOCK_N]
    acc = rank_loop(
        acc, h_ptr + rows * stride_hm, mask_m, stride_hr, b_ptr + cols * stride_bn, mask_n, stride_br, R,
        BLOCK_R, x_ptr.dtype.element_ty, PRECISION,
    )  # fmt: skip
    # [BLOCK_M, K] [K, BLOCK_N]
    acc = gemm_loop(
        acc, x_ptr + rows * stride_xm, stride_xk, w_ptr + cols * stride_wn, mask_n, stride_wk, K,
        EVEN_N, EVEN_K, BLOCK_K, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        # [BLOCK_N]
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
    y_ptrs = y_ptr + rows[:, None] * stride_ym + cols[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def gemm_tile(
    rows: int, cols: int, depth: int, device: torch.device, dtype: torch.dtype, dropout: bool = False
) -> tuple[Tile, int]:
    """The tile of the base GEMM, and its rows: fewer than the tile's when the batch is small.

    Args:
        rows: M.
        cols: columns of the result.
        depth: length of the contraction.
        device: where the tensors are.
        dtype: element type of the product.
        dropout: the kernel also draws a mask.
    """
    small = tile_for("gemm_small", device, dtype)
    if rows <= small.block_m:
        return small, power_of_two(rows, 16, small.block_m)
    tile = tile_for("gemm", device, dtype)
    if cols % 16 or depth % 16:  # rows that are not aligned are loaded element by element: many addresses
        tile = tile_for("gemm_ragged", device, dtype)
    elif dropout or cols % tile.block_n or depth % tile.block_k:  # masks and philox need registers
        tile = tile_for("gemm_narrow", device, dtype)
    return tile, tile.block_m


def linear_expand(x: Tensor, w: Tensor, bias: Tensor | None, h: Tensor, b: Tensor) -> Tensor:
    """The frozen linear layer plus the expanded low-rank part, in one launch.

    Formula: `y = x w^T + bias + h b^T`.

    Args:
        x: activations `[M, K]`, any strides.
        w: frozen weight `[N, K]` in x's dtype, any strides.
        bias: `[N]`, or None.
        h: scaled low-rank activations `[M, R]`.
        b: shared B `[N, R]`, x's dtype or float32.

    Returns:
        y `[M, N]` in x's dtype.
    """
    (m, k), n, r = x.shape, w.shape[0], b.shape[1]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    tile, block_m = gemm_tile(m, n, k, x.device, x.dtype)
    launch(
        _expand_kernel, (triton.cdiv(m, block_m) * triton.cdiv(n, tile.block_n),),
        x, w, None if bias is None else bias.contiguous(), h, b, y, m, n, k, r,
        *x.stride(), *w.stride(), *h.stride(), *b.stride(), y.stride(0),
        HAS_BIAS=bias is not None, EVEN_N=n % tile.block_n == 0, EVEN_K=k % tile.block_k == 0,
        BLOCK_M=block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        # b comes row by row, R long: next to 256 columns of it 32 ranks at a time spill, 16 do not
        BLOCK_R=rank_step(r, x.dtype, 16 if tile.block_n > 128 else 32), GROUP_M=GROUP_M,
        PRECISION=dot_precision(x.dtype), ACC=tl_dtype(acc_dtype(x.dtype)),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y
