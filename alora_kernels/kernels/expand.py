"""Forward of the layer, second half, after a shrink: the base GEMM with the low-rank product as its last K-step.

h is routed already and B is shared by all experts, so nothing here knows about routing. y is written once, where
separate launches would write the base output, read it back and write it again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import finish_gemm, operands, rank_loop, tile_of
from .launch import launch
from .numerics import common, rank_step, tl_dtype
from .tiles import GROUP_M


@triton.jit
def _expand_kernel(
    x, w, bias_ptr, h_ptr, b_ptr, y,
    M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_hm, stride_hr, stride_bn, stride_br, stride_ym,
    DESCRIPTORS: tl.constexpr, PARTS: tl.constexpr, EVEN_COLS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # x, w and y are descriptors or pointers
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    rows = tl.where(mask_m, offs_m, 0).to(tl.int64)
    cols = offs_n.to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    # [BLOCK_M, R] [R, BLOCK_N]
    acc = rank_loop(
        acc, h_ptr + rows * stride_hm, mask_m, stride_hr, b_ptr + cols * stride_bn, mask_n, stride_br, R,
        BLOCK_R, DTYPE, PRECISION,
    )  # fmt: skip
    finish_gemm(
        y, acc, x, w, bias_ptr, row, col, rows, offs_n, mask_m, mask_n,
        stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, K,
        True, True, DESCRIPTORS, PARTS, EVEN_COLS, EVEN_DEPTH, BLOCK_M, BLOCK_N, BLOCK_K, DTYPE, PRECISION, ACC,
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
        _expand_kernel, (triton.cdiv(m, base.block_m) * triton.cdiv(n, tile.block_n),),
        base.left, base.right, None if bias is None else bias.contiguous(), h, b, base.out, m, n, k, r,
        *base.strides, *h.stride(), *b.stride(), y.stride(0),
        **base.flags,
        BLOCK_M=base.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        # b comes row by row, R long: next to 256 columns of it 32 ranks at a time spill, 16 do not
        BLOCK_R=rank_step(r, x.dtype, 16 if tile.block_n > 128 else 32), GROUP_M=GROUP_M,
        DTYPE=tl_dtype(x.dtype), **common(tile, x.dtype),
    )  # fmt: skip
    return y


def plain_gemm(x: Tensor, w: Tensor) -> Tensor:
    """The base product alone, `y = x w^T`, by the same kernel: what its speed over cuBLAS's is measured with."""
    return expand(x, w, None, x.new_empty(x.shape[0], 0), w.new_empty(w.shape[0], 0))
