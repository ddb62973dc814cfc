"""Dropout without a stored mask: entry (m, k) of x is kept or not by a counter-based generator.

Every kernel asks `dropout_keep` for the mask of its tile, so forward and backward agree: lane k % 4 of philox at the
counters (k // 4, m), two 32-bit words, where m is the original row number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alora_kernels.records import Dropout, acc_dtype

from .launch import launch
from .numerics import cdiv, tl_dtype


@triton.jit
def dropout_keep(seed, rows, col0, p, BLOCK: tl.constexpr):
    """Which entries of rows `rows` and columns `col0 .. col0 + BLOCK` are kept; col0 is a multiple of 4."""
    # [1, BLOCK / 4], [BLOCK_M, 1]
    quads = (col0 // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)[None, :]
    r0, r1, r2, r3 = tl.philox(seed, quads, rows.to(tl.uint32)[:, None], quads * 0, quads * 0)
    k0 = tl.uint_to_uniform_float(r0) >= p
    k1 = tl.uint_to_uniform_float(r1) >= p
    k2 = tl.uint_to_uniform_float(r2) >= p
    k3 = tl.uint_to_uniform_float(r3) >= p
    # [BLOCK_M, BLOCK / 4, 2, 2] -> [BLOCK_M, BLOCK]: the last two axes count the lane
    keep = tl.join(tl.join(k0, k2), tl.join(k1, k3))
    return tl.reshape(keep, [rows.shape[0], BLOCK])


def seed_and_p(dropout: Dropout | None) -> tuple[Tensor | None, float]:
    """How every kernel takes dropout: the pointer to the seed and p."""
    return (None, 0.0) if dropout is None else (dropout.seed, float(dropout.p))


@triton.jit
def dropout_scale(p, ACC: tl.constexpr):
    """What kept values are multiplied by: 1 / (1 - p); 1 for p = 1, where nothing is kept."""
    rest = 1.0 - tl.cast(p, ACC)
    return 1.0 / tl.where(rest > 0.0, rest, 1.0)


@triton.jit(do_not_specialize=["M"])
def _dropout_mask_kernel(mask_ptr, seed_ptr, p, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col0 = tl.program_id(1) * BLOCK_K
    offs_k = col0 + tl.arange(0, BLOCK_K)
    # [BLOCK_M, BLOCK_K]
    keep = dropout_keep(tl.load(seed_ptr), offs_m, col0, p, BLOCK_K)
    value = tl.where(keep, dropout_scale(p, ACC), 0.0)
    ptrs = mask_ptr + offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(ptrs, value.to(mask_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_k < K)[None, :])


def dropout_mask(rows: int, cols: int, dropout: Dropout, *, dtype: torch.dtype) -> Tensor:
    """The mask that kernels apply to x, `[rows, cols]`, as a tensor for tests: `mask[m, k] = keep(m, k) / (1 - p)`."""
    mask = torch.empty(rows, cols, dtype=dtype, device=dropout.seed.device)
    grid = (cdiv(rows, 32), cdiv(cols, 64))
    args = (mask, dropout.seed, float(dropout.p), rows, cols)
    launch(_dropout_mask_kernel, grid, *args, BLOCK_M=32, BLOCK_K=64, ACC=tl_dtype(acc_dtype(dtype)))
    return mask
