"""Tensor descriptors: tiles of a matrix fetched and stored by the copy engine (TMA) of Hopper and later chips.

In:   a matrix whose rows are 16-byte aligned and contiguous, the shape of a tile.
Out:  a host-side descriptor for a kernel argument; the GEMM loop that reads through two of them.
Who:  the launchers of the kernels that have a descriptor variant.

A descriptor needs no address arithmetic and no masks: what lies outside the matrix is read as zero and never
written. Earlier chips have no copy engine; there Triton turns a descriptor into masked loads that are not pipelined
(the compiler spills 640 bytes a thread on sm_80), so those chips use pointers.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiles import has_copy_engine


def describable(*matrices: Tensor) -> bool:
    """Whether every matrix can be reached through a descriptor on its device."""
    return has_copy_engine(matrices[0].device) and all(
        t.dim() == 2
        and t.stride(1) == 1
        and t.stride(0) * t.element_size() % 16 == 0
        and t.stride(0) >= t.shape[1]
        and (t.device.type == "meta" or t.data_ptr() % 16 == 0)
        for t in matrices
    )


def describe(matrix: Tensor, tile: Sequence[int]) -> TensorDescriptor:
    """A descriptor of the matrix in tiles of this shape."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(tile))


@triton.jit
def descriptor_loop(
    acc,
    left,
    right,
    row,
    col,
    LENGTH,
    BLOCK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_N] += left [rows, LENGTH] right, right [LENGTH, cols] or, TRANSPOSED, [cols, LENGTH]."""
    for k in range(0, LENGTH, BLOCK):
        # [BLOCK_M, BLOCK]
        l_tile = left.load([row, k])
        if TRANSPOSED:
            r_tile = right.load([col, k]).T
        else:
            r_tile = right.load([k, col])
        acc = tl.dot(l_tile, r_tile.to(l_tile.dtype), acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def store_tile(y, row, col, acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """Store acc [BLOCK_M, BLOCK_N] through a descriptor of tiles [BLOCK_M, BLOCK_N / PARTS].

    In two parts it needs half the shared memory, which buys a stage of the pipeline.
    """
    if PARTS == 2:
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        y.store([row, col], left.to(y.dtype))
        y.store([row, col + BLOCK_N // 2], right.to(y.dtype))
    else:
        y.store([row, col], acc.to(y.dtype))
